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

from zipeval.errors import RunEndingError, RunError, UsageError
from zipeval.utils import foreign_patches

T = TypeVar("T")
# torchrun sets these; nothing else shows that there are other processes.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# For torchrun's port to answer.
MEETING = timedelta(minutes=5)
# For others to finish their share, or a judge; where one dies, torchrun ends them all.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Place:
    """The place of a process among others.

    Attributes:
        rank: number of the process, from 0.
        local: its number among those of its machine.
        count: how many processes there are.
    """

    rank: int = 0
    local: int = 0
    count: int = 1


# Cached, since `alone` hides the variables from lmms-eval.
@cache
def here() -> Place:
    """Return the place of this process: the first and only one unless torchrun started it."""
    # Other launchers, such as Slurm's, set some of the variables but no address.
    if not os.environ.get("MASTER_ADDR") or not {*VARIABLES} <= os.environ.keys():
        return Place()
    return Place(*(int(os.environ[name]) for name in VARIABLES))


def first() -> bool:
    """Return whether this is the process that writes and prints."""
    return here().rank == 0


def share(items: list[T]) -> list[T]:
    """Return this rank's part: neighbours, since they often ask about the same picture."""
    place = here()
    start = len(items) * place.rank // place.count
    stop = len(items) * (place.rank + 1) // place.count
    return items[start:stop]


def exchange(value: T) -> list[T]:
    """Return what every rank gave, in the order of the ranks.

    All have to come here, or to fail in `raise_on_all_ranks`.

    Raises:
        UsageError, RunError: what one of them failed with.
    """
    return [value] if here().count == 1 else _exchange(value, None)


def gather(value: T) -> list[T] | None:
    """Return what every rank gave, in the order of the ranks: in the first; None in the others.

    Raises:
        UsageError, RunError: what one of them failed with.
    """
    if here().count == 1:
        return [value]
    # Errors travel first: a rank that failed has no value to gather.
    _exchange(None, None)
    values = [None] * here().count if first() else None
    with _end_with_others():
        _joined().gather_object(value, values)
    return values


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Let all ranks raise, at the end of the block that all of them run, what one of them failed with.

    Raises:
        UsageError, RunError: what one of them failed with.
    """
    error = None
    try:
        yield
    except (UsageError, RunError) as raised:
        # The others wait for this exchange only if they do not know of the error yet.
        if here().count == 1 or raised.on_all_ranks:
            raise
        error = raised
    if here().count > 1:
        _exchange(None, error)


def leave() -> None:
    """Wait for the others, as an exit code other than 0 makes torchrun end them, and close what connects us."""
    if here().count == 1:
        return
    # One that waited no longer has gone already: there is nobody left to wait for.
    with suppress(RuntimeError):
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
    # os._exit skips them, and they remove temporary folders and finish wandb.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def alone() -> Iterator[None]:
    """Show libraries one process within the block.

    lmms-eval would divide the questions too, and wait for others.
    """
    if here().count == 1:
        yield
        return
    # The group is joined before it is hidden, and before its variables are gone.
    _joined()
    with (
        foreign_patches.environment(removed=VARIABLES),
        foreign_patches.hide_process_group(),
    ):
        yield


def _exchange(value: Any, error: RunEndingError | None) -> list:
    """Return the values of all ranks, or raise the error of the first that has one."""
    messages: list = [None] * here().count
    with _end_with_others():
        _joined().all_gather_object(messages, (value, error))
    for _, raised in messages:
        if raised:
            # All of them raise it here, and none has to tell the others.
            raised.on_all_ranks = True
            raise raised
    return [value for value, _ in messages]


@contextmanager
def _end_with_others() -> Iterator[None]:
    """End this process where another one has died, which has said why."""
    try:
        yield
    except RuntimeError as error:
        print(
            f"zipeval: rank {here().rank}: another rank ended "
            f"({str(error).splitlines()[0]}).",
            file=sys.stderr,
        )
        end(1)


@cache
def _joined():
    """Return torch.distributed with a process group, and make this process's device CUDA's current one."""
    import torch
    from torch import distributed

    if here().local < torch.cuda.device_count():
        torch.cuda.set_device(here().local)
    store, rank, count = next(distributed.rendezvous("env://", timeout=MEETING))
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE
    )
    return distributed
