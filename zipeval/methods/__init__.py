"""One file per method.

A method is an object whose `applied(model)` is a context manager in which the model
reduces, and whose `tokens_per_layer(images, depth)` says how many visual tokens of a prompt
then enter each decoder layer; what really enters is held against it. A method with a budget
has a class method `for_budget`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zipeval.engine.budget import Shape
from zipeval.engine.method import stages_of
from zipeval.engine.vision import WithImageNewlines
from zipeval.errors import UsageError


def build(method: dict[str, Any], budget: str, shape: Shape):
    """Return the method that a config's `method` node describes.

    It has its settings for `tokens`, if it has any.

    Args:
        method: `_target_` names the class, `name` only its rows; options that are None
            have the class's default.
        budget: what `tokens` counts, one of zipeval.engine.budget.BUDGETS.
        shape: what the budget is spent on.

    Raises:
        UsageError: if the class refuses its options.
    """
    module, _, name = method["_target_"].rpartition(".")
    try:
        method_class = getattr(import_module(module), name)
        built = _build_class(method_class, method, budget, shape)
        # Refused here: a decoder that is too shallow for the layers of a method.
        inside = stages_of(built).decoder
        if inside is not None:
            inside.check(shape.layers)
        return _with_row_ends(built, shape)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"method={method['name']}: {error}. Install it, or name the directory that holds it in PYTHONPATH. "
            "`zipeval run --help` shows its settings."
        ) from error
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"method={method['name']}: {error}. `zipeval run --help` shows its settings."
        ) from error


def _build_class(method_class, method: dict[str, Any], budget: str, shape: Shape):
    """Return an object of a method's class, with the options of its config."""
    # None in a config stands for the class's own default.
    options = {name: value for name, value in method.items() if value is not None}
    del options["_target_"]
    options.pop("name", None)
    if "tokens" not in options:
        return method_class(**options)
    return method_class.for_budget(options.pop("tokens"), budget, shape, **options)


def modules(method: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules that hold the classes of a config's `method` node.

    They include those of the methods that it is made of.
    """
    names = [method["_target_"].rpartition(".")[0]]
    for option in method.values():
        # A node within the node: one of the methods of a chain.
        if isinstance(option, dict):
            names += modules(option)
    return tuple(names)


def _with_row_ends(method, shape: Shape):
    """Return a method that leaves the row ends of tiles, where the model is to have them.

    Raises:
        ValueError: for a method that leaves the packing to the model.
    """
    if not shape.row_ends:
        return method
    stages = stages_of(method)
    # Of a chain, the first method is built by a call of its own, and has them already.
    if stages.vision is not None and stages.decoder is not None:
        return method
    if stages.vision is None:
        raise ValueError(
            "packing=newline is of methods before the language model; inside it the model packs as it does"
        )
    return WithImageNewlines(method)
