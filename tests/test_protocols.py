"""The image benchmarks that a judge scores, through lmms-eval's prompts, up to the number that papers print."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pyarrow.parquet
import pytest
from judge_server import kind, likes_all, serving
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from miniatures import HUB

from zipeval.benchmarks import judge
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.inference.session import Session

MMB, VET, WILD = "mmbench_en_dev", "mmvet", "llava_in_the_wild"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge, "RETRIES", 0)


@pytest.fixture
def judged(scripted):
    """(task, answers, a judge's reply to each prompt) -> (record, samples, prompts)."""
    with serving(likes_all) as server:

        def evaluate(task, answers, reply, *overrides):
            probe = PROTOCOLS[task].messages(PROTOCOLS[task].probe)[-1]["content"]
            server.reply = lambda prompt: (
                likes_all(prompt) if prompt == probe else reply(prompt)
            )
            server.prompts.clear()
            record, samples = scripted(
                task, answers, f"judge.url={server.url}", "judge.model=m", *overrides
            )
            assert server.prompts[0] == probe
            return record, samples, server.prompts[1:]

        yield evaluate


def nobody(prompt):
    raise AssertionError(f"the judge is asked: {prompt}")


# Rows: 7 (A of oak, elm, ash, fir), 8 (A of banana, cherry), 9 (C), 7 rotated (D of elm, ash, fir, oak), 8 rotated (B).
@pytest.mark.parametrize(
    "answers, expected, asked",
    [
        (["A", "A.", "C", "(D)", "It is a banana"], 100, 0),
        (["B", "B", "A", "A", "A"], 0, 0),
        (["A", "A", "C", "A", "B"], 200 / 3, 0),  # 7 is wrong in one rotation
        (["a big tree", "A", "C", "D", "B"], 100, 1),  # the judge says A
        (["A", "A", "a big tree", "D", "B"], 200 / 3, 1),
        (["A", "A", "", "D", "B"], 200 / 3, 1),
    ],
)
def test_mmbench(answers, expected, asked, judged):
    record, samples, prompts = judged(MMB, answers, lambda prompt: "A")
    assert record["score"] == pytest.approx(expected)
    assert len(prompts) == asked
    assert [s["group"] for s in samples] == [7, 8, 9, 7, 8]
    table = pd.DataFrame(
        [
            {
                "index": 1_000_000 * (i > 2) + s["group"],
                "prediction": s["scores"]["option"],
                "answer": s["target"],
            }
            | {"question": "", "category": "c", **dict.fromkeys("ABCD", "x")}
            for i, s in enumerate(samples)
        ]
    )
    assert 100 * MMBench_Evaluator().eval_result(table, "static")[0] == pytest.approx(
        expected
    )


def test_mmbench_asks_which_option_is_meant(judged):
    _, samples, (prompt,) = judged(
        MMB, ["A", "some fruit", "C", "D", "B"], lambda prompt: "E"
    )
    options = "There are several options: \nA. banana\nB. cherry\n"
    assert prompt.endswith(
        f"Question: Which??\nOptions: {options}\nAnswer: some fruit\nYour output: "
    )
    assert samples[1]["scores"] == {"option": "E"}
    assert samples[1]["score"] == 0


def test_mmbench_does_not_find_a_missing_option_in_banana(judged):
    """lmms-eval would: its missing options are the string nan, and so it would ask about every banana."""
    _, samples, _ = judged(MMB, ["A", "Banana!", "C", "D", "bananas"], nobody)
    assert [s["score"] for s in samples] == [1, 1, 1, 1, 1]


def test_mmbench_is_asked_as_llava_asks(judged, monkeypatch):
    seen = []
    decoded = Session.decoded
    monkeypatch.setattr(
        Session,
        "decoded",
        lambda self, messages: seen.append(messages) or decoded(self, messages),
    )
    judged(MMB, ["A", "A", "C", "D", "B"], nobody)
    texts = [messages[0]["content"][-1]["text"] for messages in seen]
    end = "\nAnswer with the option's letter from the given choices directly."
    assert {
        "Which?\nA. banana\nB. cherry" + end,
        "It is tall.\nWhich?\nA. oak\nB. elm\nC. ash\nD. fir" + end,
    } < {*texts}


def by_answer(replies):
    return lambda prompt: next(
        reply for answer, reply in replies.items() if f"| {answer} |" in prompt
    )


@pytest.mark.parametrize(
    "replies, expected, capabilities",
    [
        (
            ["1.0"] * 4,
            100,
            {"rec": 100, "ocr": 100, "know": 100, "gen": 100, "spat": 100, "math": 100},
        ),
        (
            ["0.0"] * 4,
            0,
            {"rec": 0, "ocr": 0, "know": 0, "gen": 0, "spat": 0, "math": 0},
        ),
        # rec: 1, 0.4, 0.1
        (
            ["0.5", "1.0 ", "0.4 since", "0.1\n"],
            50,
            {"rec": 50, "ocr": 50, "know": 40, "gen": 40, "spat": 10, "math": 50},
        ),
    ],
    ids=["right", "wrong", "mixed"],
)
def test_mmvet(replies, expected, capabilities, judged):
    answers = ["one", "two", "three", "four"]
    record, samples, prompts = judged(
        VET, answers, by_answer(dict(zip(answers, replies, strict=True)))
    )
    assert record["score"] == pytest.approx(expected)
    assert record["metrics"] == pytest.approx(
        {"gpt_eval_score": expected, **capabilities}
    )
    assert any(
        prompt.endswith("\nWhat is x? | -1 <AND> -5 | one |") for prompt in prompts
    )
    assert [s["prediction"] for s in samples] == answers


@pytest.mark.parametrize(
    "replies, expected, kinds",
    [
        (["9 9", "8 8", "10 10", "7 7"], 100, (100, 100, 100)),
        (["10 1"] * 4, 10, (10, 10, 10)),
        # (4 + 8 + 10 + 2) / (8 + 8 + 10 + 4)
        (["8 4\nGood.", "8, 8", "10 10", "4.0 2.0"], 80, (75, 100, 50)),
    ],
    ids=["right", "wrong", "mixed"],
)
def test_llava_bench(replies, expected, kinds, judged):
    record, _, prompts = judged(
        WILD,
        ["one", "two", "three", "four"],
        lambda prompt: replies[int(prompt.split("What is ")[1][0])],
    )
    assert record["score"] == pytest.approx(expected)
    found = {
        f"gpt_eval_llava_{name}": n
        for name, n in zip(("conv", "detail", "complex"), kinds, strict=True)
    }
    assert record["metrics"] == pytest.approx({"gpt_eval_llava_all": expected, **found})
    first = next(prompt for prompt in prompts if "What is 0?" in prompt)
    assert first.startswith(
        "[Context]\nA lawn.\n\n[Question]\nWhat is 0?\n\n[Assistant 1]\nIt is 0.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\none\n\n[End of Assistant 2]\n\n[System]\nWe would like to request"
    )


@pytest.mark.parametrize(
    "task, answers, reply, reason",
    [
        (
            MMB,
            ["A", "something", "C", "D", "B"],
            "A or B",
            "names none of A, B, and not E",
        ),
        (
            VET,
            ["one", "something", "three", "four"],
            "Good!",
            "no grade from 0.0 to 1.0: 'Good!'",
        ),
        (VET, ["one", "something", "three", "four"], "1.5", "no grade"),
        (VET, ["one", "something", "three", "four"], "nan", "no grade"),
        (
            WILD,
            ["one", "something", "three", "four"],
            "-1 -1",
            "two grades from 1 to 10",
        ),
        (
            WILD,
            ["one", "something", "three", "four"],
            "8\n8",
            "two grades from 1 to 10",
        ),
        (
            WILD,
            ["one", "something", "three", "four"],
            "8 7 6",
            "two grades from 1 to 10",
        ),
        (WILD, ["one", "something", "three", "four"], (500, "gone"), "gone"),
    ],
)
def test_no_verdict_no_number(task, answers, reply, reason, judged, tmp_path):
    """lmms-eval's own code guesses (MMBench), gives a zero (MM-Vet), or counts -1 and -1 (LLaVA-Bench)."""
    record, samples, _ = judged(
        task,
        answers,
        lambda prompt: reply if "something" in prompt else likes_all(prompt),
    )
    assert (record["status"], record["unscored"]) == ("incomplete", 1)
    assert samples[1]["score"] is None
    assert reason in samples[1]["unscored"]
    assert record["score"] == 100
    record, samples, prompts = judged(task, [], likes_all)
    assert (record["status"], record["unscored"], len(prompts)) == ("success", 0, 1)
    assert samples[1]["score"] is not None


@pytest.mark.parametrize(
    "task, folder",
    [(MMB, "MMBench/en"), (VET, "MMVet/data"), (WILD, "llava-bench-in-the-wild/data")],
)
def test_a_failed_sample_is_judged_as_an_empty_answer(
    task, folder, judged, tmp_path, miniatures
):
    copy = shutil.copytree(miniatures, tmp_path / "copy")
    (file,) = (copy / HUB / folder).glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    rows = table.to_pylist()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=table.schema), file
    )
    answers = {
        MMB: ["A", "", "C", "D", "B"],
        VET: ["a", "", "b", "c"],
        WILD: ["a", "", "b", "c"],
    }[task]

    def strict(prompt):
        return (
            "10 1"
            if kind(prompt) == "llava_bench" and "[Assistant 2]\n\n" in prompt
            else likes_all(prompt)
        )

    record, samples, prompts = judged(task, answers, strict, f"data.root={copy}")
    assert (record["failed"], record["unscored"]) == (1, 0)
    assert samples[1]["prediction"] == ""
    assert record["score"] == pytest.approx(
        {MMB: 200 / 3, VET: 75, WILD: 100 * 25 / 34}[task]
    )
    assert json.dumps(samples[1])
    assert len(prompts) == {MMB: 0, VET: 3, WILD: 4}[task]
