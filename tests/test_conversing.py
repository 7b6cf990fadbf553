"""Conversations about one picture: what is asked, on which visual tokens, and what becomes of the answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from zipeval.benchmarks import BENCHMARKS
from zipeval.cli import compose
from zipeval.errors import UsageError
from zipeval.evaluation.chat_model import ZipEval
from zipeval.evaluation.runner import run
from zipeval.inference import answering, conversing
from zipeval.inference.session import Session
from zipeval.models import load
from zipeval.regression.entries import WIDTH, entry
from zipeval.reporting import stats
from zipeval.reporting.render import render
from zipeval.reporting.tables import OF_TURNS, tables
from zipeval.results import records
from zipeval.tasks.turns import utils

TURNS, APART = "zipeval_shapes_turns", "zipeval_shapes_turns_no_history"
METHODS = {
    "vanilla": ["method=vanilla"],
    "visionzip": ["method=visionzip", "tokens=16"],
}
METHODS["sparsevlm"] = ["method=sparsevlm", "tokens=16"]
IMAGES = 3


def ran(results, *overrides):
    """By task, (record, samples)."""
    found = {}
    for path in run(compose([f"results={results}", *overrides])):
        record = records.read(path)
        found[record["task"]] = record, records.read_samples(path.parent, record)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("turns")


@pytest.fixture(scope="module")
def found(results):
    """Of the first images, by method and task; zipeval_shapes has the questions about the first image."""
    tasks = {
        "vanilla": [APART],
        "visionzip": [TURNS, APART],
        "sparsevlm": [TURNS, APART, "zipeval_shapes"],
    }
    return {
        name: ran(
            results, f"tasks=[{','.join(its)}]", f"limit={IMAGES}", *METHODS[name]
        )
        for name, its in tasks.items()
    }


def test_without_history_a_fresh_question_is_a_question_alone(found):
    alone = [sample["prediction"] for sample in found["sparsevlm"]["zipeval_shapes"][1]]
    (first, *_) = found["sparsevlm"][APART][1]
    assert [first["prediction"].split("; ")[0], *first["fresh"].split("; ")][
        :IMAGES
    ] == alone


def test_only_a_method_that_looks_at_the_question_can_tell_the_arms_apart(found):
    for method, task in (
        ("vanilla", APART),
        ("visionzip", TURNS),
        ("visionzip", APART),
    ):
        for sample in found[method][task][1]:
            assert sample["prediction"].split("; ")[1:] == sample["fresh"].split("; ")
            assert sample["score"] == sample["scores"]["fresh"]
    assert any(
        s["prediction"].split("; ")[1:] != s["fresh"].split("; ")
        for s in found["sparsevlm"][APART][1]
    )


def test_the_embedded_model_knows_later_questions_that_stand_alone(found):
    assert found["vanilla"][APART][0]["metrics"] == {
        "accuracy_later": 1.0,
        "accuracy_first": 1.0,
        "accuracy_later_fresh": 1.0,
        "change_later": 0.0,
    }


def test_a_record_counts_conversations_and_what_their_first_question_costs(found):
    alone = found["sparsevlm"]["zipeval_shapes"][0]["visual_tokens"]["entering"]
    for method, tasks in found.items():
        for task in {TURNS, APART} & tasks.keys():
            record, samples = tasks[task]
            assert record["samples"]["count"] == IMAGES
            assert record["visual_tokens"]["entering"] == alone or method != "sparsevlm"
            assert [sample["later"] for sample in samples] == [4] * IMAGES
            mean = np.average(
                [s["score"] for s in samples], weights=[s["later"] for s in samples]
            )
            assert (
                record["score"]
                == pytest.approx(100 * mean)
                == pytest.approx(stats.value(task, samples))
            )
            assert record["metrics"]["change_later"] == pytest.approx(
                record["metrics"]["accuracy_later"]
                - record["metrics"]["accuracy_later_fresh"]
            )


def test_history_is_the_conversation_as_the_template_has_it(monkeypatch, tmp_path):
    """Token by token what the processor makes of all of it, with the answers that were given on the cache."""
    session, again = Session(compose([f"tasks=[{TURNS}]"])), []
    answer = answering.BatchGenerator.answer

    def spy(self, batch, options):
        again.extend(batch)
        return answer(self, batch, options)

    monkeypatch.setattr(answering.BatchGenerator, "answer", spy)
    (sample,) = ran(tmp_path, f"tasks=[{TURNS}]", "limit=1", "method=vanilla")[TURNS][1]
    said, asked = sample["prediction"].split("; "), []
    tokenizer = load(
        session.config.model.family, session.checkpoint, session.placement
    )[1].tokenizer
    assert len(again) == 4
    for question in again:
        text = tokenizer.decode(question.inputs["input_ids"][0])
        asked.append(text.rpartition("USER: ")[2].partition(" ASSISTANT")[0])
    first = text.partition("<image>\n")[2].partition(" ASSISTANT")[0]
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": first}],
        }
    ]
    for number, question in enumerate(again):
        messages += [
            {"role": "assistant", "content": [{"type": "text", "text": said[number]}]},
            {"role": "user", "content": [{"type": "text", "text": asked[number]}]},
        ]
        expected = tokenizer(
            session.text(messages).replace("<image>", "<image>" * 144)
        )["input_ids"]
        assert question.inputs["input_ids"][0].tolist() == expected


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sparsevlm", ["batch_size=1"]),
        ("sparsevlm", ["runner.reuse=features"]),
        ("visionzip", ["runner.reuse=prefix", "batch_size=2"]),
    ],
)
def test_how_it_is_answered_changes_no_answer(found, method, settings, tmp_path):
    again = ran(
        tmp_path,
        f"tasks=[{TURNS},{APART}]",
        f"limit={IMAGES}",
        *METHODS[method],
        *settings,
    )
    for task, (_, samples) in again.items():
        expected = [
            records.reproducible_fields(sample) for sample in found[method][task][1]
        ]
        assert [records.reproducible_fields(sample) for sample in samples] == expected


def test_a_conversation_is_kept_whole(found, tmp_path, monkeypatch):
    """Interrupted behind its first batch, a run goes on with the conversations that it has not."""
    settings = [
        f"tasks=[{TURNS}]",
        f"limit={IMAGES}",
        "batch_size=2",
        *METHODS["sparsevlm"],
    ]
    converse, answered = conversing.converse, []

    def until(model, batch, *given):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.extend(batch)
        return converse(model, batch, *given)

    with monkeypatch.context() as patch:
        patch.setattr("zipeval.evaluation.chat_model.converse", until)
        with pytest.raises(KeyboardInterrupt):
            ran(tmp_path, *settings)
    monkeypatch.setattr(
        "zipeval.evaluation.chat_model.converse",
        lambda *given: answered.extend(given[1]) or converse(*given),
    )
    _, samples = ran(tmp_path, *settings)[TURNS]
    assert len(answered) == IMAGES
    expected = [
        records.reproducible_fields(sample) for sample in found["sparsevlm"][TURNS][1]
    ]
    assert [records.reproducible_fields(sample) for sample in samples] == expected


def test_a_table_shows_the_change_and_how_sure_it_is(found, results):
    shown = render(tables(str(results), task=APART, statistics=True))
    value, low, high = stats.change(APART, found["sparsevlm"][APART][1])
    assert (
        f"sparsevlm 16: later turns of {APART} change by {value:+.1f} points [{low:+.1f}, {high:+.1f}]"
        in shown
    )
    assert (
        "visionzip 16: later turns of" in shown and "+0.0 points [+0.0, +0.0]" in shown
    )
    heads = ("accuracy_later", "accuracy_first", "accuracy_later_fresh", "change_later")
    assert all(head in shown for head in heads) and "of 0" not in shown


def test_of_one_conversation_no_interval_is_told(tmp_path):
    ran(tmp_path, f"tasks=[{APART}]", "limit=1", "method=vanilla")
    shown = render(tables(str(tmp_path), task=APART, statistics=True))
    assert "change by +0.0 points where the first one's" in shown and "nan" not in shown
    assert shown.count(OF_TURNS) == 1


def test_a_baseline_tells_other_fresh_answers(found):
    record, samples = found["sparsevlm"][TURNS]
    other = [{**samples[0], "fresh": "something else"}, *samples[1:]]
    before, after = (entry(record, its)["answers"] for its in (samples, other))
    assert before[:WIDTH] != after[:WIDTH] and before[WIDTH:] == after[WIDTH:]


def test_conversations_are_not_right_or_wrong():
    samples = [{"doc_id": i, "score": 1.0, "later": 2} for i in range(4)]
    found = stats.compare(
        TURNS, samples, [{**sample, "score": 0.0} for sample in samples]
    )
    assert (found.lost, found.gained, found.p) == (None, None, None)
    assert stats.compare("zipeval_shapes", samples, samples).p == 1


@pytest.mark.parametrize(
    "task", [task for task, known in BENCHMARKS.items() if known.turns]
)
def test_the_change_is_paired_and_weighs_questions(task):
    """Of two images, one with a single later question and one with three."""
    samples = [
        {
            "doc_id": 0,
            "question_hash": "a",
            "score": 0.0,
            "scores": {"fresh": 1.0},
            "later": 1,
        },
        {
            "doc_id": 1,
            "question_hash": "b",
            "score": 2 / 3,
            "scores": {"fresh": 2 / 3},
            "later": 3,
        },
    ] * 20
    value, low, high = stats.change(task, samples)
    assert value == pytest.approx(-25)
    assert -50 < low < value < high < 0
    same = [{**sample, "scores": {"fresh": sample["score"]}} for sample in samples]
    assert stats.change(task, same) == (0, 0, 0)


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ("zipeval_gqa_turns", ["red; table", "yes; left"]),
        ("zipeval_pope_turns_no_history", ["yes; no", "yes; no"]),
    ],
)
def test_benchmarks_are_grouped_by_image(miniatures, tmp_path, task, targets):
    record, samples = ran(
        tmp_path, f"tasks=[{task}]", f"data.root={miniatures}", *METHODS["sparsevlm"]
    )[task]
    assert [sample["target"] for sample in samples] == targets
    assert record["status"] == "success" and record["failed"] == 0
    assert record["metric"] == "accuracy_later" and BENCHMARKS[task].sources


DOC = {"answers": ["Yes", "two", "red"]}


@pytest.mark.parametrize(
    ("process", "answers", "expected"),
    [
        (
            utils.shapes_process_results,
            ["yes.", " Two", "blue", "two", "red"],
            ([1, 1, 0], [1, 1]),
        ),
        (
            utils.gqa_process_results,
            ["Yes!", "two", "red", "three", "r.ed"],
            ([1, 1, 1], [0, 1]),
        ),
        (
            utils.shapes_process_results,
            [],
            ([0, 0, 0], [0, 0]),
        ),  # the image could not be read
    ],
)
def test_rounds_are_scored_by_the_rule_of_their_data_set(process, answers, expected):
    scored = process(DOC, [answers])
    assert [*scored] == [
        "accuracy_later",
        "accuracy_first",
        "accuracy_later_fresh",
        "change_later",
    ]
    assert (
        scored["change_later"]["cached"],
        scored["change_later"]["fresh"],
    ) == expected


def test_pope_is_scored_by_llavas_rule():
    doc = {"answers": ["no", "yes"]}
    rounds = utils.pope_process_results(doc, [["There is not", "a dog", "No, none"]])[
        "accuracy_later"
    ]
    assert (rounds["cached"], rounds["fresh"]) == ([1, 1], [0])


def test_what_is_no_such_conversation_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="answered greedily"):
        conversing.converse(None, [], [], None, {"num_beams": 2})
    unknown = SimpleNamespace(
        args=("What is it?", picture_again, {}, 0, "my_rounds", "test")
    )
    with pytest.raises(
        UsageError, match=r"tasks=\[my_rounds\]: it asks in several rounds"
    ):
        ZipEval(Session(compose([]))).generate_until_multi_round([unknown])
    monkeypatch.setattr(
        "lmms_eval.api.task.ConfigurableMessagesTask.doc_to_messages",
        lambda self, doc, **more: picture_again(more),
    )
    with pytest.raises(UsageError, match="shows pictures in later rounds"):
        ran(tmp_path, f"tasks=[{TURNS}]", "limit=1", "method=vanilla")


def picture_again(asked):
    from PIL import Image

    shown = {"type": "image", "url": Image.new("RGB", (96, 96))}
    messages = [
        {"role": "user", "content": [shown, {"type": "text", "text": "What is it?"}]}
    ]
    return (messages, False, [], None) if asked else messages
