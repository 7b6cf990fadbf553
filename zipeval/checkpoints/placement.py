"""Decide where weights go, in which numbers, and whether they fit there. Imports torch in functions only."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from zipeval.config.schema import ModelConfig
from zipeval.errors import UsageError
from zipeval.utils import ranks

if TYPE_CHECKING:
    from zipeval.models import Checkpoint


FLASH_ATTENTION = "flash_attention_2"
# Bytes of a weight that is quantised.
QUANTISED_BYTES = {"8bit": 1, "4bit": 0.5}


@dataclass(frozen=True)
class Placement:
    """Hold where and how the weights are held: the settings with every `auto` resolved.

    Attributes:
        device: the only one, or with a `device_map` the one that takes the inputs.
        dtype: data type of everything that is not quantised.
        attn_implementation: name that transformers has for the attention.
        quantization: none, 8bit or 4bit.
        device_map: auto, to spread the weights over all GPUs; None: one device.
    """

    device: str
    dtype: str
    attn_implementation: str
    quantization: str = "none"
    device_map: str | None = None


def place(config: ModelConfig) -> Placement:
    """Resolve `auto`.

    Raises:
        UsageError: for a CUDA device or a library that is not there.
    """
    if config.quantization != "none" and not find_spec("bitsandbytes"):
        raise UsageError(
            f"model.quantization={config.quantization}: bitsandbytes is not installed. "
            f"`pip install 'zipeval[quantization]'` installs it."
        )
    _check_ranks(config)
    device = _device(config.device)
    on_cuda = device.startswith("cuda")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_cuda else "float32"
    attention = _attention(config.attn_implementation, on_cuda, dtype)
    return Placement(device, dtype, attention, config.quantization, config.device_map)


def _check_ranks(config: ModelConfig) -> None:
    """Raise UsageError for settings that several processes cannot share."""
    processes = ranks.here().count
    if processes == 1:
        return
    # torchrun gives each process a GPU, so that neither may name one.
    name = "device_map" if config.device_map else "device"
    if config.device_map or ":" in config.device:
        raise UsageError(
            f"model.{name}={getattr(config, name)}: each of {processes} processes has a GPU of its own. "
            "Leave it out, or run this without torchrun."
        )


def _device(setting: str) -> str:
    """Return the device of this process.

    Raises:
        UsageError: for a CUDA device that is not there.
    """
    import torch

    place = ranks.here()
    device = setting
    if setting == "auto":
        device = f"cuda:{place.local}" if torch.cuda.is_available() else "cpu"
    elif setting == "cuda" and place.count > 1:
        device = f"cuda:{place.local}"
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        count = torch.cuda.device_count()
        if number >= count:
            raise UsageError(
                f"model.device={device}: {count} CUDA devices here. `zipeval doctor` shows them."
            )
    return device


def _attention(setting: str, on_cuda: bool, dtype: str) -> str:
    """Return the attention implementation: FlashAttention 2 where it can run, unless another one is set.

    Raises:
        UsageError: if FlashAttention 2 is set and cannot run.
    """
    from transformers.utils import is_flash_attn_2_available

    available = is_flash_attn_2_available()
    if setting == "auto":
        # FlashAttention has no float32.
        fits = on_cuda and dtype != "float32" and available
        return FLASH_ATTENTION if fits else "sdpa"
    if setting == FLASH_ATTENTION and not available:
        raise UsageError(
            f"model.attn_implementation={setting}: it is not installed, or there is no GPU for it. "
            "Leave it out, or `pip install flash-attn`."
        )
    return setting


def machine(placement: Placement) -> dict[str, str | None]:
    """Return what the model runs on.

    Returns:
        The platform, the names of the device or devices, and on GPUs torch's CUDA and their driver.
    """
    description = {
        "platform": platform.platform(),
        "device": _cpu(),
        "cuda": None,
        "driver": None,
    }
    if placement.device == "cpu":
        return description
    import torch

    names = ", ".join(map(torch.cuda.get_device_name, _gpus(placement)))
    cuda = torch.version.cuda
    return description | {"device": names, "cuda": cuda, "driver": _driver()}


def _gpus(placement: Placement) -> Sequence[int | str]:
    """Return the GPUs that hold the weights."""
    import torch

    if placement.device_map:
        return range(torch.cuda.device_count())
    return [placement.device]


def _cpu() -> str:
    """Return the name of the processor.

    Where the system does not tell, as outside Linux, it is that of the architecture.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, which torch does not know."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        return process.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def check_memory(checkpoint: Checkpoint, placement: Placement) -> None:
    """Compare the weights alone with the memory that is free: what fails here would fail after minutes of loading.

    Raises:
        UsageError: if they cannot fit; names the settings with which they would.
    """
    needed, free = _weight_bytes(checkpoint, placement), _free_bytes(placement)
    if needed <= free:
        return
    advice = "`zipeval list models` shows smaller models"
    fitting = _fitting_settings(checkpoint, placement)
    if fitting:
        advice = f"They would fit with {' or '.join(fitting)}"
    numbers = placement.quantization
    if numbers == "none":
        numbers = placement.dtype
    place = "device_map=auto" if placement.device_map else f"device={placement.device}"
    raise UsageError(
        f"model.{place}: the weights in {checkpoint.path} take {needed / 2**30:.1f} GiB in {numbers}, "
        f"{free / 2**30:.1f} GiB are free. {advice}."
    )


def _fitting_settings(checkpoint: Checkpoint, placement: Placement) -> list[str]:
    """Return the settings with which the weights would fit."""
    import torch

    changes = [("device", f"cuda:{n}") for n in range(torch.cuda.device_count())]
    changes += [
        ("device_map", "auto"),
        ("dtype", "bfloat16"),
        ("quantization", "8bit"),
        ("quantization", "4bit"),
    ]
    fitting = []
    for name, value in changes:
        changed = replace(placement, **{name: value})
        if _weight_bytes(checkpoint, changed) <= _free_bytes(changed):
            fitting.append(f"model.{name}={value}")
    return fitting


def _weight_bytes(checkpoint: Checkpoint, placement: Placement) -> float:
    """Return the bytes of the weights, of which matrices of decoder layers can be quantised."""
    width = 4 if placement.dtype == "float32" else 2
    quantised_width = QUANTISED_BYTES.get(placement.quantization, width)
    others = checkpoint.parameters - checkpoint.quantizable
    return others * width + checkpoint.quantizable * quantised_width


def _free_bytes(placement: Placement) -> int:
    """Return the free memory of the device, or of all GPUs together."""
    import torch

    if placement.device == "cpu":
        return psutil.virtual_memory().available
    return sum(torch.cuda.mem_get_info(device)[0] for device in _gpus(placement))
