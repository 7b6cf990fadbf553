"""torch for modules that are imported before it is needed: a budget is refused in a second, and torch takes several."""

from __future__ import annotations


class _Torch:
    """The module, imported when something of it is first used."""

    def __getattr__(self, name: str):
        import torch

        return getattr(torch, name)


torch = _Torch()
