"""Data sets of tasks: local copies read in place of the hub's, and what is wrong with one before anything is loaded.

A copy of `org/name` is the folder `data.root/org/name` in the hub's layout, as `hf download` makes it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from zipeval import benchmarks
from zipeval.benchmarks import Source
from zipeval.errors import NotHereError, UsageError
from zipeval.utils import content_hash, foreign_patches
from zipeval.utils.hub_access import reachable

# The states of a part of a data set.
PRESENT = "present"
MISSING = "missing"
DAMAGED = "damaged"


def check_root(root: str | None) -> None:
    """Raise UsageError if there is no such directory."""
    if root is not None and not Path(root).expanduser().is_dir():
        raise UsageError(
            f"data.root={root}: no such directory. "
            "Give the one that holds ORGANISATION/NAME folders."
        )


def copy_of(dataset: str, root: str | None) -> Path | None:
    """Return the local copy of a data set, if there is one."""
    if root is None:
        return None
    folder = Path(root).expanduser().absolute() / dataset
    return folder if folder.is_dir() else None


def fingerprint(task: str, root: str | None) -> str | None:
    """Return the hash of the names and contents of the local copy that a task reads; None where it reads none."""
    dataset = benchmarks.dataset(task) if root else None
    folder = copy_of(dataset, root) if dataset else None
    return _digest(folder) if folder else None


def require(task: str, root: str | None) -> None:
    """Raise NotHereError where a task's data is damaged, or neither here nor can be downloaded; say how to get it."""
    for source in sources(task):
        state, reason = examine(source, root)
        if state == PRESENT:
            continue
        # A copy comes before the hub, so that the hub does not make up for a bad one.
        if copy_of(source.dataset, root) or not reachable():
            raise NotHereError(
                f"tasks=[{task}]: {source.dataset} is {state} ({reason}). "
                f"{_advice(source, root)}."
            )


def examine(source: Source, root: str | None) -> tuple[str, str]:
    """Return (present | missing | damaged, where it is or what is wrong).

    Of parquet files the footers are read, not rows.
    """
    folder = copy_of(source.dataset, root)
    if folder is not None:
        return _examine_copy(folder, source)
    prepared = _prepared(source)
    return (PRESENT, str(prepared)) if prepared else (MISSING, _nowhere(root))


def _examine_copy(folder: Path, source: Source) -> tuple[str, str]:
    """Return the state of a local copy as `examine` does."""
    import yaml

    try:
        files = _files(folder, source)
    except yaml.YAMLError as error:
        return (
            DAMAGED,
            f"{folder}/README.md: its head is no YAML: {_first_line(error)}",
        )
    # There is no such config, or nothing matches what the README names.
    except (ValueError, FileNotFoundError) as error:
        return MISSING, _first_line(error)
    if source.split not in files:
        splits = ", ".join(map(str, files)) or "nothing"
        return MISSING, f"{folder} has no split {source.split}, only {splits}"
    problem = _find_damaged(files[source.split])
    return (DAMAGED, problem) if problem else (PRESENT, str(folder))


def _find_damaged(files: list[str]) -> str | None:
    """Return the first parquet file without a whole footer, and what is wrong with it."""
    import pyarrow
    from pyarrow import parquet

    for file in files:
        try:
            parquet.read_metadata(file)
        except (pyarrow.ArrowInvalid, OSError) as error:
            return f"{file}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message; what follows is a library's advice."""
    return str(error).split("\n")[0]


def is_here(task: str, root: str | None, cache: Path | None = None) -> bool:
    """Return whether what a task reads of the hub is on this machine; of a data set that is not on the hub it is.

    Args:
        cache: where else than in datasets' own cache it may be.
    """
    names = {source.dataset for source in sources(task)}
    names.add(benchmarks.dataset(task) or "")
    # Any other name is that of a data set which lies beside its task.
    on_hub = [name for name in names if name.count("/") == 1]
    return all(
        copy_of(name, root) or _prepared(Source(name, ""), cache) for name in on_hub
    )


def rows(source: Source, root: str | None) -> int | None:
    """Return the number of rows of the local copy, if there is a whole one."""
    folder = copy_of(source.dataset, root)
    if folder is None or examine(source, root)[0] != PRESENT:
        return None
    from pyarrow import parquet

    files = _files(folder, source)[source.split]
    return sum(parquet.read_metadata(file).num_rows for file in files)


def report(tasks: list[str], root: str | None) -> tuple[str, bool]:
    """Return (a line for each part of a data set that the tasks read, whether all are present)."""
    check_root(root)
    # Tasks share data sets, and each is told of once, where it comes first.
    parts = dict.fromkeys(chain.from_iterable(map(sources, tasks)))
    lines, all_present = [], True
    for source in parts:
        state, detail = examine(source, root)
        name = " ".join(filter(None, (source.dataset, source.config, source.split)))
        line = f"{state:<8} {name}: {detail}"
        if state != PRESENT:
            line += f". {_advice(source, root)}"
            all_present = False
        lines.append(line)
    return "\n".join(lines), all_present


@contextmanager
def copies_below(root: str | None) -> Iterator[None]:
    """Let datasets.load_dataset read local copies within the block, whoever calls it.

    So are those read whose ids a task has in its own code.
    """
    import datasets

    load = datasets.load_dataset

    @functools.wraps(load)
    def load_dataset(path, *args, **kwargs):
        # lmms-eval's tasks insist on a login; without this one is used if there is one.
        if kwargs.get("token") is True:
            del kwargs["token"]
        folder = copy_of(path, root) if path.count("/") == 1 else None
        if folder is None:
            return load(path, *args, **kwargs)
        kwargs["cache_dir"] = _cache(folder)
        return load(str(folder), *args, **kwargs)

    with foreign_patches.load_datasets_with(load_dataset):
        yield


def sources(task: str) -> tuple[Source, ...]:
    """Return the parts of data sets that a task of the papers is known to read, its samples first."""
    return benchmarks.lookup(task).sources


def _files(folder: Path, source: Source) -> Mapping[str, list[str]]:
    """Return the files of a copy by split."""
    import datasets

    # The builder makes folders for rows, which are not read here.
    with TemporaryDirectory() as nothing:
        builder = datasets.load_dataset_builder(
            str(folder), name=source.config, cache_dir=nothing
        )
    return builder.config.data_files or {}


def _cache(folder: Path) -> str:
    """Return the folder for the prepared rows of a copy.

    datasets tells copies of one name apart neither by place nor by content.
    """
    from datasets import config

    return str(Path(config.HF_DATASETS_CACHE) / "zipeval" / _digest(folder))


def _datasets_cache() -> Path:
    """Return datasets' own HF_DATASETS_CACHE; where that is not imported yet, what it will be."""
    if "datasets" in sys.modules:
        from datasets import config

        return Path(config.HF_DATASETS_CACHE)
    from huggingface_hub import constants

    default = f"{constants.HF_HOME}/datasets"
    return Path(os.environ.get("HF_DATASETS_CACHE", default)).expanduser()


def _prepared(source: Source, cache: Path | None = None) -> Path | None:
    """Return the folder in a cache with the rows of a data set that was loaded before.

    Args:
        cache: the Hugging Face cache, if it is None.
    """
    if cache is None:
        cache = _datasets_cache()
    organisation, name = source.dataset.split("/")
    # Where there is nothing of the organisation, the seconds of the import are saved.
    if not any(cache.glob(f"{organisation}___*")):
        return None
    from datasets.naming import camelcase_to_snakecase

    folder = cache / f"{organisation}___{camelcase_to_snakecase(name)}"
    # CONFIG/VERSION/HASH/dataset_info.json, which is written when the rows are there.
    config = source.config or "*"
    prepared = folder.glob(f"{config}/*/*/dataset_info.json")
    return folder if any(prepared) else None


def _nowhere(root: str | None) -> str:
    """Say where a data set was looked for."""
    elsewhere = f", not below data.root={root}" if root else ""
    return f"not in the Hugging Face cache{elsewhere}"


def _advice(source: Source, root: str | None) -> str:
    """Say how to make a local copy."""
    place = root or "data"
    folder = f"{place}/{source.dataset}"
    command = f"hf download --repo-type dataset {source.dataset} --local-dir {folder}"
    return (
        f"Where the hub can be reached, `{command}` "
        f"makes a copy to use with data.root={place}"
    )


def _digest(folder: Path) -> str:
    """Return the hash of the names and contents of all files of a copy, but for what `hf download` notes there."""
    return content_hash.digest_folder(folder, ignored=(".cache",))
