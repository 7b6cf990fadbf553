"""Tuned projectors: files that `zipeval tune` writes and VisionZip‡ reads. Imports no torch until weights are wanted.

    results/projectors/MODEL-visionzip-TOKENS/projector.safetensors

The metadata of the file are its manifest: what it was tuned for, on what, how, and with which code.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipeval.config.schema import BUDGETS
from zipeval.errors import UsageError

if TYPE_CHECKING:
    import torch

    from zipeval.config.schema import RunConfig
    from zipeval.models import Checkpoint

FOLDER, FILE = Path("results/projectors"), "projector.safetensors"
# The method that a projector is tuned under.
METHOD = "visionzip"
# Name of the manifest in the file's metadata.
KEY = "zipeval"
# Options of a method that are no part of its purpose, or have a field of their own.
OTHER_OPTIONS = ("name", "_target_", "tokens", "projector")


def place(model: str, tokens: int | None) -> Path:
    """Return where a projector lies unless another place is named."""
    parts = [model, METHOD]
    if tokens is not None:
        parts.append(str(tokens))
    return FOLDER / "-".join(parts) / FILE


def purpose(
    config: RunConfig, checkpoint: Checkpoint, method: dict[str, Any]
) -> dict[str, Any]:
    """Return what a projector is tuned for; it serves nothing else.

    Args:
        config: configuration of the run.
        checkpoint: the model's.
        method: the node of the configuration that reduces.
    """
    options = {}
    for name, value in method.items():
        if name not in OTHER_OPTIONS and value is not None:
            options[name] = value
    # With one crop of each image, every budget leaves the same tokens.
    several_crops = checkpoint.grids[-1][0] > 1
    return {
        "model": config.model.name,
        "fingerprint": checkpoint.fingerprint,
        "method": method["name"].removesuffix("_tuned"),
        **options,
        "tokens": method["tokens"],
        "budget": config.budget if several_crops else BUDGETS[0],
        "packing": config.packing,
    }


def check(config: RunConfig, checkpoint: Checkpoint) -> str | None:
    """Return the hash of the tuned projector that a configuration names, None where it names none.

    Reads no weights.

    Raises:
        UsageError: if it is not there, or was tuned for anything else.
    """
    method = _tuned(config.method)
    if method is None:
        return None
    path, wanted = Path(config.projector), purpose(config, checkpoint, method)
    command = _command(config, wanted)
    if not path.expanduser().is_file():
        raise UsageError(
            f"projector={path}: no such file. Make it with `{command}`, or name another one."
        )
    tuned = manifest(path)["purpose"]
    # The fingerprint tells models apart, whatever they are called.
    names = [name for name in dict.fromkeys([*wanted, *tuned]) if name != "model"]
    for name in names:
        tuned_value, wanted_value = tuned.get(name), wanted.get(name)
        if tuned_value != wanted_value:
            model = f" of model={tuned['model']}" if name == "fingerprint" else ""
            raise UsageError(
                f"projector={path}: it was tuned for {name}={tuned_value}{model}, and this run has "
                f"{name}={wanted_value}. `{command}` makes one for this run."
            )
    _content.cache_clear()
    return hashlib.sha256(_content(path.expanduser())).hexdigest()[:16]


def _tuned(method: dict[str, Any]) -> dict[str, Any] | None:
    """Return the node that has a projector: this one, or one of the methods that it is made of."""
    if "projector" in method:
        return method
    for option in method.values():
        node = _tuned(option) if isinstance(option, dict) else None
        if node is not None:
            return node
    return None


def _command(config: RunConfig, wanted: dict[str, Any]) -> str:
    """Return the command that makes the projector of a run."""
    settings = {
        "model": config.model.name,
        "method": METHOD,
        "tokens": wanted["tokens"],
        "method.dominant": wanted.get("dominant"),
        "method.contextual": wanted.get("contextual"),
    }
    for name in ("budget", "packing"):
        if wanted[name] != getattr(type(config), name):
            settings[name] = wanted[name]
    path, usual = Path(config.projector), place(config.model.name, wanted["tokens"])
    if path != usual and path.name == FILE and not path.expanduser().exists():
        settings["out"] = path.parent
    elif usual.exists():
        # The file at the usual place was tuned for something else.
        settings["out"] = "NEW_DIR"
    settings["model.path"] = config.model.path or None
    words = [f"{name}={value}" for name, value in settings.items() if value is not None]
    return f"zipeval tune {shlex.join(words)} data=FILE.json images=DIR"


def manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a file.

    Raises:
        UsageError: if it is not a tuned projector.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path.expanduser(), framework="numpy") as file:
            return json.loads((file.metadata() or {})[KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = error
        if isinstance(error, KeyError):
            reason = "its metadata are no manifest"
        raise UsageError(
            f"projector={path}: not a file of `zipeval tune` ({reason}). Name another one."
        ) from error


def weights(
    path: str, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, by their names in the model's projector: those that `check` saw last."""
    return _loaded(_content(Path(path).expanduser()), device, dtype)


@lru_cache(maxsize=4)
def _content(file: Path) -> bytes:
    """Read a file once.

    A run is known by what the file was when it began, whoever writes another one meanwhile.
    """
    return file.read_bytes()


@lru_cache(maxsize=4)
def _loaded(
    content: bytes, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return {name: tensor.to(device, dtype) for name, tensor in load(content).items()}
