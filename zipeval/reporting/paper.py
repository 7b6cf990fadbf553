"""The tables of the VisionZip paper: what it printed, and our measurements in their layout."""

from __future__ import annotations

import csv
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
MODELS = {
    "table1": "llava15",
    "table2": "llava_next",
    "table3": "video_llava",
}  # ours that the paper measured
SPEED = {"table4": "llava_next"}
EXPERIMENTS = {  # of Table 5: our methods, the first of which percentages are of
    "sparsevlm_all_tokens": "sparsevlm",
    "ex1_without_top50_encoder_tokens": "sparsevlm_without_top",
    "ex2_only_visionzip_top128": "sparsevlm_on_visionzip",
}
# What the rows of these methods say of themselves as the paper's: with any other setting they are variants.
AS_PUBLISHED = {
    "sparsevlm": "sparsevlm",
    "sparsevlm_without_top": "sparsevlm_without_top first=without_top:526 second=sparsevlm:{} of=576",
    "sparsevlm_on_visionzip": "sparsevlm_on_visionzip first=visionzip:128 second=sparsevlm:{} of=576",
}
TABLES = (*MODELS, *SPEED, "table5")
RESULTS = "results/runs"
OURS = (
    "prefill_ms: ours is the time to the first token, vision encoder included; answer_ms: of {} tokens, after one "
    "prompt; total_time_s: published only, of a whole benchmark. Speed-ups are within one device."
)
ROUNDING = 0.1  # points of a percentage: printed ones have one decimal, of scores that were rounded before


def published(name: str) -> Table:
    """A table as its raw numbers imply it. Notes name what was printed and does not follow from them.

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
    """Records in a table's layout, with the published rows and, of scores, the differences from them.

    Args:
        results: their directory; None: where they are written by default.
        columns: names of the benchmarks that are shown; none: all.

    Raises:
        UsageError: without records of the table's model, or of Table 5 of its experiments; for an unknown column.
    """
    printed = published(name)
    if name in SPEED:
        made = _speeds(printed, SPEED[name], results or speed_records.RESULTS)
        return with_columns(made, choose(columns, made[0].columns)) if columns else made
    results = results or RESULTS
    if name in MODELS:
        chosen = choose(columns, printed.columns) or printed.columns
        found = tables(
            results, model=MODELS[name], columns=chosen, statistics=statistics
        )
        return with_columns([_beside(table, printed) for table in found], chosen)
    # These experiments may be on other benchmarks than the paper's.
    chosen = (
        choose(columns, [*headings(results), *printed.columns]) if columns else None
    )
    made = _experiments(printed, results, statistics, chosen)
    return with_columns(made, chosen) if chosen else made


def _speeds(printed: Table, model: str, results: str) -> list[Table]:
    """One for every record of `zipeval bench` and batch size, without differences: the devices are not the same."""
    paths = sorted(Path(results).expanduser().glob("*.json"))
    found = [
        record
        for path in paths
        if (record := speed_records.read(path))["model"]["name"] == model
    ]
    if not found:
        raise UsageError(
            f"results={results}: no measurements of model={model}. Make them with `zipeval bench model={model} "
            "init=random method=visionzip,fastv,sparsevlm tokens=160`; results=DIR looks elsewhere."
        )
    theirs = [replace(row, label=f"{row.label} (published)") for row in printed.rows]
    made = []
    for record in found:
        for batch in record["settings"]["batch"]:
            rows = [row for row in record["rows"] if row["batch"] == batch]
            notes = [
                f"{key(row)[0]}: {row['failed']}." for row in rows if "failed" in row
            ]
            notes += [
                OURS.format(record["settings"]["new_tokens"]),
                f"{printed.about}.",
            ]
            ours = [_speed(record, row) for row in rows if row["rounds"]]
            columns = [
                "prefill_ms",
                "prefill_speedup",
                "answer_ms",
                "answer_speedup",
                "total_time_s",
                "total_speedup",
            ]
            made.append(
                Table(
                    f"{speed_records.about(record)}, batch {batch}",
                    columns,
                    ours + theirs,
                    notes,
                )
            )
    return made


def _speed(record: dict, row: dict) -> Row:
    label, tokens = key(row)
    bound, cells = speed_records.vanilla_of(record, row), {}
    for name, of in (("prefill", speed_records.first), ("answer", speed_records.total)):
        cells[f"{name}_ms"] = TableCell(median(map(of, row["rounds"])), None, record)
        cells[f"{name}_speedup"] = TableCell(
            speed_records.speed_up(record, row, of), None, record
        )
    mean, final = (row["visual_tokens"][name] for name in ("mean", "final"))
    share = (
        row["flops"]["decoder"] / bound["flops"]["decoder"]
        if "flops" in bound
        else None
    )
    return Row(label, tokens, cells, mean=mean, final=final, flops=share)


def _beside(table: Table, printed: Table) -> Table:
    if (
        table.columns != printed.columns
    ):  # of other benchmarks, an average is not to be compared with the printed one
        table = replace(
            table,
            rows=[
                replace(row, average=None, average_comparison=None)
                for row in table.rows
            ],
        )
    theirs = {(row.label, row.tokens): row for row in printed.rows}
    theirs[UPPER_BOUND, None] = printed.rows[0]
    rows = list(table.rows) + [
        replace(row, label=f"{row.label} (published)") for row in printed.rows
    ]
    rows += [
        _difference(row, theirs[key])
        for row in table.rows
        if (key := (row.label, row.tokens)) in theirs
    ]
    return replace(
        table,
        columns=printed.columns,
        rows=rows,
        notes=[*table.notes, f"Published: {CITATION}."],
    )


def _experiments(
    printed: Table, results: str, statistics: bool, columns: list[str] | None
) -> list[Table]:
    """One for every model and budget of the experiments, on all their benchmarks: what is compared is a change."""
    theirs = {(EXPERIMENTS[row.label], row.tokens): row for row in printed.rows}
    shown = [
        replace(row, label=f"{name} (published)") for (name, _), row in theirs.items()
    ]
    made = []
    for table in tables(
        results, columns=columns, statistics=statistics, methods=[*EXPERIMENTS.values()]
    ):
        configs = [
            next(iter(row.cells.values())).record["config"] for row in table.rows
        ]
        if (
            len({config["method"]["name"] for config in configs}) < 2
        ):  # SparseVLM alone: nobody experimented
            continue
        rows = [*table.rows, *shown]
        for row, config in zip(table.rows, configs, strict=True):
            key = config["method"]["name"], row.tokens
            same = config["model"]["name"] == "llava15" and row.label == AS_PUBLISHED[
                key[0]
            ].format(row.tokens)
            if same and key in theirs and row.cells.keys() & printed.columns:
                rows.append(_difference(row, theirs[key]))
        columns = [
            *table.columns,
            *(name for name in printed.columns if name not in table.columns),
        ]
        made.append(
            replace(
                table,
                columns=columns,
                rows=rows,
                notes=[*table.notes, f"{printed.about}."],
            )
        )
    if not made:
        raise UsageError(
            f"results={results}: no experiments. `zipeval run -m +experiment=misalignment` makes them."
        )
    return made


def _difference(ours: Row, theirs: Row) -> Row:
    def minus(a: float | None, b: float | None) -> float | None:
        return None if None in (a, b) else a - b

    cells = {
        name: TableCell(
            minus(cell.score, theirs.cells[name].score),
            minus(cell.percent, theirs.cells[name].percent),
            remarks=cell.remarks,
        )
        for name, cell in ours.cells.items()
        if name in theirs.cells
    }
    label = f"{ours.label}: difference"
    return Row(
        label,
        ours.tokens,
        cells,
        average=minus(ours.average, theirs.average),
        kind=DIFFERENCE,
    )


def _scores(name: str) -> Table:
    lines, averages = _of(name, "scores.csv"), _of(name, "averages.csv")
    bound = {
        line["benchmark"]: float(line["score"])
        for line in lines
        if line["method"] == UPPER_BOUND
    }
    rows, notes = [], []
    for printed in averages:
        method, tokens = printed["method"], int(printed["visual_tokens"])
        row = f"{method} {tokens}"
        cells = {}
        for line in lines:
            if (line["method"], int(line["visual_tokens"])) == (method, tokens):
                column, score = line["benchmark"], float(line["score"])
                cells[column] = TableCell(score, 100 * score / bound[column])
                of = f"{score:g} is {{:.1f}}% of {bound[column]:g}"
                notes += _disagreement(
                    f"{row} {column}",
                    of,
                    cells[column].percent,
                    line["percent_of_upper_bound"],
                )
        average = fmean(cell.percent for cell in cells.values())
        notes += _disagreement(
            f"{row} average", "it is {:.1f}%", average, printed["average_percent"]
        )
        rows.append(Row(method, tokens, cells, average=average, kind=PUBLISHED))
    return Table(_about(name, lines), list(bound), rows, notes)


def _efficiency() -> Table:
    """Table 4. Of a speed-up the paper prints one decimal."""
    lines = _of("table4", "efficiency.csv")
    rows, notes = [], []
    for line in lines:
        row = f"{line['method']} {line['visual_tokens']}"
        numbers = {name: float(line[name]) for name in ("total_time_s", "prefill_ms")}
        for what, name in (
            ("total_speedup", "total_time_s"),
            ("prefill_speedup", "prefill_ms"),
        ):
            numbers[what] = float(lines[0][name]) / numbers[name]
            notes += _disagreement(
                f"{row} {what}", "it is {:.1f}", numbers[what], line[what], unit=""
            )
        cells = {name: TableCell(number, None) for name, number in numbers.items()}
        rows.append(
            Row(line["method"], int(line["visual_tokens"]), cells, kind=PUBLISHED)
        )
    return Table(
        f"{_about('table4', lines)}, {lines[0]['benchmark']}, {lines[0]['gpu']}",
        list(numbers),
        rows,
        notes,
    )


def _misalignment() -> Table:
    """Table 5: percentages are of SparseVLM on all tokens."""
    lines = _of("table5", "misalignment.csv")
    column, bound = lines[0]["benchmark"], float(lines[0]["score"])
    rows, notes = [], []
    for line in lines:
        cell = TableCell(float(line["score"]), 100 * float(line["score"]) / bound)
        rows.append(
            Row(
                line["experiment"],
                int(line["visual_tokens"]),
                {column: cell},
                kind=PUBLISHED,
            )
        )
        if line["change_percent"]:
            notes += _disagreement(
                line["experiment"],
                "the change is {:.1f}%",
                cell.percent - 100,
                line["change_percent"],
            )
    return Table(
        _about("table5", lines), [column], rows, notes, bound=lines[0]["experiment"]
    )


def _of(name: str, file: str) -> list[dict[str, str]]:
    with (SOURCE / file).open(encoding="utf-8", newline="") as stream:
        return [line for line in csv.DictReader(stream) if line["table"] == name]


def _about(name: str, lines: list[dict[str, str]]) -> str:
    return f"{lines[0]['model']}, published: {CITATION}, Table {name[-1]}"


def _disagreement(
    where: str, said: str, value: float, printed: str, unit: str = "%"
) -> Iterator[str]:
    if abs(value - float(printed)) > ROUNDING:
        yield f"{where}: {said.format(value)}, printed {printed}{unit}."
