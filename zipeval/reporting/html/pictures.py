"""Find the picture of a sample again: beside its record, or in its data set where that is here. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipeval import benchmarks
from zipeval.benchmarks import data, lmms_names
from zipeval.errors import MediaError, UsageError
from zipeval.utils.foreign_patches import keep_datasets_offline

if TYPE_CHECKING:
    from PIL import Image

    from zipeval.benchmarks import Source

# The mean colours that pictures are padded with: of CLIP's and of SigLIP's image processors.
BACKGROUNDS = ((122, 116, 104), (127, 127, 127))
DATA_SETS = 4  # that stay open


def read_picture(
    record: dict[str, Any], sample: dict[str, Any], number: int = 0
) -> bytes | None:
    """Return the JPEG of a sample's picture, as it was kept beside the record or as the data set has it.

    A picture of the data set is the sample's only if its hash is: rows may have changed, and a task may show something
    else than what a row holds.

    Args:
        sample: one of the record's.
        number: of the sample's pictures which one.

    Returns:
        None where it is not on this machine. Nothing is downloaded.
    """
    path = Path(record["path"]).with_suffix(".images") / f"{sample['doc_id']}.jpg"
    if number == 0 and path.is_file():
        return path.read_bytes()
    hashes = sample.get("pictures") or []
    if number >= len(hashes):
        return None
    return _picture_of_data_set(record, sample["doc_id"], hashes[number])


def _picture_of_data_set(
    record: dict[str, Any], doc_id: int, wanted: str
) -> bytes | None:
    """Return the JPEG of the picture in a row whose hash is the wanted one; None without it."""
    from zipeval.media import picture_hash, rgb, thumbnail

    aspect, root = (
        record["config"]["model"]["image_aspect"],
        record["config"]["data"]["root"],
    )
    try:
        rows = _rows(record["task"], root)
        if doc_id >= len(rows):
            return None
        (row,) = rows[doc_id].to_pylist()
        for image in chain(_images(row), _images_elsewhere(record["task"], row, root)):
            for background in BACKGROUNDS:
                shown = rgb(image, aspect, background)
                if picture_hash(shown) == wanted:
                    return thumbnail(shown)
    except (
        MediaError,
        OSError,
        UsageError,
    ):  # the picture, or the whole data set, is damaged by now
        return None
    return None


def _images(value: Any) -> Iterator[Image.Image]:
    """Yield the images that a row, or a part of it, holds."""
    from PIL import Image

    if isinstance(value, dict) and value.keys() == {
        "bytes",
        "path",
    }:  # how datasets stores one
        yield Image.open(
            value["path"] if value["bytes"] is None else BytesIO(value["bytes"])
        )
    elif isinstance(value, dict):
        for part in value.values():
            yield from _images(part)
    elif isinstance(value, list):
        for part in value:
            yield from _images(part)


def _images_elsewhere(
    task: str, row: dict[str, Any], root: str | None
) -> Iterator[Image.Image]:
    """Yield the images that a row names by their ids, as rows of GQA do, whose images are a data set of their own."""
    for source in data.sources(task)[1:]:
        rows, positions = _images_by_id(source, root)
        for value in row.values():
            if isinstance(value, str) and value in positions:
                (other,) = rows[positions[value]].to_pylist()
                yield from _images(other)


@lru_cache(DATA_SETS)
def _images_by_id(source: Source, root: str | None):
    """Return a data set of images, and the position of each by its id. Raises as `_rows` does."""
    rows = _loaded(root, source.dataset, name=source.config, split=source.split)
    names = rows.data.column("id").to_pylist() if "id" in rows.column_names else []
    return rows, {name: position for position, name in enumerate(names)}


@lru_cache(DATA_SETS)
def _rows(task: str, root: str | None):
    """Return the data set that a task's samples are numbered by, as Arrow.

    Raises:
        UsageError: where it is not here. It is looked for again the next time, as a run may fetch it meanwhile.
    """
    if task not in benchmarks.task_files() or not data.is_here(task, root):
        raise UsageError(f"tasks=[{task}]: its data set is not here.")
    file = benchmarks.task_files()[task][1]
    settings = lmms_names.task_settings(file)
    split = settings.get("test_split") or settings.get("validation_split")
    if not settings.get("dataset_path") or not split:  # of videos, for example
        raise UsageError(f"tasks=[{task}]: it names no data set.")
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    options = (
        {}
        if files is None
        else {
            "data_files": {
                name: str(file.parent / path) for name, path in files.items()
            }
        }
    )
    return _loaded(
        root,
        settings["dataset_path"],
        name=settings.get("dataset_name"),
        split=split,
        **options,
    )


def _loaded(root: str | None, path: str, **options: Any):
    """Return a data set as Arrow, of this machine's copies.

    Raises:
        UsageError: where it does not load.
    """
    import datasets

    with keep_datasets_offline(), data.copies_below(root):
        try:
            rows = datasets.load_dataset(path, **options)
        except Exception as error:  # datasets raises anything; without its picture a sample is still shown
            raise UsageError(f"{path}: does not load ({error}).") from error
    return rows.with_format(
        "arrow"
    )  # rows as they are stored: decoding all images of one takes longer than finding it
