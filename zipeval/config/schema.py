"""The resolved configuration of a run: its schema, its checks, its identity. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING


# `zipeval run --help` prints what the docstrings of these classes say of each setting,
# and CHOICES below, so that they are explained here and nowhere else. In parentheses:
# what stands for the value.
@dataclass
class ModelConfig:
    """The weights, and the way they are loaded.

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
    """The places that data are read from.

    Attributes:
        root (DIR): directory of local copies of data sets, ORGANISATION/NAME in the hub's layout; null reads the hub's.
        videos (DIR): directory of the video tasks' questions and videos, see docs/benchmarks.md.
    """

    root: str | None = None
    videos: str | None = None


@dataclass
class RunnerConfig:
    """Means to make answers fast; what they are does not depend on them.

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


# Families whose papers' benchmarks are videos.
VIDEO_FAMILIES = ("video_llava",)
# `tokens` counts one of these; zipeval/engine/budget.py says how.
BUDGETS = ("paper", "mean", "final")
# Templates of zipeval/checkpoints/prompts.py.
PROMPTS = ("hf", "vicuna_v1", "llava_v1")
PACKINGS = ("published", "newline")
BOUNDS = ("auto", "none")
REUSES = ("none", "features", "prefix")
CHOICES = {
    "budget": BUDGETS,
    "packing": PACKINGS,
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.attn_implementation": ("auto", "sdpa", "eager", "flash_attention_2"),
    "model.prompt": PROMPTS,
    "model.image_aspect": ("pad", "crop", "anyres"),
    "model.quantization": ("none", "8bit", "4bit"),
    "model.device_map": (None, "auto"),
    "runner.reuse": REUSES,
    "bound": BOUNDS,
    "logger": (None, "wandb"),
}


def with_tasks(config: RunConfig) -> RunConfig:
    """Return a configuration that names its tasks: where it names none, those of the suite that fits its model."""
    if config.tasks is not None:
        return config
    from omegaconf import OmegaConf

    import zipeval.configs

    suite = f"{fitting_suite(config.model)}.yaml"
    file = Path(zipeval.configs.__path__[0], "suite", suite)
    return replace(config, tasks=list(OmegaConf.load(file).tasks))


def fitting_suite(model: ModelConfig) -> str:
    """Return the suite that a model is evaluated on when none is named.

    The embedded checkpoints know nothing but the shapes that they were trained on; other models know no shapes.
    """
    if model.embedded:
        return "shapes"
    return "quick_video" if model.family in VIDEO_FAMILIES else "quick"


UPPER_BOUND = "vanilla"
