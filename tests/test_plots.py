"""Plots: axes of one size, one style for each method, and nothing cut."""

from __future__ import annotations

from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import put, sample

from zipeval.reporting.method_styles import STYLES, method_styles
from zipeval.reporting.plots import HEIGHT, PANEL_SIZE, WIDTH, bars, curves, tradeoff
from zipeval.reporting.tables import Row, Table, TableCell, tables

LABELS = (
    st.text(ascii_lowercase + "_= ", min_size=1, max_size=90)
    .map(str.strip)
    .filter(bool)
)


def table(labels, columns=("POPE",)):
    """Every method at two budgets."""
    rows = [
        Row(
            "vanilla",
            None,
            {name: TableCell(80.0, 100.0) for name in columns},
            mean=16.0,
        )
    ]
    for tokens in (8, 4):
        for number, label in enumerate(sorted(labels)):
            cell = TableCell(70.0 + number, 90.0 - number + tokens)
            rows.append(
                Row(
                    label,
                    tokens,
                    dict.fromkeys(columns, cell),
                    mean=float(tokens),
                    average=90.0 - number,
                )
            )
    return Table("m (f)", [*columns], rows)


def size(axes):
    box = axes.get_window_extent()
    return box.width / axes.figure.dpi, box.height / axes.figure.dpi


def is_whole(figure):
    """Whether everything that is drawn lies within the figure, to a tenth of an inch."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return (
        min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02
    )


@pytest.mark.parametrize(
    "labels",
    [
        {"fastv"},
        {"qmjdup", "=emruw", "="},
        {f"method_{number}" for number in range(12)},
        {
            "sparsevlm_on_visionzip first=visionzip:128 second=sparsevlm:64 of=576",
            "a" * 90,
        },
    ],
    ids=["one", "short", "many", "long"],
)
def test_axes_keep_their_size_whatever_the_legend_holds(labels):
    shown = table(labels)
    tokens = [row.mean for row in shown.rows]
    for figure in (
        tradeoff(shown, tokens, "tokens", "percent"),
        bars(shown, "POPE"),
        curves(shown),
    ):
        assert size(figure.axes[0]) == pytest.approx((WIDTH, HEIGHT), abs=0.06)
        assert is_whole(figure)


@pytest.mark.parametrize("count", [2, 4, 11])
def test_panels_keep_their_size(count):
    figure = curves(
        table(
            ["fastv", "visionzip"], [f"benchmark {number}" for number in range(count)]
        )
    )
    for axes in figure.axes[:count]:
        assert size(axes) == pytest.approx(PANEL_SIZE, abs=0.06)
    assert is_whole(figure)


@given(st.sets(LABELS, max_size=8), st.sets(LABELS, max_size=8))
def test_a_method_looks_the_same_beside_any_others(some, others):
    for name, style in STYLES.items():
        assert (
            method_styles({name, *some})[name]
            == method_styles({name, *others})[name]
            == style
        )
    both = method_styles(some | others)
    assert len({*both.values()}) == len(both)


def test_a_variant_has_the_colour_of_its_method_and_is_hollow():
    styles = method_styles(["fastv", "fastv K=3", "fastv K=5"])
    assert {style.colour for style in styles.values()} == {STYLES["fastv"].colour}
    assert [style.hollow for style in styles.values()] == [False, True, True]
    assert len({style.marker for style in styles.values()}) == 3


def test_the_front_is_drawn_above_the_paper_and_rings_what_none_beats(tmp_path):
    for (method, tokens), right in {
        ("vanilla", None): 9,
        ("fastv", 8): 8,
        ("visionzip", 8): 6,
    }.items():
        put(
            tmp_path,
            method,
            tokens,
            "gqa",
            [sample(i, float(i < right)) for i in range(10)],
        )
    (shown,) = tables(str(tmp_path), statistics=True)
    figure = tradeoff(shown, [row.mean for row in shown.rows], "tokens", "percent")
    (front,) = [
        line for line in figure.axes[0].lines if line.get_label() == "Pareto front"
    ]
    assert [*front.get_xdata()] == [8.0, 16.0]  # FastV and vanilla; VisionZip is beaten
    assert front.get_linewidth() >= 2 and front.get_marker() == "o"
