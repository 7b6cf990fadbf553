"""One file per method.

A method is an object whose `applied(model)` is a context manager in which the model reduces, and whose
`entering(images, depth)` says how many visual tokens of a prompt then enter each decoder layer; what really enters is
held against it. A method with a budget has a class method `for_budget`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zipeval.engine.budget import Shape
from zipeval.errors import UsageError


def build(method: dict[str, Any], budget: str, shape: Shape):
    """The method that a config's `method` node describes, with its settings for `tokens`, if it has any.

    Args:
        method: `_target_` names the class, `name` only its rows; options that are None have the class's default.
        budget: what `tokens` counts, one of zipeval.engine.budget.BUDGETS.
        shape: what the budget is spent on.

    Raises:
        UsageError: if the class refuses its options.
    """
    options = {
        k: v
        for k, v in method.items()
        if k not in ("name", "_target_") and v is not None
    }
    module, _, name = method["_target_"].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
        made = (
            cls.for_budget(options.pop("tokens"), budget, shape, **options)
            if "tokens" in options
            else cls(**options)
        )
        if hasattr(made, "check"):
            made.check(shape.layers)
        return _packed(made, shape)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"method={method['name']}: {error}. Install it, or name the directory that holds it in PYTHONPATH. "
            "`zipeval run --help` shows its settings."
        ) from error
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"method={method['name']}: {error}. `zipeval run --help` shows its settings."
        ) from error


def modules(method: dict[str, Any]) -> tuple[str, ...]:
    """Those that hold the classes of a config's `method` node, and of the methods that it is made of."""
    inner = [
        name
        for option in method.values()
        if isinstance(option, dict)
        for name in modules(option)
    ]
    return (method["_target_"].rpartition(".")[0], *inner)


def _packed(method, shape: Shape):
    from zipeval.engine.vision import RowEnds, VisionMethod

    if not shape.row_ends or hasattr(method, "first"):
        return method
    if not isinstance(method, VisionMethod):
        raise ValueError(
            "packing=newline is of methods before the language model; inside it the model packs as it does"
        )
    return RowEnds(method)
