"""How far sweeps and runs are, with other processes at work on them, stopped, and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from test_sweep import failing, planned, run, states

from zipeval.cli import main
from zipeval.errors import RunError, UsageError
from zipeval.evaluation import runner
from zipeval.results import records
from zipeval.sweeps import job, sweep
from zipeval.sweeps import state as state_files

# A job as any launcher starts it, in which a run has answered two of its questions and is at the third.
JOB = """
import sys, time
from pathlib import Path
from zipeval.evaluation import runner
from zipeval.sweeps import sweep, job, state as state_files
from zipeval.cli import expand
from zipeval.results.journal import Journal
from zipeval.results.lock import locked

evaluate = runner.run

def run(config, checkpoint):
    if config.tokens != 16:
        return evaluate(config, checkpoint)
    directory = Path(config.results) / "tiny_llava-visionzip-16-0123456789"
    with locked(directory / "zipeval_shapes.lock"):
        made_with = {"task_hash": "", "data_hash": None, "code": "", "versions": {}}
        journal = Journal(directory, "zipeval_shapes", made_with, {})
        journal.append([{"doc_id": 0, "at": 1.0}, {"doc_id": 1, "at": 1.0}])
        print("at work", flush=True)
        time.sleep(300)

runner.run = run
made, _ = expand(sys.argv[1:])
sweep.begin(made)
job.Job(made)(made.cells[0])
"""
SETTINGS = [
    "-m",
    "method=visionzip",
    "tokens=48,16,32",
    "limit=3",
    "batch_size=1",
    "bound=none",
]


@contextmanager
def at_work(directory):
    """The sweep of SETTINGS with its first run done, its second under way and its third not begun."""
    script = directory / "job.py"
    script.write_text(JOB)
    command = [sys.executable, str(script), *SETTINGS]
    with subprocess.Popen(
        command,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = ""
            while "at work" not in said:
                said = process.stdout.readline()
                assert said, process.stderr.read()
            yield process
        finally:
            process.kill()


def status(monkeypatch, capsys, *arguments):
    """The lines that `zipeval status` prints."""
    monkeypatch.setattr(sys, "argv", ["zipeval", "status", *arguments])
    capsys.readouterr()
    main()
    return capsys.readouterr().out.splitlines()


def cells(said):
    """By cell, its line's other columns."""
    return {
        line.split()[0]: line.split()[1:]
        for line in said
        if line[:3].isdecimal() and ":" not in line.split()[0]
    }


def test_a_sweep_that_is_under_way_and_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with at_work(tmp_path) as process:
        said = status(monkeypatch, capsys, "tiny")
        found = cells(said)
        assert said[0].endswith(": 3 runs, 1 done, 1 running, 1 left")
        assert said[1] == "zipeval run " + " ".join(SETTINGS)
        assert found["000-tiny_llava-visionzip-48"][:3] == ["done", "3", "3"]
        assert found["001-tiny_llava-visionzip-16"][:3] == ["running", "2", "3"]
        assert found["001-tiny_llava-visionzip-16"][4:6] == [
            "process",
            str(process.pid),
        ]
        assert found["002-tiny_llava-visionzip-32"][:3] == ["left", "0", "3"]
        (record,) = records.read_all("results/runs")
        samples = records.read_samples(Path(record["path"]).parent, record)
        each = sorted(sample["latency"] for sample in samples)[
            1
        ]  # and 1 + 3 of them are left
        (left,) = (line for line in said if line.startswith("Time left: about "))
        assert float(left.split()[3]) == pytest.approx(4 * each, abs=0.51)
        (listed,) = (
            line for line in status(monkeypatch, capsys) if "-0123456789" in line
        )
        assert listed.split()[1:] == [
            "0",
            "-",
            "0",
            "-",
            *f"process {process.pid} on {os.uname().nodename}".split(),
        ]
        process.send_signal(signal.SIGKILL)
        process.wait()
    said = status(monkeypatch, capsys, "tiny")
    assert said[0].endswith(": 3 runs, 1 done, 1 died, 1 left")
    assert cells(said)["001-tiny_llava-visionzip-16"][4:6] == [
        "process",
        str(process.pid),
    ]
    assert "The same command goes on with what has no end." in said
    (listed,) = (line for line in status(monkeypatch, capsys) if "-0123456789" in line)
    assert listed.endswith("left unfinished, nobody is at it")
    assert run(monkeypatch, tmp_path, *SETTINGS) == 0
    said = status(monkeypatch, capsys, "tiny")
    assert said[0].endswith(": 3 runs, 3 done")
    assert said[-1] == "Nothing is left to be answered."


def test_the_same_command_leaves_alone_what_another_process_is_at(
    tmp_path, monkeypatch, capsys
):
    """The rest of the cells is done; that one has no end here is told."""
    with at_work(tmp_path) as process:
        before = states(tmp_path)
        capsys.readouterr()
        assert run(monkeypatch, tmp_path, *SETTINGS) == 2
        who = f"process {process.pid} on {os.uname().nodename}"
        its = f"zipeval: 001-tiny_llava-visionzip-16: {who} has been at it since"
        assert its in capsys.readouterr().err
        after = states(tmp_path)
        assert [state["status"] for state in after.values()] == [
            "done",
            "running",
            "done",
        ]
        assert (
            after["001-tiny_llava-visionzip-16"]
            == before["001-tiny_llava-visionzip-16"]
        )
        (lock,) = tmp_path.glob("results/runs/*/*.lock")
        lock.write_text(
            ""
        )  # before its process has said who it is, or where there was no room for it
        assert status(monkeypatch, capsys, "tiny")[0].endswith(
            ": 3 runs, 2 done, 1 running"
        )
        assert any(
            line.endswith("process ? on ?") for line in status(monkeypatch, capsys)
        )


def test_a_torn_state_is_told_beside_the_others(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, {})
    run(
        monkeypatch,
        tmp_path,
        "-m",
        "method=visionzip",
        "tokens=1,2",
        "limit=4",
        "bound=none",
    )
    (path,) = tmp_path.glob("results/runs/sweeps/*/000-*.json")
    path.write_text('{"status": "do')
    said = status(monkeypatch, capsys, "tiny")
    assert said[0].endswith(": 2 runs, 1 done, 1 unreadable")
    assert cells(said)["000-tiny_llava-visionzip-1"] == [
        "unreadable",
        "-",
        "4",
        "-",
        "-",
    ]
    assert any(f"{path.name}: not a readable state" in line for line in said)
    assert status(monkeypatch, capsys)[1].split()[1:] == [
        "2",
        "1",
        "-",
        "-",
        "-",
        "-",
        "-",
        "1",
        "-",
    ]


@pytest.mark.parametrize(
    "error, left",
    [(RunError("it failed"), True), (UsageError("no such data"), True), (None, False)],
)
def test_what_has_no_end_is_left(error, left, tmp_path, monkeypatch, capsys):
    """Only a run that was refused before anything started never will be answered."""
    failing(monkeypatch, {2: error} if error else {})
    run(
        monkeypatch,
        tmp_path,
        "-m",
        "method=visionzip",
        "tokens=2",
        "limit=0,4",
        "bound=none",
    )
    said = status(monkeypatch, capsys, "tiny")
    assert ("Nothing is left to be answered." not in said) == left
    assert cells(said)["001-tiny_llava-visionzip-2"][1:3] == ["-" if left else "0", "4"]


def test_a_run_that_is_done_has_the_records_that_it_says(tmp_path, monkeypatch, capsys):
    """Though they are of another batch size, or were made from the same weights elsewhere."""
    made = planned(
        "method=visionzip", "tokens=16", "limit=2", f"results={tmp_path}/there"
    )
    (path,) = runner.run(made.cells[0].config)
    record = json.loads(path.read_text())
    record["config"]["model"]["path"] = "elsewhere"
    path.write_text(json.dumps(record))
    sweep.begin(made)
    monkeypatch.setattr(runner, "run", lambda config, checkpoint: [path])
    job.Job(made)(made.cells[0])
    (tmp_path / "there").rename(tmp_path / "here")
    said = status(monkeypatch, capsys, "tiny", f"results={tmp_path}/here")
    assert cells(said)["000-tiny_llava-visionzip-16"][:3] == ["done", "2", "2"]


def test_a_number_that_another_process_has_now():
    """The one that wrote the state was born before it."""
    with subprocess.Popen(["sleep", "60"]) as other:
        born = psutil.Process(other.pid).create_time()
        state = {"status": "running", "host": os.uname().nodename, "pid": other.pid}
        assert state_files.is_alive({**state, "born": born}, {})
        assert not state_files.is_alive({**state, "born": born - 3600}, {})
        other.kill()
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert not state_files.is_alive({**state, "born": born}, {})


def test_what_failed_is_told_with_its_reason(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, {2: RunError("two [red] failed")})
    run(
        monkeypatch,
        tmp_path,
        "-m",
        "method=visionzip",
        "tokens=1,2,3",
        "limit=0,4",
        "bound=none",
    )
    said = status(monkeypatch, capsys, "tiny")
    assert said[0].endswith(": 6 runs, 2 done, 1 failed, 3 refused")
    assert "003-tiny_llava-visionzip-2: two [red] failed" in said
    assert sum("limit=0: expected" in line for line in said) == 3
    listed = status(monkeypatch, capsys)
    assert listed[0].split() == [
        "sweep",
        "runs",
        *[
            "done",
            "running",
            "failed",
            "refused",
            "stopped",
            "died",
            "unreadable",
            "left",
        ],
    ]
    assert listed[1].split()[1:] == ["6", "2", "-", "1", "3", "-", "-", "-", "-"]


def test_nothing_is_measured_before_something_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = planned("method=visionzip", "tokens=48,16")
    sweep.begin(made)
    said = status(monkeypatch, capsys, made.name)
    assert [*cells(said).values()] == [["left", "0", "1499", "-", "-"]] * 2
    assert (
        said[-1]
        == "Time left: nothing is measured yet, the first finished task will tell."
    )


def test_a_run_that_left_only_a_journal_is_shown(tmp_path, monkeypatch, capsys):
    """It was stopped in its first task, so that it has no record, and no process is at it."""
    run = tmp_path / "results" / "runs" / "tiny-vanilla"
    run.mkdir(parents=True)
    (run / "zipeval_shapes.journal.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zipeval", "status", f"results={run.parent}"])
    main()
    assert "left unfinished, nobody is at it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "age, locked, expected",
    [(10, False, "running"), (10_000, False, "died"), (10_000, True, "running")],
)
def test_a_job_on_another_machine(age, locked, expected):
    """Whose process cannot be seen: only its locks, and it has none before it has looked at its configuration."""
    from datetime import datetime, timedelta, timezone

    from zipeval.sweeps.progress import current_status

    started = (datetime.now(timezone.utc) - timedelta(seconds=age)).isoformat(
        timespec="seconds"
    )
    state = {
        "status": "running",
        "host": "elsewhere",
        "pid": os.getpid(),
        "started": started,
    }
    lock = {"host": "elsewhere", "pid": os.getpid()}
    assert (
        current_status(state, {Path("run/task.lock"): lock} if locked else {})
        == expected
    )


def test_records_made_without_the_sweep_are_its_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = planned("method=visionzip,random", "tokens=16", "limit=2")
    sweep.begin(made)
    runner.run(made.cells[0].config)
    assert [
        line[1:3] for line in cells(status(monkeypatch, capsys, made.name)).values()
    ] == [["2", "2"], ["0", "2"]]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "results=results/runs: nothing is there"),
        (["none"], "status none: no such sweep in results=results/runs."),
        (["a", "b"], "status a b: name one sweep"),
        (
            ["result=x"],
            "result: no such setting of `zipeval status`. Did you mean results?",
        ),
    ],
)
def test_refusals(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        status(monkeypatch, capsys, *arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_an_ambiguous_beginning_names_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = []
    for limit in (1, 2):
        names.append(planned("method=visionzip", "tokens=16", f"limit={limit}").name)
        sweep.begin(planned("method=visionzip", "tokens=16", f"limit={limit}"))
    with pytest.raises(SystemExit):
        status(monkeypatch, capsys, "tiny")
    assert ", ".join(sorted(names)) in capsys.readouterr().err


def test_500_runs_are_listed_within_two_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (path,) = runner.run(
        planned("method=visionzip", "tokens=16", "limit=1").cells[0].config
    )
    record = json.loads(path.read_text())
    for number in range(499):
        other = path.parent.with_name(f"run-{number}") / path.name
        other.parent.mkdir()
        other.write_text(json.dumps({**record, "run_id": other.parent.name}))
    start = time.monotonic()
    said = status(monkeypatch, capsys)
    assert time.monotonic() - start < 2
    assert len(said) == 501
