"""Find out what will work on this machine and what will not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.request import urlopen

from zipeval.benchmarks import stack
from zipeval.errors import IncompatibleError, UsageError
from zipeval.evaluation import known_answers
from zipeval.results import records

OPTIONAL = {
    "bitsandbytes": "not installed: model.quantization needs `pip install 'zipeval[quantization]'`",
    "flash-attn": "not installed: CUDA runs use SDPA",
}


# The name of what is looked at, and the finding.
Row = tuple[str, str]
FINE = "runs work: versions, imports and known answers are as they should be"
# Bytes of a GPU that 7B weights in bfloat16 take, with some room.
ENOUGH_FOR_7B = 16e9


def examine() -> tuple[str, bool]:
    """Look at each thing that a run may need; returns a line for each, and whether runs work and can be trusted."""
    rows = []
    for look in (_software, _devices, _memory, _hub, _embedded, _judge, _extras):
        rows += _rows(look)
    problems = [*_rows(_versions), *_rows(_answers)]
    rows += problems or [("verdict", FINE)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {finding}" for name, finding in rows]
    return "\n".join(lines), not problems


def _rows(look: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of a look at something, or one that says why there are none."""
    try:
        yield from look()
    # A package that is broken raises anything, when it is imported or later.
    except Exception as error:
        yield look.__name__.strip("_"), f"cannot be looked at ({_first_line(error)})"


def _extras():
    """Yield packages that only an extra of zipeval's needs: runs without the extra do without them."""
    for extra, package in stack.extras_outside_bounds():
        bounds = f"{package.name}{package.bounds}"
        yield "extra", f"{package}: zipeval[{extra}] asks for {bounds}"


def _versions():
    """Yield packages that are missing, or of a version that zipeval does not ask for."""
    for package in stack.outside_bounds():
        yield "version", f"{package}: {package.describe()}, so run `{package.repair()}`"


def _answers():
    """Yield the faults that show when a run's packages are imported, and a question is answered."""
    try:
        stack.load(stack.RUN)
        with stack.explained("zipeval"):
            differences = known_answers.differences()
    except IncompatibleError as error:
        yield "broken", str(error)
    # Where packages do not fit zipeval, anything may come of it.
    except Exception as error:
        reason = f"a known question cannot be answered ({_first_line(error)})"
        yield "broken", f"{reason}. {_suspicion()}"
    else:
        for difference in differences:
            yield "wrong answer", f"{difference}. {_suspicion()}"


def _suspicion() -> str:
    """Name the packages that are most likely at fault for answers that are wrong, and what repairs them."""
    suspects = stack.suspects()
    described = "; ".join(f"{package}: {package.describe()}" for package in suspects)
    return f"{described}. Run `{stack.repair(suspects)}`, then `zipeval doctor`."


def _first_line(error: Exception) -> str:
    """Return the kind of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _software():
    """Yield the versions of packages."""
    for package, version in records.versions().items():
        missing = OPTIONAL.get(package, "not installed: reinstall zipeval")
        yield package, version or missing


def _devices():
    """Yield the GPUs, and whether a model of 7B fits on each now."""
    import torch

    if not torch.cuda.is_available():
        cores = f"CPU only, {os.cpu_count()} cores"
        yield "devices", f"{cores}: good for the tiny models, hopeless for 7B"
    # Free memory, as other processes may be on the GPU.
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        verdict = "too little for 7B in bfloat16 (16 GB)"
        if free > ENOUGH_FOR_7B:
            verdict = "enough for 7B in bfloat16"
        memory = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        yield f"cuda:{number}", f"{name}, {memory}: {verdict}"


def _memory():
    """Yield the memory, and the disk of this folder."""
    import psutil

    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(Path.cwd()).free
    yield "memory", f"{memory / 1e9:.0f} GB free, {disk / 1e9:.0f} GB of disk here"


def _hub():
    """Yield where downloads are kept, and whether the hub answers."""
    from huggingface_hub import constants

    cached_only = "only what is in the cache, or model.path=DIR"
    yield "hub cache", constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        yield "hub", f"HF_HUB_OFFLINE is set: {cached_only}"
        return
    try:
        urlopen(constants.ENDPOINT, timeout=5).close()
        yield "hub", "reachable: models and data sets download when first used"
    except OSError as error:
        yield "hub", f"{constants.ENDPOINT} not reachable ({error}): {cached_only}"


def _embedded():
    """Yield whether the embedded model is there."""
    from zipeval import models
    from zipeval.config.compose import compose

    try:
        checkpoint = models.find(compose(["model=tiny_llava"]).model)
        yield "tiny_llava", f"embedded, {checkpoint.visual_tokens} visual tokens"
    except UsageError as error:
        yield "tiny_llava", str(error)


def _judge():
    """Yield whether there is a key for judges; never the key."""
    # Never the key itself, as this output is shown to others.
    key = "is not set, which judges on this machine may not need"
    if os.environ.get("OPENAI_API_KEY"):
        key = "is set"
    yield "judge", f"judge.url= and judge.model= name one; OPENAI_API_KEY {key}"
