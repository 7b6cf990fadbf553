"""One definition of a score, its direction, and what failed samples are worth: by small tasks of lmms-eval."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from own_tasks import write_task
from PIL import Image as Pillow

from zipeval.cli import compose
from zipeval.errors import RunError, UsageError
from zipeval.evaluation import task_scores
from zipeval.evaluation.chat_model import ZipEval
from zipeval.evaluation.runner import evaluate
from zipeval.inference.session import Session
from zipeval.reporting import stats
from zipeval.reporting.html.gallery import verdict
from zipeval.reporting.percentages import percent_of_bound
from zipeval.reporting.render import render
from zipeval.reporting.tables import tables
from zipeval.results import records

TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/test.parquet}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
process_results: !function utils.process
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
{metrics}
"""
MEAN = "  - {{metric: {}, aggregation: mean, higher_is_better: {}}}"


def picture(level):
    content = io.BytesIO()
    Pillow.fromarray(np.full((32, 32, 3), level, np.uint8)).save(content, "PNG")
    return content.getvalue()


def make_task(folder, name, process, metrics, pictures):
    """Write a task whose documents are pictures; `process` is the body of its function of (doc, results)."""
    folder.mkdir()
    rows = [
        {
            "image": {"bytes": content, "path": None},
            "question": "What is it?",
            "answer": str(number),
        }
        for number, content in enumerate(pictures)
    ]
    features = Features(
        {
            "image": Image(decode=True),
            "question": Value("string"),
            "answer": Value("string"),
        }
    )
    Dataset.from_list(rows, features=features).to_parquet(str(folder / "test.parquet"))
    functions = f"def visual(doc):\n    return [doc['image']]\n\ndef process(doc, results):\n    {process}\n"
    (folder / "utils.py").write_text(
        functions + "\ndef highest(items):\n    return max(items)\n"
    )
    text = TASK.format(name=name, folder=folder, metrics="\n".join(metrics))
    (folder / f"{name}.yaml").write_text(text)
    return folder


def answered(folder, name, *overrides):
    """Return the record and the samples of a task, as the embedded model answers it."""
    return evaluate(ZipEval(Session(compose(list(overrides)))), name, folder)


GOOD = [picture(level) for level in (0, 80, 160, 240)]


def test_statistics_are_of_the_metric_of_the_record(tmp_path):
    """Other numbers that a task returns before it, or in another order, are not its score."""
    process = (
        "return {'length': 7.0, 'acc': float(doc['answer'] == '0'), 'second': 5.0}"
    )
    metrics = [MEAN.format("acc", "true"), MEAN.format("second", "true")]
    record, samples = answered(
        make_task(tmp_path / "t", "t", process, metrics, GOOD), "t"
    )
    assert (record["metric"], record["score"], record["from_samples"]) == (
        "acc",
        0.25,
        True,
    )
    assert [sample["score"] for sample in samples] == [1.0, 0.0, 0.0, 0.0]
    assert stats.value("t", samples) == record["score"]
    assert record["directions"] == {"acc": True, "second": True}


def test_a_metric_that_is_no_mean_has_no_statistics(tmp_path):
    """The largest of the samples' values is no mean of them, whatever it is called."""
    process = "return {'acc': float(doc['answer'])}"
    metrics = [
        "  - {metric: acc, aggregation: !function utils.highest, higher_is_better: true}"
    ]
    record, samples = answered(
        make_task(tmp_path / "t", "t", process, metrics, GOOD), "t"
    )
    assert (record["score"], record["from_samples"]) == (3.0, False)
    records.write(tmp_path / "runs" / "one", record, samples)
    (table,) = tables(str(tmp_path / "runs"), statistics=True)
    assert table.notes == [
        "t (acc): no intervals. Its samples have no scores of which acc is the mean."
    ]


@pytest.mark.parametrize("higher", [True, False])
def test_failed_samples(higher, tmp_path):
    """They count 0 where more is better. Of an error 0 is perfect, and they are left out."""
    process = "return {'error': 0.0 if not results[0] else 4.0}"
    metrics = [MEAN.format("error", str(higher).lower())]
    folder = make_task(tmp_path / "t", "t", process, metrics, [*GOOD, b"no picture"])
    record, samples = answered(folder, "t")
    assert record["failed"] == 1
    assert record["higher_is_better"] is higher
    assert samples[-1]["score"] == (0.0 if higher else None)
    assert record["score"] == (3.2 if higher else 4.0)
    assert record["metrics"] == {"error": record["score"]}
    assert record["from_samples"] is True


def test_of_an_error_less_is_better(tmp_path):
    """No visual token at all is no improvement, and the table says how its percentages are meant."""
    process = "return {'mae': 2.0}"
    folder = make_task(
        tmp_path / "t", "t", process, [MEAN.format("mae", "false")], GOOD
    )
    for number, (overrides, error) in enumerate(
        ((["method=vanilla"], 2.0), (["method=none"], 6.0))
    ):
        record, samples = answered(folder, "t", *overrides)
        for sample in samples:
            sample["score"] = error + sample["doc_id"] % 2
        record["score"] = stats.value("t", samples)
        records.write(tmp_path / "runs" / str(number), record, samples)
    (table,) = tables(str(tmp_path / "runs"), statistics=True)
    assert table.columns == ["t (mae ↓)"]
    cell = table.rows[1].cells["t (mae ↓)"]
    assert cell.percent == pytest.approx(100 * 2.5 / 6.5)
    assert cell.comparison.percent == pytest.approx(cell.percent)
    assert cell.comparison.low <= cell.percent <= cell.comparison.high < 100
    text = render([table])
    assert "↓: lower is better" in text
    assert r"$\downarrow$" in render([table], "latex")
    assert [
        cell["higher_is_better"]
        for cell in json.loads(render([table], "json"))[0]["cells"]
    ] == [False, False]


POSITIVE = st.floats(0.01, 1e6)


@given(POSITIVE, POSITIVE)
def test_directions_mirror_each_other(score, bound):
    assert percent_of_bound(score, bound, False) == pytest.approx(
        percent_of_bound(bound, score, True)
    )
    assert (percent_of_bound(score, bound, False) >= 100) or score > bound * (1 - 1e-9)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=20))
def test_statistics_mirror_each_other(pairs):
    ours, bound = (
        [
            {"doc_id": i, "question_hash": "", "score": pair[side]}
            for i, pair in enumerate(pairs)
        ]
        for side in (0, 1)
    )
    lower = stats.compare("t", ours, bound, 100, higher_is_better=False)
    higher = stats.compare("t", bound, ours, 100)
    # Draws are of units in another order, so that only the number itself is the same to the digit.
    assert lower.percent == pytest.approx(higher.percent)
    expected = percent_of_bound(stats.value("t", ours), stats.value("t", bound), False)
    assert lower.percent == pytest.approx(expected, rel=1e-9, abs=10**-stats.DIGITS)


@pytest.mark.parametrize(
    ("score", "bound", "higher"),
    [(1, 0, True), (1, -1, True), (0, 1, False), (-1, 1, False), (1, 0, False)],
)
def test_ratios_that_say_nothing(score, bound, higher):
    assert np.isnan(percent_of_bound(score, bound, higher))


def test_flips_know_the_direction():
    """An error that only the bound avoids is lost."""
    ours = [{"doc_id": i, "question_hash": "", "score": float(i < 3)} for i in range(9)]
    bound = [{**sample, "score": float(sample["doc_id"] < 1)} for sample in ours]
    assert (
        stats.compare("t", ours, bound, 10).lost,
        stats.compare("t", ours, bound, 10).gained,
    ) == (0, 2)
    errors = stats.compare("t", ours, bound, 10, higher_is_better=False)
    assert (errors.lost, errors.gained) == (2, 0)


def test_errors_of_zero_leave_no_interval():
    """Draws without any error stand for a percentage beyond all others."""
    ours = [
        {"doc_id": i, "question_hash": "", "score": float(i == 0)} for i in range(9)
    ]
    bound = [{**sample, "score": 1.0} for sample in ours]
    assert np.isnan(stats.compare("t", ours, bound, 1000, higher_is_better=False).high)


@pytest.mark.parametrize(
    ("metrics", "directions", "metric"),
    [
        ({"b": 1.0, "a": 2.0}, {"a": True, "b": True}, "a"),
        ({"b": 1.0}, {"a": True, "b": True}, "b"),  # the first one only writes a file
        ({"a,short": 1.0}, {"a": True}, "a,short"),
        ({}, {"a": True}, None),
    ],
)
def test_the_score_is_the_first_metric_of_the_task(metrics, directions, metric):
    assert task_scores.main_metric("t", metrics, directions) == metric
    assert task_scores.main_metric("gqa", metrics, directions) == "exact_match"


def test_a_metric_behind_a_filter_has_its_samples_values():
    assert task_scores.sample_value({"a": 1}, "a,short") == 1.0
    assert task_scores.sample_value({"a": {"x": 1}}, "a") is None
    assert not task_scores.is_higher_better("a,short", {"a": False})


def test_an_answer_without_an_error_is_not_called_wrong():
    assert verdict({"score": 0.0}) == "wrong"
    assert verdict({"score": 0.0}, higher_is_better=False) == "score 0"


SHAPES = "zipeval_shapes"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Real runs of a few questions."""
    from zipeval.evaluation.runner import run

    root = tmp_path_factory.mktemp("runs")
    for overrides in (["method=vanilla"], ["method=visionzip", "tokens=16"]):
        run(compose([f"results={root}", "limit=12", *overrides]))
    return root


@pytest.fixture
def tampered(run, tmp_path):
    """(how the record of VisionZip is changed) -> its path, in a copy."""
    import shutil

    def tamper(change):
        shutil.copytree(run, tmp_path / "runs")
        (path,) = (tmp_path / "runs").glob("*visionzip*/*.json")
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
        return path

    return tamper


def readers(path: Path):
    """Everything that reads samples."""
    from zipeval.regression.baseline import write
    from zipeval.reporting.html.report import report
    from zipeval.reporting.show import show

    results, out = str(path.parent.parent), path.parent.parent.parent
    return (
        lambda: tables(results, statistics=True),
        lambda: report(results, out / "r.html"),
        lambda: show(path.parent.name, results),
        lambda: write(results, out / "b.json"),
    )


def test_a_score_that_is_not_of_its_samples_is_refused_by_name(tampered):
    path = tampered(lambda record: record.update(score=12.5))
    tables(str(path.parent.parent))  # reads no samples
    for reader in readers(path):
        with pytest.raises(
            UsageError,
            match=rf"{path}: its score is 12.5, and the samples in .*jsonl come to",
        ):
            reader()


def of_schema_4(record):
    record["schema"] = 4
    for name in ("from_samples", "directions", "higher_is_better"):
        del record[name]


def test_records_of_before_are_read(tampered):
    for reader in readers(tampered(of_schema_4)):
        reader()


def test_records_of_before_are_checked_too(tampered):
    def change(record):
        of_schema_4(record)
        record["score"] = 12.5

    for reader in readers(tampered(change)):
        with pytest.raises(UsageError, match=r"its score is 12\.5"):
            reader()


@pytest.mark.parametrize(
    ("process", "named", "text"),
    [
        ("return {'acc': doc['gold']}", "process", "raised KeyError: 'gold'"),
        (
            "return {'acc': float(doc['image'].size[0])}",
            "process",
            "raised KeyError: 'image'",
        ),
        (
            "return {'acc': 1 / 0}",
            "process",
            "raised ZeroDivisionError: division by zero",
        ),
    ],
)
def test_what_fails_in_a_tasks_function_is_not_blamed_on_its_data(
    process, named, text, tmp_path, monkeypatch
):
    from lmms_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask.process_results.retry, "wait", lambda state: 0)
    folder = write_task(
        tmp_path / "task", "own", "{max_new_tokens: 4}", samples=2, process=process
    ).parent
    session = Session(compose(["method=vanilla", f"results={tmp_path}"]))
    with pytest.raises(
        RunError,
        match=rf"tasks=\[own\]: its function {named} \(utils.py, line 6\) {text}",
    ):
        evaluate(ZipEval(session), "own", folder)


def test_what_fails_in_an_aggregation_names_it_too(tmp_path):
    file = write_task(tmp_path / "task", "own", "{max_new_tokens: 4}", samples=2)
    file.write_text(
        file.read_text().replace(
            "aggregation: mean", "aggregation: !function utils.total"
        )
    )
    with (file.parent / "utils.py").open("a") as utils:
        utils.write("\n\ndef total(scores):\n    raise ValueError('no\\nscores')\n")
    session = Session(compose(["method=vanilla", f"results={tmp_path}"]))
    with pytest.raises(
        RunError,
        match=r"its function total \(utils.py, line 10\) raised ValueError: no\. Mend it",
    ):
        evaluate(ZipEval(session), "own", file.parent)


def test_a_data_set_that_does_not_load_is_told_as_that(tmp_path, monkeypatch):
    from lmms_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", lambda state: 0)
    file = write_task(tmp_path / "task", "own", "{max_new_tokens: 4}", samples=2)
    (file.parent / "test.parquet").write_bytes(b"torn")
    session = Session(compose(["method=vanilla", f"results={tmp_path}"]))
    with pytest.raises(UsageError, match="its data set does not load"):
        evaluate(ZipEval(session), "own", file.parent)
