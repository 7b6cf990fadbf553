"""Digests of files: every byte counts, and what is remembered is never of another content."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zipeval.utils import content_hash

LENGTH = 3 * content_hash.CHUNK + 12_345  # of which nearly all is a hole


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and none in memory; files count as settled at once."""
    monkeypatch.setenv("ZIPEVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "_remembered", {})
    monkeypatch.setattr(content_hash, "SETTLED", 0)
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, one entry for each chunk."""
    paths = []
    hash_chunk = content_hash._hash_chunk

    def counted(path, start, length):
        paths.append(Path(path).name)
        return hash_chunk(path, start, length)

    monkeypatch.setattr(content_hash, "_hash_chunk", counted)
    return paths


def forget():
    """As in another process."""
    content_hash._remembered.clear()


def a_file(folder, content=b"content"):
    path = folder / "weights"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A file of 200 MB that takes no room, and its digest."""
    path = tmp_path_factory.mktemp("sparse") / "weights"
    with path.open("wb") as file:
        file.truncate(LENGTH)
    return path, content_hash.digest(path)


@settings(
    deadline=None,
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, LENGTH - 1), bit=st.integers(0, 7))
@example(place=0, bit=0)
@example(place=LENGTH - 1, bit=7)
@example(place=content_hash.CHUNK, bit=3)
@example(place=content_hash.CHUNK - 1, bit=3)
@example(place=(2 << 20) + 5, bit=1)  # behind the first MiB
def test_any_bit_of_any_byte_counts(sparse, place, bit):
    path, before = sparse
    with path.open("r+b") as file:
        for value in (1 << bit, 0):
            file.seek(place)
            file.write(bytes([value]))
            file.flush()
            assert (content_hash.digest(path) == before) == (value == 0)


@pytest.mark.parametrize("size", [0, 1, 100, 4096])
def test_lengths_and_names_count(tmp_path, size):
    path = a_file(tmp_path, bytes(size))
    digests = {
        content_hash.digest(path),
        content_hash.digest(a_file(tmp_path, bytes(size + 1))),
    }
    assert len(digests) == 2
    assert content_hash.combined({"a": "1", "b": "2"}) == content_hash.combined(
        {"b": "2", "a": "1"}
    )
    assert content_hash.combined({"a": "1", "b": "2"}) != content_hash.combined(
        {"a": "2", "b": "1"}
    )


def test_chunks_that_change_places_count(tmp_path, monkeypatch):
    monkeypatch.setattr(content_hash, "CHUNK", 4)
    assert content_hash.digest(a_file(tmp_path, b"aaaabbbb")) != content_hash.digest(
        a_file(tmp_path, b"bbbbaaaa")
    )


def test_what_has_not_changed_is_not_read_again(tmp_path, reads):
    path = a_file(tmp_path)
    digest = content_hash.digest(path)
    assert content_hash.digest(path) == digest
    forget()
    assert content_hash.digest(path) == digest
    assert reads == ["weights"]
    assert content_hash.unknown_bytes([path]) == 0


def rewrite_in_place(path):
    """Of the same length, and with the mtime of before, as rsync and tar leave it."""
    before = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path):
    """By another file of the same length and time."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"CONTENT")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def append(path):
    path.write_bytes(b"content and more")


def point_elsewhere(path):
    """A link, as in the Hugging Face cache, to another file."""
    other = path.with_name("blob")
    other.write_bytes(b"CONTENT")
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [rewrite_in_place, replace, append, point_elsewhere])
@pytest.mark.parametrize("process", ["the same", "another"])
def test_what_has_changed_is_read_again(change, process, tmp_path):
    path = a_file(tmp_path)
    before = content_hash.digest(path)
    change(path)
    if process == "another":
        forget()
    assert content_hash.digest(path) != before


def test_what_was_written_just_now_is_not_remembered(
    tmp_path, monkeypatch, reads, cache
):
    """Its next change may fall into the same tick of the clock."""
    monkeypatch.setattr(content_hash, "SETTLED", 3600 * 10**9)
    path = a_file(tmp_path)
    content_hash.digest(path)
    content_hash.digest(path)
    assert reads == ["weights"] * 2
    assert not cache.exists()


def test_a_file_that_is_written_meanwhile_is_not_remembered(
    tmp_path, monkeypatch, cache
):
    path = a_file(tmp_path)
    hash_chunk = content_hash._hash_chunk

    def meanwhile(*chunk):
        digest = hash_chunk(*chunk)
        path.write_bytes(b"more content")
        return digest

    monkeypatch.setattr(content_hash, "_hash_chunk", meanwhile)
    content_hash.digest(path)
    assert not content_hash._remembered
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"weights": 3}',
        b'{"weights": [1]}',
        b'{"weights": null}',
        b"\xff",
    ],
)
def test_a_damaged_cache_is_none(damage, tmp_path, cache, reads):
    path = a_file(tmp_path)
    digest = content_hash.digest(path)
    (file,) = (cache / "digests").iterdir()
    file.write_bytes(damage)
    forget()
    assert content_hash.digest(path) == digest
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch, reads):
    """A file lies where the directory would; root may write anywhere else."""
    (tmp_path / "in the way").touch()
    monkeypatch.setenv("ZIPEVAL_CACHE", str(tmp_path / "in the way" / "cache"))
    path = a_file(tmp_path)
    digest = content_hash.digest(path)
    assert content_hash.digest(path) == digest
    forget()
    assert content_hash.digest(path) == digest
    assert len(reads) == 2


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert content_hash.cache_directory() == tmp_path / "cache"
    monkeypatch.setenv("ZIPEVAL_CACHE", "")
    assert content_hash.cache_directory() is None
    monkeypatch.delenv("ZIPEVAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert content_hash.cache_directory() == Path("/x/zipeval")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert content_hash.cache_directory() == Path("/h/.cache/zipeval")


def test_the_cache_is_of_the_user_alone_and_forgets_files_that_are_gone(
    tmp_path, cache
):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    first = a_file(folder)
    content_hash.digest(first)
    first.unlink()
    (folder / "second").write_bytes(b"2")
    content_hash.digest(folder / "second")
    (file,) = (cache / "digests").iterdir()
    assert [*content_hash._read(str(folder))] == ["second"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(tmp_path) not in file.read_text()


def hash_all(paths):
    return [content_hash.digest(path) for path in paths]


def test_several_processes_at_once(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    paths = [folder / str(number) for number in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode())
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(hash_all, [paths, paths[::-1], paths])
    assert found[0] == found[1][::-1] == found[2] == hash_all(paths)


def test_progress_comes_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(content_hash, "CHUNK", 700_000)
    path = a_file(tmp_path, bytes(5 << 20))
    told = []
    content_hash.digests([path], told.append)
    assert sum(told) == 5
    assert min(told) > 0


def test_a_digest_of_several_files_is_remembered_until_one_changes(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"rows")
    content_hash.Entry("rows", paths).store("digest")
    assert content_hash.Entry("rows", paths).digest == "digest"
    assert content_hash.Entry("other rows", paths).digest is None
    assert content_hash.Entry("rows", paths[:1]).digest is None
    paths[1].write_bytes(b"ROWS")
    assert content_hash.Entry("rows", paths).digest is None
