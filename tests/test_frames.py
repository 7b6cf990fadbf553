"""Records, samples and tables as DataFrames."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import SCORES, put, sample, write_sweep

from zipeval.errors import UsageError
from zipeval.reporting.frames import _against_bound
from zipeval.reporting.results import Results, read_results
from zipeval.reporting.tables import tables

SHAPES, GQA = "zipeval_shapes", "GQA"  # headings


@pytest.fixture
def results(tmp_path):
    return read_results(write_sweep(tmp_path / "sweep") / "runs")


def test_a_row_for_each_record(results):
    frame = results.records
    assert len(frame) == 2 * len(SCORES)
    row = frame.query("method == 'fastv' and tokens == 4 and benchmark == 'GQA'").iloc[
        0
    ]
    assert (row.score, row.samples, row.failed, row["mean"], row.flops) == (
        40.0,
        10,
        0,
        4.0,
        4000.0,
    )
    assert frame.tokens.isna().sum() == 2  # vanilla's


def test_lost_and_gained_samples_are_those_of_the_statistics(results):
    """The table counts them by itself, of the same samples."""
    counted = results.samples.groupby(["method", "tokens", "benchmark"])[
        ["lost", "gained"]
    ].sum()
    table = results.table(statistics=True)
    for (method, tokens, benchmark), (lost, gained) in counted.iterrows():
        cells = table.loc[("m", method, tokens), benchmark]
        assert (cells["lost"], cells["gained"]) == (lost, gained)
    assert counted.loc[("fastv", 4, SHAPES), "lost"] == 9 - 5


@given(
    score=st.none() | st.floats(0, 1),
    bound=st.none() | st.floats(0, 1),
    higher=st.booleans(),
)
def test_a_sample_is_lost_where_the_upper_bound_is_better(score, bound, higher):
    flags = _against_bound({"score": score}, {"score": bound}, higher)
    sign = 1 if higher else -1
    known = score is not None and bound is not None
    assert flags["lost"] == (known and sign * bound > sign * score)
    assert flags["gained"] == (known and sign * bound < sign * score)


def test_without_an_upper_bound_nothing_is_lost_or_kept(tmp_path):
    put(tmp_path, "fastv", 8, "gqa", [sample(i, 1.0) for i in range(3)])
    frame = read_results(tmp_path).samples
    assert frame[["lost", "gained", "bound_score"]].isna().all(axis=None)
    with pytest.raises(UsageError, match="has no upper bound"):
        read_results(tmp_path).table()


def test_samples_that_failed_and_samples_of_before(results, tmp_path):
    """Of before schema 6, samples hold no question."""
    assert results.samples.question.isna().all()
    more = {"question": "what?", "choices": ["a", "b"], "prompt_tokens": 30}
    put(
        tmp_path / "new",
        "vanilla",
        None,
        "gqa",
        [sample(0, 1.0, **more), sample(1, 0.0, error="no picture")],
    )
    frame = read_results(tmp_path / "new").samples
    assert frame.question.tolist()[0] == "what?" and frame.choices.tolist()[0] == [
        "a",
        "b",
    ]
    assert frame.error.tolist()[
        1
    ] == "no picture" and frame.prompt_tokens.isna().tolist() == [False, True]


def test_an_upper_bound_of_other_questions_is_refused(tmp_path):
    put(tmp_path, "vanilla", None, "gqa", [sample(i, 1.0) for i in range(3)])
    put(
        tmp_path,
        "fastv",
        8,
        "gqa",
        [sample(i, 1.0, question_hash="other") for i in range(3)],
    )
    with pytest.raises(UsageError, match="other questions"):
        _ = read_results(tmp_path).samples


def test_samples_that_changed_are_refused(tmp_path):
    path = put(tmp_path, "vanilla", None, "gqa", [sample(i, 1.0) for i in range(3)])
    file = path.with_name("gqa.samples.jsonl")
    file.write_text(file.read_text().replace("answer 1", "answer 2"))
    with pytest.raises(UsageError, match=r"gqa\.samples"):
        _ = read_results(tmp_path).samples


@pytest.mark.parametrize("name", ["count", "failed"])
def test_a_record_that_counts_other_samples_is_refused(name, tmp_path):
    path = put(tmp_path, "vanilla", None, "gqa", [sample(i, 1.0) for i in range(3)])
    record = json.loads(path.read_text())
    (record["samples"] if name == "count" else record)[name] = 2
    path.write_text(json.dumps(record))
    with pytest.raises(
        UsageError, match=r"it says 2 (failed )?samples, and its samples are"
    ):
        _ = read_results(tmp_path).samples


def test_a_table_holds_the_numbers_that_the_command_line_prints(results):
    table = results.table()
    assert table.index.names == ["model", "method", "tokens"]
    # The rows stand in the order of the command's: budgets fall, and the upper bound is the first.
    assert [method for _, method, _ in table.index] == [
        "vanilla",
        "fastv",
        "visionzip",
        "fastv",
        "visionzip",
    ]
    assert table.loc[("m", "fastv", 8), (SHAPES, "score")] == 80.0
    assert table.loc[("m", "fastv", 8), (SHAPES, "percent")] == pytest.approx(
        100 * 8 / 9
    )
    assert table.loc[("m", "fastv", 8), ("average", "percent")] == pytest.approx(
        (100 * 8 / 9 + 100 * 7 / 8) / 2
    )
    assert table.loc[("m", "fastv", 8), ("visual tokens", "mean")] == 8.0
    from zipeval.reporting.render import render

    shown = tables(results.directory)
    for form in ("markdown", "csv", "latex", "json"):
        assert table.render(form) == render(shown, form)
    assert table._repr_html_() == render(shown, "html")


def test_columns_are_chosen_by_heading_or_task(results):
    for name in ("GQA", "gqa"):
        assert [*results.table(columns=[name]).columns.get_level_values(0).unique()][
            2:
        ] == ["GQA"]
    with pytest.raises(
        UsageError, match=r"columns=GQQ: no such column\. Did you mean GQA"
    ):
        results.table(columns=["GQQ"])
    assert [
        *results.table(task="gqa", columns=["accuracy"])
        .columns.get_level_values(0)
        .unique()
    ][2:] == ["accuracy"]


def test_csv_is_the_frame(results):
    """Whatever reads it gets the numbers of the records."""
    text = results.table(statistics=True).render("csv")
    read = pd.read_csv(io.StringIO(text)).query(
        "method == 'visionzip' and tokens == 8 and benchmark == 'GQA'"
    )
    assert (read.score.item(), read.lost.item(), read.tied.item()) == (60.0, 2, True)
    cells = json.loads(results.table().render("json"))[0]["cells"]
    assert (
        cells[0]["tokens"] is None
        and cells[0]["score"] == 90.0
        and cells[0]["lost"] is None
    )


def test_a_part_of_a_table_is_a_plain_frame(results):
    table = results.table()
    assert type(table.loc["m"]) is pd.DataFrame
    assert type(table[SHAPES]) is pd.DataFrame


def test_two_tables_of_one_model_stand_apart(results):
    put(
        Path(results.directory),
        "vanilla",
        None,
        "gqa",
        [sample(i, 1.0) for i in range(10)],
        prompt="vicuna_v1",
    )
    names = results.table().index.get_level_values("model").unique()
    assert len(names) == 2 and all("prompt=" in name for name in names)
    with pytest.raises(UsageError, match="Choose one with model="):
        results.plot()


def test_results_of_some_records_are_about_these(results):
    paths = [
        path for path in results.records.path if "vanilla" in path or "fastv-8" in path
    ]
    some = Results(results.directory, paths)
    assert len(some.records) == 4 and {
        *some.table().index.get_level_values("method")
    } == {"vanilla", "fastv"}
    assert some.samples.lost.sum() == 2


def test_a_plot_is_chosen_by_its_name(results, tmp_path):
    for name in ("tokens", "time", "curves", SHAPES, GQA):
        plot = results.plot(name)
        assert plot._repr_png_().startswith(b"\x89PNG")
    assert results.plot(GQA, columns=[GQA]).column == GQA
    results.plot().save(tmp_path / "tokens.pdf")
    assert (tmp_path / "tokens.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(
        UsageError, match=r"no such plot as tokns\. Did you mean tokens"
    ):
        results.plot("tokns")
    with pytest.raises(
        UsageError,
        match=r"tokens\.jpg: a plot's file ends in one of \.pdf, \.svg, \.png",
    ):
        results.plot().save(tmp_path / "tokens.jpg")


def test_a_directory_without_records_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no records.*zipeval\.evaluate"):
        read_results(tmp_path)
