"""Configurations: their schema, and how Hydra composes them."""

from __future__ import annotations

from typing import Any

from zipeval import moved


def __getattr__(name: str) -> Any:
    """Return what this package called by a name when it was a module."""
    return moved.attribute(__name__, name)
