"""A model that its user loaded, in place of a checkpoint on disk. Imports torch in functions only."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from zipeval import models
from zipeval.config.schema import ModelConfig
from zipeval.errors import UsageError
from zipeval.models import Checkpoint
from zipeval.utils import content_hash

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "zipeval",
)  # whose code is in records, by version
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
NAME = re.compile(r"\w[\w.-]*")
# Of a configuration, what no answer depends on: where it came from, and which release wrote it.
ABOUT = ("_name_or_path", "transformers_version", "name_or_path")


def describe(
    model, processor, name: str | None = None
) -> tuple[ModelConfig, Checkpoint]:
    """Return what a run has to know of a model and a processor that are loaded.

    Args:
        model: a Hugging Face model of a supported family, in evaluation mode.
        name: of the model in tables; without one, the last part of the name that it was loaded by.

    Raises:
        UsageError: for what cannot be evaluated.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = _family(kind)
    _check(model, processor)
    settings = model.config.to_dict()
    name = name or Path(model.config.name_or_path).name or kind
    if not NAME.fullmatch(name):
        raise UsageError(
            f"name={name}: it names folders of records. Use letters, digits, '-', '_' and '.', such as name=mine."
        )
    config = ModelConfig(
        name=name,
        family=kind,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        attn_implementation=model.config._attn_implementation,
        image_aspect=family.aspects[0],
    )
    # Prompts of a batch end together; the user's own processor stays as it is.
    processor = copy.deepcopy(processor)
    processor.tokenizer.padding_side = "left"
    checkpoint = Checkpoint(
        path=Path(name),
        revision=None,
        visual_tokens=family.visual_tokens(settings),
        layers=family.decoder_layers(settings),
        grids=family.grids(settings),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantizable=0,
        without_file=fingerprint(model, processor),
        loaded=(model, processor),
    )
    return config, checkpoint


def _family(kind: str):
    """Return the declaration of a family.

    Raises:
        UsageError: for a model of no family that is supported.
    """
    try:
        return models.family(ModelConfig(family=kind))
    except UsageError:
        raise UsageError(
            f"model: {kind} is of no family that is supported. `zipeval list models` shows them."
        ) from None


def _check(model, processor) -> None:
    """Raise UsageError for a model or a processor that would give other answers than its user expects."""
    if processor is None:
        raise UsageError(
            "processor: a model that is loaded needs its processor. Add processor=AutoProcessor...."
        )
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            kind = type(processor).__name__
            raise UsageError(
                f"processor: {kind} has no {part}. Give the whole one, as AutoProcessor loads it."
            )
    if model.training:
        raise UsageError(
            "model: it is in training mode, in which dropout changes answers. Call model.eval() first."
        )
    _check_code(model)
    if (
        getattr(model, "is_quantized", False)
        or len(set(getattr(model, "hf_device_map", {}).values())) > 1
    ):
        raise UsageError(
            "model: it is quantised or lies on several devices. Give its name or model.path instead, with "
            "model.quantization= or model.device_map=."
        )


def _check_code(model) -> None:
    """Refuse a model that computes with code of its user's: a fingerprint of weights does not tell of it.

    Raises:
        UsageError: names the module, and what to do.
    """
    for name, module in model.named_modules():
        # What runs when the module is called: its class, its forward, and hooks around that.
        code = {"class": type(module), "forward": getattr(module, "forward", None)}
        for hooks in HOOKS:
            code |= {
                f"hook {number}": hook
                for number, hook in vars(module).get(hooks, {}).items()
            }
        for what, part in code.items():
            package = str(getattr(part, "__module__", None)).partition(".")[0]
            if package not in LIBRARIES:
                raise UsageError(
                    f"model: {name or type(module).__name__} has a {what.split()[0]} of {package}, of which no "
                    "fingerprint tells. Remove it; docs/adding-a-method.md says how a method changes a model."
                )


def fingerprint(model, processor) -> str:
    """Return a hash of everything in a model and its processor that can change an answer.

    In it are the names, types and all bytes of parameters and buffers, the configurations of model, generation and
    image processor, the tokenizer and the chat template. It is another one than that of the same checkpoint on disk.
    """
    import xxhash

    digests = {}
    for name, tensor in sorted(_tensors(model).items()):
        hasher = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        hasher.update(_bytes(tensor))
        digests[f"tensor {name}"] = hasher.hexdigest()
    texts = {
        "model": _text(model.config.to_dict()),
        "generation": _text(model.generation_config.to_dict()),
        "pictures": _text(processor.image_processor.to_dict()),
        "tokenizer": _tokenizer_text(processor.tokenizer),
        "template": str(getattr(processor, "chat_template", None)),
    }
    for name, text in texts.items():
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return f"loaded-{content_hash.combined(digests)[:16]}"


def _tensors(model) -> dict[str, Any]:
    """Return parameters and buffers by their names, also the buffers that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _bytes(tensor) -> memoryview:
    """Return the content of a tensor."""
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def _tokenizer_text(tokenizer) -> str:
    """Return all that a tokenizer does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else _text(tokenizer.get_vocab())
    return content + _text(
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    )


def _text(settings: dict[str, Any]) -> str:
    settings = {name: value for name, value in settings.items() if name not in ABOUT}
    return json.dumps(settings, sort_keys=True, default=str)
