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
METHOD = "visionzip"  # that it is tuned under
KEY = "zipeval"  # of the manifest in the file's metadata


def place(model: str, tokens: int | None) -> Path:
    """Where it lies unless another place is named."""
    return (
        FOLDER
        / "-".join(str(part) for part in (model, METHOD, tokens) if part is not None)
        / FILE
    )


def purpose(
    config: RunConfig, checkpoint: Checkpoint, method: dict[str, Any]
) -> dict[str, Any]:
    """What a projector is tuned for; it serves nothing else.

    Args:
        method: the node of the configuration that reduces.
    """
    options = {
        k: v
        for k, v in method.items()
        if k not in ("name", "_target_", "tokens", "projector")
    }
    several = (
        checkpoint.grids[-1][0] > 1
    )  # crops of an image; of one, every budget leaves the same
    return {
        "model": config.model.name,
        "fingerprint": checkpoint.fingerprint,
        "method": method["name"].removesuffix("_tuned"),
        **{name: value for name, value in options.items() if value is not None},
        "tokens": method["tokens"],
        "budget": config.budget if several else BUDGETS[0],
        "packing": config.packing,
    }


def check(config: RunConfig, checkpoint: Checkpoint) -> str | None:
    """Hash of the tuned projector that a configuration names, None where it names none. Reads no weights.

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
    for name in dict.fromkeys([*wanted, *tuned]):
        its, asked = tuned.get(name), wanted.get(name)
        if (
            its != asked and name != "model"
        ):  # which has a fingerprint, whatever it is called
            of = f" of model={tuned['model']}" if name == "fingerprint" else ""
            raise UsageError(
                f"projector={path}: it was tuned for {name}={its}{of}, and this run has {name}={asked}. "
                f"`{command}` makes one for this run."
            )
    _content.cache_clear()
    return hashlib.sha256(_content(path.expanduser())).hexdigest()[:16]


def _tuned(method: dict[str, Any]) -> dict[str, Any] | None:
    """The node that has a projector: this one, or of the methods that it is made of."""
    if "projector" in method:
        return method
    inner = [_tuned(option) for option in method.values() if isinstance(option, dict)]
    return next((node for node in inner if node), None)


def _command(config: RunConfig, wanted: dict[str, Any]) -> str:
    """That makes the projector of a run."""
    options = {
        f"method.{name}": wanted[name]
        for name in ("dominant", "contextual")
        if name in wanted
    }
    options |= {
        name: wanted[name]
        for name in ("budget", "packing")
        if wanted[name] != getattr(type(config), name)
    }
    path, usual = Path(config.projector), place(config.model.name, wanted["tokens"])
    if path != usual and path.name == FILE and not path.expanduser().exists():
        options["out"] = path.parent
    elif usual.exists():  # tuned for something else
        options["out"] = "NEW_DIR"
    if config.model.path:
        options["model.path"] = config.model.path
    given = {
        "model": config.model.name,
        "method": METHOD,
        "tokens": wanted["tokens"],
        **options,
    }
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    return f"zipeval tune {shlex.join(named)} data=FILE.json images=DIR"


def manifest(path: Path) -> dict[str, Any]:
    """What a file says of itself.

    Raises:
        UsageError: if it is not a tuned projector.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path.expanduser(), framework="numpy") as file:
            return json.loads((file.metadata() or {})[KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = (
            "its metadata are no manifest" if isinstance(error, KeyError) else error
        )
        raise UsageError(
            f"projector={path}: not a file of `zipeval tune` ({reason}). Name another one."
        ) from error


def weights(
    path: str, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of a file, by the names that they have in the model's projector: those that `check` saw last."""
    return _loaded(_content(Path(path).expanduser()), device, dtype)


@lru_cache(maxsize=4)
def _content(file: Path) -> bytes:
    """Read once: a run is known by what it was when it began, whoever writes another one meanwhile."""
    return file.read_bytes()


@lru_cache(maxsize=4)
def _loaded(
    content: bytes, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return {name: tensor.to(device, dtype) for name, tensor in load(content).items()}
