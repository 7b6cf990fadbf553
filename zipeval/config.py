"""The resolved configuration of a run: its schema, its checks, its identity. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from zipeval import projector
from zipeval.budget import BUDGETS
from zipeval.errors import UsageError
from zipeval.prompts import TEMPLATES
from zipeval.protocols import PROTOCOLS
from zipeval.videoqa import SETS


# `zipeval run --help` prints what the docstrings of these classes say of each setting, and CHOICES below, so that they
# are explained here and nowhere else. In parentheses: what stands for the value.
@dataclass
class ModelConfig:
    """Which weights, and how they are loaded.

    Attributes:
        name: the model's name on the command line and in tables, set by model=NAME.
        family: the file below zipeval/models/ that knows the model's architecture.
        hub (ORGANISATION/NAME): the weights' place on the Hugging Face hub.
        revision (COMMIT): the commit of `hub` that is read.
        embedded (FOLDER): folder below zipeval/embedded/ for weights that ship with the package.
        path (DIR): a local directory of weights in the Hugging Face layout, used instead of `hub` or `embedded`.
        dtype: what numbers the weights are held in; auto is bfloat16 on CUDA and float32 on CPU.
        device (auto|cpu|cuda|cuda:N): where the model runs; auto is CUDA where there is some.
        attn_implementation: how attention is computed; auto is FlashAttention 2 on CUDA where it is installed, else
            SDPA.
        prompt: the template around a question; hf is the checkpoint's own, vicuna_v1 is LLaVA's, which has a system
            prompt, llava_v1 is Video-LLaVA's.
        image_aspect: how a picture becomes a square; pad fills it up with the mean colour as LLaVA does, crop cuts out
            the middle as transformers does, anyres is for models that cut pictures in tiles, and only for them.
        quantization: in how many bits bitsandbytes holds the language model's layers.
        device_map: auto spreads the layers over all GPUs, null leaves them on one device.
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
class JudgeConfig:
    """The model that scores answers which have to be read: those of MMB, MM-Vet, LLaVA-B and the video tasks.

    Attributes:
        url (URL): address of an OpenAI-compatible server, such as http://localhost:8000/v1. Its key, if it needs one,
            is read from the environment as OPENAI_API_KEY. The port is not part of a record's identity.
        model (NAME): the judge's name on that server.
    """

    url: str | None = None
    model: str | None = None


@dataclass
class DataConfig:
    """Where data are read from.

    Attributes:
        root (DIR): directory of local copies of data sets, ORGANISATION/NAME in the hub's layout; null reads the hub's.
        videos (DIR): directory of the video tasks' questions and videos, see docs/benchmarks.md.
    """

    root: str | None = None
    videos: str | None = None


@dataclass
class RunnerConfig:
    """How answers are made fast; what they are does not depend on it.

    Attributes:
        reuse: what questions about one picture share; features is the encoder's output, prefix is also the cache of the
            prompt up to its last visual token, where the method does not look at the question.
        workers (N): processes that decode and prepare pictures ahead; null is one less than the machine has cores, and
            at most 8.
        cache_gib (NUMBER): GiB of host memory for the encoder's output, which the other runs of a sweep then share.
        compile: whether the blocks of encoder and decoder run compiled by torch.compile.
    """

    reuse: str = "none"
    workers: int | None = None
    cache_gib: float = 4.0
    compile: bool = False


@dataclass
class RunConfig:
    """One run: a model under a method on some tasks.

    Attributes:
        model (NAME): which weights, one of `zipeval list models`.
        method (NAME): what removes visual tokens, one of `zipeval list methods`.
        tokens (N): visual tokens that an image is left with; null for methods without a budget, such as vanilla.
        budget: what `tokens` counts in methods that act inside the language model: paper is what was published, mean is
            the mean over its layers, final is what enters its last layer.
        packing: how a method before the language model packs LLaVA-NeXT's tiles; published is VisionZip's way without
            row ends, newline keeps them.
        projector (FILE): the tuned projector of method=visionzip_tuned; null is where `zipeval tune` leaves it.
        tasks ([TASK,...]): what is asked, names of `zipeval list tasks`; a suite names several, and null is the suite
            that fits the model.
        limit (N): samples of each task; null is all.
        batch_size (N|auto): prompts in one generate call; auto is as many as fit. It is halved where memory runs out.
        seed (N): what everything random starts from.
        runner: how answers are made fast.
        judge: the model that scores answers which have to be read.
        data: where data are read from.
        bound: auto evaluates the upper bound too, the model without reduction, where its records are missing; none
            leaves it out.
        results (DIR): directory below which each run gets its own.
        logger: wandb writes what is in the records to Weights & Biases too; its settings are in the environment, such
            as WANDB_PROJECT and WANDB_MODE.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    tokens: int | None = None
    budget: str = "paper"
    packing: str = "published"
    projector: str | None = None
    tasks: list[str] | None = None
    limit: int | None = None
    batch_size: Any = "auto"
    seed: int = 0
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bound: str = "auto"
    results: str = "results/runs"
    logger: str | None = None


VIDEO_FAMILIES = ("video_llava",)  # whose papers' benchmarks are videos
PACKINGS = ("published", "newline")
BOUNDS = ("auto", "none")
# Of a run's configuration, what its answers do not depend on: with another batch size the same sweep continues.
CIRCUMSTANCES = ("results", "logger", "batch_size", "runner", "bound")
REUSES = ("none", "features", "prefix")
CHOICES = {
    "budget": BUDGETS,
    "packing": PACKINGS,
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.attn_implementation": ("auto", "sdpa", "eager", "flash_attention_2"),
    "model.prompt": tuple(TEMPLATES),
    "model.image_aspect": ("pad", "crop", "anyres"),
    "model.quantization": ("none", "8bit", "4bit"),
    "model.device_map": (None, "auto"),
    "runner.reuse": REUSES,
    "bound": BOUNDS,
    "logger": (None, "wandb"),
}


PORT = re.compile(r"^(https?://(?:\[[^\]]*\]|[^/:\[]*)):\d+(?=/|$)")  # group 1: what stands before it
ADDRESS = re.compile(r"https?://([^/@?#\s]*@)?([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^@?#\s]*)?")


def check(config: RunConfig) -> RunConfig:
    """Refuse what can be refused without looking at a checkpoint; returns the config in its normal form.

    Raises:
        UsageError: for a value out of range.
    """
    config = with_tasks(config)
    _check_numbers(config)
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
    if not config.tasks:
        raise UsageError("tasks=[]: name at least one task, such as tasks=[zipeval_shapes], or a suite=.")
    return _with_projector(_with_budget(_with_judge(config)))


def with_tasks(config: RunConfig) -> RunConfig:
    """Return a configuration that names its tasks: where it names none, those of the suite that fits its model."""
    if config.tasks is not None:
        return config
    from omegaconf import OmegaConf

    import zipeval.configs

    file = Path(zipeval.configs.__path__[0], "suite", f"{fitting_suite(config.model)}.yaml")
    return replace(config, tasks=list(OmegaConf.load(file).tasks))


def fitting_suite(model: ModelConfig) -> str:
    """Return the suite that a model is evaluated on when none is named.

    The embedded checkpoints know nothing but the shapes that they were trained on; other models know no shapes.
    """
    if model.embedded:
        return "shapes"
    return "quick_video" if model.family in VIDEO_FAMILIES else "quick"


def _check_numbers(config: RunConfig) -> None:
    for name in ("tokens", "limit", "batch_size"):
        value, auto = getattr(config, name), name == "batch_size"
        if value != ("auto" if auto else None) and not (type(value) is int and value > 0):
            also = ", or auto" if auto else ""
            raise UsageError(f"{name}={value}: expected a whole number from 1 up, such as {name}=16{also}.")
    for name in ("workers", "cache_gib"):
        value = getattr(config.runner, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"runner.{name}={value}: expected a number from 0 up.")
    if not 0 <= config.seed < 2**32:
        raise UsageError(f"seed={config.seed}: expected a whole number from 0 to {2**32 - 1}.")


def _with_judge(config: RunConfig) -> RunConfig:
    """With the judge's address in its normal form; refuses what judged tasks and the video tasks lack."""
    judge, judged = config.judge, [task for task in config.tasks if task in PROTOCOLS]
    if judge.url is not None:
        url = judge.url.strip().rstrip("/").removesuffix("/chat/completions")
        if not ADDRESS.fullmatch(url):
            raise UsageError(f"judge.url={public_url(url)}: expected an address, such as http://localhost:8000/v1.")
        judge = replace(judge, url=url)
    if judged and not (judge.url and judge.model):
        raise UsageError(
            f"tasks=[{judged[0]}]: a judge model scores its answers. Set judge.url= (an OpenAI-compatible server, "
            "such as judge.url=http://localhost:8000/v1) and judge.model=; its key goes into the environment as "
            "OPENAI_API_KEY."
        )
    videos = [task for task in config.tasks if task in SETS]
    if videos and not config.data.videos:
        raise UsageError(
            f"tasks=[{videos[0]}]: its videos are not on the hub. Set data.videos=DIR: see docs/benchmarks.md."
        )
    return replace(config, judge=judge)


def public_url(url: str) -> str:
    """The address without what may be secret in it: user, password, query."""
    return re.sub(r"^(https?://)?.*@|[?#].*", r"\1", url)


def judge_identity(judge: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return which judge a configuration names, whatever port its server listens at.

    A server that is started again, or on another node of a cluster's tunnel, is the same judge at another port.
    """
    if not judge or judge.get("url") is None:
        return judge
    return {**judge, "url": PORT.sub(r"\1", judge["url"])}


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


def _with_projector(config: RunConfig) -> RunConfig:
    """With the place of a tuned projector where the method has one, and without where it has none."""
    method, path = deepcopy(config.method), None
    for where, node in _nodes("method", method):
        if "projector" not in node:
            continue
        if node["projector"] != config.projector:
            raise UsageError(f"{where}.projector={node['projector']}: set by projector={node['projector']}.")
        path = node["projector"] = config.projector or str(projector.place(config.model.name, node["tokens"]))
    return replace(config, method=method, projector=path)


def _nodes(name: str, method: dict) -> Iterator[tuple[str, dict]]:
    """A method's node and those of the methods that it is made of."""
    yield name, method
    for option, value in method.items():
        if isinstance(value, dict):
            yield from _nodes(f"{name}.{option}", value)


def run_identity(config: RunConfig) -> str:
    """Return what two runs of a sweep are told apart by, before any checkpoint is looked at."""
    identity = {name: value for name, value in asdict(config).items() if name not in CIRCUMSTANCES}
    identity["judge"] = judge_identity(identity["judge"])
    return json.dumps(identity, sort_keys=True)


def run_id(config: RunConfig, resolved: dict, judged: bool = False, port: bool = False) -> str:
    """Return a readable name with a hash of everything the answers depend on: `tiny_llava-visionzip-16-3f9a12c4d0`.

    Args:
        resolved: what `auto`, the paths of weights and the budget came to.
        judged: the judge is part of it.
        port: and so is the port that its server listens at, as in names of before.
    """
    identity = recorded(config, judged)
    if judged and not port:
        identity["judge"] = judge_identity(identity["judge"])
    # A record is per task and holds hashes of its data, wherever they lie; how fast answers come does not change them.
    for name in ("data", "batch_size", "runner"):
        identity.pop(name)
    for name in ("path", "hub", "revision"):  # where the weights came from; the fingerprint says which they are
        identity["model"].pop(name)
    identity["model"] |= resolved | {"device": resolved["device"].partition(":")[0]}
    identity["model"].pop("method")  # follows from the rest; its repr may hold an address
    for _, method in _nodes("method", identity["method"]):
        method.pop("projector", None)  # where it lies; what is in it was resolved
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    parts = [config.model.name, config.method["name"], config.tokens, digest]
    return "-".join(str(p) for p in parts if p is not None)


def recorded(config: RunConfig, judged: bool = False) -> dict:
    """The part of a configuration that its records keep, the judge where the task has one."""
    kept = asdict(config)
    # A record is per task, whoever else is told of it; the method has the projector.
    for name in ("tasks", "results", "logger", "projector", "bound"):
        kept.pop(name)
    if judged:
        kept["judge"]["url"] = public_url(config.judge.url)
    else:
        kept.pop("judge")
    return kept
