"""Load models and make methods in Python, as `model=`, `method=` and `tokens=` do on the command line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zipeval import methods, models
from zipeval.config.schema import ModelConfig
from zipeval.engine.budget import Shape
from zipeval.errors import UsageError
from zipeval.inference.validation import check

LOADED = (
    "path",
    "revision",
    "dtype",
    "device",
    "attn_implementation",
    "quantization",
    "device_map",
)


def load(name: str, **settings: Any):
    """Return (model, processor) of `zipeval list models`, as `zipeval run model=NAME` loads them.

    They are a copy of the caller's own: what is done to them changes no run.

    Args:
        settings: the way it is loaded, `LOADED`: as model.SETTING= on the command line.

    Raises:
        UsageError: for what cannot be loaded; says what to do.
    """
    from zipeval.checkpoints.placement import place
    from zipeval.config.compose import compose

    for setting in settings:
        if setting not in LOADED:
            raise UsageError(
                f"{setting}={settings[setting]}: no setting of load(). It takes "
                f"{', '.join(LOADED)}."
            )
    config = compose([f"model={name}"])
    config = check(replace(config, model=replace(config.model, **settings))).model
    return models.load_copy(config.family, models.find(config), place(config))


def method(
    name: str, model, tokens: int | None = None, budget: str = "paper", **options: Any
):
    """Return a method of `zipeval list methods` with its settings for a budget on a model, as `zipeval run` chooses them.

    Args:
        model: a Hugging Face model of a supported family, or its config.
        tokens, budget: what an image is left with, and what that counts: mean, final, or what was published for it.
        options: of the method, as method.OPTION= on the command line; those of a part of it are a dict.

    Raises:
        UsageError: for a budget that cannot be met, and for a model of another family.
    """
    from zipeval.config.compose import compose

    shape = shape_of(getattr(model, "config", model))
    count = "null" if tokens is None else tokens
    overrides = [f"method={name}", f"budget={budget}", f"tokens={count}"]
    # The seed is a setting of a run, which the method's node refers to.
    if "seed" in options:
        overrides.append(f"seed={options.pop('seed')}")
    config = compose(overrides)
    if "projector" in config.method:
        raise UsageError(
            f"method={name}: it has a file that is tuned for one checkpoint. `zipeval "
            "run` looks into it."
        )
    config = check(replace(config, method=_with(config.method, options)))
    if tokens is not None and tokens > shape.image:
        raise UsageError(
            f"tokens={tokens}: this model has {shape.image} visual tokens an image."
        )
    return methods.build(config.method, config.budget, shape)


def _with(node: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return a method's node with other options, also of the nodes in it."""
    changed = {**node, **options}
    for name, option in options.items():
        # A part of a chain is a node of its own, whose other options stay.
        if isinstance(option, dict) and isinstance(node.get(name), dict):
            changed[name] = _with(node[name], option)
    return changed


def shape_of(config) -> Shape:
    """Return the shape of a model with this Hugging Face configuration, for which a budget is chosen.

    Raises:
        UsageError: for a model of another family.
    """
    kind = getattr(config, "model_type", type(config).__name__)
    try:
        family = models.family(ModelConfig(family=kind))
    except UsageError:
        raise UsageError(
            f"model: {kind} is of no family that is supported. `zipeval list models` "
            "shows them."
        ) from None
    settings = config.to_dict()
    tokens = family.visual_tokens(settings)
    layers = family.decoder_layers(settings)
    # Row ends are of packing=newline only, which is chosen for a run.
    crops = tuple(sorted({(crop, 0) for crop, _ in family.grids(settings)}))
    return Shape(tokens, tokens, layers, crops)
