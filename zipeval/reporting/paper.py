"""The tables of the VisionZip paper: what it printed, and our measurements in their layout."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import zipeval.published
from zipeval.config.schema import UPPER_BOUND
from zipeval.errors import UsageError, did_you_mean
from zipeval.reporting.columns import choose, with_columns
from zipeval.reporting.tables import (
    DIFFERENCE,
    PUBLISHED,
    Row,
    Table,
    TableCell,
    headings,
    key,
    tables,
)
from zipeval.results import speed_records

SOURCE = Path(zipeval.published.__path__[0])
CITATION = "VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467)"
# Our models that the paper measured.
MODELS = {"table1": "llava15", "table2": "llava_next", "table3": "video_llava"}
SPEED = {"table4": "llava_next"}
# The rows of Table 5 as our methods, the first of which percentages are of.
EXPERIMENTS = {
    "sparsevlm_all_tokens": "sparsevlm",
    "ex1_without_top50_encoder_tokens": "sparsevlm_without_top",
    "ex2_only_visionzip_top128": "sparsevlm_on_visionzip",
}
# Labels of these methods with the paper's settings: with any other they are variants.
AS_PUBLISHED = {
    "sparsevlm": "sparsevlm",
    "sparsevlm_without_top": "sparsevlm_without_top first=without_top:526 second=sparsevlm:{} of=576",
    "sparsevlm_on_visionzip": "sparsevlm_on_visionzip first=visionzip:128 second=sparsevlm:{} of=576",
}
TABLES = (*MODELS, *SPEED, "table5")
RESULTS = "results/runs"
SPEED_COLUMNS = [
    "prefill_ms",
    "prefill_speedup",
    "answer_ms",
    "answer_speedup",
    "total_time_s",
    "total_speedup",
]
OURS = (
    "prefill_ms: ours is the time to the first token, vision encoder included; answer_ms: of {} tokens, after one "
    "prompt; total_time_s: published only, of a whole benchmark. Speed-ups are within one device."
)
# Points of a percentage: printed ones have one decimal, of scores that were rounded
# before.
ROUNDING = 0.1


def published(name: str) -> Table:
    """Return a table as its raw numbers imply it. Notes name what was printed and does not follow from them.

    Args:
        name: `table1` to `table5`.

    Raises:
        UsageError: if there is none of this name.
    """
    if name not in TABLES:
        raise UsageError(
            f"table=paper/{name}: no such table.{did_you_mean(name, TABLES)}"
        )
    if name == "table4":
        return _efficiency()
    return _misalignment() if name == "table5" else _scores(name)


def measured(
    name: str,
    results: str | None = None,
    statistics: bool = False,
    columns: Sequence[str] = (),
) -> list[Table]:
    """Return records in a table's layout, with the published rows and, of scores, the differences from them.

    Args:
        name: `table1` to `table5`.
        results: directory of the records; None: where they are written by default.
        columns: names of the benchmarks that are shown; none: all.

    Raises:
        UsageError: without records of the table's model, or of Table 5 of its experiments; for an unknown column.
    """
    printed = published(name)
    if name in SPEED:
        built = _speeds(printed, SPEED[name], results or speed_records.RESULTS)
        if not columns:
            return built
        return with_columns(built, choose(columns, built[0].columns))
    results = results or RESULTS
    if name in MODELS:
        chosen = choose(columns, printed.columns) or printed.columns
        built = tables(
            results, model=MODELS[name], columns=chosen, statistics=statistics
        )
        return with_columns([_beside(table, printed) for table in built], chosen)
    if not columns:
        return _experiments(printed, results, statistics, None)
    # These experiments may be on other benchmarks than the paper's.
    chosen = choose(columns, [*headings(results), *printed.columns])
    built = _experiments(printed, results, statistics, chosen)
    return with_columns(built, chosen)


def _published_rows(printed: Table) -> list[Row]:
    """Return the rows of the paper, labelled as such."""
    return [replace(row, label=f"{row.label} (published)") for row in printed.rows]


def _speeds(printed: Table, model: str, results: str) -> list[Table]:
    """Return a table for every record of `zipeval bench` and batch size.

    It has no differences from the paper: the devices are not the same.
    """
    measurements = []
    for path in sorted(Path(results).expanduser().glob("*.json")):
        record = speed_records.read(path)
        if record["model"]["name"] == model:
            measurements.append(record)
    if not measurements:
        raise UsageError(
            f"results={results}: no measurements of model={model}. Make them with `zipeval bench model={model} "
            "init=random method=visionzip,fastv,sparsevlm tokens=160`; results=DIR looks elsewhere."
        )
    built = []
    for record in measurements:
        for batch in record["settings"]["batch"]:
            built.append(_speed_table(printed, record, batch))
    return built


def _speed_table(printed: Table, record: dict, batch: int) -> Table:
    """Return the rows of a record of `zipeval bench` at a batch size, above the published ones."""
    rows, notes = [], []
    for row in record["rows"]:
        if row["batch"] != batch:
            continue
        if row["rounds"]:
            rows.append(_speed_row(record, row))
        if "failed" in row:
            notes.append(f"{key(row)[0]}: {row['failed']}.")
    notes += [OURS.format(record["settings"]["new_tokens"]), f"{printed.about}."]
    about = f"{speed_records.about(record)}, batch {batch}"
    return Table(about, SPEED_COLUMNS, rows + _published_rows(printed), notes)


def _speed_row(record: dict, row: dict) -> Row:
    """Return the times of a method, and its speed-ups over vanilla."""
    label, tokens = key(row)
    cells = {}
    times = {"prefill": speed_records.first, "answer": speed_records.total}
    for name, time in times.items():
        milliseconds = median(map(time, row["rounds"]))
        speed_up = speed_records.speed_up(record, row, time)
        cells[f"{name}_ms"] = TableCell(milliseconds, None, record)
        cells[f"{name}_speedup"] = TableCell(speed_up, None, record)
    bound = speed_records.vanilla_of(record, row)
    share = None
    if "flops" in bound:
        share = row["flops"]["decoder"] / bound["flops"]["decoder"]
    visual_tokens = row["visual_tokens"]
    mean, final = visual_tokens["mean"], visual_tokens["final"]
    return Row(label, tokens, cells, mean=mean, final=final, flops=share)


def _beside(table: Table, printed: Table) -> Table:
    """Return a table with the published rows below, and the differences below those."""
    rows = list(table.rows)
    # The average of other benchmarks must not be compared with the printed one.
    if table.columns != printed.columns:
        rows = [replace(row, average=None, average_comparison=None) for row in rows]
    counterparts = {(row.label, row.tokens): row for row in printed.rows}
    counterparts[UPPER_BOUND, None] = printed.rows[0]
    differences = []
    for row in rows:
        counterpart = counterparts.get((row.label, row.tokens))
        if counterpart is not None:
            differences.append(_difference(row, counterpart))
    return replace(
        table,
        columns=printed.columns,
        rows=rows + _published_rows(printed) + differences,
        notes=[*table.notes, f"Published: {CITATION}."],
    )


def _experiments(
    printed: Table, results: str, statistics: bool, columns: list[str] | None
) -> list[Table]:
    """Return a table for every model and budget of the experiments, on all their benchmarks.

    What is compared with the paper is a change, which other benchmarks have too.
    """
    methods = [*EXPERIMENTS.values()]
    measured_tables = tables(
        results, columns=columns, statistics=statistics, methods=methods
    )
    built = []
    for table in measured_tables:
        used = {_config(row)["method"]["name"] for row in table.rows}
        # Where SparseVLM is alone, nobody experimented.
        if len(used) > 1:
            built.append(_experiment_table(table, printed))
    if not built:
        raise UsageError(
            f"results={results}: no experiments. `zipeval run -m +experiment=misalignment` makes them."
        )
    return built


def _config(row: Row) -> dict:
    """Return the configuration of the first record of a row."""
    first = next(iter(row.cells.values()))
    return first.record["config"]


def _experiment_table(table: Table, printed: Table) -> Table:
    """Return our experiments with the published ones below, and the differences where the settings are the paper's."""
    counterparts, published_rows = {}, []
    for row in printed.rows:
        method = EXPERIMENTS[row.label]
        counterparts[method, row.tokens] = row
        published_rows.append(replace(row, label=f"{method} (published)"))
    differences = []
    for row in table.rows:
        config = _config(row)
        method = config["method"]["name"]
        counterpart = counterparts.get((method, row.tokens))
        published_label = AS_PUBLISHED[method].format(row.tokens)
        same_setting = (config["model"]["name"], row.label) == (
            MODELS["table1"],
            published_label,
        )
        same_benchmark = row.cells.keys() & printed.columns
        if counterpart and same_setting and same_benchmark:
            differences.append(_difference(row, counterpart))
    return replace(
        table,
        columns=list(dict.fromkeys(table.columns + printed.columns)),
        rows=table.rows + published_rows + differences,
        notes=[*table.notes, f"{printed.about}."],
    )


def _difference(ours: Row, theirs: Row) -> Row:
    """Return our numbers minus the published ones, for the benchmarks that both have."""
    cells = {}
    for name, cell in ours.cells.items():
        if name in theirs.cells:
            other = theirs.cells[name]
            score = _minus(cell.score, other.score)
            percent = _minus(cell.percent, other.percent)
            cells[name] = TableCell(score, percent, remarks=cell.remarks)
    return Row(
        f"{ours.label}: difference",
        ours.tokens,
        cells,
        average=_minus(ours.average, theirs.average),
        kind=DIFFERENCE,
    )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if None in (a, b) else a - b


def _scores(name: str) -> Table:
    """Return Tables 1 to 3: scores, their percentages, and the averages of those."""
    lines = _lines(name, "scores.csv")
    bound = {}
    cells_by_row: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for line in lines:
        benchmark = line["benchmark"]
        if line["method"] == UPPER_BOUND:
            bound[benchmark] = float(line["score"])
        cells_by_row[line["method"], line["visual_tokens"]][benchmark] = line
    rows, notes = [], []
    for printed in _lines(name, "averages.csv"):
        method, tokens = printed["method"], printed["visual_tokens"]
        label = f"{method} {int(tokens)}"
        cells = {}
        for column, line in cells_by_row[method, tokens].items():
            score = float(line["score"])
            percent = 100 * score / bound[column]
            cells[column] = TableCell(score, percent)
            sentence = f"{score:g} is {{:.1f}}% of {bound[column]:g}"
            notes += _disagreement(
                f"{label} {column}", sentence, percent, line["percent_of_upper_bound"]
            )
        average = fmean(cell.percent for cell in cells.values())
        notes += _disagreement(
            f"{label} average", "it is {:.1f}%", average, printed["average_percent"]
        )
        rows.append(Row(method, int(tokens), cells, average=average, kind=PUBLISHED))
    return Table(_about(name, lines), list(bound), rows, notes)


def _efficiency() -> Table:
    """Return Table 4. Of a speed-up the paper prints one decimal."""
    lines = _lines("table4", "efficiency.csv")
    times = {"total_time_s": "total_speedup", "prefill_ms": "prefill_speedup"}
    rows, notes = [], []
    for line in lines:
        tokens = line["visual_tokens"]
        label = f"{line['method']} {tokens}"
        numbers = {time: float(line[time]) for time in times}
        for time, speedup in times.items():
            numbers[speedup] = float(lines[0][time]) / numbers[time]
            notes += _disagreement(
                f"{label} {speedup}",
                "it is {:.1f}",
                numbers[speedup],
                line[speedup],
                unit="",
            )
        cells = {name: TableCell(number, None) for name, number in numbers.items()}
        rows.append(Row(line["method"], int(tokens), cells, kind=PUBLISHED))
    about = f"{_about('table4', lines)}, {lines[0]['benchmark']}, {lines[0]['gpu']}"
    return Table(about, [*times, *times.values()], rows, notes)


def _misalignment() -> Table:
    """Return Table 5: percentages are of SparseVLM on all tokens."""
    lines = _lines("table5", "misalignment.csv")
    first = lines[0]
    column, bound = first["benchmark"], float(first["score"])
    rows, notes = [], []
    for line in lines:
        experiment, score = line["experiment"], float(line["score"])
        percent = 100 * score / bound
        cells = {column: TableCell(score, percent)}
        rows.append(Row(experiment, int(line["visual_tokens"]), cells, kind=PUBLISHED))
        if line["change_percent"]:
            sentence = "the change is {:.1f}%"
            notes += _disagreement(
                experiment, sentence, percent - 100, line["change_percent"]
            )
    about = _about("table5", lines)
    return Table(about, [column], rows, notes, bound=first["experiment"])


def _lines(table: str, file: str) -> list[dict[str, str]]:
    """Return the lines of a table in a file of published numbers."""
    with (SOURCE / file).open(encoding="utf-8", newline="") as stream:
        return [line for line in csv.DictReader(stream) if line["table"] == table]


def _about(name: str, lines: list[dict[str, str]]) -> str:
    return f"{lines[0]['model']}, published: {CITATION}, Table {name[-1]}"


def _disagreement(
    place: str, sentence: str, value: float, printed: str, unit: str = "%"
) -> Iterator[str]:
    """Yield a note if a printed number does not follow from the raw ones."""
    if abs(value - float(printed)) > ROUNDING:
        yield f"{place}: {sentence.format(value)}, printed {printed}{unit}."
