"""What will work on this machine and what will not."""

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


Row = tuple[str, str]  # what is looked at, and what is to be said of it


def examine() -> tuple[str, bool]:
    """Look at each thing that a run may need; returns a line for each, and whether runs work and can be trusted."""
    facts = (_software, _devices, _memory, _hub, _embedded, _judge, _extras)
    rows = [row for fact in facts for row in _read(fact)]
    problems = [row for check in (_versions, _answers) for row in _read(check)]
    rows += problems or [
        (
            "verdict",
            "runs work: versions, imports and known answers are as they should be",
        )
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{width}}  {finding}" for name, finding in rows
    ), not problems


def _read(look: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of a look at something, or one that says why there are none."""
    try:
        yield from look()
    except Exception as error:  # a package that is broken raises anything, when it is imported or later
        yield look.__name__.strip("_"), f"cannot be looked at ({_first_line(error)})"


def _extras():
    """Yield packages that only an extra of zipeval's needs: runs without the extra do without them."""
    for extra, package in stack.extras_outside_bounds():
        yield (
            "extra",
            f"{package}: zipeval[{extra}] asks for {package.name}{package.bounds}",
        )


def _versions():
    """Yield packages that are missing, or of a version that zipeval does not ask for."""
    for package in stack.outside_bounds():
        yield "version", f"{package}: {package.describe()}, so run `{package.repair()}`"


def _answers():
    """Yield what is wrong when what a run imports is imported, and a question is answered."""
    try:
        stack.load(stack.RUN)
        with stack.explained("zipeval"):
            differences = known_answers.differences()
    except IncompatibleError as error:
        yield "broken", str(error)
    except (
        Exception
    ) as error:  # where packages do not fit zipeval, anything may come of it
        yield (
            "broken",
            f"a known question cannot be answered ({_first_line(error)}). {_suspicion()}",
        )
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
    for package, found in records.versions().items():
        yield (
            package,
            found or OPTIONAL.get(package, "not installed: reinstall zipeval"),
        )


def _devices():
    import torch

    if not torch.cuda.is_available():
        yield (
            "devices",
            f"CPU only, {os.cpu_count()} cores: good for the tiny models, hopeless for 7B",
        )
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        enough = (
            "enough for 7B in bfloat16"
            if free > 16e9
            else "too little for 7B in bfloat16 (16 GB)"
        )
        yield (
            f"cuda:{number}",
            f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free: {enough}",
        )


def _memory():
    import psutil

    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(Path.cwd()).free
    yield "memory", f"{memory / 1e9:.0f} GB free, {disk / 1e9:.0f} GB of disk here"


def _hub():
    from huggingface_hub import constants

    yield "hub cache", constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        yield (
            "hub",
            "HF_HUB_OFFLINE is set: only what is in the cache, or model.path=DIR",
        )
        return
    try:
        urlopen(constants.ENDPOINT, timeout=5).close()
        yield "hub", "reachable: models and data sets download when first used"
    except OSError as error:
        yield (
            "hub",
            f"{constants.ENDPOINT} not reachable ({error}): only what is in the cache, or model.path=DIR",
        )


def _embedded():
    from zipeval import models
    from zipeval.config.compose import compose

    try:
        found = models.find(compose(["model=tiny_llava"]).model)
        yield "tiny_llava", f"embedded, {found.visual_tokens} visual tokens"
    except UsageError as error:
        yield "tiny_llava", str(error)


def _judge():
    key = (
        "is set"
        if os.environ.get("OPENAI_API_KEY")
        else "is not set, which judges on this machine may not need"
    )
    yield "judge", f"judge.url= and judge.model= name one; OPENAI_API_KEY {key}"
