"""Sweeps whose jobs a scheduler runs: processes of this machine, a real Slurm of one node, and Ray.

`pytest -m cluster tests/test_clusters.py` runs those of the last two; they need what docs/clusters.md says.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from test_ranks import kept

from zipeval.cli import compose, expand
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.results import records
from zipeval.results.journal import answered

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm.sh"
METHODS, BUDGETS = ("visionzip", "fastv", "sparsevlm"), (48, 16)
EACH = [
    "limit=200",
    "batch_size=2",
    "runner.workers=1",
    "bound=none",
]  # for some seconds, in which a job can be stopped
SWEEP = [
    f"method={','.join(METHODS)}",
    f"tokens={','.join(map(str, BUDGETS))}",
    *EACH,
    "sweep.group_by=none",
]
ON_SLURM = [
    "+launcher=slurm",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
]
ON_RAY = ["+launcher=ray", "hydra.launcher.ray.remote.num_gpus=0"]


def started(directory, *arguments, **variables):
    command = [sys.executable, "-m", "zipeval", "run", "-m", *arguments]
    with (directory / "launcher.log").open("w") as log:
        environment = {**os.environ, **variables}
        return subprocess.Popen(
            command,
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def states(directory):
    """By cell: the states of the only sweep."""
    paths = directory.glob("results/runs/sweeps/*/[0-9]*.json")
    return {path.stem: json.loads(path.read_text()) for path in sorted(paths)}


def told(directory):
    """What the launcher and the jobs said, for a failure's report."""
    logs = [
        directory / "launcher.log",
        *directory.glob("results/runs/sweeps/*/.submitit/*/*.err"),
    ]
    return "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The records of the runs of SWEEP, one after another in this process."""
    results = tmp_path_factory.mktemp("plain")
    for method, tokens in product(METHODS, BUDGETS):
        run(
            compose(
                [f"method={method}", f"tokens={tokens}", *EACH, f"results={results}"]
            )
        )
    return kept(results)


@pytest.fixture
def slurm(tmp_path):
    """(command, *arguments, check=True) -> what a command of Slurm prints, of one that is started for this test."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
    subprocess.run([SCRIPT, "start", tmp_path / "slurm"], check=True, timeout=150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
        yield (
            lambda *given, check=True: (
                subprocess.run(
                    given, check=check, stdout=subprocess.PIPE, text=True
                ).stdout
            )
        )
    subprocess.run([SCRIPT, "stop", tmp_path / "slurm"], check=True, timeout=150)


def held(directory, others=()):
    """Stops a job in the middle of a run and returns (cell, job, process id).

    The process is stopped, so that the run cannot end before Slurm is told what to do with the job.
    """
    for _ in range(1800):
        for cell, state in states(directory).items():
            runs = [*directory.glob(f"results/runs/{cell.partition('-')[2]}-*")]
            if cell in others or not any(
                answered(path, "zipeval_shapes") for path in runs
            ):
                continue
            os.kill(state["pid"], signal.SIGSTOP)
            if not any((path / "zipeval_shapes.json").exists() for path in runs):
                return cell, state["job"], state["pid"]
            os.kill(state["pid"], signal.SIGCONT)  # it was about to end
        time.sleep(0.1)
    raise TimeoutError(told(directory))


def killed(pid):
    """Keeps a job stopped until Slurm kills it: Slurm wakes it first and waits, and so short a run could end then."""
    for _ in range(6000):
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} was not killed")


@pytest.mark.cluster
def test_jobs_of_slurm_that_are_queued_again_go_on(slurm, plain, tmp_path):
    """One is requeued by hand; another is told that its time is over, or that it is preempted, which are one signal."""
    launcher = started(tmp_path, *ON_SLURM, *SWEEP)
    try:
        requeued, first, pid = held(tmp_path)
        slurm("scontrol", "requeue", first)
        killed(pid)
        _, second, pid = held(tmp_path, [requeued])
        # By itself scancel would not return: it repeats what cannot be sent to a job that is being queued again.
        slurm("timeout", "2", "scancel", "--signal=USR2", second, check=False)
        os.kill(pid, signal.SIGCONT)
        assert launcher.wait(timeout=400) == 0, told(tmp_path)
    finally:
        launcher.kill()
    assert [state["status"] for state in states(tmp_path).values()] == ["done"] * 6
    jobs = {state["job"] for state in states(tmp_path).values()}
    assert len(jobs) == 6
    restarts = {job: f"Restarts={int(job in (first, second))} " for job in jobs}
    assert all(restarts[job] in slurm("scontrol", "show", "job", job) for job in jobs)
    assert told(tmp_path).count("Caught signal SIGUSR2") == 1
    results = tmp_path / "results" / "runs"
    assert sorted(
        len(record["sessions"]) for record in records.read_all(str(results))
    ) == [1, 1, 1, 1, 2, 2]
    assert kept(results) == plain


@pytest.mark.cluster
def test_ray_makes_the_records_of_one_process(plain, tmp_path):
    pytest.importorskip(
        "ray", reason="Ray is not installed: pip install 'zipeval[ray]'"
    )
    launcher = started(tmp_path, *ON_RAY, *SWEEP)
    try:
        assert launcher.wait(timeout=500) == 0, told(tmp_path)
    finally:
        launcher.kill()
    assert [state["status"] for state in states(tmp_path).values()] == ["done"] * 6
    assert kept(tmp_path / "results" / "runs") == plain


def test_jobs_are_processes(tmp_path):
    """One for each model, whose weights it loads once."""
    models = [
        "model=tiny_llava,tiny_next",
        "method=vanilla,uniform",
        "budget=mean",
        "tokens=16",
        "limit=2",
    ]
    launcher = started(tmp_path, "+launcher=local", *models)
    assert launcher.wait(timeout=300) == 0, told(tmp_path)
    assert [state["status"] for state in states(tmp_path).values()] == ["done"] * 4
    pids = {state["pid"] for state in states(tmp_path).values()}
    assert len(pids) == 2 and os.getpid() not in pids


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["+launcher=slurn"],
            r"launcher=slurn: no such launcher. Did you mean slurm\? Available: local, ray, slurm.",
        ),
        (["+launcher=slurm", "hydra.launcher.gpus=1"], "gpus"),
    ],
)
def test_a_launcher_is_checked_before_anything_starts(arguments, message):
    with pytest.raises(UsageError, match=message):
        expand(["-m", *arguments, "method=vanilla"])


def test_a_machine_without_slurm_says_so(tmp_path):
    launcher = started(tmp_path, "+launcher=slurm", "limit=1", PATH=str(tmp_path))
    assert launcher.wait(timeout=60) == 2
    assert "+launcher=slurm: this machine has no srun." in told(tmp_path)
    assert not (tmp_path / "results").exists()
