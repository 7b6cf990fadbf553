"""Host memory of this process while a long task is answered: it has to stay flat.

    python scripts/bench_memory.py SAMPLES [OVERRIDE ...]
    python scripts/bench_memory.py 10000 method=visionzip tokens=16

The questions of zipeval_shapes are repeated until there are enough. Memory is the resident set, printed every 1000
samples and when the records are made; the growth is told from the first 1000 on, when all that is needed once is there.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import psutil
import pyarrow
from pyarrow import parquet

import zipeval.utils.progress
from zipeval import benchmarks
from zipeval.config.compose import compose
from zipeval.evaluation.chat_model import ZipEval
from zipeval.evaluation.runner import evaluate
from zipeval.inference.session import Session

TASK, EVERY = "zipeval_shapes", 1000


def resident() -> float:
    """MiB of this process, without what the garbage collector has not met yet."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def repeated(folder: Path, samples: int, here: Path) -> Path:
    """The task with its questions over and over."""
    copy = Path(shutil.copytree(folder, here / TASK))
    table = parquet.read_table(copy / "test.parquet")
    parquet.write_table(
        pyarrow.concat_tables([table] * -(-samples // len(table))),
        copy / "test.parquet",
    )
    return copy


def main(samples: int, overrides: list[str]) -> None:
    session = Session(compose([f"limit={samples}", f"tasks=[{TASK}]", *overrides]))
    told: list[float] = []

    @contextmanager
    def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if before // EVERY < done // EVERY:
                told.append(resident())
                print(f"{done:>7} samples {told[-1]:8.1f} MiB", flush=True)

        yield advance

    with (
        TemporaryDirectory() as here,
        patch.object(zipeval.progress, "progress", progress),
    ):
        evaluate(
            ZipEval(session),
            TASK,
            repeated(benchmarks.task_folder(TASK), samples, Path(here)),
        )
    print(f"scored  {samples:>7} {resident():8.1f} MiB")
    if len(told) > 1:
        growth = told[-1] - told[0]
        print(
            f"growth while answering: {growth:.1f} MiB, {growth * 1024 / (len(told) - 1) / EVERY:.2f} KiB a sample"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
