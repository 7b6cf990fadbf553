"""Hash the whole content of files, and remember the digests of those that have not changed since.

Every byte counts: a merged LoRA changes a few matrices in the middle of a weight file, and a hash of samples misses
them. xxh3 reads 10 to 20 GiB/s on one core, more than any disk gives, where SHA-256 and BLAKE2b read about 1 GiB/s. It
guards against mistakes, not against somebody who builds two files with one digest on purpose.

Digests are remembered in ZIPEVAL_CACHE, else in XDG_CACHE_HOME/zipeval, else in ~/.cache/zipeval:

    digests/HASH_OF_FOLDER.json     for each file in it: size, inode, device, mtime, ctime and digest
    digests/HASH_OF_KEY.json        of an `Entry`: the same of several files, and one digest

Where nothing can be written there, files are hashed again and nothing else happens. `ZIPEVAL_CACHE=` remembers nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import starmap
from pathlib import Path
from typing import Any

# Bytes that one thread hashes; the digest depends on it.
CHUNK = 64 << 20
# Bytes of a read.
READ = 4 << 20
# Disks and networks may give more to several readers; xxhash holds no lock meanwhile.
THREADS = 8
# Part of what a cache file is named by: digests of another algorithm are not taken for
# ours.
ALGORITHM = f"xxh3_128 of chunks of {CHUNK}"
# A file that changed so short a time ago may change again without another mtime: the
# clock of a file system has a tick, of up to two seconds. So its digest is not
# remembered, as git does not trust its index there.
SETTLED = 2_000_000_000  # nanoseconds

# The numbers of stat that change with a file's content, see `_signature`.
Signature = list[int]

# By real path: for the runs of a sweep, also without a cache.
_remembered: dict[str, list] = {}


def digest(path: Path) -> str:
    """Return the hash of a file's content.

    Raises:
        OSError: if it cannot be read.
    """
    return digests([path])[path]


def digests(
    paths: Iterable[Path], advance: Callable[[int], None] | None = None
) -> dict[Path, str]:
    """Return the hash of the content of each file. Files are read by several threads.

    Args:
        advance: is called with the number of MiB that were read since it was called last.

    Raises:
        OSError: if one cannot be read.
    """
    real_paths = {path: os.path.realpath(path) for path in paths}
    signatures = _signatures(real_paths.values())
    known = _known_digests(signatures)
    unknown = [real_path for real_path in signatures if real_path not in known]
    computed = _hash_files(unknown, signatures, advance)
    _remember(computed, signatures)
    known |= computed
    return {path: known[real_path] for path, real_path in real_paths.items()}


def unknown_bytes(paths: Iterable[Path]) -> int:
    """Return how many bytes `digests` would have to read."""
    signatures = _signatures(map(os.path.realpath, paths))
    known = _known_digests(signatures)
    unknown = signatures.keys() - known.keys()
    # The first number of a signature is the file's size.
    return sum(signatures[real_path][0] for real_path in unknown)


def combined(digest_by_name: Mapping[str, str]) -> str:
    """Return one hash of named contents, whatever the order they come in."""
    hasher = hashlib.sha256()
    for name in sorted(digest_by_name):
        hasher.update(f"{name}\0{digest_by_name[name]}\n".encode())
    return hasher.hexdigest()[:16]


def digest_folder(folder: Path, ignored: tuple[str, ...] = ()) -> str:
    """Return one hash of the names and contents of all files in a folder and below it.

    Args:
        ignored: names of folders below it that do not count.

    Raises:
        OSError: if a file cannot be read.
    """
    files = {}
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if file.is_file() and set(ignored).isdisjoint(name.parts):
            files[name.as_posix()] = file
    file_digests = digests(files.values())
    return combined({name: file_digests[file] for name, file in files.items()})


def cache_directory() -> Path | None:
    """Return the directory that digests are remembered in; None: they are not."""
    if "ZIPEVAL_CACHE" in os.environ:
        named = os.environ["ZIPEVAL_CACHE"]
        return Path(named).expanduser() if named else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Still there for a user without a home.
    return None if base.startswith("~") else Path(base) / "zipeval"


def _signature(stat: os.stat_result) -> Signature:
    """Return what differs once a file's content does, also where its mtime was set back: its ctime cannot be."""
    return [stat.st_size, stat.st_ino, stat.st_dev, stat.st_mtime_ns, stat.st_ctime_ns]


def _signatures(real_paths: Iterable[str]) -> dict[str, Signature]:
    """Return the signature of each file as it is now."""
    return {real_path: _signature(os.stat(real_path)) for real_path in real_paths}


def _hash_files(
    paths: list[str],
    signatures: Mapping[str, Signature],
    advance: Callable[[int], None] | None,
) -> dict[str, str]:
    """Return the digest of each file: a hash of its chunks' hashes, so that threads share a large file."""
    import xxhash

    # (path, first byte, length in bytes)
    chunks = []
    for path in paths:
        size = signatures[path][0]
        # An empty file is one empty chunk.
        for start in range(0, max(size, 1), CHUNK):
            chunks.append((path, start, min(CHUNK, size - start)))
    hashers = {path: xxhash.xxh3_128() for path in paths}
    hashed_bytes = shown_mib = 0
    with ThreadPoolExecutor(THREADS) as pool:
        # The pool gives them in the order of the chunks, whichever is done first.
        chunk_digests = pool.map(lambda chunk: _hash_chunk(*chunk), chunks)
        for (path, _, length), chunk_digest in zip(chunks, chunk_digests, strict=True):
            hashers[path].update(chunk_digest)
            hashed_bytes += length
            # What is less than a MiB waits for the next chunk.
            hashed_mib = hashed_bytes >> 20
            if advance and hashed_mib > shown_mib:
                advance(hashed_mib - shown_mib)
                shown_mib = hashed_mib
    return {path: hasher.hexdigest() for path, hasher in hashers.items()}


def _hash_chunk(path: str, start: int, length: int) -> bytes:
    """Return the hash of `length` bytes of a file, or of those that are there."""
    import xxhash

    hasher = xxhash.xxh3_128()
    if length == 0:
        return hasher.digest()
    buffer = memoryview(bytearray(min(READ, length)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        # Nothing is read where the file has become shorter.
        while count := file.readinto(buffer[:length]):
            hasher.update(buffer[:count])
            length -= count
    return hasher.digest()


def _known_digests(signatures: Mapping[str, Signature]) -> dict[str, str]:
    """Return the remembered digests of those files that still look as they did then."""
    known = {}
    folders = set(map(os.path.dirname, signatures))
    contents = {folder: _read(folder) for folder in folders}
    for path, signature in signatures.items():
        folder, name = os.path.split(path)
        # What is on disk may be newer than what this process remembers.
        for entry in (_remembered.get(path), contents[folder].get(name)):
            if _is_entry_of(entry, signature):
                known[path] = entry[-1]
    return known


def _is_entry_of(entry: Any, signature: Signature) -> bool:
    """Return whether an entry has a digest of the file with this signature."""
    # A cache file may be of anything: only a list of just these numbers and a text is
    # an entry.
    is_of_file = isinstance(entry, list) and entry[:-1] == signature
    return is_of_file and isinstance(entry[-1], str)


def _remember(computed: Mapping[str, str], signatures: Mapping[str, Signature]) -> None:
    """Remember digests of files that are as they were before they were read, and have been for a while."""
    entries_by_folder: defaultdict[str, dict[str, list]] = defaultdict(dict)
    for path, file_digest in computed.items():
        signature = signatures[path]
        if _is_settled(path, signature):
            _remembered[path] = [*signature, file_digest]
            folder, name = os.path.split(path)
            entries_by_folder[folder][name] = _remembered[path]
    # Of two processes that do so at once, one may have to hash again.
    for folder, entries in entries_by_folder.items():
        merged = _read(folder) | entries
        # Files that are gone would make the cache file grow for ever.
        for name in merged.keys() - set(os.listdir(folder)):
            del merged[name]
        _write(folder, merged)


def _is_settled(path: str, signature: Signature) -> bool:
    """Return whether a file still is what it was, and has been for so long that a change since would show."""
    *_, modified, changed = signature
    is_unchanged = _signature(os.stat(path)) == signature
    return is_unchanged and time.time_ns() - max(modified, changed) >= SETTLED


class Entry:
    """A digest of something else that files hold, as of the rows of a data set, remembered until one of them changes.

    Attributes:
        digest: that was stored; None if there is none, or if a file has changed since.

    Args:
        name: tells it from other digests of the same files.
    """

    def __init__(self, name: str, files: Iterable[Path]):
        self._signatures = _signatures(map(os.path.realpath, files))
        self._key = "\0".join([name, *self._signatures])
        stored = _read(self._key)
        is_unchanged = stored.get("signatures") == [*self._signatures.values()]
        self.digest = stored.get("digest") if is_unchanged else None

    def store(self, digest: str) -> None:
        """Remember the digest, if the files are as they were when this entry was made."""
        self.digest = digest
        if all(starmap(_is_settled, self._signatures.items())):
            signatures = [*self._signatures.values()]
            _write(self._key, {"signatures": signatures, "digest": digest})


def _cache_file(key: str) -> Path | None:
    """Return the cache file of a folder or another key; None where nothing is remembered."""
    directory = cache_directory()
    if directory is None:
        return None
    # A path may have bytes that are no UTF-8.
    named = f"{ALGORITHM}\0{key}".encode("utf-8", "surrogateescape")
    name = hashlib.sha256(named).hexdigest()[:32]
    return directory / "digests" / f"{name}.json"


def _read(key: str) -> dict:
    """Return what is remembered for a folder or another key; nothing where that is not there or damaged."""
    file = _cache_file(key)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(key: str, content: Mapping) -> None:
    """Remember something, if it can be written."""
    file = _cache_file(key)
    if file is None:
        return
    # No room, or no right to write: the next process hashes again.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                json.dump(content, stream)
            # Readers see what was there before, or all of it.
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise


def digest_files(paths: Iterable[Path]) -> str:
    """Return the hash of some files' names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
