"""Plots of a table, for a report and for papers: matplotlib figures, without a display. Imports no torch."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from textwrap import fill
from xml.etree import ElementTree

import matplotlib
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
# Inches of the axes, whatever labels and legends stand around them; of one of several panels, and panels in a row.
WIDTH, HEIGHT = 3.7, 2.1
PANEL_SIZE, PANELS = (1.6, 1.7), 3
FIGURE = (4.4, 2.9)  # inches of a whole figure without a legend
CLOSE = 0.01  # inches that a size may differ by
FITTINGS = 6  # of a layout; two are enough where labels do not change
HATCHES = ("", "////", "....", "xxxx")
PAPER = "#ffffff"
UNDATED = {
    ".pdf": "CreationDate",
    ".svg": "Date",
    ".png": "Software",
}  # what would differ from file to file
LEGEND_WIDTH, LABEL_WIDTH = 48, 36  # letters that fit below, and on the left
PANEL_WIDTH = 28  # letters below a panel
KEY_WIDTH = 60  # letters of what marks mean, below a plot
MARK = {
    "xytext": (3, 3),
    "textcoords": "offset points",
    "fontsize": 7,
    "color": INK,
}  # beside a point
STYLE = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # matplotlib brings it
    "text.parse_math": False,  # names are text, also where they hold a dollar sign
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
            "axes.edgecolor",
        ),
        INK,
    ),
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters
}


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: of its files.
        about: what it shows, in words.
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
    """Two trade-offs over all benchmarks, one for each of them, and bars for each; none that would be empty.

    Args:
        table: with statistics, for intervals.
        seconds: per sample, of every row.
    """
    of = (
        table.columns[0]
        if len(table.columns) == 1
        else f"average of {len(table.columns)}"
    )
    percent = _percent_label(of)
    tokens = [row.mean for row in table.rows]
    drawn = [
        ("tokens", tokens, TOKENS),
        (
            "time",
            seconds,
            "seconds per sample in this run, at its batch size\n(not a benchmark)",
        ),
    ]
    found = [
        Plot(name, f"{_line(percent)}, against {_line(label)}", figure)
        for name, values, label in drawn
        if (figure := tradeoff(table, values, label, percent))
    ]
    if figure := curves(table):
        found.append(
            Plot("curves", f"Every benchmark's own metric, against {TOKENS}", figure)
        )
    for number, column in enumerate(table.columns, 1):
        if figure := bars(table, column):
            found.append(
                Plot(
                    f"bars-{number}-{column}",
                    f"{_line(_percent_label(column))}, by budget",
                    figure,
                    column,
                )
            )
    key = remarks.key(
        r for row in table.rows for cell in row.cells.values() for r in cell.remarks
    )
    return (
        [replace(plot, about=f"{plot.about}; {key}") for plot in found]
        if key
        else found
    )


def table_plots(table: Table) -> list[Plot]:
    """Return the plots of a table that has statistics, with the seconds that its samples tell.

    Raises:
        UsageError: if samples changed since their record was written.
    """
    seconds = {}
    for row in table.rows:
        for cell in row.cells.values():
            seconds[cell.record["path"]] = seconds_per_sample(
                cell.record, read_scored(cell.record, positions=False)
            )
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
        of_row = [seconds[cell.record["path"]] for cell in row.cells.values()]
        is_whole = len(of_row) == len(table.columns) and None not in of_row
        means.append(fmean(of_row) if is_whole else None)
    return means


def tradeoff(
    table: Table, values: list[float | None], x_label: str, y_label: str
) -> Figure | None:
    """A line for each method over its budgets, 95% intervals, and the Pareto front behind; None without a method."""
    points, noted = [], []
    for row, x in zip(table.rows, values, strict=True):
        overall = None if x is None else _overall(table, row)
        if overall:
            points.append((row.label, x, *overall))
            noted.append((x, overall[0], _remarks(table, row)))
    if len({label for label, *_ in points}) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        best = front([(x, percent) for _, x, percent, _ in points])
        # A band below the lines, and a ring around each method that no other one beats.
        ring = {
            "marker": "o",
            "markersize": 9,
            "markerfacecolor": "none",
            "markeredgewidth": 0.8,
        }
        axes.step(
            *zip(*best, strict=True),
            where="post",
            color=INK,
            alpha=0.35,
            linewidth=2.5,
            label=FRONT,
            zorder=1,
            **ring,
        )
        axes.axhline(100, color=INK, linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
        for label, style in styles(table).items():
            of_label = [point[1:] for point in points if point[0] == label]
            if not of_label:
                continue
            x, y, interval = zip(*of_label, strict=True)
            errors = list(zip(*interval, strict=True))
            axes.errorbar(
                x, y, errors, label=_legend_text(label), **_line_options(style)
            )
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None))
        _mark(axes, noted)
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
    """A panel for every benchmark (Figure 4 of VisionZip): its metric over the visual tokens of its records, a line for
    each method, 95% intervals, and the upper bound's level; None without a method.
    """
    if len(styles(table)) < 2 or all(row.mean is None for row in table.rows):
        return None
    columns = min(PANELS, len(table.columns))
    rows = math.ceil(len(table.columns) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure((FIGURE[0] * columns, FIGURE[1] * rows), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, column in zip(cells, table.columns, strict=False):
            _curve(axes, table, column)
        for axes in cells[len(table.columns) :]:
            axes.set_visible(False)
        shown = cells[: len(table.columns)]
        size = PANEL_SIZE if columns > 1 else (WIDTH, HEIGHT)
        _finish(figure, shown, size, rows, columns)
    return figure


def _curve(axes, table: Table, column: str) -> None:
    """A benchmark's panel."""
    bound = table.rows[0].cells[column].score
    noted = []
    for label, style in styles(table).items():
        points = []
        for row in table.rows:
            cell = row.cells.get(column)
            if row.label == label and None not in (row.mean, cell and cell.score):
                points.append((row.mean, cell.score, *_score_errors(cell, bound)))
                noted.append((row.mean, cell.score, cell.remarks))
        # Also without a point: the legend is the first panel's.
        x, y, *errors = (
            zip(*sorted(points), strict=True) if points else ((), (), (), ())
        )
        axes.errorbar(x, y, errors, label=_legend_text(label), **_line_options(style))
    if bound is not None:
        axes.axhline(bound, color=INK, linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
    known = next((its for its in BENCHMARKS.values() if its.column == column), None)
    scale = f" x {known.scale:g}" if known and known.scale != 1 else ""
    direction = (
        "" if table.rows[0].cells[column].higher_is_better else "\n(lower is better)"
    )
    axes.set(
        ylabel=(known.metric if known else "score") + scale + direction,
        xlabel=fill(TOKENS, PANEL_WIDTH),
    )
    _mark(axes, noted, PANEL_WIDTH)
    axes.set_title(fill(column, PANEL_WIDTH - 6), fontsize=8)
    axes.set_xlim(0, None)
    _grid(axes)


def bars(table: Table, column: str) -> Figure | None:
    """Draw how far every method at every budget is from the upper bound, with 95% intervals; None without a method."""
    style = {
        label: kind for label, kind in styles(table).items() if label != UPPER_BOUND
    }
    groups = [
        {
            row.label: value
            for row in group
            if row.label in style and (value := _percent(row.cells.get(column)))
        }
        for group in table.groups()
    ]
    about = [
        {row.label: row.cells[column].remarks for row in g if column in row.cells}
        for g in table.groups()
    ]
    about = [of_group for of_group, group in zip(about, groups, strict=True) if group]
    noted = []
    names = [budget(group[0]) for group in table.groups()]
    shown = [(name, group) for name, group in zip(names, groups, strict=True) if group]
    if not shown:
        return None
    width = 0.8 / len(style)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        colours: list[str] = []
        for i, (label, kind) in enumerate(style.items()):
            has = [place for place, (_, group) in enumerate(shown) if label in group]
            values = [shown[place][1][label] for place in has]
            x = [place + (i - (len(style) - 1) / 2) * width for place in has]
            noted += [
                (at, value[0], about[place][label])
                for at, value, place in zip(x, values, has, strict=True)
            ]
            heights, errors = (
                [percent - 100 for percent, _ in values],
                list(zip(*(e for _, e in values), strict=True)),
            )
            error = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5}
            # Bars have no markers, so that methods of one colour differ by what fills them.
            look = {
                "color": kind.colour,
                "hatch": HATCHES[colours.count(kind.colour) % len(HATCHES)],
                "edgecolor": PAPER,
            }
            colours.append(kind.colour)
            named = {
                "label": _legend_text(label),
                "yerr": errors or None,
                "error_kw": error,
            }
            axes.bar(x, heights, width * 0.9, 100, linewidth=0, **look, **named)
        axes.axhline(100, color=INK, linewidth=0.8)
        axes.set(ylabel=_percent_label(column), xticks=range(len(shown)))
        axes.set_xticklabels([name for name, _ in shown])
        axes.margins(y=0.08)
        _mark(axes, noted)
        _grid(axes)
        _finish(figure, [axes], (WIDTH, HEIGHT))
    return figure


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


def write(found: list[Plot], directory: Path, prefix: str) -> list[Path]:
    """PDF and SVG files `PREFIX-NAME`, the same bytes for the same records."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in found:
        stem = re.sub(r"[^\w.-]+", "_", f"{prefix}-{plot.name}")
        for form in ("pdf", "svg"):
            paths.append(directory / f"{stem}.{form}")
            save(plot.figure, paths[-1])
    return paths


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure; a PNG file has a white background, as few viewers would give it one.

    Args:
        path: its suffix is one of UNDATED.
    """
    undated = {UNDATED[path.suffix]: None}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        figure.savefig(
            path, transparent=path.suffix != ".png", metadata=undated, dpi=200
        )


def inline(plot: Plot, prefix: str, colours: dict[str, str]) -> str:
    """SVG to stand within HTML: without namespaces, global styles and metadata, its ids made unique by `prefix`.

    Args:
        colours: what replaces some of its colours, such as INK -> a variable of the page's style sheet.
    """
    text = io.StringIO()
    with matplotlib.rc_context(
        {**STYLE, "svg.fonttype": "none", "svg.hashsalt": prefix}
    ):
        plot.figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None}
        )
    root = ElementTree.fromstring(text.getvalue())
    replaced = {key.lower(): value for key, value in colours.items()}
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        element.attrib = {
            k.rpartition("}")[2]: _local(v, prefix) for k, v in element.attrib.items()
        }
        if "id" in element.attrib:
            element.attrib["id"] = f"{prefix}-{element.attrib['id']}"
        if "style" in element.attrib:
            element.attrib["style"] = re.sub(
                r"#[0-9a-f]{6}",
                lambda found: replaced.get(found[0], found[0]),
                element.attrib["style"],
            )
    del root.attrib["width"], root.attrib["height"], root.attrib["version"]
    root.attrib |= {"role": "img", "aria-label": plot.about}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _local(value: str, prefix: str) -> str:
    """An attribute that refers to an id does so below the prefix."""
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


def _mark(
    axes, points: list[tuple[float, float, tuple[Remark, ...]]], width: int = KEY_WIDTH
) -> None:
    """Write the marks of remarks beside points (x, y, remarks), and what they mean below the axis."""
    for x, y, about in points:
        if about:
            axes.annotate(remarks.marks(about), (x, y), **MARK)
    key = remarks.key(remark for *_, about in points for remark in about)
    if key:
        axes.set_xlabel(
            "\n".join(line for line in (axes.get_xlabel(), fill(key, width)) if line)
        )


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


def _percent_label(of: str) -> str:
    return f"% of the upper bound:\n{fill(of, LABEL_WIDTH)}"


def _line(label: str) -> str:
    return " ".join(label.split())


def _overall(table: Table, row: Row) -> tuple[float, tuple[float, float]] | None:
    if len(table.columns) == 1:
        return _percent(row.cells.get(table.columns[0]))
    return _percent(TableCell(None, row.average, comparison=row.average_comparison))


def _remarks(table: Table, row: Row) -> tuple[Remark, ...]:
    """Return what has to be said of a row's percentage over all benchmarks."""
    return (
        row.cells[table.columns[0]].remarks if len(table.columns) == 1 else row.remarks
    )


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


def _percent(cell: TableCell | None) -> tuple[float, tuple[float, float]] | None:
    """A percentage and how far its interval reaches below and above; None where there is none."""
    if cell is None or cell.percent is None or math.isnan(cell.percent):
        return None
    found = cell.comparison
    if found is None or math.isnan(found.low):
        return cell.percent, (0.0, 0.0)
    return cell.percent, (
        max(0.0, cell.percent - found.low),
        max(0.0, found.high - cell.percent),
    )
