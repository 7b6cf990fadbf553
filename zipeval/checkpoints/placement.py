"""Where weights go, in which numbers, and whether they fit there. Imports torch in functions only."""

from __future__ import annotations

import platform
import subprocess
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


@dataclass(frozen=True)
class Placement:
    """Where and how the weights are held: what `auto` came to.

    Attributes:
        device: the only one, or with a `device_map` the one that takes the inputs.
        dtype: of everything that is not quantised.
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
    if ranks.here().count > 1 and (config.device_map or ":" in config.device):
        name = "device_map" if config.device_map else "device"
        raise UsageError(
            f"model.{name}={getattr(config, name)}: each of {ranks.here().count} processes has a GPU of its own. "
            "Leave it out, or run this without torchrun."
        )
    import torch
    from transformers.utils import is_flash_attn_2_available

    device, dtype, attention = config.device, config.dtype, config.attn_implementation
    if device == "auto":
        device = f"cuda:{ranks.here().local}" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and ranks.here().count > 1:
        device = f"cuda:{ranks.here().local}"
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UsageError(
                f"model.device={device}: {count} CUDA devices here. `zipeval doctor` shows them."
            )
    on_cuda = device.startswith("cuda")
    if dtype == "auto":
        dtype = "bfloat16" if on_cuda else "float32"
    if attention == "auto":
        flash = on_cuda and dtype != "float32" and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "sdpa"
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise UsageError(
            f"model.attn_implementation={attention}: it is not installed, or there is no GPU for it. "
            "Leave it out, or `pip install flash-attn`."
        )
    return Placement(device, dtype, attention, config.quantization, config.device_map)


def machine(placement: Placement) -> dict[str, str | None]:
    """What the model runs on: platform, names of the device or devices, and on GPUs torch's CUDA and their driver."""
    found = {
        "platform": platform.platform(),
        "device": _cpu(),
        "cuda": None,
        "driver": None,
    }
    if placement.device == "cpu":
        return found
    import torch

    devices = (
        range(torch.cuda.device_count()) if placement.device_map else [placement.device]
    )
    names = ", ".join(torch.cuda.get_device_name(device) for device in devices)
    return found | {"device": names, "cuda": torch.version.cuda, "driver": _driver()}


def _cpu() -> str:
    """Its name; where the system does not tell, as outside Linux, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (
        line.partition(":")[2].strip()
        for line in lines
        if line.startswith("model name")
    )
    return next(names, platform.processor() or platform.machine())


def _driver() -> str | None:
    """The version of NVIDIA's driver, which torch does not know."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def check_memory(checkpoint: Checkpoint, placement: Placement) -> None:
    """Compare the weights alone with the memory that is free: what fails here would fail after minutes of loading.

    Raises:
        UsageError: if they cannot fit; names the settings with which they would.
    """
    import torch

    needed, free = _weight_bytes(checkpoint, placement), _free_bytes(placement)
    if needed <= free:
        return
    others = {
        f"model.device=cuda:{n}": {"device": f"cuda:{n}"}
        for n in range(torch.cuda.device_count())
    }
    others |= {
        "model.device_map=auto": {"device_map": "auto"},
        "model.dtype=bfloat16": {"dtype": "bfloat16"},
    }
    others |= {f"model.quantization={q}": {"quantization": q} for q in ("8bit", "4bit")}
    changed = {name: replace(placement, **change) for name, change in others.items()}
    fitting = [
        name
        for name, p in changed.items()
        if _weight_bytes(checkpoint, p) <= _free_bytes(p)
    ]
    held = (
        placement.dtype if placement.quantization == "none" else placement.quantization
    )
    where = "device_map=auto" if placement.device_map else f"device={placement.device}"
    advice = (
        f"They would fit with {' or '.join(fitting)}"
        if fitting
        else "`zipeval list models` shows smaller models"
    )
    raise UsageError(
        f"model.{where}: the weights in {checkpoint.path} take {needed / 2**30:.1f} GiB in {held}, "
        f"{free / 2**30:.1f} GiB are free. {advice}."
    )


def _weight_bytes(checkpoint: Checkpoint, placement: Placement) -> float:
    width = 4 if placement.dtype == "float32" else 2
    quantised = {"none": width, "8bit": 1, "4bit": 0.5}[placement.quantization]
    return (
        checkpoint.parameters - checkpoint.quantizable
    ) * width + checkpoint.quantizable * quantised


def _free_bytes(placement: Placement) -> int:
    """Of the device, or of all GPUs together."""
    import torch

    if placement.device == "cpu":
        return psutil.virtual_memory().available
    devices = (
        range(torch.cuda.device_count()) if placement.device_map else [placement.device]
    )
    return sum(torch.cuda.mem_get_info(device)[0] for device in devices)
