"""The resolved configuration of a run: its schema, its checks, its identity. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any

from omegaconf import MISSING

from zipeval.budget import BUDGETS
from zipeval.errors import UsageError


@dataclass
class ModelConfig:
    """Which weights, and how they are loaded.

    Attributes:
        name: as on the command line and in tables.
        family: the file below zipeval/models/ that knows this architecture.
        hub: Hugging Face id; `revision` pins a commit of it.
        embedded: folder below zipeval/embedded/ for checkpoints that ship with the package.
        path: a local directory in the Hugging Face layout, used instead of either.
        dtype: auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16 or float16.
        device: auto, cpu, cuda or cuda:N.
        attn_implementation: auto (FlashAttention 2 on CUDA where installed, else SDPA), sdpa, eager, flash_attention_2.
        prompt: hf (the checkpoint's chat template) or vicuna_v1 (LLaVA's, with the system prompt; for Vicuna decoders).
        image_aspect: pad (to a square, with the mean colour, as LLaVA does) or crop (to the middle square, as
            transformers does); anyres for models that cut an image in tiles, and only for them.
        quantization: none, or 8bit or 4bit (NF4) for the language model's layers, by bitsandbytes.
        device_map: null, or auto to spread the layers over all GPUs.
    """

    name: str = MISSING
    family: str = MISSING
    hub: str | None = None
    revision: str | None = None
    embedded: str | None = None
    path: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "auto"
    prompt: str = "hf"
    image_aspect: str = "pad"
    quantization: str = "none"
    device_map: str | None = None


@dataclass
class DataConfig:
    """Where data sets are read from.

    Attributes:
        root: directory of local copies, ORGANISATION/NAME in the hub's layout, read in place of the hub's.
    """

    root: str | None = None


@dataclass
class RunConfig:
    """One run: a model under a method on some tasks.

    Attributes:
        model: see ModelConfig.
        method: `name`, `_target_` (the class) and that class's options, `tokens` among them if it has a budget.
        tokens: visual tokens that an image is left with.
        budget: what `tokens` counts in methods that act inside the language model: see zipeval/budget.py.
        packing: how a method before the language model packs LLaVA-NeXT's tiles: published (VisionZip's, without row
            ends) or newline (with them).
        tasks: lmms-eval task names.
        data: see DataConfig.
        limit: samples of each task, all by default.
        batch_size: prompts in one generate call.
        seed: of everything random.
        results: directory below which every run gets its own.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    tokens: int | None = None
    budget: str = "paper"
    packing: str = "published"
    tasks: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    results: str = "results/runs"


PACKINGS = ("published", "newline")
CHOICES = {
    "budget": BUDGETS,
    "packing": PACKINGS,
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.attn_implementation": ("auto", "sdpa", "eager", "flash_attention_2"),
    "model.prompt": ("hf", "vicuna_v1"),
    "model.image_aspect": ("pad", "crop", "anyres"),
    "model.quantization": ("none", "8bit", "4bit"),
    "model.device_map": (None, "auto"),
}


def check(config: RunConfig) -> RunConfig:
    """Refuse what can be refused without looking at a checkpoint; returns the config in its normal form.

    Raises:
        UsageError: for a value out of range.
    """
    for name in ("tokens", "limit", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: expected a whole number from 1 up, such as {name}=16.")
    for name, choices in CHOICES.items():
        value = reduce(getattr, name.split("."), config)
        if value not in choices:
            raise UsageError(f"{name}={value}: expected one of {', '.join(c or 'null' for c in choices)}.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.model.device):
        raise UsageError(f"model.device={config.model.device}: expected auto, cpu, cuda or cuda:N.")
    if config.model.device_map and config.model.device != "auto":
        raise UsageError(
            f"model.device={config.model.device}: model.device_map=auto takes all GPUs. Set one of the two."
        )
    if not 0 <= config.seed < 2**32:
        raise UsageError(f"seed={config.seed}: expected a whole number from 0 to {2**32 - 1}.")
    if not config.tasks:
        raise UsageError("tasks=[]: name at least one task, such as tasks=[zipeval_shapes], or a suite=.")
    return _with_budget(config)


def _with_budget(config: RunConfig) -> RunConfig:
    options = {k: v for k, v in config.method.items() if k not in ("name", "_target_", "seed")}
    if "tokens" not in options:
        # Without a budget, as vanilla: one run for a whole sweep.
        return replace(config, tokens=None, budget=BUDGETS[0], packing=PACKINGS[0])
    if config.tokens is None:
        config = replace(config, budget=BUDGETS[0])  # nothing that it could count
    for where, method in _nodes("method", config.method):
        if method.get("seed", config.seed) != config.seed:
            raise UsageError(f"{where}.seed={method['seed']}: the seed of everything is set by seed={method['seed']}.")
    if options["tokens"] != config.tokens:
        raise UsageError(f"method.tokens={options['tokens']}: the budget is set by tokens={options['tokens']}.")
    if all(v is None for v in options.values()):
        raise UsageError(f"tokens is not set: method={config.method['name']} needs a budget, such as tokens=16.")
    return config


def _nodes(name: str, method: dict) -> Iterator[tuple[str, dict]]:
    """A method's node and those of the methods that it is made of."""
    yield name, method
    for option, value in method.items():
        if isinstance(value, dict):
            yield from _nodes(f"{name}.{option}", value)


def run_id(config: RunConfig, resolved: dict) -> str:
    """A readable name with a hash of everything the answers depend on: `tiny_llava-visionzip-16-3f9a12c4d0`.

    Args:
        resolved: what `auto`, the path of the weights and the budget came to.
    """
    identity = asdict(config)
    # A record is per task and holds a hash of its data, wherever that lies; answers should not depend on the batch.
    for name in ("tasks", "results", "batch_size", "data"):
        identity.pop(name)
    identity["model"].pop("path")
    identity["model"] |= resolved | {"device": resolved["device"].partition(":")[0]}
    identity["model"].pop("method")  # follows from the rest; its repr may hold an address
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    parts = [config.model.name, config.method["name"], config.tokens, digest]
    return "-".join(str(p) for p in parts if p is not None)


def recorded(config: RunConfig) -> dict:
    """The part of a configuration that its records keep."""
    kept = asdict(config)
    for name in ("tasks", "results"):
        kept.pop(name)
    return kept
