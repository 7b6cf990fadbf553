"""Several processes that answer one run's questions, as torchrun starts them.

    torchrun --nproc_per_node=2 -m zipeval run model=llava15 method=visionzip tokens=64

Every process (rank) holds the whole model on a device of its own and answers its share. The first one does all else:
it scores, asks the judge, writes and prints. What they tell each other are Python objects, on gloo; weights and
activations never travel, so that no other backend is needed. Alone, nothing here does anything or imports torch.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from zipeval.errors import RunError, UsageError

T = TypeVar("T")
VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)  # of torchrun; that there are others shows by them alone
MEETING = timedelta(minutes=5)  # for torchrun's port to answer
PATIENCE = timedelta(
    days=30
)  # for others to finish their share, or a judge; where one dies, torchrun ends them all


@dataclass(frozen=True)
class Place:
    """Of this process among `count`; `local`: among those of its machine."""

    rank: int = 0
    local: int = 0
    count: int = 1


@cache  # lmms-eval is not to see these variables: see `alone`
def here() -> Place:
    """Where this process is; the first and only one unless torchrun started it."""
    if not os.environ.get("MASTER_ADDR") or not {*VARIABLES} <= os.environ.keys():
        return Place()
    return Place(*(int(os.environ[name]) for name in VARIABLES))


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return here().rank == 0


def share(items: list[T]) -> list[T]:
    """This rank's part: neighbours, since they often ask about the same picture."""
    place = here()
    start, end = (
        len(items) * rank // place.count for rank in (place.rank, place.rank + 1)
    )
    return items[start:end]


def exchange(value: T) -> list[T]:
    """What every rank gave, in the order of the ranks. All have to come here, or to fail in `agreed`.

    Raises:
        UsageError, RunError: what one of them failed with.
    """
    return [value] if here().count == 1 else _exchange(value, None)


def gather(value: T) -> list[T] | None:
    """What every rank gave, in the order of the ranks: in the first; None in the others. Raises as `exchange` does."""
    if here().count == 1:
        return [value]
    _exchange(None, None)
    found = [None] * here().count if first() else None
    with _lost():
        _joined().gather_object(value, found)
    return found


@contextmanager
def agreed() -> Iterator[None]:
    """A block that all ranks run, at the end of which all raise what one of them failed with."""
    error = None
    try:
        yield
    except (UsageError, RunError) as raised:
        if here().count == 1 or hasattr(raised, "agreed"):
            raise
        error = raised
    if here().count > 1:
        _exchange(None, error)


def leave() -> None:
    """Wait for the others, as an exit code other than 0 makes torchrun end them, and close what connects us."""
    if here().count == 1:
        return
    with suppress(
        RuntimeError
    ):  # one that waited no longer has gone already: there is nobody left to wait for
        _joined().barrier()
    _joined().destroy_process_group()


def end(code: int) -> None:
    """End this process with an exit code; the only process goes on where the code is 0.

    Among several processes the interpreter is not torn down: threads of gloo can still own tensors then, and asking a
    dying interpreter to free one aborts the process (SIGABRT), for which torchrun also kills the rank that writes.
    """
    if here().count == 1:
        if code:
            sys.exit(code)
        return
    atexit._run_exitfuncs()  # temporary folders, wandb
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def alone() -> Iterator[None]:
    """A block in which libraries see one process: lmms-eval would divide the questions too, and wait for others."""
    if here().count == 1:
        yield
        return
    from unittest.mock import patch

    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    with (
        patch.dict(os.environ, kept, clear=True),
        patch.object(_joined(), "is_initialized", return_value=False),
    ):
        yield


def _exchange(value: Any, error: Exception | None) -> list:
    found: list = [None] * here().count
    with _lost():
        _joined().all_gather_object(found, (value, error))
    for _, raised in found:
        if raised:
            raised.agreed = (
                True  # all of them raise it here, and none has to tell the others
            )
            raise raised
    return [value for value, _ in found]


@contextmanager
def _lost() -> Iterator[None]:
    """Ends this process where another one has died, which has said why."""
    try:
        yield
    except RuntimeError as error:
        print(
            f"zipeval: rank {here().rank}: another rank ended ({str(error).splitlines()[0]}).",
            file=sys.stderr,
        )
        end(1)


@cache
def _joined():
    """torch.distributed, with a process group; the device of this process becomes CUDA's current one."""
    import torch
    from torch import distributed

    if here().local < torch.cuda.device_count():
        torch.cuda.set_device(here().local)
    store, rank, count = next(distributed.rendezvous("env://", timeout=MEETING))
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE
    )
    return distributed
