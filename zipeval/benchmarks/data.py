"""Data sets of tasks: local copies read in place of the hub's, and what is wrong with one before anything is loaded.

A copy of `org/name` is the folder `data.root/org/name` in the hub's layout, as `hf download` makes it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from zipeval import benchmarks
from zipeval.benchmarks import Source
from zipeval.errors import NotHereError, UsageError
from zipeval.utils import content_hash
from zipeval.utils.hub_access import reachable

PRESENT, MISSING, DAMAGED = "present", "missing", "damaged"


def check_root(root: str | None) -> None:
    """Raises UsageError if there is no such directory."""
    if root is not None and not Path(root).expanduser().is_dir():
        raise UsageError(
            f"data.root={root}: no such directory. Give the one that holds ORGANISATION/NAME folders."
        )


def copy_of(dataset: str, root: str | None) -> Path | None:
    """The local copy of a data set, if there is one."""
    if root is None:
        return None
    return (
        folder
        if (folder := Path(root).expanduser().absolute() / dataset).is_dir()
        else None
    )


def fingerprint(task: str, root: str | None) -> str | None:
    """Hash of the names and contents of the local copy that a task reads; None where it reads none."""
    dataset = benchmarks.dataset(task) if root else None
    folder = copy_of(dataset, root) if dataset else None
    return _digest(folder) if folder else None


def require(task: str, root: str | None) -> None:
    """Raises NotHereError where a task's data is damaged, or neither here nor can be downloaded; says how to get it."""
    for source in sources(task):
        state, reason = examine(source, root)
        if state != PRESENT and (copy_of(source.dataset, root) or not reachable()):
            raise NotHereError(
                f"tasks=[{task}]: {source.dataset} is {state} ({reason}). {_advice(source, root)}."
            )


def examine(source: Source, root: str | None) -> tuple[str, str]:
    """(present | missing | damaged, where it is or what is wrong). Of parquet files the footers are read, not rows."""
    folder = copy_of(source.dataset, root)
    if folder is None:
        prepared = _prepared(source)
        return (PRESENT, str(prepared)) if prepared else (MISSING, _nowhere(root))
    import pyarrow
    import yaml
    from pyarrow import parquet

    try:
        files = _files(folder, source)
    except yaml.YAMLError as error:
        return (
            DAMAGED,
            f"{folder}/README.md: its head is no YAML: {str(error).splitlines()[0]}",
        )
    except (
        ValueError,
        FileNotFoundError,
    ) as error:  # no such config; nothing matches what its README names
        return MISSING, str(error).split("\n")[0]
    if source.split not in files:
        return (
            MISSING,
            f"{folder} has no split {source.split}, only {', '.join(map(str, files)) or 'nothing'}",
        )
    for file in files[source.split]:
        try:
            parquet.read_metadata(file)
        except (pyarrow.ArrowInvalid, OSError) as error:
            return DAMAGED, f"{file}: {str(error).splitlines()[0]}"
    return PRESENT, str(folder)


def is_here(task: str, root: str | None, cache: Path | None = None) -> bool:
    """Return whether what a task reads of the hub is on this machine; of a data set that is not on the hub it is.

    Args:
        cache: where else than in datasets' own cache it may be.
    """
    names = {source.dataset for source in sources(task)} | {
        benchmarks.dataset(task) or ""
    }
    of_the_hub = [name for name in names if name.count("/") == 1]
    return all(
        copy_of(name, root) or _prepared(Source(name, ""), cache) for name in of_the_hub
    )


def rows(source: Source, root: str | None) -> int | None:
    """Of the local copy, if there is a whole one."""
    folder = copy_of(source.dataset, root)
    if folder is None or examine(source, root)[0] != PRESENT:
        return None
    from pyarrow import parquet

    return sum(
        parquet.read_metadata(file).num_rows
        for file in _files(folder, source)[source.split]
    )


def report(tasks: list[str], root: str | None) -> tuple[str, bool]:
    """(a line for each part of a data set that the tasks read, whether all are present)."""
    check_root(root)
    found = {
        source: examine(source, root) for task in tasks for source in sources(task)
    }
    lines = []
    for source, (state, detail) in found.items():
        name = " ".join(filter(None, (source.dataset, source.config, source.split)))
        lines.append(
            f"{state:<8} {name}: {detail}"
            + ("" if state == PRESENT else f". {_advice(source, root)}")
        )
    return "\n".join(lines), all(state == PRESENT for state, _ in found.values())


@contextmanager
def copies_below(root: str | None) -> Iterator[None]:
    """Within the block datasets.load_dataset reads local copies, whoever calls it; also ids that a task hard-codes."""
    import datasets

    load = datasets.load_dataset

    @functools.wraps(load)
    def load_dataset(path, *args, **kwargs):
        if (
            kwargs.get("token") is True
        ):  # lmms-eval's tasks insist on a login; without this one is used if there is one
            del kwargs["token"]
        folder = copy_of(path, root) if path.count("/") == 1 else None
        if folder is None:
            return load(path, *args, **kwargs)
        return load(str(folder), *args, **{**kwargs, "cache_dir": _cache(folder)})

    with patch.object(datasets, "load_dataset", load_dataset):
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Within the block datasets reads what its cache has: a newer version on the hub is not what was answered."""
    import datasets
    from huggingface_hub import constants

    with (
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(constants, "HF_HUB_OFFLINE", True),
    ):
        yield


def sources(task: str) -> tuple[Source, ...]:
    """Return the parts of data sets that a task of the papers is known to read, its samples first."""
    return benchmarks.BENCHMARKS[task].sources if task in benchmarks.BENCHMARKS else ()


def _files(folder: Path, source: Source) -> dict:
    """Those of a copy, by split."""
    import datasets

    with (
        TemporaryDirectory() as nothing
    ):  # it makes folders for rows that are not read here
        builder = datasets.load_dataset_builder(
            str(folder), name=source.config, cache_dir=nothing
        )
    return builder.config.data_files or {}


def _cache(folder: Path) -> str:
    """Where rows of a copy are kept: datasets tells copies of one name apart neither by place nor by content."""
    from datasets import config

    return str(Path(config.HF_DATASETS_CACHE) / "zipeval" / _digest(folder))


def _datasets_cache() -> Path:
    """datasets' own HF_DATASETS_CACHE; where that is not imported yet, what it will be."""
    if "datasets" in sys.modules:
        from datasets import config

        return Path(config.HF_DATASETS_CACHE)
    from huggingface_hub import constants

    return Path(
        os.environ.get("HF_DATASETS_CACHE", f"{constants.HF_HOME}/datasets")
    ).expanduser()


def _prepared(source: Source, cache: Path | None = None) -> Path | None:
    """The folder in the Hugging Face cache, or in another one, with the rows of a data set that was loaded before."""
    organisation, name = source.dataset.split("/")
    cache = cache or _datasets_cache()
    if not any(cache.glob(f"{organisation}___*")):
        return None  # without the seconds that an import of datasets takes
    from datasets.naming import camelcase_to_snakecase

    folder = cache / f"{organisation}___{camelcase_to_snakecase(name)}"
    return (
        folder
        if any(folder.glob(f"{source.config or '*'}/*/*/dataset_info.json"))
        else None
    )


def _nowhere(root: str | None) -> str:
    return "not in the Hugging Face cache" + (
        f", not below data.root={root}" if root else ""
    )


def _advice(source: Source, root: str | None) -> str:
    place = root or "data"
    command = f"hf download --repo-type dataset {source.dataset} --local-dir {place}/{source.dataset}"
    return f"Where the hub can be reached, `{command}` makes a copy to use with data.root={place}"


def _digest(folder: Path) -> str:
    """Return the hash of the names and contents of all files of a copy, but for what `hf download` notes there."""
    return content_hash.digest_folder(folder, ignored=(".cache",))
