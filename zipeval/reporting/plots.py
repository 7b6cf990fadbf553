"""Plots of a table, for a report and for papers: matplotlib figures, without a display. Imports no torch."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from zipeval.benchmarks import BENCHMARKS
from zipeval.config.schema import UPPER_BOUND
from zipeval.errors import UsageError
from zipeval.reporting import remarks
from zipeval.reporting.method_styles import INK, MethodStyle, method_styles
from zipeval.reporting.remarks import Remark
from zipeval.reporting.scored_samples import read_scored, seconds_per_sample
from zipeval.reporting.tables import Row, Table, TableCell

FRONT = "Pareto front"
TOKENS = "visual tokens entering the decoder's layers, mean"
LINE = "#c3c7cd"
# Inches of the axes, whatever labels and legends stand around them.
WIDTH, HEIGHT = 3.7, 2.1
# The same of one of several panels, and the number of panels in a row.
PANEL_SIZE, PANELS = (1.6, 1.7), 3
# Inches of a whole figure without a legend.
FIGURE = (4.4, 2.9)
# Inches that a size may differ by.
CLOSE = 0.01
# Rounds of a layout; two are enough where labels do not change.
FITTINGS = 6
HATCHES = ("", "////", "....", "xxxx")
PAPER = "#ffffff"
# The metadata that would differ from file to file.
UNDATED = {".pdf": "CreationDate", ".svg": "Date", ".png": "Software"}
# Letters that fit below, and on the left.
LEGEND_WIDTH, LABEL_WIDTH = 48, 36
# Letters below a panel.
PANEL_WIDTH = 28
# Letters of what marks mean, below a plot.
KEY_WIDTH = 60
# How the marks of remarks stand beside a point.
MARK = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7, "color": INK}
# The upper bound's level.
BOUND_LINE = {
    "color": INK,
    "linewidth": 0.6,
    "linestyle": (0, (4, 3)),
    "zorder": 1,
}
# The Pareto front: a band below the lines, and a ring around each method that no other
# one beats.
FRONT_LINE = {
    "where": "post",
    "color": INK,
    "alpha": 0.35,
    "linewidth": 2.5,
    "zorder": 1,
    "marker": "o",
    "markersize": 9,
    "markerfacecolor": "none",
    "markeredgewidth": 0.8,
}
ERROR_BARS = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5}
STYLE = {
    "font.size": 8,
    # matplotlib brings this font.
    "font.family": "DejaVu Sans",
    # Names are text, also where they hold a dollar sign.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # Letters stay letters.
    "pdf.fonttype": 42,
}

# A percentage, and how far its interval reaches below and above it.
Percent = tuple[float, tuple[float, float]]
# A point and its remarks: x, y, remarks.
MarkedPoint = tuple[float, float, tuple[Remark, ...]]


@dataclass(frozen=True)
class Plot:
    """Hold a figure.

    Attributes:
        name: name of its files.
        about: what it shows, in words.
        figure: the figure.
        column: the heading of the benchmark that it is of; None for all of them.
    """

    name: str
    about: str
    figure: Figure
    column: str | None = None

    def save(self, path: str | Path) -> None:
        """Write the figure as a PDF, SVG or PNG file, by the ending of its name.

        Raises:
            UsageError: for another ending.
        """
        path = Path(path)
        if path.suffix not in UNDATED:
            raise UsageError(
                f"{path}: a plot's file ends in one of {', '.join(UNDATED)}. Choose one of these."
            )
        try:
            save(self.figure, path)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written ({error.strerror}). Name a file elsewhere."
            ) from error

    def _repr_png_(self) -> bytes:
        """Return what a notebook shows."""
        image = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(image, format="png", dpi=144)
        return image.getvalue()


def plots(table: Table, seconds: list[float | None]) -> list[Plot]:
    """Return two trade-offs over all benchmarks, one for each of them, and bars for each; none that would be empty.

    Args:
        table: with statistics, for intervals.
        seconds: per sample, of every row.
    """
    percent = _percent_label(_overall_name(table))
    tokens = [row.mean for row in table.rows]
    time = "seconds per sample in this run, at its batch size\n(not a benchmark)"
    # Name, what it shows, figure, and column of each plot; the figure may be empty.
    candidates = [
        (
            "tokens",
            f"{_one_line(percent)}, against {TOKENS}",
            tradeoff(table, tokens, TOKENS, percent),
            None,
        ),
        (
            "time",
            f"{_one_line(percent)}, against {_one_line(time)}",
            tradeoff(table, seconds, time, percent),
            None,
        ),
        (
            "curves",
            f"Every benchmark's own metric, against {TOKENS}",
            curves(table),
            None,
        ),
    ]
    for number, column in enumerate(table.columns, 1):
        about = f"{_one_line(_percent_label(column))}, by budget"
        candidates.append(
            (f"bars-{number}-{column}", about, bars(table, column), column)
        )
    key = _key(table)
    drawn = []
    for name, about, figure, column in candidates:
        if figure is not None:
            about = f"{about}; {key}" if key else about
            drawn.append(Plot(name, about, figure, column))
    return drawn


def _overall_name(table: Table) -> str:
    """Return the name of the number that a table has over all its benchmarks."""
    if len(table.columns) == 1:
        return table.columns[0]
    return f"average of {len(table.columns)}"


def _key(table: Table) -> str:
    """Return what the marks in a table mean; nothing without any."""
    marked: list[Remark] = []
    for row in table.rows:
        for cell in row.cells.values():
            marked += cell.remarks
    return remarks.key(marked)


def table_plots(table: Table) -> list[Plot]:
    """Return the plots of a table that has statistics, with the seconds that its samples tell.

    Raises:
        UsageError: if samples changed since their record was written.
    """
    seconds = {}
    for row in table.rows:
        for cell in row.cells.values():
            record = cell.record
            samples = read_scored(record, positions=False)
            seconds[record["path"]] = seconds_per_sample(record, samples)
    return plots(table, seconds_of_rows(table, seconds))


def seconds_of_rows(
    table: Table, seconds: dict[str, float | None]
) -> list[float | None]:
    """Return for each row the mean of the benchmarks' seconds per sample.

    It is None where one is missing, since they do not take the same time.

    Args:
        seconds: per sample, by the paths of records.
    """
    means = []
    for row in table.rows:
        times = [seconds[cell.record["path"]] for cell in row.cells.values()]
        is_whole = len(times) == len(table.columns) and None not in times
        means.append(fmean(times) if is_whole else None)
    return means


def tradeoff(
    table: Table, values: list[float | None], x_label: str, y_label: str
) -> Figure | None:
    """Draw a line for each method over its budgets, 95% intervals, and the Pareto front behind.

    Returns:
        None without a method beside the upper bound.
    """
    # Points (x, percentage, its interval) by method.
    lines: dict[str, list[tuple]] = defaultdict(list)
    marked: list[MarkedPoint] = []
    for row, x in zip(table.rows, values, strict=True):
        overall = _overall(table, row)
        if x is not None and overall is not None:
            lines[row.label].append((x, *overall))
            marked.append((x, overall[0], _overall_remarks(table, row)))
    if len(lines) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        best = front([(x, percent) for x, percent, _ in marked])
        axes.step(*zip(*best, strict=True), label=FRONT, **FRONT_LINE)
        axes.axhline(100, **BOUND_LINE)
        for label, style in styles(table).items():
            if label in lines:
                x, y, intervals = zip(*lines[label], strict=True)
                errors = list(zip(*intervals, strict=True))
                axes.errorbar(
                    x, y, errors, label=_legend_text(label), **_line_options(style)
                )
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None))
        _mark(axes, marked)
        _grid(axes)
        _finish(figure, [axes], (WIDTH, HEIGHT))
    return figure


def _line_options(style: MethodStyle) -> dict:
    """Return how a method's line and its intervals are drawn."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": 4,
        "markerfacecolor": "none" if style.hollow else style.colour,
        "linestyle": "--" if style.hollow else "-",
        "linewidth": 1,
        "elinewidth": 0.8,
        "capsize": 1.5,
        "zorder": 2,
    }


def curves(table: Table) -> Figure | None:
    """Draw a panel for every benchmark, as Figure 4 of VisionZip.

    It shows the benchmark's metric over the visual tokens of its records, a line for each method, 95% intervals, and
    the upper bound's level.

    Returns:
        None without a method beside the upper bound.
    """
    if len(styles(table)) < 2 or all(row.mean is None for row in table.rows):
        return None
    columns = min(PANELS, len(table.columns))
    rows = math.ceil(len(table.columns) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure((FIGURE[0] * columns, FIGURE[1] * rows), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        shown, empty = np.split(cells, [len(table.columns)])
        for axes, column in zip(shown, table.columns, strict=True):
            _curve(axes, table, column)
        for axes in empty:
            axes.set_visible(False)
        size = PANEL_SIZE if columns > 1 else (WIDTH, HEIGHT)
        _finish(figure, shown, size, rows, columns)
    return figure


def _curve(axes, table: Table, column: str) -> None:
    """Draw a benchmark's panel."""
    bound = table.rows[0].cells[column]
    # Points (x, score, lower error, upper error) by method.
    lines: dict[str, list[tuple]] = defaultdict(list)
    marked: list[MarkedPoint] = []
    for row in table.rows:
        cell = row.cells.get(column)
        if cell is not None and None not in (row.mean, cell.score):
            errors = _score_errors(cell, bound.score)
            lines[row.label].append((row.mean, cell.score, *errors))
            marked.append((row.mean, cell.score, cell.remarks))
    for label, style in styles(table).items():
        # A method without a point here is drawn too: the legend is the first panel's.
        x, y, *errors = [(), (), (), ()]
        if label in lines:
            x, y, *errors = zip(*sorted(lines[label]), strict=True)
        axes.errorbar(x, y, errors, label=_legend_text(label), **_line_options(style))
    if bound.score is not None:
        axes.axhline(bound.score, **BOUND_LINE)
    metric = _metric_name(column)
    if not bound.higher_is_better:
        metric += "\n(lower is better)"
    axes.set(ylabel=metric, xlabel=fill(TOKENS, PANEL_WIDTH))
    _mark(axes, marked, PANEL_WIDTH)
    axes.set_title(fill(column, PANEL_WIDTH - 6), fontsize=8)
    axes.set_xlim(0, None)
    _grid(axes)


def _metric_name(column: str) -> str:
    """Return the metric of a benchmark and its scale, by the heading of its column."""
    for benchmark in BENCHMARKS.values():
        if benchmark.column == column:
            scale = f" x {benchmark.scale:g}" if benchmark.scale != 1 else ""
            return benchmark.metric + scale
    return "score"


def bars(table: Table, column: str) -> Figure | None:
    """Draw how far every method at every budget is from the upper bound, with 95% intervals; None without a method."""
    methods = styles(table)
    methods.pop(UPPER_BOUND, None)
    names = []
    # Bars (place of the budget, percentage, its interval, remarks) by method.
    by_method: dict[str, list[tuple]] = {label: [] for label in methods}
    for group in table.groups():
        place = len(names)
        group_bars = _group_bars(group, column, methods)
        for label, percent, interval, about in group_bars:
            by_method[label].append((place, percent, interval, about))
        if group_bars:
            names.append(budget(group[0]))
    if not names:
        return None
    width = 0.8 / len(methods)
    marked: list[MarkedPoint] = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        colours: list[str] = []
        for i, (label, style) in enumerate(methods.items()):
            # Bars have no markers, so that methods of one colour differ by their
            # hatches.
            hatch = HATCHES[colours.count(style.colour) % len(HATCHES)]
            colours.append(style.colour)
            offset = (i - (len(methods) - 1) / 2) * width
            x, heights, intervals = [], [], []
            for place, percent, interval, about in by_method[label]:
                x.append(place + offset)
                # A bar begins at 100%.
                heights.append(percent - 100)
                intervals.append(interval)
                marked.append((place + offset, percent, about))
            axes.bar(
                x,
                heights,
                width * 0.9,
                bottom=100,
                linewidth=0,
                color=style.colour,
                hatch=hatch,
                edgecolor=PAPER,
                label=_legend_text(label),
                yerr=list(zip(*intervals, strict=True)) or None,
                error_kw=ERROR_BARS,
            )
        axes.axhline(100, color=INK, linewidth=0.8)
        axes.set(ylabel=_percent_label(column), xticks=range(len(names)))
        axes.set_xticklabels(names)
        axes.margins(y=0.08)
        _mark(axes, marked)
        _grid(axes)
        _finish(figure, [axes], (WIDTH, HEIGHT))
    return figure


def _group_bars(
    group: list[Row], column: str, methods: dict[str, MethodStyle]
) -> list[tuple]:
    """Return the bars (label, percentage, its interval, remarks) of one budget."""
    group_bars = []
    for row in group:
        cell = row.cells.get(column)
        percent = _percent(cell)
        if percent is not None and row.label in methods:
            group_bars.append((row.label, *percent, cell.remarks))
    return group_bars


def budget(row: Row) -> str:
    """Return what a row's group is called."""
    if row.tokens is None:
        return "all tokens" if row.label == UPPER_BOUND else "no budget"
    return f"{row.tokens} tokens"


def styles(table: Table) -> dict[str, MethodStyle]:
    """Return the style of every method of a table, the upper bound's first."""
    labels = method_styles({row.label for row in table.rows} | {UPPER_BOUND})
    return {UPPER_BOUND: labels.pop(UPPER_BOUND)} | dict(sorted(labels.items()))


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, gain) that none beats: none is as cheap and gains more, or cheaper and gains as much."""
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def write(drawn: list[Plot], directory: Path, prefix: str) -> list[Path]:
    """Write PDF and SVG files `PREFIX-NAME`, the same bytes for the same records, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in drawn:
        stem = re.sub(r"[^\w.-]+", "_", f"{prefix}-{plot.name}")
        for form in ("pdf", "svg"):
            paths.append(directory / f"{stem}.{form}")
            save(plot.figure, paths[-1])
    return paths


def save(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same one; a PNG file has a white background, as few viewers would give it one.

    Args:
        path: its suffix is one of UNDATED.
    """
    undated = {UNDATED[path.suffix]: None}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        figure.savefig(
            path, transparent=path.suffix != ".png", metadata=undated, dpi=200
        )


def inline(plot: Plot, prefix: str, colours: dict[str, str]) -> str:
    """Return SVG to stand within HTML: without namespaces, global styles and metadata.

    Args:
        plot: the plot.
        prefix: beginning of its ids, which makes them unique in the page.
        colours: replacements of some of its colours, such as INK -> a variable of the page's style sheet.
    """
    text = io.StringIO()
    text_as_text = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": prefix}
    with matplotlib.rc_context(text_as_text):
        plot.figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None}
        )
    root = ElementTree.fromstring(text.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    replacements = {key.lower(): value for key, value in colours.items()}
    for element in root.iter():
        # Tags and attributes are written `{namespace}name`.
        element.tag = element.tag.partition("}")[2]
        attributes = {}
        for name, value in element.attrib.items():
            attributes[name.rpartition("}")[2]] = _local(value, prefix)
        if "id" in attributes:
            attributes["id"] = f"{prefix}-{attributes['id']}"
        if "style" in attributes:
            attributes["style"] = _recoloured(attributes["style"], replacements)
        element.attrib = attributes
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.attrib |= {"role": "img", "aria-label": plot.about}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _recoloured(style: str, replacements: dict[str, str]) -> str:
    """Return a style with some of its colours replaced."""

    def replacement(match: re.Match) -> str:
        return replacements.get(match[0], match[0])

    return re.sub(r"#[0-9a-f]{6}", replacement, style)


def _local(value: str, prefix: str) -> str:
    """Return the value of an attribute, with a reference to an id below the prefix."""
    return re.sub(r"^#|(?<=^url\()#", f"#{prefix}-", value)


def _figure():
    """Return a figure with one pair of axes."""
    figure = Figure(FIGURE, layout="constrained")
    return figure, figure.add_subplot()


def _finish(
    figure: Figure, panels, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> None:
    """Add a legend, and give the axes their size in inches."""
    _fit(figure, panels, size, rows, columns)
    _legend(figure, panels[0])  # fits the width that the figure has now
    _fit(figure, panels, size, rows, columns)


def _fit(
    figure: Figure, panels, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> None:
    """Make a figure so large that its axes have a size in inches, with everything around them inside of the figure."""
    for _ in range(FITTINGS):
        figure.draw_without_rendering()  # where the layout puts the axes
        boxes = [panel.get_window_extent() for panel in panels]
        width = min(box.width for box in boxes) / figure.dpi
        height = min(box.height for box in boxes) / figure.dpi
        whole = figure.get_size_inches()
        missing = columns * (size[0] - width), rows * (size[1] - height)
        if max(map(abs, missing)) < CLOSE:
            return
        figure.set_size_inches(whole[0] + missing[0], whole[1] + missing[1])


def _mark(axes, points: list[MarkedPoint], width: int = KEY_WIDTH) -> None:
    """Write the marks of remarks beside their points, and what they mean below the axis."""
    shown: list[Remark] = []
    for x, y, about in points:
        shown += about
        if about:
            axes.annotate(remarks.marks(about), (x, y), **MARK)
    if shown:
        key = fill(remarks.key(shown), width)
        axes.set_xlabel("\n".join(filter(None, [axes.get_xlabel(), key])))


def _grid(axes) -> None:
    axes.grid(axis="y", color=LINE, linewidth=0.4)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes) -> None:
    """Add a legend below the axes, with as many entries in a row as fit."""
    handles, labels = axes.get_legend_handles_labels()
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, handlelength=1.6
        )
        # Its size is known before the figure is drawn.
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _legend_text(label: str) -> str:
    """Return a label in lines that fit."""
    return fill(label, LEGEND_WIDTH)


def _percent_label(name: str) -> str:
    return f"% of the upper bound:\n{fill(name, LABEL_WIDTH)}"


def _one_line(label: str) -> str:
    return " ".join(label.split())


def _overall(table: Table, row: Row) -> Percent | None:
    """Return a row's percentage over all benchmarks."""
    if len(table.columns) == 1:
        return _percent(row.cells.get(table.columns[0]))
    return _percent(TableCell(None, row.average, comparison=row.average_comparison))


def _overall_remarks(table: Table, row: Row) -> tuple[Remark, ...]:
    """Return the remarks on a row's percentage over all benchmarks."""
    if len(table.columns) == 1:
        return row.cells[table.columns[0]].remarks
    return row.remarks


def _score_errors(cell: TableCell, bound: float | None) -> tuple[float, float]:
    """Return how far a score's interval reaches below and above it; 0 where it has none."""
    percent = _percent(cell)
    if not percent or not bound or percent[1] == (0.0, 0.0):
        return 0.0, 0.0
    value, (below, above) = percent
    if cell.higher_is_better:
        return below * bound / 100, above * bound / 100
    # The percentage is the bound's share of the score: its lower end is the score's upper one.
    highest = 100 * bound / (value - below) if value > below else cell.score
    return cell.score - 100 * bound / (value + above), highest - cell.score


def _percent(cell: TableCell | None) -> Percent | None:
    """Return a percentage with the reach of its interval; None where there is none."""
    if cell is None or cell.percent is None or math.isnan(cell.percent):
        return None
    comparison = cell.comparison
    if comparison is None or math.isnan(comparison.low):
        return cell.percent, (0.0, 0.0)
    below = max(0.0, cell.percent - comparison.low)
    above = max(0.0, comparison.high - cell.percent)
    return cell.percent, (below, above)
