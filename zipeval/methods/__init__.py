"""One file per method.

A method is an object whose `applied(model)` is a context manager in which the model reduces, and whose `budget` is the
number of visual tokens that it leaves an image with, None for all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zipeval.errors import UsageError


def build(method: dict[str, Any]):
    """The method that a config's `method` node describes: `_target_` names the class, `name` only its rows.

    Raises:
        UsageError: if the class refuses its options.
    """
    options = {k: v for k, v in method.items() if k not in ("name", "_target_")}
    module, _, name = method["_target_"].rpartition(".")
    try:
        return getattr(import_module(module), name)(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"method={method['name']}: {error}. `zipeval run --help` shows its settings.") from error
