"""Every benchmark through lmms-eval's own task code, on miniatures of its data, up to the number that papers print."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import datasets
import pyarrow.parquet
import pytest
from judge_server import likes_all, serving
from miniatures import HUB

from zipeval import benchmarks
from zipeval.benchmarks import BENCHMARKS, scoring
from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.benchmarks.videoqa import SETS
from zipeval.cli import compose
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.evaluation.task_record import make_sample
from zipeval.inference import answering
from zipeval.inference.session import Session
from zipeval.reporting.render import render
from zipeval.reporting.tables import tables
from zipeval.results import records

PAPER = [
    name
    for name, benchmark in BENCHMARKS.items()
    if benchmark.sources and not benchmark.turns
]


# task: answers that are all right, all wrong, and mixed; the score of the mixed ones, computed by hand from what
# tests/miniatures.py says of the rows; and of empty ones.
SCRIPTS = {
    "gqa": (
        ["Red", "yes", "table.", "left"],
        ["blue", "no", "chair", "right"],
        ["red", "no", "a table", "left"],
        50,
        0,
    ),
    # existence: (200 + 50) / 2, since of its second image one question is right; color 0; code_reasoning 50.
    "mme": (
        ["Yes", "No."] * 4,
        ["No", "Yes"] * 4,
        ["Yes", "No", "Yes", "Yes", "No", "Yes", "no", "No"],
        175,
        0,
    ),
    # F1 of adversarial: precision and recall 1/2; of popular 1; of random: an empty answer is a yes, precision 2/3.
    "pope": (
        ["Yes, a dog.", "No."] * 6,
        ["No", "Yes"] * 6,
        [
            "Yes.",
            "No, it is not.",
            "no",
            "Yes",
            *["yes", "no"] * 2,
            "",
            "no",
            "yes",
            "yes",
        ],
        100 * (0.5 + 1 + 0.8) / 3,
        100 * 2 / 3,
    ),
    "scienceqa_img": (
        ["A", "B. y", "c", "A."],
        ["B", "A. x", "A", "C"],
        ["A", "A. x", "It is C", "a"],
        50,
        0,
    ),
    # Two of ten said goal: each of these two finds one other of his opinion (1/3), the other eight find two (2/3).
    "vqav2_val": (
        ["net", "a net", "Net", "two"],
        ["bat"] * 4,
        ["goal", "net", "bat", "2"],
        (60 + 100 + 0 + 100) / 4,
        0,
    ),
    # no was said by two as above, phone by one: nine people find him (1/3), he finds nobody.
    "textvqa_val": (
        ["nokia", "Nokia", "nokia.", "NOKIA"],
        ["lg"] * 4,
        ["no", "phone", "Nokia", "lg"],
        190 / 4,
        0,
    ),
    "mmmu_val": (
        ["A", "(C)", "B.", "12"],
        ["B", "A", "A", "13"],
        ["A", "B", "B", "There are 12"],
        75,
        None,
    ),
    "seedbench": (
        ["A", "B. b", "C", "D"],
        ["B", "A", "D", "C"],
        ["a", "b", "B", "D"],
        75,
        0,
    ),
    "vizwiz_vqa_val": (
        ["soda"] * 4,
        ["tin"] * 4,
        ["soda.", "can", "unanswerable", "tin"],
        (100 + 60 + 60) / 4,
        0,
    ),
}
CASES = [
    pytest.param(task, answers, expected, id=f"{task} {case}")
    for task, (right, wrong, mixed, score, empty) in SCRIPTS.items()
    for case, answers, expected in (
        ("right", right, 600 if task == "mme" else 100),
        ("wrong", wrong, 0),
        ("mixed", mixed, score),
        ("empty", [""] * len(right), empty),
    )
]


@pytest.mark.parametrize("task, answers, expected", CASES)
def test_the_number_of_the_papers(task, answers, expected, scripted):
    record, samples = scripted(task, answers)
    assert [s["prediction"] for s in samples] == answers
    assert record["failed"] == 0
    if expected is None:  # MMMU's own rule guesses an option
        assert 0 <= record["score"] <= 75
    else:
        assert record["score"] == pytest.approx(expected, abs=1e-9)


def test_every_benchmark_of_the_papers_is_here():
    assert (
        {*SCRIPTS, *PROTOCOLS} - set(SETS)
        == set(PAPER)
        == set(compose(["suite=paper_image"]).tasks)
    )
    assert set(compose(["suite=smoke"]).tasks) < set(PAPER)
    for task in PAPER:
        assert benchmarks.dataset(task) == BENCHMARKS[task].sources[0].dataset


def test_a_suite_gives_a_number_for_every_column(miniatures, tmp_path, monkeypatch):
    """The model's own answers, cut short."""
    options = answering.generation_options
    monkeypatch.setattr(
        answering,
        "generation_options",
        lambda given: {**options(given), "max_new_tokens": 4},
    )
    monkeypatch.chdir(tmp_path)
    settings = ["suite=paper_image", f"data.root={miniatures}", "results=results"]
    with serving(likes_all) as judge:
        settings += [f"judge.url={judge.url}", "judge.model=m"]
        for method in (["method=vanilla"], ["method=visionzip", "tokens=16"]):
            for path in run(compose([*settings, *method])):
                record = records.read(path)
                assert math.isfinite(record["score"])
                assert record["data_hash"]
                for sample in records.read_samples(path.parent, record):
                    assert math.isfinite(sample["score"])
                    assert sample["latency"] > 0
                    assert len(sample["question_hash"]) == 16
    header, _, *rows = [
        line.strip("|").split("|")
        for line in render(tables("results")).splitlines()
        if line.startswith("|")
    ]
    columns = [
        "GQA",
        "MMB",
        "MME",
        "POPE",
        "SQA",
        "VQAv2",
        "TextVQA",
        "MMMU",
        "SEED",
        "MM-Vet",
        "LLaVA-B",
        "VizWiz",
    ]
    assert [cell.strip() for cell in header[5:-1]] == columns  # Table 1's, in its order
    for row in rows:
        assert all(math.isfinite(float(cell.split()[0])) for cell in row[5:-1])
    assert [path.name for path in tmp_path.iterdir()] == [
        "results"
    ]  # no file to submit, no log


def test_pope_is_reported_under_both_rules(scripted):
    record, _ = scripted("pope", SCRIPTS["pope"][2])
    # lmms-eval's: `Yes.` is no answer at all (0 of adversarial), nor is an empty one (random: precision 1/2, recall 1).
    assert record["metrics"]["pope_f1_exact"] == pytest.approx((0 + 1 + 2 / 3) / 3)
    assert record["metrics"]["pope_f1_llava"] == pytest.approx(record["score"] / 100)


def test_a_failed_question_of_pope_is_wrong_under_both_rules():
    """lmms-eval's rule counts an answer that is neither yes nor no nowhere."""
    asked = {"target": "yes", "kind": "random"}
    samples = [
        {**asked, "prediction": "yes", "score": 1.0},
        {**asked, "prediction": "", "score": 0.0, "error": "x"},
    ]
    assert scoring.pope({}, samples) == pytest.approx(
        {"pope_f1_llava": 2 / 3, "pope_f1_exact": 2 / 3}
    )


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog.", "no"),
        ("There is no dog", "no"),
        ("Yes. There is no cat.", "yes"),  # the first sentence counts
        ("NO", "yes"),  # LLaVA's rule knows these three words, in this case
        ("Nothing", "yes"),
        ("", "yes"),
    ],
)
def test_llavas_rule(answer, said):
    assert scoring.llava_yes_no(answer) == said


def test_seed_tells_images_from_videos(scripted):
    record, _ = scripted("seedbench", SCRIPTS["seedbench"][2])
    assert (record["metrics"]["seed_image"], record["metrics"]["seed_video"]) == (
        0.5,
        1.0,
    )


def test_seed_shows_the_middle_frame_of_a_video(scripted):
    """As LLaVA. Of the eight that lmms-eval gives it LLaVA-1.5 answers no question (lmms-eval's issue 132)."""
    _, samples = scripted("seedbench", SCRIPTS["seedbench"][0])
    assert [s["kind"] for s in samples] == ["image", "video"] * 2
    assert [len(s["crops"]) for s in samples] == [1] * 4


def test_a_change_of_what_replaces_a_task_is_another_version_of_it(monkeypatch):
    folder = benchmarks.task_folder("seedbench")
    before = benchmarks.task_hash("seedbench", folder)
    changed = replace(
        BENCHMARKS["seedbench"], version=BENCHMARKS["seedbench"].version + 1
    )
    monkeypatch.setitem(BENCHMARKS, "seedbench", changed)
    assert benchmarks.task_hash("seedbench", folder) != before


@pytest.mark.parametrize(
    "task", ["vrbench_process", "videoevalpro", "unig2u_uni_mmmu_maze100"]
)
def test_a_task_that_asks_a_judge_of_its_own_is_refused(task):
    """By lmms-eval's verifiers, or a client of its own."""
    with pytest.raises(
        UsageError, match=rf"tasks=\[{task}\]: a judge model scores its answers"
    ):
        benchmarks.task_folder(task)


@pytest.mark.parametrize("task", ["ovo_forward", "zipeval_shapes_turns"])
def test_of_tasks_in_several_rounds_only_our_conversations_run(task, monkeypatch):
    """What a task's YAML includes says so too."""
    if task in BENCHMARKS:
        assert benchmarks.task_folder(task).is_dir()
        monkeypatch.delitem(BENCHMARKS, task)
    with pytest.raises(
        UsageError, match=rf"tasks=\[{task}\]: it asks in several rounds"
    ):
        benchmarks.task_folder(task)


def test_a_limit_may_leave_out_half_of_mme(scripted):
    record, _ = scripted("mme", ["Yes", "No"], "limit=2")
    assert record["score"] == 200


def test_gqa_encodes_no_image(scripted, monkeypatch):
    """lmms-eval's own task copies the images with Dataset.map, one for every question."""
    monkeypatch.delattr(datasets.Dataset, "map")
    record, _ = scripted("gqa", SCRIPTS["gqa"][0])
    assert record["score"] == 100


def test_mmmu_guesses_for_an_answer_and_not_for_a_failure():
    """What MMMU's rule guessed for the second sample is right."""
    guess = {
        "question_type": "multiple-choice",
        "answer": "B",
        "parsed_pred": ["B"],
        "id": "validation_Art_1",
    }
    logged = {
        "doc_id": 1,
        "target": "B",
        "arguments": ["Which?"],
        "filtered_resps": [""],
        "mmmu_acc": guess,
    }
    samples = [
        make_sample("mmmu_val", logged, measured)
        for measured in ({}, {"error": "cannot be decoded"})
    ]
    assert scoring.mmmu({}, samples) == {"mmmu_acc": 0.5}


def test_textvqa_shows_the_ocr_tokens(scripted, monkeypatch):
    seen = []
    decoded = Session.decoded
    monkeypatch.setattr(
        Session,
        "decoded",
        lambda self, messages: seen.append(messages) or decoded(self, messages),
    )
    scripted("textvqa_val", SCRIPTS["textvqa_val"][0])
    text = seen[0][0]["content"][-1]["text"]
    assert text == (
        "What brand is it?\nReference OCR token: NOKIA, 5G\nAnswer the question using a single word or phrase."
    )


def damaged(root, copy, file, row):
    """A copy of the miniatures where the first image of a row is cut off."""
    shutil.copytree(root, copy)
    table = pyarrow.parquet.read_table(copy / HUB / file)
    rows = table.to_pylist()
    column = "image_1" if "image_1" in rows[row] else "image"
    image = rows[row][column]
    image = image[0] if isinstance(image, list) else image
    image["bytes"] = image["bytes"][:60]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=table.schema), copy / HUB / file
    )


@pytest.mark.parametrize(
    "task, file, row, failed, expected",
    [
        (
            "pope",
            "POPE/data/test-00000-of-00001.parquet",
            0,
            {0},
            100 * (2 / 3 + 1 + 1) / 3,
        ),  # one of two yes missed
        (
            "gqa",
            "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet",
            2,
            {0, 2},
            50,
        ),  # n0, of two questions
        ("seedbench", "SEED-Bench/data/test-00000-of-00001.parquet", 1, {1}, 75),
        ("mmmu_val", "MMMU/data/validation-00000-of-00001.parquet", 0, {0}, 75),
        (
            "mme",
            "MME/data/test-00000-of-00001.parquet",
            0,
            {0},
            200 + 200 + (50 + 200) / 2,
        ),
    ],
)
def test_a_damaged_image_is_one_failed_sample(
    task, file, row, failed, expected, miniatures, tmp_path, scripted
):
    """The run goes on; the sample is wrong whatever a benchmark makes of an empty answer."""
    damaged(miniatures, tmp_path / "copy", file, row)
    record, samples = scripted(task, SCRIPTS[task][0], f"data.root={tmp_path / 'copy'}")
    assert {s["doc_id"] for s in samples if "error" in s} == failed
    assert all(
        "image" in samples[i]["error"] and samples[i]["prediction"] == ""
        for i in failed
    )
    assert record["failed"] == len(failed)
    assert record["score"] == pytest.approx(expected)
