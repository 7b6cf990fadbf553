"""Official checkpoints of models that transformers lacks, brought into the Hugging Face layout: `zipeval convert`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ConvNextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaProcessor,
)

from zipeval.checkpoints.prompts import VICUNA_V1
from zipeval.errors import UsageError
from zipeval.models import mini_gemini as family
from zipeval.models._mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
)

SHARD = "5GB"
DECODERS = {
    "mgm": LlamaConfig,
    "mini_gemini": LlamaConfig,
    "mgm_gemma": GemmaConfig,
    "mini_gemini_gemma": GemmaConfig,
}
KNOWN = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
}
CLIP, CONVNEXT = (
    "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower_aux.vision_",
)
TOWERS = {
    "vision_tower": ("vision_model", CLIP),
    "vision_tower_aux": (r"visual\.trunk", CONVNEXT),
}
NAMES = {  # beginnings of our names and of official ones
    "model.vision_tower.": CLIP,
    "model.vision_tower_aux.embeddings.patch_embeddings.": f"{CONVNEXT}stem.0.",
    "model.vision_tower_aux.embeddings.layernorm.": f"{CONVNEXT}stem.1.",
    "model.vision_tower_aux.encoder.stages.": f"{CONVNEXT}stages.",
    "model.patch_info_mining.query.": "model.vlm_uni_query_projector.",
    "model.patch_info_mining.key.": "model.vlm_uni_aux_projector.",
    "model.patch_info_mining.value.": "model.vlm_uni_val_projector.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
STAGE = {  # the parts of a ConvNeXt's stage, as transformers and as timm call them
    "downsampling_layer": "downsample",
    "layers": "blocks",
    "dwconv": "conv_dw",
    "layernorm": "norm",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
    "layer_scale_parameter": "gamma",
}
UNUSED = re.compile(  # computed anew; CLIP's text tower; the head and the text tower of open_clip's ConvNeXt
    r".*\.rotary_emb\.inv_freq|.*\.position_ids"
    r"|(text_model|text_projection|visual_projection|logit_scale)\b.*"
    r"|model\.vision_tower_aux\.vision_head\..*|visual\.head\..*"
    r"|(text|transformer|token_embedding|positional_embedding|ln_final)\b.*"
)
GEMMA = (  # conv_gemma
    "{% for message in messages %}<start_of_turn>{{ {'user': 'user', 'assistant': 'model'}[message.role] }}\n"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<' + part.type + '>\n' }}{% endfor %}"
    "<end_of_turn>\n{{ '<eos>' if message.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: list[int]

    def read(self) -> torch.Tensor:
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(self.name)


def mini_gemini(source: Path, target: Path, **towers: Path) -> str:
    """Write the Mini-Gemini checkpoint in `source` (YanweiLi/MGM-*) to the new directory `target`, shard by shard.

    Args:
        towers: directories of those that `source` leaves out because they were frozen, with safetensors: `vision_tower`
            is OpenAI's CLIP in the Hugging Face layout, `vision_tower_aux` open_clip's ConvNeXt.

    Returns:
        the `model=` to run it with.

    Raises:
        UsageError: for a source that is not such a checkpoint or is not complete; nothing is left of the target.
    """
    if target.exists():
        raise UsageError(f"{target} exists. Name a new directory, or move it away.")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such directory. Make it first.")
    raw = _settings(source)
    stored = _tensors(source, raw, towers)
    config = _config(source, raw, stored)
    with torch.device("meta"):
        expected = MiniGeminiForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        stored.pop("lm_head.weight", None)
    _check(source, stored, expected)
    processor = _processor(source, config)
    tokenizer = processor.tokenizer
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer))
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        unfinished = Path(beside, target.name)
        config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        file = (
            unfinished / "tokenizer_config.json"
        )  # `legacy` (see _processor) is a setting that transformers does not save
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"legacy": True}, indent=2)
        )
        special = {
            f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id")
            for kind in ("bos", "eos", "pad")
        }
        GenerationConfig(**special).save_pretrained(unfinished)
        _write(stored, expected, config.text_config.vocab_size, unfinished)
        unfinished.rename(target)
    return _model(config)


def _model(config: MiniGeminiConfig) -> str:
    """The configuration that asks a checkpoint as it was trained: not every one has a Vicuna decoder."""
    if isinstance(config.text_config, GemmaConfig):
        return "mini_gemini_2b"
    if config.image_grid > 1:
        return "mini_gemini_hd"
    return (
        "mini_gemini_13b"
        if config.text_config.num_hidden_layers == 40
        else "mini_gemini"
    )


def official(name: str) -> str:
    """Return what a tensor of ours is called in official checkpoints."""
    ours, theirs = next(pair for pair in NAMES.items() if name.startswith(pair[0]))
    rest = name.removeprefix(ours)
    if theirs == f"{CONVNEXT}stages.":
        rest = ".".join(STAGE.get(part, part) for part in rest.split("."))
    return theirs + rest


def _settings(source: Path) -> dict:
    """The official config.json."""
    try:
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{source}: its config.json cannot be read ({error}). Give a copy of YanweiLi/MGM-7B."
        ) from error
    if kind not in DECODERS or "image_size_aux" not in raw or "aux_config" in raw:
        raise UsageError(
            f"{source} holds a {kind!r} checkpoint that is not an official one of Mini-Gemini "
            f"({', '.join(DECODERS)}). If it is in the Hugging Face layout, use it with model.path={source}."
        )
    for name in ("image_size_aux", "image_grid"):
        if not isinstance(raw.get(name, 1), int):
            raise UsageError(
                f"{source}: its config.json says {name}={raw[name]!r}, which is no whole number."
            )
    for name, value in {**KNOWN, "image_global": raw.get("image_grid", 1) > 1}.items():
        if raw.get(name, value) != value:
            raise UsageError(
                f"{source}: its config.json says {name}={raw[name]!r}, and only {value!r} is known."
            )
    return raw


def _tensors(source: Path, raw: dict, towers: dict[str, Path]) -> dict[str, Stored]:
    """All that are there, by their official names."""
    stored = _stored(source)
    for tower, (theirs, ours) in TOWERS.items():
        present, directory = (
            any(name.startswith(ours) for name in stored),
            towers.get(tower),
        )
        if present and directory:
            raise UsageError(
                f"{tower}={directory}: {source} has its own. Leave {tower}= out."
            )
        if directory:
            stored |= {
                re.sub(rf"^{theirs}\.", ours, name): tensor
                for name, tensor in _stored(directory).items()
            }
        elif not present:
            original = raw.get(f"mm_{tower}")
            raise UsageError(
                f"{source} is without {original}, as it was not trained. Fetch it too: {tower}=DIR."
            )
    return {
        name: tensor for name, tensor in stored.items() if not UNUSED.fullmatch(name)
    }


def _stored(directory: Path) -> dict[str, Stored]:
    """Return what the safetensors files of a directory hold."""
    stored = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                stored |= {
                    name: Stored(file, name, tensors.get_slice(name).get_shape())
                    for name in list(tensors.keys())
                }
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} is damaged: {error}. Fetch it again.") from error
    pickled = next(directory.glob("*.bin"), None)
    if not stored and pickled:
        raise UsageError(
            f"{pickled} is pickled, and loading it could run what is in it. To turn it into safetensors without that: "
            f'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in torch.load('
            f"'{pickled}', weights_only=True).items()}}, '{pickled.with_suffix('.safetensors')}')\""
        )
    if not stored:
        raise UsageError(
            f"{directory}: no *.safetensors there. Give a directory with weights."
        )
    return stored


def _config(source: Path, raw: dict, stored: dict[str, Stored]) -> MiniGeminiConfig:
    """Return a configuration of what the official config.json says, and of the towers' shapes."""

    def count(beginning: str) -> int:
        return len(
            {
                name.removeprefix(beginning).partition(".")[0]
                for name in stored
                if name.startswith(beginning)
            }
        )

    text = DECODERS[raw["model_type"]]
    known = {field.name for field in fields(text)} - {"architectures"} | {
        "rope_theta",
        "rope_scaling",
    }
    stages = [
        f"{CONVNEXT}stages.{stage}.blocks."
        for stage in range(count(f"{CONVNEXT}stages."))
    ]
    try:
        width, _, patch, _ = stored[f"{CLIP}embeddings.patch_embedding.weight"].shape
        config = MiniGeminiConfig(
            text_config=text(**{k: v for k, v in raw.items() if k in known}),
            vision_config=CLIPVisionConfig(
                hidden_size=width,
                patch_size=patch,
                image_size=patch
                * isqrt(
                    stored[f"{CLIP}embeddings.position_embedding.weight"].shape[0] - 1
                ),
                intermediate_size=stored[
                    f"{CLIP}encoder.layers.0.mlp.fc1.weight"
                ].shape[0],
                num_hidden_layers=count(f"{CLIP}encoder.layers."),
                num_attention_heads=width // 64,  # as in all of OpenAI's
            ),
            aux_config=ConvNextConfig(
                depths=[count(stage) for stage in stages],
                hidden_sizes=[stored[f"{stage}0.gamma"].shape[0] for stage in stages],
                num_stages=len(stages),
            ),
            image_size_aux=raw["image_size_aux"],
            image_grid=raw.get("image_grid", 1),
            vision_feature_layer=raw.get("mm_vision_select_layer", -2),
            dtype=raw.get("torch_dtype"),
            architectures=[MiniGeminiForConditionalGeneration.__name__],
        )
    except KeyError as error:
        raise UsageError(
            f"{source}: 1 tensor or more is missing ({error.args[0]}). Fetch it again."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{source}: its config.json is not one of Mini-Gemini ({error}). Fetch it again."
        ) from error
    config.image_seq_length = family.visual_tokens(config.to_dict())
    return config


def _check(
    source: Path, stored: dict[str, Stored], expected: dict[str, torch.Tensor]
) -> None:
    """Raises UsageError unless every tensor of the model is there in its shape, and no other."""
    shapes = {official(name): list(tensor.shape) for name, tensor in expected.items()}
    problems = {
        "missing": shapes.keys() - stored.keys(),
        "unexpected": stored.keys() - shapes.keys(),
        "of another shape": {
            n for n in shapes.keys() & stored.keys() if shapes[n] != stored[n].shape
        },
    }
    complaints = [
        f"{len(names)} {problem} ({', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if complaints:
        raise UsageError(
            f"{source}: of its tensors and its towers', {'; '.join(complaints)}. Fetch them again."
        )


def _processor(source: Path, config: MiniGeminiConfig) -> LlavaProcessor:
    """Return the processor, whose tokenizer has an `<image>` token.

    Official code encodes the text behind an image apart, so that Llama's tokenizer puts a space before it; `legacy`
    makes it do so behind every special token. Gemma's does not know it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config.text_config, local_files_only=True, legacy=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"{source}: its tokenizer cannot be loaded ({reason}). Put a tokenizer.json and its "
            "tokenizer_config.json there: of llava-hf/llava-1.5-7b-hf for Vicuna, of google/gemma-2b-it for Gemma."
        ) from error
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = (
        tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    )
    size = config.image_size_aux
    images = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    template = GEMMA if isinstance(config.text_config, GemmaConfig) else VICUNA_V1
    return LlavaProcessor(
        images,
        tokenizer,
        chat_template=template,
        **family.placeholders(config.to_dict()),
    )


def _write(
    stored: dict[str, Stored],
    expected: dict[str, torch.Tensor],
    rows: int,
    directory: Path,
) -> None:
    """Shards, of which one at a time is in memory; embeddings are grown to so many rows."""
    plan = split_torch_state_dict_into_shards(expected, max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: stored[official(name)].read() for name in names}
        for name in shard.keys() & {
            "model.language_model.embed_tokens.weight",
            "lm_head.weight",
        }:
            # The mean of the others: its logit is never the highest.
            mean = shard[name].float().mean(0).to(shard[name].dtype)
            shard[name] = torch.cat(
                [shard[name], mean.expand(rows - len(shard[name]), -1)]
            )
        save_file(shard, directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2)
        )
