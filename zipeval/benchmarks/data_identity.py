"""Tell the data of a task from other data of the same name.

What lies here is hashed file by file: the local copy that data.root= gives, the videos of data.videos= and their
questions. What the hub gives is hashed as it was loaded, value by value, and so are videos that
lmms-eval unpacked beside it. Neither the revision nor the `_fingerprint` of
datasets would do: both follow from names, the second from that of a folder in the cache, and whatever was changed there
keeps it. The values themselves are the same for any version of datasets, with or without a network, whatever the files
they lie in. The revision is recorded beside the hash, where the cache tells it.

Data that lies beside a task of zipeval's own is in the hash of the task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval import benchmarks
from zipeval.benchmarks import Source, data, lmms_names, stack, videoqa
from zipeval.benchmarks.protocols import no_key
from zipeval.config.schema import DataConfig
from zipeval.errors import UsageError
from zipeval.utils import content_hash, ranks
from zipeval.utils.arrow_hash import hash_rows

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DataIdentity:
    """The data that a task is asked about.

    Attributes:
        data_hash: of all of its contents; None where they are in the hash of the task.
        revision: the hub's commit that they are of, if they come from there and the cache tells it.
        setting: that names the data, for messages.
    """

    data_hash: str | None
    revision: str | None
    setting: str


# git's name of a commit.
COMMIT = re.compile("[0-9a-f]{40}")
# What was identified in this process last.
_latest: dict[tuple, DataIdentity] = {}


def identify(
    task: str,
    folder: Path,
    given: DataConfig,
    questions: Sequence[dict[str, str]] | None,
    limit: int | None,
) -> DataIdentity:
    """Return the data that a task would be asked about now. What the hub gives is downloaded first where it is not here.

    Args:
        folder: folder that defines the task.
        given: the places of local data.
        questions: questions about videos, of a task that has such.
        limit: of the samples; of questions about videos only those have a part in it.

    Raises:
        UsageError: if the data does not load.
    """
    if questions is not None:
        digest = _hash_videos(task, str(given.videos), questions[:limit])
        identity = DataIdentity(digest, None, f"data.videos={given.videos}")
    elif (digest := data.fingerprint(task, given.root)) or benchmarks.lies_beside(
        task, folder
    ):
        identity = DataIdentity(digest, None, f"data.root={given.root or 'null'}")
    else:
        identity = _identify_rows(task, folder, given.root)
    _latest[task, given.root, given.videos, limit] = identity
    return identity


def known(
    task: str, folder: Path, given: DataConfig, questions, limit: int | None
) -> DataIdentity | None:
    """Return the data that a finished record would be made of now, downloading nothing; None: it is not here.

    Of the hub's data sets each is looked at once in a process: nothing is answered for a record that is finished.
    """
    if not data.is_here(task, given.root):
        # lmms-eval may have another cache, which only its code tells.
        stack.load(stack.RUN)
        if not data.is_here(task, given.root, lmms_names.datasets_cache()):
            return None
    latest = _latest.get((task, given.root, given.videos, limit))
    # Videos are looked at again: files tell cheaply whether they have changed.
    if questions is None and latest:
        return latest
    return identify(task, folder, given, questions, limit)


def _hash_videos(task: str, root: str, questions: Sequence[dict[str, str]]) -> str:
    """Return the hash of the videos that questions are about, and of the files that hold questions and answers."""
    place = Path(root).expanduser().absolute() / videoqa.SETS[task].folder
    videos = {Path(question["video"]) for question in questions}
    files = [place / videoqa.QUESTIONS, place / videoqa.ANSWERS]
    files += [video for video in videos if video.is_file()]
    try:
        digests = content_hash.digests(files)
    except OSError as error:
        raise UsageError(
            f"data.videos={root}: {error.filename} cannot be read ({error.strerror}). "
            "Give a copy that can."
        ) from error
    # A video that comes later makes other data.
    missing = dict.fromkeys(videos - digests.keys(), "missing")
    by_name = {}
    for file, digest in (missing | digests).items():
        by_name[file.relative_to(place).as_posix()] = digest
    return content_hash.combined(by_name)


def _identify_rows(task: str, folder: Path, root: str | None) -> DataIdentity:
    """Load a task's rows as lmms-eval does, and what else the task is known to read."""
    stack.load(stack.RUN)
    # A task's own module is imported with its settings, and may import what nothing
    # else does.
    with (
        no_key(),
        ranks.alone(),
        stack.explained("lmms_eval"),
        data.copies_below(root),
        lmms_names.loading(task),
    ):
        rows, videos = lmms_names.load_rows(task, folder)
        others = [_load(source) for source in data.sources(task)[1:]]
    digests = {}
    for number, dataset in enumerate([rows, *others]):
        digests[str(number)] = hash_rows(dataset)
    if videos and videos.is_dir():
        digests["videos"] = content_hash.digest_folder(videos)
    # Most tasks read one data set and no more.
    digest = digests["0"] if len(digests) == 1 else content_hash.combined(digests)
    return DataIdentity(digest, revision(rows), f"tasks=[{task}]")


def _load(source: Source) -> Dataset:
    """Load a part of a data set."""
    import datasets

    return datasets.load_dataset(source.dataset, name=source.config, split=source.split)


def revision(dataset: Dataset) -> str | None:
    """Return the hub's commit that a data set was prepared from: datasets names a folder in its cache by it."""
    for file in dataset.cache_files:
        name = Path(file["filename"]).parent.name
        if COMMIT.fullmatch(name):
            return name
    return None
