"""Hash the values of a data set: the same for any version of datasets, however rows are cut into files and chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipeval.utils import content_hash

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Rows that are looked at together; the hash does not depend on it.
BATCH = 1_000
# The fields of an image, a sound or a video as datasets stores them.
MEDIA = {"bytes", "path"}

# Texts and byte strings, and the type of the positions at which Arrow has each begin.
OFFSETS = {
    "string": "int32",
    "binary": "int32",
    "large_string": "int64",
    "large_binary": "int64",
}

# The name of a part of a column's type, and its bytes in some rows.
Parts = Iterator[tuple[str, Any]]


def hash_rows(dataset: Dataset) -> str:
    """Return the hash of the names and values of all columns, in the order of the rows.

    Images count as the bytes that the data set holds, or as the content of the files that it names. The hash is
    remembered until a file that the rows lie in changes.
    """
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # Rows that are in memory only have no file whose change would show.
    if not files:
        return _hash_columns(dataset)[0]
    # The fingerprint of datasets tells what was done to the rows of the files:
    # selected, renamed, added.
    entry = content_hash.Entry(f"rows {dataset._fingerprint} {len(dataset)}", files)
    if entry.digest:
        return entry.digest
    digest, names_files = _hash_columns(dataset)
    # A named file may change while those of the rows do not.
    if not names_files:
        entry.store(digest)
    return digest


def _hash_columns(dataset: Dataset) -> tuple[str, bool]:
    """Return (hash of all columns, whether a column names files)."""
    columns = {name: ColumnHash() for name in dataset.column_names}
    # Of rows in the order of their file no copy is made: the bytes are hashed where the
    # file is mapped.
    for table in dataset.with_format("arrow").iter(BATCH):
        for name, column in columns.items():
            column.update(table.column(name))
    digests = {name: column.hexdigest() for name, column in columns.items()}
    names_files = any(column.names_files for column in columns.values())
    return content_hash.combined(digests), names_files


class ColumnHash:
    """Hash a column, chunk by chunk.

    Every part of its type has a hash of its own that goes on from chunk to chunk: which values are null, how long each
    is, and the bytes of all. So it does not matter where chunks end. What Arrow keeps in place of a null is not looked
    at.

    Attributes:
        names_files: some values are in files that the column only names.
    """

    def __init__(self) -> None:
        import xxhash

        self.names_files = False
        self._hashers = defaultdict(xxhash.xxh3_128)

    def update(self, column: pa.ChunkedArray) -> None:
        """Add the values of some rows."""
        for chunk in column.chunks:
            for name, content in self._parts(chunk, ""):
                self._hashers[name].update(content)

    def hexdigest(self) -> str:
        """Return the hash of all values so far."""
        digests = {name: hasher.hexdigest() for name, hasher in self._hashers.items()}
        return content_hash.combined(digests)

    def _parts(self, array: pa.Array, name: str) -> Parts:
        """Yield the parts of an array, and of the arrays that it is made of.

        Args:
            name: path of the array within its column.
        """
        import pyarrow as pa

        if isinstance(array.type, pa.BaseExtensionType):
            array = array.storage
        kind = array.type
        yield f"{name} null", _fixed_width(array.is_null())
        if isinstance(kind, pa.StructType):
            yield from self._struct_parts(array, name)
            return
        # Arrow keeps anything in place of a null.
        array = array.drop_null()
        if str(kind) in OFFSETS:
            yield from _text_parts(array, name)
        elif isinstance(kind, (pa.ListType, pa.LargeListType)):
            yield f"{name} length", _fixed_width(array.value_lengths().cast(pa.int64()))
            yield from self._parts(array.flatten(), f"{name}[]")
        elif isinstance(kind, pa.FixedSizeListType):
            yield from self._parts(array.flatten(), f"{name}[{kind.list_size}]")
        elif pa.types.is_primitive(kind):
            yield f"{name} {kind}", _fixed_width(array)
        else:
            # Rare types, such as decimals, count as they are printed.
            for value in array.to_pylist():
                yield f"{name} {kind}", f"{value!r}\0".encode()

    def _struct_parts(self, array: pa.StructArray, name: str) -> Parts:
        """Yield the parts of a struct's fields: none but its own where it is null."""
        names = [field.name for field in array.type]
        fields = dict(zip(names, array.flatten(), strict=True))
        # The same image counts the same, whether its bytes are in the rows or in a
        # file.
        if fields.keys() == MEDIA:
            fields["path"] = self._with_contents(fields["path"], fields["bytes"])
        for field_name, values in fields.items():
            yield from self._parts(values, f"{name}.{field_name}")

    def _with_contents(self, paths: pa.Array, contents: pa.Array) -> pa.Array:
        """Return the paths of media, and the hash of a file's content in place of the path where only that is there."""
        import numpy as np
        import pyarrow as pa

        if contents.null_count == 0:
            return paths
        values = paths.to_pylist()
        file_by_row = {}
        for row in np.flatnonzero(contents.is_null()):
            # The path of an image that is nowhere is no more than a text.
            if values[row] and Path(values[row]).is_file():
                file_by_row[row] = Path(values[row])
        # All at once, for several threads to read.
        digests = content_hash.digests(file_by_row.values())
        for row, file in file_by_row.items():
            values[row] = digests[file]
        self.names_files |= bool(file_by_row)
        return pa.array(values, pa.string())


def _fixed_width(array: pa.Array) -> memoryview | bytes:
    """Return the bytes of values that all take the same space."""
    import pyarrow as pa

    # Arrow keeps eight booleans in a byte, which need not begin with the first one.
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    # The first buffer tells which values are null.
    values = array.buffers()[1]
    if values is None:
        return b""
    # A slice of an array shares the buffer, from its offset on.
    width = array.type.bit_width // 8
    return memoryview(values)[
        array.offset * width : (array.offset + len(array)) * width
    ]


def _text_parts(array: pa.Array, name: str) -> Parts:
    """Yield the lengths of texts or of byte strings, and then the bytes of all: they lie one behind the other."""
    import numpy as np

    if not len(array):
        return
    _, offsets, content = array.buffers()
    # One more than there are texts: the end of the last one.
    stop = array.offset + len(array) + 1
    starts = np.frombuffer(offsets, OFFSETS[str(array.type)])[array.offset : stop]
    # Lengths, since offsets depend on where a chunk begins.
    yield f"{name} length", np.diff(starts).astype("int64").tobytes()
    if content is not None:
        yield f"{name} content", memoryview(content)[int(starts[0]) : int(starts[-1])]
