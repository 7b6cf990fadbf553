"""What will work on this machine and what will not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.request import urlopen

import psutil

from zipeval import models, records
from zipeval.errors import UsageError

OPTIONAL = {
    "bitsandbytes": "not installed: model.quantization needs `pip install 'zipeval[quantization]'`",
    "flash-attn": "not installed: CUDA runs use SDPA",
}


def examine() -> str:
    """A line for each thing that a run may need."""
    rows = [*_software(), *_devices(), _memory(), *_hub(), _embedded(), _judge()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {finding}" for name, finding in rows)


def _software():
    for package, found in records.versions().items():
        yield package, found or OPTIONAL.get(package, "not installed: reinstall zipeval")


def _devices():
    import torch

    if not torch.cuda.is_available():
        yield "devices", f"CPU only, {os.cpu_count()} cores: good for the tiny models, hopeless for 7B"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        enough = "enough for 7B in bfloat16" if free > 16e9 else "too little for 7B in bfloat16 (16 GB)"
        yield f"cuda:{number}", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free: {enough}"


def _memory():
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(Path.cwd()).free
    return "memory", f"{memory / 1e9:.0f} GB free, {disk / 1e9:.0f} GB of disk here"


def _hub():
    from huggingface_hub import constants

    yield "hub cache", constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        yield "hub", "HF_HUB_OFFLINE is set: only what is in the cache, or model.path=DIR"
        return
    try:
        urlopen(constants.ENDPOINT, timeout=5).close()
        yield "hub", "reachable: models and data sets download when first used"
    except OSError as error:
        yield "hub", f"{constants.ENDPOINT} not reachable ({error}): only what is in the cache, or model.path=DIR"


def _embedded():
    from zipeval.cli import compose

    try:
        found = models.find(compose(["model=tiny_llava"]).model)
        return "tiny_llava", f"embedded, {found.visual_tokens} visual tokens"
    except UsageError as error:
        return "tiny_llava", str(error)


def _judge():
    key = "is set" if os.environ.get("OPENAI_API_KEY") else "is not set, which judges on this machine may not need"
    return "judge", f"judge.url= and judge.model= name one; OPENAI_API_KEY {key}"
