"""Records survive whatever happens to the process that writes them."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest

import zipeval
from zipeval.errors import RunError, UsageError
from zipeval.results import records

WRITER = """
import itertools, sys
from pathlib import Path
from zipeval.results import records
for i in itertools.count():
    samples = [{"doc_id": n, "text": "x" * 1000} for n in range(400)]
    images = {n: b"z" * 9999 for n in range(4)}
    records.write(Path(sys.argv[1]), {"task": f"task{i}", "padding": "y" * 400_000}, samples, images)
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_whole_records_only(tmp_path):
    """SIGKILL at 20 random moments: a record is there with exactly its samples, or it is not there."""
    rng = random.Random(0)
    for number in range(20):
        directory = tmp_path / str(number)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, directory], stdout=subprocess.PIPE
        ) as writer:
            for _ in range(rng.randrange(1, 4)):
                writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
        found = records.read_all(str(tmp_path))
        assert found
        for record in found:
            assert record["padding"] == "y" * 400_000
            assert (
                len(records.read_samples(directory, record))
                == record["samples"]["count"]
                == 400
            )
            folder = directory / f"{record['task']}.images"
            assert {path.name: path.stat().st_size for path in folder.iterdir()} == {
                f"{n}.jpg": 9999 for n in range(4)
            }
        shutil.rmtree(directory)


def test_no_file_is_written_in_place(tmp_path):
    """Whoever has the old file open keeps all of it."""
    path, reader = tmp_path / "file", tmp_path / "reader"
    path.write_text("old")
    os.link(path, reader)
    records.atomic_write(path, "new")
    assert (path.read_text(), reader.read_text()) == ("new", "old")


def test_a_record_is_never_replaced(tmp_path):
    path = records.write(tmp_path, {"task": "t", "score": 1}, [])
    with pytest.raises(RunError, match="finished"):
        records.write(tmp_path, {"task": "t", "score": 2}, [])
    assert records.read(path)["score"] == 1


def test_images_are_there_before_their_record_and_go_with_the_next(
    tmp_path, monkeypatch
):
    folder = tmp_path / "t.images"
    waiting = {"task": "t", "status": "incomplete"}
    path = records.write(tmp_path, waiting, [{"doc_id": 0}], {0: b"a", 1: b"b"})
    records.write(tmp_path, waiting, [{"doc_id": 0, "score": 1}])  # a judge has spoken
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "0.jpg": b"a",
        "1.jpg": b"b",
    }
    path.unlink()

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(RunError, match="No space"):
        disk.setattr(os, "fsync", full)
        records.write(tmp_path, {"task": "t"}, [], {1: b"c"})
    assert not path.exists()
    records.write(tmp_path, {"task": "t"}, [], {1: b"c"})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"1.jpg": b"c"}
    assert sorted(os.listdir(tmp_path)) == ["t.images", "t.json", "t.samples.jsonl"]


def test_round_trip(tmp_path):
    samples = [
        {"doc_id": 0, "prediction": "naïve <script>\u2028"},
        {"doc_id": 1, "prediction": ""},
    ]
    path = records.write(tmp_path / "run", {"task": "t", "score": 0.1}, samples)
    record = records.read(path)
    assert record["score"] == 0.1
    assert record["path"] == str(path)
    assert records.read_samples(path.parent, record) == samples
    assert [r["path"] for r in records.read_all(str(tmp_path))] == [str(path)]
    assert sorted(os.listdir(path.parent)) == ["t.json", "t.samples.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x"
    records.atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        records.atomic_write(path, "\udc80")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_samples_that_are_not_json_are_kept_as_text(tmp_path):
    path = records.write(tmp_path / "run", {"task": "t"}, [{"target": Decimal("1.5")}])
    assert records.read_samples(path.parent, records.read(path)) == [{"target": "1.5"}]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    records.atomic_write(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_changed_samples_are_noticed(tmp_path):
    path = records.write(tmp_path / "run", {"task": "t"}, [{"doc_id": 0}])
    (path.parent / "t.samples.jsonl").write_text('{"doc_id": 1}\n')
    with pytest.raises(UsageError, match=r"t\.samples\.jsonl"):
        records.read_samples(path.parent, records.read(path))


def test_the_revision_is_that_of_our_own_sources(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    source = tmp_path / "zipeval/results/records.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(records, "__file__", str(source))
    revision = records.git_revision.__wrapped__  # of a process it is asked once
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    assert revision() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("changed")
    assert revision() == {"revision": git("rev-parse", "HEAD"), "dirty": True}
    wheel = tmp_path / "site-packages/zipeval/results/records.py"
    wheel.parent.mkdir(parents=True)
    monkeypatch.setattr(records, "__file__", str(wheel))
    assert revision() is None


def test_code_is_what_answers_depend_on(tmp_path, monkeypatch):
    """A docstring of the report is no reason to answer all questions again."""
    package = Path(zipeval.__file__).parent
    assert all(
        (package / name).exists() for name in records.ANSWERING
    )  # a name that is gone would hash nothing
    for name in (
        "engine/decoder.py",
        "reporting/html/report.py",
        "media.py",
        "results/records.py",
        "cli/run.py",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "results/records.py"))
    code = records.code.__wrapped__
    before = code()
    for name in ("reporting/html/report.py", "results/records.py", "cli/run.py"):
        (tmp_path / name).write_text("after")
        assert code() == before
    hashes = {before}
    for name in ("engine/decoder.py", "media.py"):
        (tmp_path / name).write_text("after")
        hashes.add(code())
    assert len(hashes) == 3


def test_what_is_edited_during_a_run_does_not_change_its_revision(monkeypatch):
    before = records.git_revision()
    monkeypatch.setattr(records, "__file__", "/nowhere/zipeval/results/records.py")
    assert records.git_revision() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}', "{}"])
def test_what_is_no_record_is_named(tmp_path, content):
    path = tmp_path / "run" / "t.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UsageError, match=r"run/t\.json"):
        records.read_all(str(tmp_path))


@pytest.mark.parametrize(
    "name, given",
    [
        ("m-visionzip-16-abc", "method=visionzip tokens=16"),
        ("m-vanilla-abc", "method=vanilla"),
    ],
)
def test_what_is_cut_off_is_named_with_its_command(name, given, tmp_path):
    path = records.write(tmp_path / name, {"task": "t"}, [{"doc_id": 0}, {"doc_id": 1}])
    record, whole = records.read(path), path.read_text()
    command = re.escape(f"`zipeval run model=m {given} tasks=[t] ...`")
    path.write_text(whole[:-20])
    with pytest.raises(
        UsageError,
        match=f"^{path}: not a readable record .* Move it away and .*{command}",
    ):
        records.read(path)
    path.write_text(whole)
    samples = path.with_name("t.samples.jsonl")
    samples.write_text(samples.read_text()[:-5])
    with pytest.raises(
        UsageError,
        match=f"^{samples}: does not match its record {path}. Move both away .*{command}",
    ):
        records.read_samples(path.parent, record)
