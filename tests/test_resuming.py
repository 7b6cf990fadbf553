"""Whatever ends a process, its answers are there: killed, stopped, out of room, or two at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from test_lock import HOLDING
from test_ranks import TORCHRUN, kept

from zipeval.cli import compose
from zipeval.errors import BudgetError, RunError, Stopped, TaskLockedError, UsageError
from zipeval.evaluation.runner import run
from zipeval.methods.visionzip import VisionZip
from zipeval.reporting.render import render
from zipeval.reporting.tables import tables
from zipeval.results import records
from zipeval.results.journal import Journal, answered
from zipeval.utils import ranks

BATCH, LIMIT = 8, 120
METHOD = ["method=visionzip", "method._target_=test_resuming.Counted", "tokens=16"]
SETTINGS = [f"limit={LIMIT}", f"batch_size={BATCH}", "runner.workers=0"]
MADE_WITH = {
    "task_hash": "t",
    "data_hash": None,
    "code": "c",
    "versions": {"torch": "1", "python": "3"},
}
SESSION = {"started": "then", "reuse": "none", "machine": {}}
WORKING = """
import sys
sys.path.insert(0, {tests!r})
from zipeval.cli import main
sys.argv = ["zipeval", *{arguments!r}]
main()
"""


class Counted(VisionZip):
    """VisionZip that writes down of how many prompts it was asked."""

    def reduce(self, crops):
        with open(os.environ["ASKED"], "a") as file:
            file.write(f"{len(crops.hidden)}\n")
        return super().reduce(crops)


class Faulty(Counted):
    """As Counted, while the environment names no batch at which it is to raise."""

    def reduce(self, crops):
        reduced = super().reduce(crops)
        if len(Path(os.environ["ASKED"]).read_text().split()) == int(
            os.environ.get("FAULTY_AT", 0)
        ):
            print("raising", file=sys.stderr, flush=True)
            raise KeyError("scores")
        return reduced


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """How many prompts were read, by all processes."""
    path = tmp_path / "asked"
    path.touch()
    monkeypatch.setenv("ASKED", str(path))
    return lambda: sum(map(int, path.read_text().split()))


def command(*arguments):
    """A process that does what `zipeval` does, with the method above."""
    script = WORKING.format(
        tests=str(Path(__file__).parent), arguments=["run", *arguments, "bound=none"]
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def seconds_after(process, line):
    """(seconds from a line on stderr to the end of a process, all that it says there); it is killed after a minute."""
    errors, start = [], None
    killed = threading.Timer(60, process.kill)
    killed.start()
    for error in process.stderr:
        errors.append(error)
        if error == line:
            start = time.monotonic()
    process.wait(timeout=10)
    killed.cancel()
    return time.monotonic() - start, "".join(errors)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def work(config, asked):
    os.environ["ASKED"] = asked
    run(config)


def journal_of(results):
    """(directory, answers on the disk) of the one run that is not finished."""
    found = [path.parent for path in Path(results).glob("*/*.journal.jsonl")]
    return (found[0], answered(found[0], "zipeval_shapes")) if found else (None, 0)


def test_a_run_killed_at_ten_random_points_ends_as_one_that_was_not(tmp_path, asked):
    """Of processes that find their imports done: those take longer than the answers. The last one is left alone."""
    limit = 2 * LIMIT  # far beyond what ten such processes come to
    its = [*SETTINGS, f"limit={limit}"]
    bound, settings = [*its, "method=vanilla"], [*METHOD, *its]
    for results in ("whole", "killed"):
        run(compose([*bound, f"results={tmp_path}/{results}"]))
    run(compose([*settings, f"results={tmp_path}/whole"]))
    assert asked() == limit
    config, rng = compose([*settings, f"results={tmp_path}/killed"]), random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "zipeval.evaluation.chat_model",
            "lmms_eval.evaluator",
            "transformers.models.llava",
            "datasets",
        ]
    )
    kills = before = 0
    while kills < 10:
        process = context.Process(target=work, args=[config, os.environ["ASKED"]])
        process.start()
        wanted = before + BATCH * rng.randrange(3)
        while journal_of(tmp_path / "killed")[1] < wanted and process.is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills, before = kills + 1, max(before, journal_of(tmp_path / "killed")[1])
        assert journal_of(tmp_path / "killed")[1] == before < limit
    assert before
    run(config)
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")
    assert (
        limit <= asked() - limit <= limit + kills * BATCH
    )  # a batch at most was answered again each time
    whole, killed = (
        render(tables(f"{tmp_path}/{results}")) for results in ("whole", "killed")
    )
    assert killed == whole
    (record,) = (
        r for r in records.read_all(f"{tmp_path}/killed") if r["config"]["tokens"]
    )
    assert len(record["sessions"]) > 3
    assert record["seconds"] == pytest.approx(
        sum(its["seconds"] for its in record["sessions"]), abs=0.01
    )
    assert record["started"] == record["sessions"][0]["started"]
    assert not [*tmp_path.glob("*/*/*.journal*"), *tmp_path.glob("*/*/*.lock")]


def test_two_processes_of_one_run(tmp_path, asked):
    """One works, the other says who does; when the first is stopped behind a batch, the next one goes on."""
    settings = [*METHOD, *SETTINGS, f"limit={4 * LIMIT}", f"results={tmp_path}/runs"]
    first = command(*settings)
    wait_for(lambda: journal_of(tmp_path / "runs")[1])
    start = time.monotonic()
    with pytest.raises(
        UsageError,
        match=f"process {first.pid} on .* tasks=\\[zipeval_shapes\\] since 20",
    ):
        run(compose(settings))
    assert time.monotonic() - start < 5
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert errors.count("stopping behind this batch") == 1
    assert "Traceback" not in errors
    _, count = journal_of(tmp_path / "runs")
    assert asked() == count  # the batch at hand was finished, and kept
    run(
        compose([*settings, "batch_size=32"])
    )  # how fast answers come is no part of a run
    assert asked() == 4 * LIMIT


@pytest.mark.parametrize(
    "signals, code", [([signal.SIGTERM], 130), ([signal.SIGINT, signal.SIGINT], 130)]
)
def test_stopped_by_a_scheduler_or_at_once(signals, code, tmp_path, asked):
    settings = [
        *METHOD,
        *SETTINGS,
        "batch_size=64",
        f"limit={4 * LIMIT}",
        f"results={tmp_path}/runs",
    ]
    process = command("-m", *settings, "seed=0,1")
    wait_for(lambda: journal_of(tmp_path / "runs")[1])
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert (
        len([*tmp_path.glob("runs/tiny*")]) == 1
    )  # the sweep's other run was not begun
    directory, count = journal_of(tmp_path / "runs")
    assert 64 <= count < 4 * LIMIT
    assert not [*directory.glob("*.lock")]


FAULTY = ["method=visionzip", "method._target_=test_resuming.Faulty", "tokens=16"]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_whose_method_raises_ends_and_goes_on(
    batch, tmp_path, asked, monkeypatch
):
    """With as many workers as suit the machine: those that outlive the exception would be waited for, for ever."""
    settings = [
        *FAULTY,
        f"limit={LIMIT}",
        f"batch_size={BATCH}",
        f"results={tmp_path}/runs",
    ]
    monkeypatch.setenv("FAULTY_AT", str(batch))
    process = command(*settings)
    seconds, errors = seconds_after(process, "raising\n")
    assert process.returncode == 1
    assert seconds < 10
    assert errors.endswith(
        "KeyError: 'scores'\n"
    )  # the traceback is the method's author's
    monkeypatch.delenv("FAULTY_AT")
    answered_before = BATCH * (batch - 1)
    assert journal_of(tmp_path / "runs")[1] == answered_before
    run(compose(settings))
    assert asked() == LIMIT + BATCH  # those of the batch that raised were asked twice
    (record,) = records.read_all(f"{tmp_path}/runs")
    assert record["samples"]["count"] == LIMIT


def test_a_method_that_raises_keeps_no_other_run_of_its_sweep_waiting(
    tmp_path, asked, monkeypatch
):
    monkeypatch.setenv("FAULTY_AT", "2")
    process = command(
        "-m",
        *FAULTY,
        f"limit={LIMIT}",
        f"batch_size={BATCH}",
        f"results={tmp_path}/runs",
        "seed=0,1",
    )
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "KeyError: 'scores'. This is a bug." in errors
    assert len(records.read_all(f"{tmp_path}/runs")) == 1


def test_a_run_whose_preprocessing_raises_in_a_worker_ends_and_goes_on(
    tmp_path, asked, monkeypatch
):
    """In a worker, behind questions that are answered by then."""
    script = WORKING.replace(
        "from zipeval.cli",
        "import test_resuming; test_resuming.raise_in_preparation()\nfrom zipeval.cli",
    )
    settings = [
        *METHOD,
        f"limit={LIMIT}",
        f"batch_size={BATCH}",
        f"results={tmp_path}/runs",
    ]
    arguments = ["run", *settings, "bound=none"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script.format(tests=str(Path(__file__).parent), arguments=arguments),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds, errors = seconds_after(process, "raising\n")
    assert process.returncode == 1
    assert seconds < 10
    told = errors.splitlines()[-1]
    assert told.startswith("zipeval: tasks=[zipeval_shapes]: sample ")
    assert "could not be prepared: KeyError: 'size' (test_resuming.py, line " in told
    assert journal_of(tmp_path / "runs")[1] >= BATCH
    run(compose(settings))
    assert asked() == LIMIT  # none twice


def raise_in_preparation():
    """Have the processor's part of a session raise at the tenth prompt that a worker prepares."""
    from zipeval.inference.session import Session

    prepare, calls = Session.inputs, []

    def inputs(self, conversations):
        calls.append(conversations)
        if len(calls) == 10:
            assert multiprocessing.parent_process() is not None
            print("raising", file=sys.stderr, flush=True)
            raise KeyError("size")
        return prepare(self, conversations)

    Session.inputs = inputs


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_workers_end_with_a_run_that_is_stopped(signals, tmp_path, asked):
    """Also where the signals are for every process of a job, as a scheduler's."""
    process = command(
        *METHOD, f"limit={4 * LIMIT}", "batch_size=128", f"results={tmp_path}/runs"
    )
    wait_for(lambda: journal_of(tmp_path / "runs")[1])
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    assert len(processes) > 1
    for number in signals:
        for each in processes:
            with suppress(psutil.NoSuchProcess):  # the first has ended it
                each.send_signal(number)
        time.sleep(0.05)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not psutil.wait_procs(processes, timeout=1)[1]


def test_stopped_while_it_scores(miniatures, tmp_path, asked, monkeypatch):
    """When all is answered: the record is written, and no other task is begun."""
    from zipeval.evaluation import task_scores

    scored = task_scores.scores

    def then_stop(*given):
        signal.raise_signal(signal.SIGINT)
        return scored(*given)

    monkeypatch.setattr(task_scores, "scores", then_stop)
    with pytest.raises(Stopped):
        settings = [
            f"data.root={miniatures}",
            f"results={tmp_path}/runs",
            "tasks=[zipeval_shapes,gqa]",
        ]
        run(compose([*METHOD, *settings, "limit=4"]))
    (record,) = records.read_all(f"{tmp_path}/runs")
    assert record["samples"]["count"] == 4
    assert not [*tmp_path.glob("runs/*/*.journal*"), *tmp_path.glob("runs/*/*.lock")]


def test_a_task_that_another_process_answers_keeps_no_other_task_waiting(
    miniatures, tmp_path, asked
):
    settings = [
        *METHOD,
        f"data.root={miniatures}",
        "limit=4",
        f"results={tmp_path}/runs",
    ]
    (path,) = run(compose([*settings, "tasks=[zipeval_shapes]"]))
    path.unlink()
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLDING, path.with_suffix(".lock")],
        stdout=subprocess.PIPE,
    )
    try:
        holding.stdout.readline()
        with pytest.raises(
            TaskLockedError, match=r"answering tasks=\[zipeval_shapes\]"
        ):
            run(compose([*settings, "tasks=[zipeval_shapes,gqa]"]))
    finally:
        holding.kill()
    assert [record["task"] for record in records.read_all(f"{tmp_path}/runs")] == [
        "gqa"
    ]


def test_a_journal_that_was_left_beside_its_record_is_removed(tmp_path, asked):
    """Or deleting the record, to answer everything again, would bring its answers back."""
    config = compose([*METHOD, "limit=2", f"results={tmp_path}/runs"])
    (path,) = run(config)
    Journal(path.parent, "zipeval_shapes", MADE_WITH, SESSION).append(entries(0))
    run(config)
    assert not [*path.parent.glob("*.journal*")]


def test_two_ranks_go_on_from_what_both_have(tmp_path, asked):
    """Of a run that was stopped with an answer of either rank; one process alone ends it, with pictures and all."""
    settings = ["method=visionzip", "tokens=16", f"limit={LIMIT}", "batch_size=4"]
    run(compose([*settings, f"results={tmp_path}/whole"]))
    sweep = [
        *TORCHRUN,
        "-m",
        "zipeval",
        "run",
        *settings,
        "bound=none",
        f"results={tmp_path}/two",
    ]
    with subprocess.Popen(
        sweep, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        wait_for(
            lambda: (
                any(answers(tmp_path / "two", 1)) and any(answers(tmp_path / "two", 0))
            )
        )
        os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: not still_writing(tmp_path / "two"))
    left = {rank: [*answers(tmp_path / "two", rank)] for rank in (0, 1)}
    run(compose([*settings, f"results={tmp_path}/two"]))
    assert kept(tmp_path / "two") == kept(tmp_path / "whole")
    assert left[0] and left[1] and not {*left[0]} & {*left[1]}


def answers(results, rank):
    name = (
        "zipeval_shapes.journal.jsonl"
        if rank == 0
        else f"zipeval_shapes.journal.{rank}.jsonl"
    )
    for path in Path(results).glob(f"*/{name}"):
        yield from (
            line["doc_id"]
            for row in path.read_text().splitlines()
            if "doc_id" in (line := json.loads(row[9:]))
        )


def still_writing(results):
    """Whether something is added within a second."""
    before = sum(path.stat().st_size for path in Path(results).glob("*/*.jsonl"))
    time.sleep(1)
    return before != sum(
        path.stat().st_size for path in Path(results).glob("*/*.jsonl")
    )


def test_a_full_disk_loses_nothing(tmp_path, asked):
    """Of real files that may not grow: first the journal of a run, then its record."""
    config = compose([*METHOD, *SETTINGS, f"results={tmp_path}/runs"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        with pytest.raises(
            RunError, match=r"journal\.jsonl: cannot be written \(File too large\)"
        ):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _, count = journal_of(tmp_path / "runs")
    assert count and count % BATCH in range(BATCH)
    run(config)
    assert LIMIT <= asked() <= LIMIT + BATCH
    whole = compose([*METHOD, *SETTINGS, f"results={tmp_path}/whole"])
    run(whole)
    assert kept(tmp_path / "runs") == kept(tmp_path / "whole")


def test_a_record_that_cannot_be_written_leaves_the_answers(
    tmp_path, asked, monkeypatch
):
    config = compose([*METHOD, *SETTINGS, f"results={tmp_path}/runs"])
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device", str(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        RunError,
        match=r"zipeval_shapes\.json: cannot be written \(No space left on device\)",
    ):
        run(config)
    monkeypatch.undo()
    os.environ["ASKED"] = str(tmp_path / "again")
    run(config)
    assert not (tmp_path / "again").exists()  # not one was answered again


def test_a_wrong_count_keeps_no_answer(tmp_path, asked, monkeypatch):
    """Where a method leaves another number of tokens than it should, its earlier answers are no better."""
    from zipeval.inference.session import Session

    entering, calls = Session.entering, []

    def later(self, images):
        calls.append(images)
        return [count + (len(calls) > 40) for count in entering(self, images)]

    monkeypatch.setattr(Session, "entering", later)
    with pytest.raises(BudgetError):
        run(compose([*METHOD, *SETTINGS, f"results={tmp_path}/runs"]))
    assert asked() > BATCH
    assert not [*tmp_path.glob("runs/*/*")]  # nor the lock


def entries(*numbers):
    return [
        {"doc_id": number, "at": number / 10, "text": "red\n"} for number in numbers
    ]


def begun(directory):
    journal = Journal(directory, "task", MADE_WITH, SESSION)
    journal.append(entries(0, 1))
    journal.append(entries(2))
    return journal.first


@pytest.mark.parametrize(
    "spoil, left",
    [
        (lambda content: content[:-1], [0, 1]),  # torn within the last line
        (lambda content: content[:-20], [0, 1]),
        (lambda content: content + b"1234", [0, 1, 2]),
        (lambda content: content.replace(b'"doc_id": 1', b'"doc_id": 7'), [0, 2]),
        (lambda content: content + b"\x00" * 4096, [0, 1, 2]),
    ],
)
def test_damaged_lines_are_answered_again_and_whole_ones_kept(
    spoil, left, tmp_path, capsys
):
    path = begun(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    assert answered(tmp_path, "task") == len(left)
    again = Journal(tmp_path, "task", MADE_WITH, SESSION)
    assert sorted(again.done) == [(number, 0) for number in left]
    assert "1 damaged line" in capsys.readouterr().err
    again.append(entries(9))
    third = Journal(tmp_path, "task", MADE_WITH, SESSION)
    assert sorted(third.done) == [(number, 0) for number in (*left, 9)]
    assert [its.get("seconds") for its in third.sessions] == [max(left) / 10, 0.9, None]
    assert third.answers[0, 0] == entries(0)[0]
    assert not capsys.readouterr().err


def test_answers_of_which_nothing_tells_what_made_them_are_not_kept(tmp_path):
    path = begun(tmp_path)
    path.write_bytes(b"0" + path.read_bytes()[1:])
    assert answered(tmp_path, "task") == 0
    again = Journal(tmp_path, "task", MADE_WITH, SESSION)
    assert (again.done, again.sessions) == (set(), [SESSION])


def test_another_ranks_answers_tell_themselves_what_made_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "here", lambda: ranks.Place(rank=1, local=1, count=2))
    monkeypatch.setattr(ranks, "exchange", lambda value: [value])
    path = begun(tmp_path).with_name("task.journal.1.jsonl")
    monkeypatch.undo()
    assert Journal(tmp_path, "task", MADE_WITH, SESSION).done == {
        (0, 0),
        (1, 0),
        (2, 0),
    }
    (tmp_path / "task.journal.jsonl").unlink()
    with pytest.raises(
        UsageError, match=rf"{path}: begun with .* delete task\.journal\*\.jsonl there"
    ):
        Journal(tmp_path, "task", {**MADE_WITH, "code": "d"}, SESSION)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"code": "d"}, r"code c \(now d\)"),
        ({"task_hash": "u"}, r"task_hash t \(now u\)"),
        ({"data_hash": "1"}, r"data_hash None \(now 1\)"),
        ({"versions": {"torch": "2", "python": "3"}}, r"torch 1 \(now 2\)"),
    ],
)
def test_answers_of_other_code_are_not_mixed_in(changed, named, tmp_path):
    path = begun(tmp_path)
    before = path.read_bytes()
    with pytest.raises(
        UsageError, match=f"begun with {named}. Go back to that, or delete "
    ):
        Journal(tmp_path, "task", {**MADE_WITH, **changed}, SESSION)
    assert path.read_bytes() == before


def test_another_python_is_no_other_code(tmp_path):
    begun(tmp_path)
    made_with = {**MADE_WITH, "versions": {"torch": "1", "python": "4"}}
    assert Journal(tmp_path, "task", made_with, SESSION).done == {
        (0, 0),
        (1, 0),
        (2, 0),
    }


def test_a_finished_run_says_that_the_code_changed(
    tmp_path, asked, capsys, monkeypatch
):
    config = compose([*METHOD, "limit=2", f"results={tmp_path}/runs"])
    run(config)
    run(config)
    assert "was made with" not in capsys.readouterr().out
    monkeypatch.setattr(records, "code", lambda modules: "another")
    run(config)
    assert "(now another)" in capsys.readouterr().out


def test_a_methods_own_file_is_part_of_the_code(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    monkeypatch.syspath_prepend(tmp_path)
    hashes = set()
    for number in range(2):
        file.write_text(f"NUMBER = {number}")
        __import__("mine")
        records.code.cache_clear()
        hashes |= {records.code(("mine",)), records.code()}
    records.code.cache_clear()
    assert len(hashes) == 3


def test_another_question_under_the_same_number_is_refused(tmp_path, asked):
    """As of a data set on the hub that has changed."""
    config = compose([*METHOD, *SETTINGS, f"results={tmp_path}/runs"])
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        patch.setattr("zipeval.evaluation.resuming._digest", lambda request: 1)
        append = Journal.append

        def then_stop(self, answers):
            append(self, answers)
            signal.raise_signal(signal.SIGINT)

        patch.setattr(Journal, "append", then_stop)
        run(config)
    with pytest.raises(UsageError, match="to another question than the task asks now"):
        run(config)
