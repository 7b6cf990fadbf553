"""Change what other libraries do, for the time of a block: each patch of theirs is one context manager here.

A library is imported when its patch is applied, so that a command which patches nothing does not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any


@dataclass(eq=False)  # two blocks may set the same value, and each ends its own
class _Replacement:
    """A value that an attribute has while a block runs."""

    value: Any


# Threads may be in blocks of one attribute at once, and leave them in any order. So the
# library's own value is noted by the first block only, and comes back with the last.
_lock = RLock()
_replacements: dict[tuple[int, str], list[_Replacement]] = {}


@contextmanager
def _replaced(library: Any, name: str, value: Any) -> Iterator[None]:
    """Give a library's attribute another value within the block."""
    key = (id(library), name)
    replacement = _Replacement(value)
    with _lock:
        original = _Replacement(getattr(library, name))
        _replacements.setdefault(key, [original]).append(replacement)
        setattr(library, name, value)
    try:
        yield
    finally:
        with _lock:
            active = _replacements[key]
            active.remove(replacement)
            setattr(library, name, active[-1].value)
            if len(active) == 1:
                del _replacements[key]


@contextmanager
def environment(removed: Collection[str] = (), **variables: str) -> Iterator[None]:
    """Set and remove environment variables within the block, for libraries that know no other way to be told.

    What a library sets in the block does not outlast it.
    """
    with _lock:
        before = dict(os.environ)
        for name in before.keys() & set(removed):
            del os.environ[name]
        os.environ.update(variables)
    try:
        yield
    finally:
        # Never empty in between: other threads read it.
        with _lock:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)


@contextmanager
def refuse_truncated_images() -> Iterator[None]:
    """Let PIL raise for an image that is cut off.

    Importing lmms-eval makes PIL accept such images, whose missing part is then grey.
    """
    from PIL import ImageFile

    with _replaced(ImageFile, "LOAD_TRUNCATED_IMAGES", False):
        yield


@contextmanager
def load_datasets_with(load_dataset: Callable[..., Any]) -> Iterator[None]:
    """Put a function in place of `datasets.load_dataset`, which lmms-eval and its tasks call by that name."""
    import datasets

    with _replaced(datasets, "load_dataset", load_dataset):
        yield


@contextmanager
def keep_datasets_offline() -> Iterator[None]:
    """Let datasets read what its cache has: a newer version on the hub is not what was answered.

    Both libraries read their environment variable only once, when they are imported.
    """
    import datasets
    from huggingface_hub import constants

    with (
        _replaced(datasets.config, "HF_HUB_OFFLINE", True),
        _replaced(constants, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextmanager
def hide_lmms_bars() -> Iterator[None]:
    """Let lmms-eval draw no progress bars of its questions and its scoring.

    It draws them wherever it runs, also where there is no terminal.
    """
    from lmms_eval import evaluator
    from lmms_eval.api import task

    with (
        _replaced(task, "tqdm", partial(_hidden_bar, task.tqdm)),
        _replaced(evaluator, "tqdm", partial(_hidden_bar, evaluator.tqdm)),
    ):
        yield


def _hidden_bar(tqdm: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return a bar that is not drawn, also where lmms-eval itself says that it is."""
    return tqdm(*args, **{**options, "disable": True})


@contextmanager
def hide_process_group() -> Iterator[None]:
    """Let torch.distributed say that it is not in use.

    lmms-eval would divide the questions among processes too, and wait for the others.
    """
    from torch import distributed

    with _replaced(distributed, "is_initialized", lambda: False):
        yield
