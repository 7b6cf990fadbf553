"""Runs of two processes, as torchrun starts them, on gloo and the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from test_benchmarks import damaged

from zipeval.checkpoints import placement
from zipeval.cli import compose
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.results import records
from zipeval.utils import ranks
from zipeval.utils.ranks import Place

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
]
# Something that rank $WHO does raises $RAISED, at $PLACE.
FAILING = """
import os
from zipeval import errors
from zipeval.utils import ranks
from zipeval.evaluation import task_scores
from zipeval.inference.session import Session
from zipeval.cli import main

def fail(*given):
    raise {"refused": errors.UsageError, "bug": KeyError}[os.environ["RAISED"]]("what" + " went wrong")

if ranks.here().rank == int(os.environ["WHO"]):
    owner, _, name = os.environ["PLACE"].rpartition(".")
    setattr({"Session": Session, "task_scores": task_scores}[owner], name, fail)
main()
"""


def torchrun(*arguments, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [*TORCHRUN, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def kept(results):
    """By record: what equal runs agree on of it, its samples and its pictures."""
    found = {}
    for record in records.read_all(str(results)):
        path = Path(record["path"])
        samples = [
            records.reproducible_fields(sample)
            for sample in records.read_samples(path.parent, record)
        ]
        pictures = {
            image.name: image.read_bytes()
            for image in path.parent.glob(f"{record['task']}.images/*")
        }
        found[path.parent.name, path.name] = (
            records.reproducible_fields(record),
            samples,
            pictures,
        )
    return found


def test_two_processes_make_the_records_of_one(miniatures, tmp_path):
    """Of an odd number of questions; of another task two images are damaged, in the share of either rank one."""
    damaged(
        miniatures,
        tmp_path / "data",
        "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet",
        2,
    )
    settings = [
        f"data.root={tmp_path}/data",
        "tasks=[zipeval_shapes,gqa]",
        "tokens=16",
        "limit=3",
    ]
    sweep = [
        "-m",
        *settings,
        "method=vanilla,visionzip",
        "bound=none",
        f"results={tmp_path}/two",
    ]
    done = torchrun("-m", "zipeval", "run", *sweep)
    assert done.returncode == 0, done.stderr
    for method in ("vanilla", "visionzip"):
        run(compose([*settings, f"method={method}", f"results={tmp_path}/one"]))
    two, one = kept(tmp_path / "two"), kept(tmp_path / "one")
    assert len(one) == 4
    assert two == one
    assert sorted(record["failed"] for record, *_ in one.values()) == [0, 0, 2, 2]
    assert {len(samples) for _, samples, _ in one.values()} == {3}
    assert sorted(len(pictures) for *_, pictures in one.values()) == [1, 1, 3, 3]
    assert {r["processes"] for r in records.read_all(f"{tmp_path}/two")} == {2}
    assert {r["processes"] for r in records.read_all(f"{tmp_path}/one")} == {1}
    assert len(done.stdout.splitlines()) == 4  # one line for a record
    assert ": 1/1, " in done.stderr  # the first rank's share of three
    assert ": 2/2, " not in done.stderr


# Rank 1 must not hash data, which the first one has hashed.
WATCHED = """
from zipeval.utils import ranks
from zipeval.cli import main
from zipeval.evaluation import data_identity

def refuse(*given):
    raise KeyError("hashed in another rank")

if not ranks.first():
    data_identity.identify = data_identity.known = refuse
main()
"""


def test_only_the_first_process_hashes_data(miniatures, tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    settings = [
        f"data.root={miniatures}",
        "tasks=[gqa]",
        "method=vanilla",
        "limit=2",
        f"results={tmp_path}/runs",
    ]
    for told in ("exact_match", "finished before, kept"):
        done = torchrun(str(script), "run", *settings)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout


@pytest.mark.parametrize(
    "who, place, raised",
    [
        (1, "Session.load", "refused"),  # the first waits for answers
        (1, "Session.load", "bug"),
        (0, "task_scores.scores", "refused"),  # the other has nothing left to do
    ],
)
def test_what_fails_in_one_rank_ends_all_with_one_message(who, place, raised, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    settings = [
        "run",
        "method=visionzip",
        "tokens=16",
        "limit=2",
        "bound=none",
        f"results={tmp_path}/runs",
    ]
    done = torchrun(str(script), *settings, WHO=str(who), PLACE=place, RAISED=raised)
    assert done.returncode == 1  # torchrun's own
    assert f"exitcode  : {2 if raised == 'refused' else 1} " in done.stderr
    assert done.stderr.count("what went wrong") == 1
    assert not list(tmp_path.glob("runs/**/*.json"))


def test_a_sweep_goes_on_after_what_all_ranks_refuse(tmp_path):
    """With a single question, which is of the second rank's share."""
    sweep = [
        "run",
        "-m",
        "method=visionzip",
        "tokens=9999,16",
        "limit=1",
        "bound=none",
        f"results={tmp_path}/runs",
    ]
    done = torchrun("-m", "zipeval", *sweep)
    assert done.stderr.count("tokens=9999: ") == 1
    ((_, samples, pictures),) = kept(tmp_path / "runs").values()
    assert (len(samples), len(pictures)) == (1, 1)


@pytest.fixture
def second_of_three(monkeypatch):
    monkeypatch.setattr(ranks, "here", lambda: Place(rank=1, local=1, count=3))


@pytest.mark.parametrize("count", range(8))
def test_shares_are_all_of_it_in_order(count, monkeypatch):
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "here", lambda rank=rank: Place(rank, rank, 3))
        shares.append(ranks.share([*range(count)]))
    assert [*chain(*shares)] == [*range(count)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_every_rank_has_a_gpu_of_its_own(device, second_of_three, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert placement.place(compose([f"model.device={device}"]).model).device == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="1 CUDA devices"):
        placement.place(compose([f"model.device={device}"]).model)


@pytest.mark.parametrize("setting", ["model.device_map=auto", "model.device=cuda:0"])
def test_ranks_do_not_share_gpus(setting, second_of_three):
    with pytest.raises(UsageError, match=f"{setting}: each of 3 processes"):
        placement.place(compose([setting]).model)


def test_alone_nothing_is_distributed(monkeypatch):
    """Also where another launcher, such as Slurm's, sets some of torchrun's variables."""
    script = (
        "import sys; from zipeval.utils import ranks\n"
        "with ranks.raise_on_all_ranks(), ranks.alone():\n    ranks.exchange(ranks.gather(1))\n"
        "ranks.leave(); print(ranks.here().count, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.stdout == "1 False\n", done.stderr


ENDING = """
import atexit
from zipeval.utils import ranks

class Held:
    def __del__(self):
        print("freed by an interpreter that is torn down")

held = Held()
atexit.register(print, "cleaned up")
ranks.end(3)
"""


@pytest.mark.parametrize(
    "count, printed",
    [
        ("1", "cleaned up\nfreed by an interpreter that is torn down\n"),
        ("2", "cleaned up\n"),
    ],
)
def test_only_a_process_that_is_alone_tears_its_interpreter_down(count, printed):
    """Threads of gloo still own tensors at that moment, and to free one then ends a rank with SIGABRT."""
    place = {
        "MASTER_ADDR": "localhost",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": count,
    }
    done = subprocess.run(
        [sys.executable, "-c", ENDING],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **place},
    )
    assert (done.returncode, done.stdout) == (3, printed), done.stderr
