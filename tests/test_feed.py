"""Which questions stand beside each other, and the processes that prepare them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise

import datasets
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import GRIDS

from zipeval.cli import compose
from zipeval.errors import MediaError, RunError, UsageError
from zipeval.inference import batch_size
from zipeval.inference.batch_size import BatchSize
from zipeval.inference.feed import (
    collate,
    feed,
    same_picture,
    sort_by_group_and_length,
)
from zipeval.inference.session import Session


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=30))
def test_groups_stay_together_the_longest_first(questions):
    groups, lengths = [g for g, _ in questions], [n for _, n in questions]
    order = sort_by_group_and_length(groups, lengths)
    assert sorted(order) == [*range(len(questions))]
    changes = [groups[a] != groups[b] for a, b in pairwise(order)]
    assert sum(changes) == max(0, len({*groups}) - 1)
    longest = [max(n for g, n in questions if g == groups[i]) for i in order]
    assert longest == sorted(longest, reverse=True)


def test_documents_of_one_picture_are_told_without_decoding_it(monkeypatch):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    rows = datasets.Dataset.from_dict(
        {"image": [red, blue, red], "question": ["a", "b", "c"]},
        features=datasets.Features(
            image=datasets.Image(), question=datasets.Value("string")
        ),
    )
    monkeypatch.delattr(datasets.Image, "decode_example")
    hint = same_picture(rows)
    assert hint(0) == hint(2) != hint(1)
    several = datasets.Dataset.from_dict(
        {"image": [[red, blue], [red, red], [red, blue]]}
    )
    hint = same_picture(
        several.cast_column("image", datasets.List(datasets.Image(decode=True)))
    )
    assert hint(0) == hint(2) != hint(1)
    hint = same_picture(datasets.Dataset.from_dict({"imageId": ["n1", "n2", "n1"]}))
    assert hint(0) == hint(2) != hint(1)
    hint = same_picture(datasets.Dataset.from_dict({"question": ["same", "same"]}))
    assert hint(0) != hint(1)


def messages(number):
    if number == 3:
        raise MediaError("an image cannot be decoded (it is cut off)")
    if number == 9:
        raise UsageError("what nobody can answer")
    rows, columns = GRIDS[number % len(GRIDS)]
    pixels = np.random.default_rng(number).integers(
        0, 255, (90 * rows, 90 * columns, 3), dtype=np.uint8
    )
    image = Image.fromarray(pixels)
    content = [{"type": "image", "url": image}] * (1 + number % 2) + [
        {"type": "text", "text": "What " * (1 + number)}
    ]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("model", ["tiny_llava", "tiny_next"])
def test_workers_prepare_what_the_processor_makes_of_all_together(model):
    session = Session(compose([f"model={model}", "runner.workers=2"]))
    numbers = [4, 0, 7, 3, 1]
    questions = [*feed(session, messages, numbers, keyed=True)]
    assert [q.number for q in questions] == numbers
    assert [q.error is not None for q in questions] == [
        number == 3 for number in numbers
    ]
    read = [q for q in questions if not q.error]
    assert [len(q.keys) for q in read] == [len(q.kinds) for q in read] == [1, 1, 2, 2]
    assert read[2].keys[0] == read[2].keys[1]
    assert len({key for q in read for key in q.keys}) == 4
    made = collate(read, session.load()[1].tokenizer.pad_token_id)
    stock = session.inputs([session.decoded(messages(q.number)) for q in read])
    assert made.keys() == stock.keys()
    for name, value in stock.items():
        assert torch.equal(made[name], value), name


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_is_told_as_it_is(workers):
    session = Session(compose([f"runner.workers={workers}"]))
    with pytest.raises(UsageError, match=r"^what nobody can answer$"):
        [*feed(session, messages, [0, 9], keyed=False)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [KeyError("column"), RuntimeError("no\nroom")])
def test_a_fault_is_one_sentence_behind_its_traceback(workers, error, capfd):
    def faulty(number):
        raise error

    session = Session(compose([f"runner.workers={workers}"]))
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    place = r"test_feed.py, line \d+, in faulty"
    told = rf"^sample 70 could not be prepared: {reason} \({place}\)\. Its traceback is above\.$"
    with pytest.raises(RunError, match=told):
        [*feed(session, faulty, [7], False, lambda number: f"sample {10 * number}")]
    traceback = capfd.readouterr().err
    assert traceback.startswith("Traceback")
    assert "in faulty" in traceback


def test_a_worker_that_is_ended_is_told():
    def killed(number):
        os.kill(os.getpid(), signal.SIGKILL)

    session = Session(compose(["runner.workers=1"]))
    with pytest.raises(
        RunError, match=r"runner.workers=1: one of them was ended.*runner.workers=0"
    ):
        [*feed(session, killed, [0], keyed=False)]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
)
def test_a_scheduler_s_signal_is_not_for_workers(tmp_path, number):
    """What a launcher does at it, having the job queued again, every worker would do as well; or die of it."""

    def signalled(question):
        os.kill(os.getpid(), number)
        return messages(question)

    before = signal.signal(number, lambda *_: (tmp_path / "queued again").touch())
    try:
        questions = [
            *feed(
                Session(compose(["runner.workers=1"])), signalled, [0, 1], keyed=False
            )
        ]
    finally:
        signal.signal(number, before)
    assert [question.number for question in questions] == [0, 1]
    assert not (tmp_path / "queued again").exists()


OWNER = """
import os, sys, time
import psutil
from zipeval.cli import compose
from zipeval.inference.feed import feed
from zipeval.evaluation.runner import Session
text = [{"role": "user", "content": [{"type": "text", "text": "Is it red? " * 100}]}]
questions = feed(Session(compose(["runner.workers=2"])), lambda number: text, [*range(10_000)], keyed=False)
next(questions)
print(*(worker.pid for worker in psutil.Process().children()), flush=True)
time.sleep(1)  # the workers now wait for their owner to read what they have prepared
ENDS
"""
ENDS = {
    "at its end": "",
    "raising": "raise KeyError('scores')",
    "exiting while an error is handled": "try: [][0]\nexcept IndexError: sys.exit(3)",
    "killed": "os.kill(os.getpid(), 9)",
    "closing them": "questions.close(); time.sleep(60)",
}


@pytest.mark.parametrize("end", ENDS)
def test_no_worker_outlives_its_owner(end):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER.replace("ENDS", ENDS[end])],
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            workers = [
                psutil.Process(int(pid)) for pid in owner.stdout.readline().split()
            ]
            assert len(workers) == 2
            _, alive = psutil.wait_procs(workers, timeout=8)
            assert not alive
            if end != "closing them":
                owner.wait(timeout=8)
        finally:
            owner.kill()


def test_random_numbers_of_a_task_do_not_depend_on_workers():
    state = torch.get_rng_state()
    [*feed(Session(compose(["runner.workers=1"])), messages, [0, 1], keyed=False)]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_batch_grows_while_twice_the_memory_would_fit(monkeypatch):
    shares = iter([0.1, 0.2, 0.6, 0.1])
    monkeypatch.setattr(batch_size, "peak_share", lambda device: next(shares))
    size, sizes = BatchSize("auto", "cuda:0"), []
    for _ in range(6):
        sizes.append(size.size)
        size.grow(size.size)
    assert sizes == [32, 64, 128, 128, 128, 128]


def test_a_part_of_a_batch_says_nothing_about_memory(monkeypatch):
    monkeypatch.setattr(batch_size, "peak_share", lambda device: 0.01)
    size = BatchSize("auto", "cuda:0")
    size.grow(5)
    assert size.size == 32


@pytest.mark.parametrize("asked, device", [(32, "cuda:0"), ("auto", "cpu")])
def test_what_was_asked_for_does_not_grow(asked, device):
    size = BatchSize(asked, device)
    size.grow(32)
    assert size.size == 32


@pytest.mark.parametrize(
    "setting",
    [
        "batch_size=0",
        "batch_size=many",
        "batch_size=true",
        "batch_size=1.5",
        "runner.workers=-1",
        "runner.cache_gib=-1.0",
    ],
)
def test_settings_are_refused(setting):
    with pytest.raises(UsageError, match=rf"(?i){setting}: expected a"):
        Session(compose([setting]))


def test_ways_of_reuse_are_listed():
    with pytest.raises(
        UsageError,
        match=r"runner.reuse=everything: expected one of none, features, prefix",
    ):
        Session(compose(["runner.reuse=everything"]))
