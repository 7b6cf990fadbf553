"""Finding, checking and loading checkpoints. A model family is one module here; torch is imported only to load."""

from __future__ import annotations

import gc
import hashlib
import json
import struct
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path

from zipeval.checkpoints.hub import fetch, snapshot
from zipeval.checkpoints.placement import Placement, check_memory
from zipeval.config.schema import ModelConfig
from zipeval.errors import UsageError
from zipeval.models._checkpoint import fingerprint

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine that looks complete.

    Attributes:
        path: its directory.
        revision: the hub's commit; None for weights that lie here, which only the fingerprint tells apart.
        visual_tokens: how many its largest picture, an image or a video, has without reduction.
        layers: of its decoder.
        grids: (crops, rows of patches in its tiles) that an image or video can have, ascending.
        parameters: numbers in its weights.
        quantizable: those of them in matrices of decoder layers.
        weights: its weight files.
        without_file: the fingerprint of weights that no file holds: drawn at random, or loaded by the user.
        loaded: (model, processor) that the user loaded.
    """

    path: Path
    revision: str | None
    visual_tokens: int
    layers: int
    grids: tuple[tuple[int, int], ...]
    parameters: int
    quantizable: int
    weights: tuple[Path, ...] = ()
    without_file: str | None = None
    loaded: tuple | None = field(default=None, repr=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Hash everything in it that can change an answer; see zipeval/models/_checkpoint.py.

        It is made when it is first asked for: what is refused is refused without reading gigabytes.

        Raises:
            UsageError: if a file cannot be read.
        """
        if self.without_file:
            return self.without_file
        try:
            return fingerprint(self.path, self.weights)
        except OSError as error:
            raise UsageError(
                f"model.path={self.path}: {error.filename} cannot be read ({error.strerror}). Give a copy that can."
            ) from error


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
        raise UsageError(
            f"{where}: no *.safetensors in {path}. Convert the weights, or {fetch(config)}."
        )
    sizes = [_check_safetensors(file, where, config) for file in weights]
    parameters, quantizable = map(sum, zip(*sizes, strict=True))
    settings = _of_family(settings, config, path, where)
    return Checkpoint(
        path=path,
        revision=None
        if config.path or config.embedded
        else path.name,  # of a snapshot in the cache its commit
        visual_tokens=its.visual_tokens(settings),
        layers=its.decoder_layers(settings),
        grids=its.grids(settings),
        parameters=parameters,
        quantizable=quantizable,
        weights=tuple(weights),
    )


def _of_family(settings: dict, config: ModelConfig, path: Path, where: str) -> dict:
    """A config.json, or that of the stand-in which is made of it.

    Raises:
        UsageError: if it is of another family.
    """
    its = family(config)
    if config.embedded and not config.path and hasattr(its, "of_llava"):
        _refuse_for_stand_in(config)
        settings = its.of_llava(settings)
    if settings.get("model_type") != its.MODEL_TYPE:
        raise UsageError(
            f"{where}: {path} holds a {settings.get('model_type')!r} checkpoint, the family {config.family!r} "
            f"loads {its.MODEL_TYPE!r}. `zipeval list models` shows the families."
        )
    return settings


def size(config: ModelConfig) -> dict:
    """The model's config.json: the one that is here, or what the family knows of models by their names.

    Raises:
        UsageError: if there is neither; says what to do.
    """
    its = family(config)
    if config.path or config.embedded:
        path = _directory(config)
        where = f"model.path={config.path}" if config.path else f"model={config.name}"
        return _of_family(_read_json(path / "config.json", where), config, path, where)
    if config.name not in its.SIZES:
        raise UsageError(
            f"model={config.name}: its size is not known. Set model.path=DIR, where its config.json is."
        )
    return its.SIZES[config.name]


def sketch(config: ModelConfig) -> Checkpoint:
    """A checkpoint without weights, for `draw`; counts of parameters are not known before."""
    its, settings = family(config), size(config)
    return Checkpoint(
        path=Path(config.path or config.name),
        revision=None,
        visual_tokens=its.visual_tokens(settings),
        layers=its.decoder_layers(settings),
        grids=its.grids(settings),
        parameters=0,
        quantizable=0,
        without_file="random-"
        + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:9],
    )


def draw(config: ModelConfig, placement: Placement, seed: int):
    """The model in evaluation mode, its weights drawn at random: on the device, in its dtype, and nowhere else.

    Raises:
        UsageError: if they do not fit into memory.
    """
    import torch

    model_class, settings = family(config).model_class(), size(config)
    made = [
        model_class.config_class.from_dict(settings) for _ in range(2)
    ]  # a model changes its own
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model_class(made[0]).parameters())
    check_memory(replace(sketch(config), parameters=parameters), placement)
    with torch.random.fork_rng(), torch.device(placement.device):
        torch.manual_seed(seed)
        options = {
            "dtype": getattr(torch, placement.dtype),
            "attn_implementation": placement.attn_implementation,
        }
        return model_class._from_config(made[1], **options).eval()


def _refuse_for_stand_in(config: ModelConfig) -> None:
    """Its weights are copied into a model that was made in code; only from_pretrained quantises and spreads."""
    for name in ("quantization", "device_map"):
        value = getattr(config, name)
        if value != getattr(ModelConfig, name):
            raise UsageError(
                f"model.{name}={value}: model={config.name} is made of {config.embedded}'s weights in memory, which "
                f"excludes it. `zipeval run model={config.embedded} model.{name}={value}` works."
            )


def _processor_file(path: Path) -> str:
    """transformers 5 writes the one, older versions the other."""
    new, old = "processor_config.json", "preprocessor_config.json"
    return old if (path / old).exists() else new


def _weights(path: Path, where: str) -> list[Path]:
    """The weight files, those that an index names or else those that are there."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path.glob("*.safetensors"))
    return [
        path / name
        for name in sorted(set(_read_json(index, where).get("weight_map", {}).values()))
    ]


def _directory(config: ModelConfig) -> Path:
    if config.path:
        path = Path(config.path).expanduser()
        if not path.is_dir():
            raise UsageError(
                f"model.path={config.path}: no such directory. Give one with a config.json."
            )
        return path
    if config.embedded:
        return EMBEDDED / config.embedded
    if not config.hub:
        remedy = getattr(
            family(config),
            "NO_WEIGHTS",
            "Set model.hub=ORGANISATION/NAME or model.path=DIR.",
        )
        raise UsageError(f"model={config.name}: it names no weights. {remedy}")
    return snapshot(config)


def _read_json(path: Path, where: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except FileNotFoundError:
        raise UsageError(
            f"{where}: {path} is missing. Give a directory in the Hugging Face layout."
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{where}: {path} cannot be read ({error}). Fetch it again."
        ) from error


def _check_safetensors(path: Path, where: str, config: ModelConfig) -> tuple[int, int]:
    """(parameters, those in matrices of decoder layers), if length and header agree.

    A truncated download is noticed in milliseconds instead of after loading its neighbours.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 100_000_000:
                raise ValueError("its header is not a safetensors header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = [v["data_offsets"][1] for v in header.values()]
        sizes = {k: prod(v["shape"]) for k, v in header.items()}
        expected, actual = 8 + length + max(ends, default=0), path.stat().st_size
        if actual != expected:
            raise ValueError(f"it has {actual} bytes and should have {expected}")
        matrices = [
            k
            for k, v in header.items()
            if ".layers." in k and "vision" not in k and len(v["shape"]) == 2
        ]
        return sum(sizes.values()), sum(sizes[k] for k in matrices)
    except (
        OSError,
        ValueError,
        struct.error,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise UsageError(
            f"{where}: {path} is damaged: {error}. To mend it, {fetch(config)}."
        ) from error


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


def load(family: str, checkpoint: Checkpoint, placement: Placement):
    """(model, processor) of the family; the latest is kept, so that the runs of a sweep share one copy.

    Raises:
        UsageError: if the weights cannot be loaded, or do not fit into memory.
    """
    if checkpoint.loaded:
        return checkpoint.loaded
    place = family, checkpoint.path, placement
    if not any(key[:-1] == place for key in _loaded):
        if _loaded:  # before the next one takes its place: two do not fit
            _clear()
        check_memory(
            checkpoint, placement
        )  # before the fingerprint reads weights that do not fit
    key = (*place, checkpoint.fingerprint)
    if key not in _loaded:
        if _loaded:  # what lies there has changed
            _clear()
        _loaded[key] = import_module(f"zipeval.models.{family}").load(
            checkpoint.path, placement
        )
    return _loaded[key]


def load_copy(family: str, checkpoint: Checkpoint, placement: Placement):
    """Return (model, processor) of its own: whoever changes it changes no run's.

    Raises:
        UsageError: as `load` does.
    """
    check_memory(checkpoint, placement)
    return import_module(f"zipeval.models.{family}").load(checkpoint.path, placement)


def _clear() -> None:
    """Give back the memory of the loaded model: to the driver too, which is asked what is free."""
    import torch

    _loaded.clear()
    gc.collect()
    torch.cuda.empty_cache()
