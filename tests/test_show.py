from __future__ import annotations

import subprocess
import sys

import pytest

from zipeval.cli import main
from zipeval.errors import UsageError
from zipeval.reporting.show import find, show
from zipeval.results import records

RUNS = (
    "tiny-vanilla-0a1b",
    "tiny-visionzip-16-2c3d",
    "tiny-visionzip-32-4e5f",
    "tiny-visionzip-32-4e5f-2",
)


def put(root, name=RUNS[1], task="shapes", score=91.5, **fields):
    record = {
        "run_id": name,
        "task": task,
        "task_hash": f"hash-of-{task}",
        "data_hash": "d" * 16,
        "data_revision": "c" * 40,
        "model_revision": "c0ffee",
        "status": "success",
        "failed": 3,
        "metric": "accuracy",
        "score": score,
        "metrics": {"accuracy_exist": 0.5, "accuracy": 0.915},
        "visual_tokens": {"requested": 16, "mean": 16.04, "final": 15.0},
        "config": {
            "model": {"name": "tiny"},
            "method": {"name": "x", "layers": [2, 6]},
            "limit": None,
        },
        "resolved": {
            "method": "X(tokens=16, [red]kept[/red])",
            "fingerprint": "f" * 16,
        },
        "machine": {"device": "NVIDIA H100 80GB HBM3", "driver": "570.1"},
        "versions": {"torch": "2.9", "flash-attn": None},
        "git": {"revision": "abc", "dirty": True},
        "code": "0123",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T01:00:00+00:00",
        "seconds": 3600.0,
    }
    samples = [
        {"doc_id": n} | ({"error": "no picture"} if n < 3 else {}) for n in range(7)
    ]
    return records.write(root / name, record | fields, samples)


def shown(capsys, *arguments):
    """Lines of words of what is printed."""
    show(*arguments)
    return [
        line.split() for line in capsys.readouterr().out.splitlines() if line.strip()
    ]


def test_scores_and_provenance(tmp_path, capsys):
    put(tmp_path)
    lines = shown(capsys, RUNS[1], str(tmp_path))
    assert lines[0] == [RUNS[1]]
    headings = [
        "task",
        "score",
        "metric",
        "value",
        "samples",
        "failed",
        "unscored",
        "tokens",
        "mean",
        "final",
    ]
    assert lines[1] == headings
    assert lines[2] == [
        "shapes",
        "91.5",
        "accuracy",
        "0.915",
        "7",
        "3",
        "0",
        "16",
        "16.0",
        "15.0",
    ]
    assert lines[3] == ["accuracy_exist", "0.5"]
    times = ["2026-01-01T00:00:00+00:00", "2026-01-01T01:00:00+00:00", "3600.0"]
    assert lines[5] == [
        "shapes",
        "success",
        *times,
        "hash-of-shapes",
        "d" * 16,
        "c" * 40,
    ]
    held = {name: " ".join(value) for name, *value in lines[6:]}
    assert held == {
        "provenance": "",
        "run_id": RUNS[1],
        "model_revision": "c0ffee",
        "git.revision": "abc",
        "git.dirty": "true",
        "code": "0123",
        "machine.device": "NVIDIA H100 80GB HBM3",
        "machine.driver": "570.1",
        "versions.torch": "2.9",
        "versions.flash-attn": "-",
        "resolved.method": "X(tokens=16, [red]kept[/red])",
        "resolved.fingerprint": "f" * 16,
        "config.model.name": "tiny",
        "config.method.name": "x",
        "config.method.layers": "[2, 6]",
        "config.limit": "-",
    }


def test_all_processes_that_answered_a_run_are_told(tmp_path, capsys):
    device = {"device": "NVIDIA A100"}
    put(
        tmp_path,
        sessions=[
            {"machine": device, "seconds": 12.5},
            {"machine": {"device": "cpu"}, "seconds": 1.0},
        ],
    )
    put(tmp_path, RUNS[0], sessions=[{"machine": device, "seconds": 12.5}])
    lines = shown(capsys, RUNS[1], str(tmp_path))
    assert ["session", "1.machine.device", "NVIDIA", "A100"] in lines
    assert ["session", "2.seconds", "1.0"] in lines
    assert not [
        line for line in shown(capsys, RUNS[0], str(tmp_path)) if line[0] == "session"
    ]


def test_prompts_that_did_not_fit_have_a_column_where_there_are_any(tmp_path, capsys):
    put(tmp_path, overflowed=5)
    _, headings, line, *_ = shown(capsys, RUNS[1], str(tmp_path))
    assert line[headings.index("overflowed")] == "5"


def test_what_tasks_do_not_agree_on_is_said_of_each(tmp_path, capsys):
    put(tmp_path)
    put(
        tmp_path,
        task="gqa",
        score=None,
        metrics={},
        status="incomplete",
        unscored=7,
        git=None,
    )
    put(tmp_path, RUNS[0])  # of another run
    lines = shown(capsys, RUNS[1], str(tmp_path))
    assert lines[2] == [
        "gqa",
        "-",
        "accuracy",
        "-",
        "7",
        "3",
        "7",
        "16",
        "16.0",
        "15.0",
    ]
    (status,) = (line for line in lines if line[:2] == ["gqa", "incomplete"])
    assert "hash-of-gqa" in status
    told = [line for line in lines if line[0].startswith("git")]
    assert told == [
        ["git", "(gqa)", "-"],
        ["git.revision", "(shapes)", "abc"],
        ["git.dirty", "(shapes)", "true"],
    ]
    assert [line for line in lines if line[0] == "model_revision"] == [
        ["model_revision", "c0ffee"]
    ]


def test_piped_it_is_plain_and_not_folded(tmp_path):
    """As a shell runs it; torch is not imported."""
    long = "x" * 500
    put(tmp_path / "results/runs", resolved={"method": long})
    script = "import sys, zipeval.cli as c; c.main(); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "show", "tiny-vis"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert any(
        line.split() == ["resolved.method", long] for line in done.stdout.splitlines()
    )


@pytest.mark.parametrize(
    "name, found", [("tiny-va", 0), ("tiny-visionzip-1", 1), (RUNS[2], 2), (RUNS[3], 3)]
)
def test_the_beginning_of_a_name_will_do(name, found, tmp_path):
    for run in RUNS:
        put(tmp_path, run)
    (tmp_path / "tiny-vanilla-empty").mkdir()  # nothing to show, so not in the way
    assert find(name, str(tmp_path)).name == RUNS[found]


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "tiny-vis",
            f"show tiny-vis: 3 runs begin like this: {', '.join(RUNS[1:])}. Name one of them.",
        ),
        (
            "tiny-vanila-0a1b",
            "no such run. Did you mean tiny-vanilla-0a1b? `ls {root}` lists all 4.",
        ),
        ("zzz", "show zzz: no such run. `ls {root}` lists all 4."),
    ],
)
def test_refused_names(name, said, tmp_path):
    for run in RUNS:
        put(tmp_path, run)
    with pytest.raises(UsageError) as refused:
        find(name, str(tmp_path))
    assert str(refused.value).endswith(said.format(root=tmp_path))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "show: name one run"),
        (["a", "b"], "show a b: name one run"),
        (["a", "result=x"], "Did you mean results?"),
        (["a", "results=nowhere"], "results=nowhere: no records."),
    ],
)
def test_refused_arguments(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zipeval", "show", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
