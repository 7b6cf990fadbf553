"""Sweeps: what a command comes to, which jobs work it off, and what is told of their ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_ranks import kept

from zipeval.cli import compose, expand, main
from zipeval.errors import RunError, Stopped, UsageError
from zipeval.evaluation import runner
from zipeval.inference.validation import check
from zipeval.results import records
from zipeval.sweeps import job, sweep
from zipeval.utils import ranks

TABLE = """# @package _global_
defaults:
  - override /model: tiny_next
  - override /suite: smoke
hydra:
  sweeper:
    params: {method: "vanilla,visionzip", tokens: "160,80"}
"""


def planned(*arguments):
    return expand(["-m", *arguments, "bound=none"])[0]


def run(monkeypatch, directory, *arguments):
    """The exit code of `zipeval run` in this process."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["zipeval", "run", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def states(directory):
    """By cell: the states of the only sweep."""
    paths = sorted(directory.glob("results/runs/sweeps/*/0*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def statuses(directory):
    return [state["status"] for state in states(directory).values()]


@pytest.fixture
def tables(tmp_path):
    """A user's directory of configurations, with a table in it."""
    (tmp_path / "my" / "table" / "mine").mkdir(parents=True)
    (tmp_path / "my" / "table" / "mine" / "two.yaml").write_text(TABLE)
    return ["--config-dir", str(tmp_path / "my"), "+table=mine/two"]


def test_every_combination_is_a_cell_and_equal_ones_are_one():
    """vanilla has no budget."""
    made = planned("method=vanilla,visionzip", "tokens=48,16", "limit=4")
    assert [cell.name for cell in made.cells] == [
        "000-tiny_llava-vanilla",
        "001-tiny_llava-visionzip-48",
        "002-tiny_llava-visionzip-16",
    ]
    for cell in made.cells:
        assert cell.config == check(compose(cell.overrides))
    assert (
        made.command
        == "zipeval run -m method=vanilla,visionzip tokens=48,16 limit=4 bound=none"
    )


def test_a_table_is_a_sweep_that_the_command_line_changes(tables):
    whole = planned(*tables)
    assert whole.name.startswith("mine-two-")
    assert [cell.name[4:] for cell in whole.cells] == [
        "tiny_next-vanilla",
        "tiny_next-visionzip-160",
        "tiny_next-visionzip-80",
    ]
    assert {len(cell.config.tasks) for cell in whole.cells} == {4}
    changed = planned(
        *tables, "model=tiny_llava", "suite=shapes", "tokens=16", "method=fastv,random"
    )
    assert [cell.name[4:] for cell in changed.cells] == [
        "tiny_llava-fastv-16",
        "tiny_llava-random-16",
    ]
    assert {*changed.cells[0].config.tasks} == {"zipeval_shapes"}


def test_the_same_cells_are_the_same_sweep():
    """However fast, wherever and by whatever they are run; another limit, another budget or model are another sweep."""
    name = planned("method=visionzip", "tokens=48,16").name
    for same in (
        "batch_size=2",
        "runner.workers=0",
        "results=elsewhere",
        "hydra/launcher=basic",
        "sweep.group_by=none",
    ):
        assert planned("method=visionzip", "tokens=48,16", same).name == name
    for other in ("limit=4", "tokens=48,32", "model=tiny_gemini", "seed=1"):
        assert planned("method=visionzip", "tokens=48,16", other).name != name


@pytest.mark.parametrize(
    "grouping, groups", [([], [0, 1, 0, 1]), (["sweep.group_by=none"], [0, 1, 2, 3])]
)
@pytest.mark.parametrize(
    "swept", ["model=tiny_llava,tiny_gemini", "model.dtype=float32,bfloat16"]
)
def test_cells_of_a_model_are_one_job(grouping, groups, swept):
    """With other settings it is another one to load."""
    assert [
        cell.group for cell in planned("method=vanilla,none", swept, *grouping).cells
    ] == groups


def test_what_launches_a_sweep_is_not_of_its_cells(tables):
    made, launching = expand(
        [
            "-m",
            *tables,
            "hydra/launcher=basic",
            "sweep.group_by=none",
            "hydra.verbose=false",
        ]
    )
    search = f"hydra.searchpath=['file://{Path(tables[1])}']"
    assert launching == [search, "hydra/launcher=basic", "hydra.verbose=false"]
    assert made.cells[0].overrides == [
        "method=vanilla",
        "tokens=160",
        "+table=mine/two",
    ]


REFUSED = [
    (["model=tiny_lava,tiny_llava"], "model=tiny_lava: ", "Did you mean tiny_llava?"),
    (["+table=paper_tabel1"], "table=paper_tabel1: ", "Did you mean paper_table1?"),
    (["table=paper_table1"], "table=paper_table1: ", "write +table=paper_table1"),
    (
        ["+table=paper_table1,paper_table2"],
        "+table=paper_table1,paper_table2: ",
        "by itself",
    ),
    (
        ["+experiment=misalignmnt"],
        "experiment=misalignmnt: ",
        "Did you mean misalignment?",
    ),
    (
        ["experiment=misalignment"],
        "experiment=misalignment: ",
        "write +experiment=misalignment",
    ),
    (
        ["+experiment=misalignment", "+table=paper_table1"],
        "+experiment=misalignment +table=paper_table1: ",
        "by itself",
    ),
    (["hydra/launcher=nowhere"], "hydra/launcher/nowhere", "--help"),
    (["sweep.group=model"], "sweep.group: ", "Did you mean sweep.group_by?"),
    (["sweep.group_by=method"], "sweep.group_by=method: ", "model, none"),
    (["results=a,b"], "results=a,b: ", "once for each"),
    (["limit=0,-1"], "limit=0: ", "limit=16"),
    (
        ["judge.url=http://user:canary@host/v1", "judge.model=x"],
        "judge.url=http://host/v1: ",
        "without -m",
    ),
    (
        ["judge.url='http://host/v1?key=canary'", "judge.model=x"],
        "judge.url=http://host/v1: ",
        "without -m",
    ),
    (["tokens=range(5,5)"], "tokens=range(5,5): ", "at least one value"),
    (["--config-dir", "nowhere"], "--config-dir nowhere: ", "no such directory"),
]


@pytest.mark.parametrize(
    "arguments, named, advice",
    REFUSED,
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_refused_sweep_leaves_nothing(
    arguments, named, advice, tmp_path, monkeypatch, capsys
):
    assert run(monkeypatch, tmp_path, "-m", *arguments) == 2
    said = capsys.readouterr().err
    assert named in said
    assert advice in said
    assert "canary" not in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "launching",
    ["+launcher=slurm", "hydra/launcher=submitit_slurm", "sweep.group_by=none"],
)
def test_what_launches_a_sweep_does_not_launch_one_run(
    launching, tmp_path, monkeypatch, capsys
):
    seen = failing(monkeypatch, {})
    assert run(monkeypatch, tmp_path, launching, "method=visionzip", "tokens=1") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"zipeval: {launching}: ")
    assert "Add -m." in said
    assert not seen


def test_what_shows_a_sweep_is_a_shells_command():
    made = planned("results='of mine'")
    assert made.status_command == f"zipeval status {made.name} 'results=of mine'"


def test_runs_of_a_sweep_are_those_of_single_commands(tmp_path, monkeypatch, capsys):
    settings = ["method=vanilla,visionzip", "tokens=16", "limit=3"]
    assert run(monkeypatch, tmp_path, "-m", *settings) == 0
    results = tmp_path / "results" / "runs"
    for method in ("vanilla", "visionzip"):
        runner.run(
            compose(
                [
                    f"method={method}",
                    "tokens=16",
                    "limit=3",
                    f"results={tmp_path}/alone",
                ]
            )
        )
    assert kept(results) == kept(tmp_path / "alone")
    found = states(tmp_path)
    assert statuses(tmp_path) == ["done", "done"]
    assert [path for state in found.values() for path in state["records"]] == [
        record["path"] for record in records.read_all("results/runs")
    ]
    (directory,) = (results / "sweeps").iterdir()
    assert f"`zipeval status {directory.name}`" in capsys.readouterr().err
    written = json.loads((directory / "plan.json").read_text())
    assert [cell["name"] for cell in written["cells"]] == [*found]
    assert {path.name for path in tmp_path.iterdir()} == {"results", "alone"}
    before = kept(results)
    assert run(monkeypatch, tmp_path, "-m", *settings) == 0
    assert capsys.readouterr().out.count("kept") == 2
    assert kept(results) == before


def failing(monkeypatch, failures):
    """A runner that does nothing but to fail: by tokens, what with. Returns the tokens it was run with."""
    seen = []

    def fail(config, checkpoint):
        seen.append(config.tokens)
        if config.tokens in failures:
            raise failures[config.tokens]
        return []

    monkeypatch.setattr(runner, "run", fail)
    return seen


@pytest.mark.parametrize(
    "failures, code, expected",
    [
        ({}, 0, ["done"] * 3),
        ({1: UsageError("one is refused")}, 2, ["refused", "done", "done"]),
        ({2: RunError("two failed")}, 1, ["done", "failed", "done"]),
        (
            {1: UsageError("one is refused"), 3: RunError("three failed")},
            1,
            ["refused", "done", "failed"],
        ),
        ({1: KeyError("a bug")}, 1, ["failed", "done", "done"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("group_by", sweep.GROUPINGS)
def test_what_one_run_fails_with_is_told_and_the_others_go_on(
    failures, code, expected, group_by, tmp_path, monkeypatch, capsys
):
    failing(monkeypatch, failures)
    settings = [
        "-m",
        "method=visionzip",
        "tokens=1,2,3",
        f"sweep.group_by={group_by}",
        "bound=none",
    ]
    assert run(monkeypatch, tmp_path, *settings) == code
    assert statuses(tmp_path) == expected
    said = capsys.readouterr().err
    for error in failures.values():
        assert (
            f"zipeval: {error}" in said
            or "zipeval: 000-tiny_llava-visionzip-1: KeyError: 'a bug'" in said
        )
        assert any(
            str(error) in (state["error"] or "") for state in states(tmp_path).values()
        )
    failing(monkeypatch, {})  # the next time none of it is left
    assert run(monkeypatch, tmp_path, *settings) == 0
    assert statuses(tmp_path) == ["done"] * 3


@pytest.mark.parametrize("group_by", sweep.GROUPINGS)
def test_a_sweep_that_is_told_to_stop_begins_nothing_else(
    group_by, tmp_path, monkeypatch, capsys
):
    seen = failing(monkeypatch, {2: Stopped("two is stopped")})
    settings = [
        "-m",
        "method=visionzip",
        "tokens=1,2,3",
        f"sweep.group_by={group_by}",
        "bound=none",
    ]
    assert run(monkeypatch, tmp_path, *settings) == 130
    assert seen == [1, 2]
    assert statuses(tmp_path) == ["done", "stopped"]
    assert capsys.readouterr().err.splitlines()[1:] == ["zipeval: two is stopped"]


def test_what_is_refused_before_it_starts_is_told_with_the_rest(
    tmp_path, monkeypatch, capsys
):
    seen = failing(monkeypatch, {})
    assert (
        run(
            monkeypatch,
            tmp_path,
            "-m",
            "method=visionzip",
            "tokens=1",
            "limit=0,2",
            "bound=none",
        )
        == 2
    )
    assert seen == [1]
    assert statuses(tmp_path) == ["refused", "done"]
    assert "zipeval: limit=0: expected" in capsys.readouterr().err


def test_a_job_that_died_is_told(tmp_path, monkeypatch):
    """One cell was under way, another one was not begun; what it failed with the last time is not told again."""
    monkeypatch.chdir(tmp_path)
    made = planned("method=visionzip", "tokens=1,2,3")
    sweep.begin(made)
    failing(monkeypatch, {3: RunError("three failed")})
    job.Job(made)(made.cells[0])
    sweep.begin(made)
    failing(monkeypatch, {2: SystemExit})
    with pytest.raises(SystemExit):
        job.Job(made)(made.cells[0])  # anything with a group
    with pytest.raises(
        RunError,
        match=f"sweep {made.name}: 2 of 3 runs .* `zipeval status {made.name}`",
    ):
        sweep.end(made)


@pytest.mark.parametrize("torn", ["", '{"status": "done', "{}", "null"])
def test_a_torn_state_is_as_none(torn, tmp_path, monkeypatch):
    settings = ["-m", "method=visionzip", "tokens=1,2", "bound=none"]
    failing(monkeypatch, {})
    assert run(monkeypatch, tmp_path, *settings) == 0
    next(tmp_path.glob("results/runs/sweeps/*/000-*.json")).write_text(torn)
    seen = failing(monkeypatch, {})
    assert run(monkeypatch, tmp_path, *settings) == 0
    assert seen == [1, 2]
    assert statuses(tmp_path) == ["done", "done"]


def test_a_bug_in_one_of_several_ranks_ends_it(tmp_path, monkeypatch):
    """The others wait for this one, in the run that it left."""
    monkeypatch.chdir(tmp_path)
    made = planned("method=visionzip", "tokens=1,2,3")
    sweep.begin(made)
    seen = failing(monkeypatch, {2: KeyError("a bug")})
    monkeypatch.setattr(ranks, "here", lambda: ranks.Place(rank=0, local=0, count=2))
    monkeypatch.setattr(ranks, "exchange", lambda value: [value])
    begun = job.Job(made)
    with pytest.raises(KeyError):
        begun(made.cells[0])
    begun(made.cells[0])
    assert seen == [1, 2]


def test_a_killed_sweep_continues(tmp_path):
    """SIGKILL while its second run is under way."""
    command = [
        sys.executable,
        "-m",
        "zipeval",
        "run",
        "-m",
        "method=visionzip",
        "tokens=48,16",
        "limit=3",
        "bound=none",
    ]
    script = (
        "import os, signal, sys\nfrom zipeval import cli\nfrom zipeval.evaluation import runner\n"
        "evaluate = runner.run\n"
        "def run(config, checkpoint):\n    if config.tokens == 16:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return evaluate(config)\n"
        "runner.run = run\nsys.argv = ['zipeval', *sys.argv[1:]]\ncli.main()"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, *command[3:]],
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL
    assert statuses(tmp_path) == ["done", "running"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "visionzip-48" in done.stdout.splitlines()[0]
    assert "kept" in done.stdout.splitlines()[0]
    assert statuses(tmp_path) == ["done", "done"]


def test_a_sweep_over_an_interval_is_refused():
    with pytest.raises(UsageError, match=r"tokens=interval\(1,9\): .*Name each value"):
        expand(["model=tiny_llava", "method=visionzip", "tokens=interval(1,9)"])
