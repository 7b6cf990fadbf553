"""What has to be known of a number stands beside it, in every format, in plots and in the report."""

from __future__ import annotations

import csv
import io
import json

import pytest
from test_report import put, sample

from zipeval.reporting.html.report import report
from zipeval.reporting.plots import plots
from zipeval.reporting.remarks import MARKS, Remark, key, marks, record_remarks, status
from zipeval.reporting.render import FORMATS, legend, render
from zipeval.reporting.tables import tables

LATEX = {
    "§": r"\textsuperscript{\S}",
    "¶": r"\textsuperscript{\P}",
    "‖": r"\textsuperscript{$\parallel$}",
}
KINDS = {
    "failed": (
        "§",
        {"error": "cut off"},
        0.0,
        "1 of 4 samples failed and count as wrong",
    ),
    "unjudged": (
        "¶",
        {"unscored": "the judge was away"},
        None,
        "1 of 4 answers are unjudged",
    ),
    "overflowed": (
        "‖",
        {},
        1.0,
        "2 of 4 prompts are longer than the model's positions",
    ),
}


def overflow(path, count):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "overflowed": count}))


@pytest.fixture(params=KINDS)
def marked(request, tmp_path):
    """Tables of a bound without, and a method with something to say; its mark and what is said."""
    mark, fields, score, said = KINDS[request.param]
    clean = [sample(i, 1.0) for i in range(4)]
    put(tmp_path, "vanilla", None, "gqa", clean)
    path = put(tmp_path, "fastv", 16, "gqa", [*clean[:3], sample(3, score, **fields)])
    if request.param == "overflowed":
        overflow(path, 2)
    return tmp_path, tables(str(tmp_path)), mark, said


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_shows_it(form, marked):
    _, found, mark, said = marked
    text = render(found, form)
    if form in ("markdown", "html"):
        (line,) = (
            line
            for line in text.splitlines()
            if "fastv" in line and "%" in line and "<p>" not in line
        )
        assert mark in line
        assert f"Marks: {mark} " in text
    if form == "latex":
        printed = [line for line in text.splitlines() if not line.startswith("%")]
        assert (
            sum(LATEX[mark] in line for line in printed) == 2
        )  # in the cell, and what it means
        assert any(said in line for line in printed)
    if form == "csv":
        cells = list(csv.DictReader(io.StringIO(text)))
        assert [cell["status"] for cell in cells] == ["ok", said]
    if form == "json":
        assert [cell["status"] for cell in json.loads(text)[0]["cells"]] == ["ok", said]


def test_plots_show_it(marked, tmp_path):
    root, found, mark, _ = marked
    drawn = {plot.name: plot for plot in plots(found[0], [1.0, 1.0])}
    assert {name.partition("-")[0] for name in drawn} == {
        "tokens",
        "time",
        "curves",
        "bars",
    }
    for plot in drawn.values():
        axes = plot.figure.axes[0]
        assert mark in [text.get_text() for text in axes.texts]
        assert mark in axes.get_xlabel()
        assert mark in plot.about
    report(str(root), tmp_path / "report.html")
    assert f"{mark}</span>" in (tmp_path / "report.html").read_text()


def test_without_anything_to_say_nothing_is_marked(tmp_path):
    for method, tokens in (("vanilla", None), ("fastv", 16)):
        put(tmp_path, method, tokens, "gqa", [sample(i, 1.0) for i in range(4)])
    found = tables(str(tmp_path))
    assert not any(
        mark in render(found, form)
        for form in ("markdown", "csv", "html", "json")
        for mark in "§¶‖"
    )
    assert "textsuperscript" not in render(found, "latex")
    assert found[0].rows[1].remarks == ()


@pytest.mark.parametrize("statistics", [False, True])
def test_where_the_bound_overflowed_there_is_no_percentage(statistics, tmp_path):
    """Of other benchmarks there is, and of the average, which would lack a column, none."""
    clean = [sample(i, 1.0) for i in range(4)]
    for task in ("gqa", "zipeval_shapes"):
        path = put(tmp_path, "vanilla", None, task, clean)
        put(tmp_path, "fastv", 16, task, clean)
        if task == "gqa":
            overflow(path, 3)
    (table,) = tables(str(tmp_path), statistics=statistics)
    _, row = table.rows
    assert [
        (cell.score, cell.percent)
        for cell in (row.cells["GQA"], row.cells["zipeval_shapes"])
    ] == [
        (100.0, None),
        (100.0, 100.0),
    ]
    assert row.average is None
    assert row.cells["GQA"].comparison is None
    assert table.rows[0].cells["GQA"].percent is None
    assert "100.0‖ " in render([table])
    note = "GQA: no percentages. 3 of the 4 prompts of gqa are longer than the model's positions under the upper bound."
    assert note in legend(table)
    assert (
        "no percentage: the upper bound's prompts are longer than the model's positions"
        in render([table], "csv")
    )


def test_what_is_said_of_the_bound_is_said_of_its_percentages(tmp_path):
    clean = [sample(i, 1.0) for i in range(4)]
    put(tmp_path, "vanilla", None, "gqa", [*clean[:3], sample(3, 0.0, error="cut off")])
    put(tmp_path, "fastv", 16, "gqa", clean)
    (table,) = tables(str(tmp_path))
    assert (
        status(table.rows[1].cells["GQA"].remarks)
        == "upper bound: 1 of 4 samples failed and count as wrong"
    )
    assert (
        status(table.rows[0].cells["GQA"].remarks)
        == "1 of 4 samples failed and count as wrong"
    )


def test_an_average_has_what_is_said_of_its_numbers(tmp_path):
    clean = [sample(i, 1.0) for i in range(4)]
    for task in ("gqa", "zipeval_shapes"):
        put(tmp_path, "vanilla", None, task, clean)
        put(
            tmp_path,
            "fastv",
            16,
            task,
            [*clean[:3], sample(3, 0.0, error="cut off")] if task == "gqa" else clean,
        )
    found = tables(str(tmp_path))
    assert "87.5%§" in render(found)
    cells = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert cells[-1]["benchmark"] == "average"
    assert cells[-1]["status"] == "GQA: 1 of 4 samples failed and count as wrong"


def test_marks_are_told_once_and_in_one_order():
    both = [Remark("overflowed", "b"), Remark("failed", "a"), Remark("failed", "a")]
    assert (marks(both), status(both), status([])) == ("§‖", "b; a", "ok")
    assert key(both).index("§") < key(both).index("‖")
    assert len({*MARKS.values()}) == len(MARKS)


def test_of_an_error_failed_samples_are_left_out():
    record = {"samples": {"count": 9}, "failed": 2, "higher_is_better": False}
    assert [remark.text for remark in record_remarks(record)] == [
        "2 of 9 samples failed and are left out"
    ]
