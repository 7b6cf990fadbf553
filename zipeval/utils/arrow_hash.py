"""Hash the values of a data set: the same for any version of datasets, however rows are cut into files and chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipeval.utils import content_hash

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BATCH = 1_000  # rows that are looked at together; the hash does not depend on it
MEDIA = {"bytes", "path"}  # fields of an image, a sound or a video as datasets stores them

Parts = Iterator[tuple[str, Any]]  # the name of a part of a column's type, and its bytes in some rows


def hash_rows(dataset: Dataset) -> str:
    """Return the hash of the names and values of all columns, in the order of the rows.

    Images count as the bytes that the data set holds, or as the content of the files that it names. The hash is
    remembered until a file that the rows lie in changes.
    """
    files = [Path(file["filename"]) for file in dataset.cache_files]
    selected = dataset._indices is not None  # rows were selected or sorted, and the files say nothing of that
    entry = content_hash.Entry(f"rows {dataset.column_names} {len(dataset)}", files) if files and not selected else None
    if entry and entry.digest:
        return entry.digest
    columns = {name: ColumnHash() for name in dataset.column_names}
    # Of rows in the order of their file no copy is made: the bytes are hashed where the file is mapped.
    for table in dataset.with_format("arrow").iter(BATCH):
        for name, column in columns.items():
            for chunk in table.column(name).chunks:
                column.update(chunk)
    digest = content_hash.combined({name: column.hexdigest() for name, column in columns.items()})
    if entry and not any(column.names_files for column in columns.values()):
        entry.store(digest)
    return digest


class ColumnHash:
    """Hash a column, chunk by chunk.

    Every part of its type has a hash of its own that goes on from chunk to chunk: which values are null, how long each
    is, and the bytes of all. So it does not matter where chunks end. What Arrow keeps in place of a null is not looked
    at.

    Attributes:
        names_files: some values are in files that the column only names.
    """

    def __init__(self) -> None:
        self.names_files = False
        self._hashers: dict[str, Any] = {}

    def update(self, array: pa.Array) -> None:
        """Add the values of a chunk."""
        import xxhash

        for name, content in self._parts(array, ""):
            if name not in self._hashers:
                self._hashers[name] = xxhash.xxh3_128()
            self._hashers[name].update(content)

    def hexdigest(self) -> str:
        """Return the hash of all values so far."""
        return content_hash.combined({name: hasher.hexdigest() for name, hasher in self._hashers.items()})

    def _parts(self, array: pa.Array, name: str) -> Parts:
        import pyarrow as pa
        from pyarrow import types

        if isinstance(array.type, pa.BaseExtensionType):
            array = array.storage
        kind = array.type
        yield f"{name} null", _fixed_width(array.is_null())
        if types.is_struct(kind):
            yield from self._struct_parts(array, name)
            return
        array = array.drop_null()
        if types.is_string(kind) or types.is_binary(kind):
            yield from _text_parts(array, name, "int32")
        elif types.is_large_string(kind) or types.is_large_binary(kind):
            yield from _text_parts(array, name, "int64")
        elif types.is_list(kind) or types.is_large_list(kind):
            yield f"{name} length", _fixed_width(array.value_lengths().cast(pa.int64()))
            yield from self._parts(array.flatten(), f"{name}[]")
        elif types.is_fixed_size_list(kind):
            yield from self._parts(array.flatten(), f"{name}[{kind.list_size}]")
        elif types.is_primitive(kind):
            yield f"{name} {kind}", _fixed_width(array)
        else:  # rare ones, such as decimals: as they are printed
            for value in array.to_pylist():
                yield f"{name} {kind}", f"{value!r}\0".encode()

    def _struct_parts(self, array: pa.StructArray, name: str) -> Parts:
        fields = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
        if fields.keys() == MEDIA:
            fields["path"] = self._with_contents(fields["path"], fields["bytes"])
        for field, values in fields.items():
            yield from self._parts(values, f"{name}.{field}")

    def _with_contents(self, paths: pa.Array, contents: pa.Array) -> pa.Array:
        """Return the paths of media, and the hash of a file's content in place of the path where only that is there."""
        import pyarrow as pa

        if contents.null_count == 0:
            return paths
        named = [
            path for path, known in zip(paths.to_pylist(), contents.is_valid().to_pylist(), strict=True) if not known
        ]
        files = {path for path in named if path and Path(path).is_file()}
        if not files:
            return paths
        self.names_files = True
        digests = content_hash.digests(map(Path, files))
        return pa.array(
            [str(digests.get(Path(path), path)) if path else path for path in paths.to_pylist()], pa.string()
        )


def _fixed_width(array: pa.Array) -> memoryview | bytes:
    """Return the bytes of values that all take the same space."""
    import pyarrow as pa

    if pa.types.is_boolean(array.type):  # of which Arrow keeps eight in a byte
        array = array.cast(pa.uint8())
    values = array.buffers()[1]
    if values is None:
        return b""
    width = array.type.bit_width // 8
    return memoryview(values)[array.offset * width : (array.offset + len(array)) * width]


def _text_parts(array: pa.Array, name: str, offset_type: str) -> Parts:
    """Yield the lengths of texts or of byte strings, and then all their bytes.

    Args:
        offset_type: of the positions at which Arrow has them begin.
    """
    import numpy as np

    if not len(array):
        return
    _, positions, content = array.buffers()
    starts = np.frombuffer(positions, offset_type)[array.offset : array.offset + len(array) + 1]
    yield f"{name} length", np.diff(starts).astype("int64").tobytes()
    if content is not None:
        yield f"{name} content", memoryview(content)[int(starts[0]) : int(starts[-1])]
