"""Finding, checking and loading checkpoints. A model family is one module here; torch is imported only to load."""

from __future__ import annotations

import gc
import hashlib
import json
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
from zipeval.models._family import ModelFamily

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
    model_family = family(config)
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
        # A snapshot in the hub's cache has the name of its commit.
        revision=None if config.path or config.embedded else path.name,
        visual_tokens=model_family.visual_tokens(settings),
        layers=model_family.decoder_layers(settings),
        grids=model_family.grids(settings),
        parameters=parameters,
        quantizable=quantizable,
        weights=tuple(weights),
    )


def _of_family(settings: dict, config: ModelConfig, path: Path, where: str) -> dict:
    """Return the settings of a config.json, or those of the stand-in which is made of it.

    Raises:
        UsageError: if it is of another family.
    """
    model_family = family(config)
    if config.embedded and not config.path and model_family.from_llava:
        _refuse_for_stand_in(config)
        settings = model_family.from_llava(settings)
    if settings.get("model_type") != model_family.model_type:
        raise UsageError(
            f"{where}: {path} holds a {settings.get('model_type')!r} checkpoint, the family {config.family!r} "
            f"loads {model_family.model_type!r}. `zipeval list models` shows the families."
        )
    return settings


def size(config: ModelConfig) -> dict:
    """Return the model's config.json: the one that is here, or what the family knows of models by their names.

    Raises:
        UsageError: if there is neither; says what to do.
    """
    sizes = family(config).sizes
    if config.path or config.embedded:
        path = _directory(config)
        where = f"model.path={config.path}" if config.path else f"model={config.name}"
        return _of_family(_read_json(path / "config.json", where), config, path, where)
    if config.name not in sizes:
        raise UsageError(
            f"model={config.name}: its size is not known. Set model.path=DIR, where its config.json is."
        )
    return sizes[config.name]


def sketch(config: ModelConfig) -> Checkpoint:
    """Return a checkpoint without weights, for `draw`; its number of parameters is not known before."""
    model_family, settings = family(config), size(config)
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:9]
    return Checkpoint(
        path=Path(config.path or config.name),
        revision=None,
        visual_tokens=model_family.visual_tokens(settings),
        layers=model_family.decoder_layers(settings),
        grids=model_family.grids(settings),
        parameters=0,
        quantizable=0,
        without_file=f"random-{digest}",
    )


def draw(config: ModelConfig, placement: Placement, seed: int):
    """Return the model in evaluation mode, its weights drawn at random: on the device, in its dtype, nowhere else.

    Raises:
        UsageError: if they do not fit into memory.
    """
    import torch

    model_class, settings = family(config).model_class(), size(config)
    # A model changes its configuration, so that each needs one of its own.
    counted = model_class.config_class.from_dict(settings)
    drawn = model_class.config_class.from_dict(settings)
    with torch.device("meta"):
        weights = model_class(counted).parameters()
        parameters = sum(weight.numel() for weight in weights)
    check_memory(replace(sketch(config), parameters=parameters), placement)
    with torch.random.fork_rng(), torch.device(placement.device):
        torch.manual_seed(seed)
        model = model_class._from_config(
            drawn,
            dtype=getattr(torch, placement.dtype),
            attn_implementation=placement.attn_implementation,
        )
    return model.eval()


def _refuse_for_stand_in(config: ModelConfig) -> None:
    """Raise UsageError for settings that a stand-in cannot have.

    Its weights are copied into a model that was made in code; only from_pretrained quantises and spreads.
    """
    for name in ("quantization", "device_map"):
        value = getattr(config, name)
        if value != getattr(ModelConfig, name):
            raise UsageError(
                f"model.{name}={value}: model={config.name} is made of {config.embedded}'s weights in memory, which "
                f"excludes it. `zipeval run model={config.embedded} model.{name}={value}` works."
            )


def _processor_file(path: Path) -> str:
    """Return the file of the processor, which transformers 5 and older versions name differently."""
    new, old = "processor_config.json", "preprocessor_config.json"
    return old if (path / old).exists() else new


def _weights(path: Path, where: str) -> list[Path]:
    """Return the weight files: those that an index names, or else those that are there."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path.glob("*.safetensors"))
    files = _read_json(index, where).get("weight_map", {}).values()
    return [path / name for name in sorted(set(files))]


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
        remedy = family(config).no_weights
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
    """Return the parameters of a weight file, and those in matrices of decoder layers.

    Opening it compares its length with its header, so that a truncated download is noticed in milliseconds instead of
    after loading its neighbours.

    Raises:
        UsageError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    parameters, quantizable = 0, 0
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                shape = file.get_slice(name).get_shape()
                parameters += prod(shape)
                in_decoder = ".layers." in name and "vision" not in name
                if in_decoder and len(shape) == 2:
                    quantizable += prod(shape)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{where}: {path} is damaged: {error}. To mend it, {fetch(config)}."
        ) from error
    return parameters, quantizable


def family(config: ModelConfig) -> ModelFamily:
    """Return the declaration of the model's family, which the module of this name has.

    Raises:
        UsageError: for a family that does not exist.
    """
    refusal = UsageError(
        f"model.family={config.family}: no such family. `zipeval list models` shows models."
    )
    # The other modules here, whose names begin with an underscore, are parts of families.
    if config.family.startswith("_"):
        raise refusal
    try:
        return _declared(config.family)
    except ImportError as error:
        raise refusal from error


def _declared(name: str) -> ModelFamily:
    """Return the declaration in a module of this package."""
    return import_module(f"zipeval.models.{name}").FAMILY


_loaded: dict[tuple, tuple] = {}


def load(family: str, checkpoint: Checkpoint, placement: Placement):
    """Return (model, processor) of the family; the latest is kept, so that the runs of a sweep share one copy.

    Raises:
        UsageError: if the weights cannot be loaded, or do not fit into memory.
    """
    if checkpoint.loaded:
        return checkpoint.loaded
    place = family, checkpoint.path, placement
    if not any(key[:-1] == place for key in _loaded):
        # Two models would not fit: the last one goes before the next one comes, and the
        # memory is checked before the fingerprint reads weights that do not fit.
        _clear()
        check_memory(checkpoint, placement)
    key = (*place, checkpoint.fingerprint)
    if key not in _loaded:
        # Other weights lie at the same place now.
        _clear()
        _loaded[key] = _declared(family).load(checkpoint.path, placement)
    return _loaded[key]


def load_copy(family: str, checkpoint: Checkpoint, placement: Placement):
    """Return (model, processor) of its own: whoever changes it changes no run's.

    Raises:
        UsageError: as `load` does.
    """
    check_memory(checkpoint, placement)
    return _declared(family).load(checkpoint.path, placement)


def _clear() -> None:
    """Give back the memory of the loaded model: to the driver too, which is asked what is free."""
    if not _loaded:
        return
    import torch

    _loaded.clear()
    gc.collect()
    torch.cuda.empty_cache()
