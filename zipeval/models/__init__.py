"""Finding, checking and loading checkpoints. A model family is one module here; torch is imported only to load."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from zipeval.config import ModelConfig
from zipeval.errors import UsageError

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine that looks complete.

    Attributes:
        path: its directory.
        fingerprint: hash of its small files and of samples of its weights; the same for a copy elsewhere.
        visual_tokens: how many its largest picture, an image or a video, has without reduction.
        layers: of its decoder.
        grids: numbers of crops that an image or video can have, ascending.
    """

    path: Path
    fingerprint: str
    visual_tokens: int
    layers: int
    grids: tuple[int, ...]


def find(config: ModelConfig) -> Checkpoint:
    """Locate the weights and check them without loading.

    Raises:
        UsageError: if they are missing, damaged, or of another family; says what to do.
    """
    its = family(config)
    path = _directory(config)
    where = f"model.path={config.path}" if config.path else f"model={config.name}"
    settings = _read_json(path / "config.json", where)
    for name in ("tokenizer_config.json", "tokenizer.json", _processor_file(path)):
        _read_json(path / name, where)
    weights = _weights(path, where)
    if not weights:
        raise UsageError(f"{where}: no *.safetensors in {path}. Convert the weights, or {_fetch(config)}.")
    for file in weights:
        _check_safetensors(file, where, config)
    if config.embedded and hasattr(its, "of_llava"):
        settings = its.of_llava(settings)
    if settings.get("model_type") != its.MODEL_TYPE:
        raise UsageError(
            f"{where}: {path} holds a {settings.get('model_type')!r} checkpoint, the family {config.family!r} "
            f"loads {its.MODEL_TYPE!r}. `zipeval list models` shows the families."
        )
    visual = its.visual_tokens(settings)
    return Checkpoint(path, _fingerprint(path), visual, its.decoder_layers(settings), its.grids(settings))


def _processor_file(path: Path) -> str:
    """transformers 5 writes the one, older versions the other."""
    new, old = "processor_config.json", "preprocessor_config.json"
    return old if (path / old).exists() else new


def _weights(path: Path, where: str) -> list[Path]:
    """The weight files, those that an index names or else those that are there."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path.glob("*.safetensors"))
    return [path / name for name in sorted(set(_read_json(index, where).get("weight_map", {}).values()))]


def _directory(config: ModelConfig) -> Path:
    if config.path:
        path = Path(config.path).expanduser()
        if not path.is_dir():
            raise UsageError(f"model.path={config.path}: no such directory. Give one with a config.json.")
        return path
    if config.embedded:
        return EMBEDDED / config.embedded
    if not config.hub:
        remedy = getattr(family(config), "NO_WEIGHTS", "Set model.hub=ORGANISATION/NAME or model.path=DIR.")
        raise UsageError(f"model={config.name}: it names no weights. {remedy}")
    return _from_hub(config)


def _from_hub(config: ModelConfig) -> Path:
    """The snapshot in the Hugging Face cache, downloaded first where the hub can be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    wanted = {"repo_id": config.hub, "revision": config.revision, "ignore_patterns": ["*.bin", "*.pth", "*.msgpack"]}
    try:
        return Path(snapshot_download(**wanted))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"model={config.name}: {config.hub} is not in the Hugging Face cache and the hub did not give it "
            f"({type(error).__name__}). {_fetch(config).capitalize()}, or give a local copy with model.path=DIR."
        ) from error


def _fetch(config: ModelConfig) -> str:
    revision = f" --revision {config.revision}" if config.revision else ""
    if config.hub:
        return f"run `hf download {config.hub}{revision}`"
    return "copy it again" if config.path else "reinstall zipeval"


def _read_json(path: Path, where: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except FileNotFoundError:
        raise UsageError(f"{where}: {path} is missing. Give a directory in the Hugging Face layout.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {path} cannot be read ({error}). Fetch it again.") from error


def _check_safetensors(path: Path, where: str, config: ModelConfig) -> None:
    """Length and header; a truncated download is noticed in milliseconds instead of after loading its neighbours."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError("its header is not a safetensors header")
            header = json.loads(file.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        expected, actual = 8 + length + max(ends, default=0), path.stat().st_size
        if actual != expected:
            raise ValueError(f"it has {actual} bytes and should have {expected}")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: {path} is damaged: {error}. To mend it, {_fetch(config)}.") from error


def _fingerprint(path: Path, sample: int = 1 << 20) -> str:
    """Hash of names, sizes and content; of a large file only its start, middle and end."""
    digest = hashlib.sha256()
    for file in sorted(f for f in path.iterdir() if f.is_file() and f.suffix in (".json", ".safetensors", ".jinja")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, max(0, size - sample)) if size > 3 * sample else range(0, size, sample):
                stream.seek(start)
                digest.update(stream.read(sample))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Placement:
    """Where and how the weights are held: what `auto` came to."""

    device: str
    dtype: str
    attn_implementation: str


def place(config: ModelConfig) -> Placement:
    """Resolve `auto`.

    Raises:
        UsageError: for a CUDA device that is not there.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    device, dtype, attention = config.device, config.dtype, config.attn_implementation
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UsageError(f"model.device={device}: {count} CUDA devices here. `zipeval doctor` shows them.")
    on_cuda = device.startswith("cuda")
    if dtype == "auto":
        dtype = "bfloat16" if on_cuda else "float32"
    if attention == "auto":
        flash = on_cuda and dtype != "float32" and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "sdpa"
    return Placement(device, dtype, attention)


def family(config: ModelConfig):
    """The module of the model's family.

    Raises:
        UsageError: for a family that does not exist.
    """
    try:
        return import_module(f"zipeval.models.{config.family}")
    except ImportError as error:
        raise UsageError(
            f"model.family={config.family}: no such family. `zipeval list models` shows models."
        ) from error


_loaded: dict[tuple, tuple] = {}


def load(family: str, path: Path, fingerprint: str, placement: Placement):
    """(model, processor) of the family; the latest is kept, so that the runs of a sweep share one copy."""
    key = family, path, fingerprint, placement
    if key not in _loaded:
        _loaded.clear()  # before the next one takes its place: two do not fit
        _loaded[key] = import_module(f"zipeval.models.{family}").load(path, placement)
    return _loaded[key]
