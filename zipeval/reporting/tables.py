"""Tables from records: raw scores and percentages of the upper bound, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING

from zipeval.benchmarks import BENCHMARKS
from zipeval.config.schema import BUDGETS, PACKINGS, UPPER_BOUND, ModelConfig
from zipeval.errors import UsageError
from zipeval.reporting.percentages import percent_of_bound
from zipeval.reporting.remarks import (
    LOWER,
    OVERFLOWED,
    Remark,
    bound_remarks,
    record_remarks,
    undefined_remarks,
)
from zipeval.reporting.scored_samples import follows_from_samples, read_scored
from zipeval.results import records
from zipeval.results.identity import judge_identity
from zipeval.results.records import incomplete

if TYPE_CHECKING:
    from zipeval.reporting.stats import Comparison

Record = dict
MEASURED, PUBLISHED, DIFFERENCE = "measured", "published", "difference"
OF_EVERY_ROW = ("name", "_target_", "tokens", "seed", "projector")
OF_TURNS = "Conversations: visual tokens and FLOPs are of the first question."


@dataclass(frozen=True)
class Cell:
    """A number of a benchmark.

    Attributes:
        score: on the papers' scale; None while no answer is judged.
        percent: of the upper bound's score; None where one of them is missing or the bound's prompts did not fit the
            model, nan where it is not defined (zipeval/reporting/percentages.py).
        record: where it comes from; None for a published one.
        comparison: with the upper bound, sample by sample.
        tied: with the best of the same budget, or the best itself, where several methods have one.
        remarks: what has to be said of it, and of the upper bound where it has a percentage.
        higher_is_better: whether a larger score is better.
    """

    score: float | None
    percent: float | None
    record: Record | None = None
    comparison: Comparison | None = None
    tied: bool = False
    remarks: tuple[Remark, ...] = ()
    higher_is_better: bool = True


@dataclass(frozen=True)
class Row:
    """A method at a budget.

    Attributes:
        kind: measured, published, or the difference of the two.
        label: the method and its options that are not at their default.
        tokens: visual tokens an image was to be left with; None for all.
        mean, final: visual tokens that entered the decoder's layers on average, and its last one.
        flops: of reading the prompts, as a share of the upper bound's.
        cells: by the headings of their columns.
        average: of the percentages, where there is one for every column.
        average_comparison: its interval.
    """

    label: str
    tokens: int | None
    cells: dict[str, Cell]
    mean: float | None = None
    final: float | None = None
    flops: float | None = None
    average: float | None = None
    average_comparison: Comparison | None = None
    kind: str = MEASURED

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """Return what has to be said of the average: all that is said of a number it is made of."""
        found = []
        for column, cell in self.cells.items():
            found += [
                Remark(remark.kind, f"{column}: {remark.text}")
                for remark in cell.remarks
            ]
        return tuple(found)


@dataclass(frozen=True)
class Table:
    """Rows with one upper bound, which is the first of them.

    Attributes:
        about: what its runs have in common.
        columns: headings, the benchmarks.
        notes: what has to be said about some rows.
        bound: the method that percentages are of.
    """

    about: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    bound: str = UPPER_BOUND

    def groups(self) -> list[list[Row]]:
        """Rows of the same budget."""
        return [
            list(rows) for _, rows in groupby(self.rows, key=lambda row: row.tokens)
        ]


def tables(
    results: str,
    task: str | None = None,
    model: str | None = None,
    columns: list[str] | None = None,
    statistics: bool = False,
    methods: Sequence[str] = (),
    paths: Collection[str] | None = None,
    under_way: bool = False,
) -> list[Table]:
    """One for each setting in which models ran.

    Args:
        results: directory of runs.
        task: show all metrics of this task instead of the main one of every task.
        model: of runs of this model only.
        columns: of these benchmarks only, in this order.
        statistics: compare every run with its upper bound, sample by sample.
        methods: of these only, at each budget by itself, and in place of vanilla the first of them is the upper bound.
        paths: of the records at these places only.
        under_way: whether a record without upper bound is left out, with a note, since its sweep may still make one.

    Raises:
        UsageError: without records, without their upper bound, or with two records for one cell.
    """
    settings: dict[tuple, list[Record]] = {}
    for record in records.read_all(results):
        try:
            if (
                task in (None, record["task"])
                and model in (None, record["config"]["model"]["name"])
                and (columns is None or heading(record) in columns)
                and (not methods or record["config"]["method"]["name"] in methods)
                and (paths is None or record["path"] in paths)
            ):
                settings.setdefault(
                    _setting(record) + _budget(record) * bool(methods), []
                ).append(record)
        except KeyError as error:
            raise UsageError(
                f"{record['path']}: lacks {error}. Move it away and run its command again."
            ) from error
    if not settings:
        asked = (("task", task), ("model", model), ("method", ",".join(methods)))
        wanted = "".join(f" of {name}={value}" for name, value in asked if value)
        raise UsageError(
            f"results={results}: no records{wanted}. `zipeval run` makes them; results=DIR looks elsewhere."
        )
    bound = methods[0] if methods else UPPER_BOUND
    comparable = [rs for of in settings.values() for rs in _by_judge(of)]
    if under_way:
        comparable, notes = _with_bounds(comparable, results, bound)
    made = [_table(rs, task, columns, results, bound) for rs in comparable]
    if under_way:
        made = [
            replace(table, notes=[*table.notes, *more])
            for table, more in zip(made, notes, strict=True)
        ]
    # Samples tell the main number only, which is the first of a task's.
    return (
        [
            _compared(table, table.columns[:1] if task else table.columns)
            for table in made
        ]
        if statistics
        else made
    )


def upper_bound_of(record: Record, results: str) -> Record | None:
    """Return the record of another one's upper bound in a directory of results; None without one."""
    return bound_among(record, records.read_all(results))


def bound_among(record: Record, candidates: Sequence[Record]) -> Record | None:
    """Return of some records the upper bound of another one: of the same setting, task, data and judge."""
    for candidate in candidates:
        if (
            candidate["config"]["method"]["name"] == UPPER_BOUND
            and _setting(candidate) == _setting(record)
            and _judge(candidate) == _judge(record)
            and all(
                candidate.get(name) == record.get(name)
                for name in ("task", "task_hash", "data_hash")
            )
        ):
            return candidate
    return None


def _setting(record: Record) -> tuple:
    """Return what records must agree on to stand in one table."""
    config, resolved = record["config"], record["resolved"]
    device = resolved["device"].partition(":")[0]
    held = [resolved["dtype"], device, resolved["attn_implementation"]]
    for name in ("quantization", "device_map"):
        held += (
            [f"{name}={resolved[name]}"]
            if resolved[name] != getattr(ModelConfig, name)
            else []
        )
    read = [f"{name}={config['model'][name]}" for name in ("prompt", "image_aspect")]
    model = config["model"]
    return (
        model["name"],
        resolved["fingerprint"],
        model["family"],
        *held,
        *read,
        config["limit"] or 0,
    )


def _budget(record: Record) -> tuple:
    return record["config"]["tokens"], record["config"]["budget"]


def _by_judge(records: list[Record]) -> list[list[Record]]:
    """Return the records once for each judge that scored some of them, with those that no judge scored.

    A judge is a model at an address, whatever the port. Records of before may tell of the same cell twice, scored at
    two ports: these may have been two judges, so that they stand in two tables, as they always did.
    """
    not_judged = [record for record in records if _judge(record) is None]
    judges: dict[str, list[Record]] = {}
    for record in records:
        if _judge(record) is not None:
            judges.setdefault(_judge(record), []).append(record)
    groups = []
    for judged in judges.values():
        cells = {(key(record), record["task"]) for record in judged}
        is_twice = len(cells) < len(judged)
        groups += _by_address(judged) if is_twice else [judged]
    return [[*group, *not_judged] for group in groups] or [records]


def _by_address(records: list[Record]) -> list[list[Record]]:
    """Return records by the whole address of their judge."""
    addresses: dict[str, list[Record]] = {}
    for record in records:
        addresses.setdefault(record["config"]["judge"]["url"], []).append(record)
    return [*addresses.values()]


def _judge(record: Record) -> str | None:
    """Return the name of the judge that scored a record."""
    judge = judge_identity(record["config"].get("judge"))
    return judge and f"judge={judge['model']} at {judge['url']}"


def _judges(records: list[Record]) -> list[str]:
    """Return the judges of a table as its heading names them: with the port, where all records have one."""
    addresses: dict[str, set[str]] = {}
    for record in records:
        if _judge(record) is not None:
            addresses.setdefault(_judge(record), set()).add(
                record["config"]["judge"]["url"]
            )
    names = []
    for judge, urls in addresses.items():
        model = judge.partition(" at ")[0]
        names.append(f"{model} at {urls.pop()}" if len(urls) == 1 else judge)
    return names


def key(record: Record) -> tuple[str, int | None]:
    """(method and its options that are not at their default, budget) of a record, or of a row of `zipeval bench`."""
    config = record["config"]
    label = _label(config["method"])
    label += f" seed={config['seed']}" if config["seed"] else ""
    label += f" budget={config['budget']}" if config["budget"] != BUDGETS[0] else ""
    label += f" packing={config['packing']}" if config["packing"] != PACKINGS[0] else ""
    return label, record["visual_tokens"]["requested"]


def _label(method: dict) -> str:
    """`fastv K=3`; of a chain `chain first=visionzip:128 second=sparsevlm:64`."""
    label = method["name"]
    for name, value in method.items():
        if isinstance(value, dict):
            label += f" {name}={_label(value)}:{value.get('tokens')}"
        elif name not in OF_EVERY_ROW and value is not None:
            label += f" {name}={value}"
    return label


def _table(
    found: list[Record],
    task: str | None,
    order: list[str] | None,
    results: str,
    first: str,
) -> Table:
    by_row: dict[tuple, dict[str, Record]] = {}
    for record in found:
        row = by_row.setdefault(key(record), {})
        if record["task"] in row:
            raise UsageError(
                f"two records for one cell: {row[record['task']]['path']} and {record['path']}. Move one of them away."
            )
        row[record["task"]] = record
    bounds = _bounds(found, first)
    for record in found:
        bound = bounds.get(record["task"])
        if not _is_bound_of(bound, record):
            command = _bound_command(record, results, first)
            other = (
                f" of the same task and data, that of {bound['path']} is of another"
                if bound
                else ""
            )
            raise UsageError(
                f"{record['path']} has no upper bound{other}. Make it with `{command}`."
            )
    picks = (
        _metrics(found)
        if task
        else {heading(bounds[t]): _main(t) for t in sorted(bounds, key=_place)}
    )
    if order is not None:
        picks = {name: picks[name] for name in order if name in picks}
    rows = []
    for (label, tokens), row in sorted(by_row.items(), key=partial(_order, first)):
        cells = {
            name: cell for name, pick in picks.items() if (cell := pick(row, bounds))
        }
        percentages = [cell.percent for cell in cells.values()]
        complete = len(cells) == len(picks) > 1 and None not in percentages and not task
        rows.append(
            Row(
                label,
                tokens,
                cells,
                mean=fmean(r["visual_tokens"]["mean"] for r in row.values()),
                final=fmean(r["visual_tokens"]["final"] for r in row.values()),
                flops=fmean(
                    r["prefill"]["flops_exact"] / bounds[t]["prefill"]["flops_exact"]
                    for t, r in row.items()
                ),
                average=fmean(percentages) if complete else None,
            )
        )
    model, fingerprint, _, *held, limit = _setting(found[0])
    held += _judges(found)
    about = f"{model} ({fingerprint}), {', '.join(held)}" + (
        f", first {limit} samples" if limit else ""
    )
    notes = list(dict.fromkeys(note for record in found for note in _fit_notes(record)))
    notes += [note for record in found for note in _notes(record)]
    notes += [
        note
        for task, bound in bounds.items()
        for note in _overflow_notes(task, bound, len(by_row) > 1)
    ]
    notes += [OF_TURNS] * any(
        task in BENCHMARKS and BENCHMARKS[task].turns for task in bounds
    )
    return Table(about, list(picks), rows, notes, first)


def _bounds(found: list[Record], first: str) -> dict[str, Record]:
    """Return the record of the upper bound for each task."""
    return {
        record["task"]: record
        for record in found
        if _label(record["config"]["method"]) == first
    }


def _is_bound_of(bound: Record | None, record: Record) -> bool:
    """Return whether a record of the upper bound is of the task and the data of another record."""
    return bound is not None and all(
        bound.get(name) == record.get(name) for name in ("task_hash", "data_hash")
    )


def _with_bounds(
    comparable: list[list[Record]], results: str, first: str
) -> tuple[list[list[Record]], list[list[str]]]:
    """Return the records that have an upper bound, and by table what to say of those that do not have one yet.

    Args:
        comparable: the records of each table.

    Raises:
        UsageError: where none is left.
    """
    tables_left, notes = [], []
    for found in comparable:
        bounds = _bounds(found, first)
        waiting = [
            record
            for record in found
            if not _is_bound_of(bounds.get(record["task"]), record)
        ]
        if len(waiting) < len(found):
            tables_left.append([record for record in found if record not in waiting])
            notes.append(
                [
                    f"{record['path']} is left out: it has no upper bound yet."
                    for record in waiting
                ]
            )
    if not tables_left:
        command = _bound_command(comparable[0][0], results, first)
        raise UsageError(
            f"results={results}: no record has an upper bound yet. `{command}` makes one."
        )
    return tables_left, notes


def _notes(record: Record) -> Iterator[str]:
    row = " ".join(str(part) for part in key(record) if part is not None)
    total = f"of the {record['samples']['count']} samples of {record['task']}"
    if record["failed"]:
        rule = (
            "count as unanswered"
            if is_higher_better(record)
            else "are left out, as no error is the worst one"
        )
        yield f"{row}: {record['failed']} {total} could not be read and {rule}."
    if record.get("overflowed"):
        yield f"{row}: {record['overflowed']} {total} have a prompt that is longer than the model's positions."
    if incomplete(record):
        yield (
            f"{row}: INCOMPLETE, {record['unscored']} {total} have no verdict and do not count. The command that "
            "made it asks the judge for those."
        )


def _fit_notes(record: Record) -> Iterator[str]:
    """Say where a model was asked about pictures that are not made for it."""
    model, task = record["config"]["model"], record["task"]
    shapes = task.startswith("zipeval_shapes")
    if shapes and not model.get("embedded"):
        yield (
            f"{task}: drawn shapes, made for the embedded checkpoints. Its scores say little about {model['name']}; "
            "suite=quick is of real pictures."
        )
    # With a path, the weights are the user's own.
    if (
        not shapes
        and task in BENCHMARKS
        and model.get("embedded")
        and not model.get("path")
    ):
        yield (
            f"{BENCHMARKS[task].column}: {model['name']} was trained on drawn shapes only. Its scores on real pictures "
            "say nothing about a method."
        )


def _overflow_notes(task: str, bound: Record, several: bool) -> Iterator[str]:
    """Say why a column has no percentages: those of a model beyond its positions are of nothing."""
    if bound.get("overflowed") and several:
        yield (
            f"{heading(bound)}: no percentages. {bound['overflowed']} of the {bound['samples']['count']} prompts of "
            f"{task} are longer than the model's positions under the upper bound."
        )


def is_higher_better(*records: Record) -> bool:
    """Return whether more is better of the score of some records of a task; those of before schema 5 do not say."""
    return all(record.get("higher_is_better", True) for record in records)


def _order(first: str, item) -> tuple:
    (label, tokens), _ = item
    return label != first, -(tokens or 0), label


def _place(task: str) -> tuple:
    """Columns stand in the papers' order, and others behind them."""
    known = list(BENCHMARKS)
    return known.index(task) if task in known else len(known), task


def heading(record: Record) -> str:
    """The papers' name of a benchmark; of any other task its own, with its metric, lmms-eval's first one."""
    known = BENCHMARKS.get(record["task"])
    arrow = "" if is_higher_better(record) else LOWER
    return known.column if known else f"{record['task']} ({record['metric']}{arrow})"


def headings(results: str) -> list[str]:
    """Return the headings of all records of a directory; of broken ones, which `tables` refuses, none."""
    complete = [
        record
        for record in records.read_all(results)
        if {"task", "metric"} <= record.keys()
    ]
    tasks = {record["task"]: heading(record) for record in complete}
    return [tasks[task] for task in sorted(tasks, key=_place)]


Pick = Callable[[dict[str, Record], dict[str, Record]], "Cell | None"]


def _cell(
    record: Record,
    score: float | None,
    bound: Record,
    bound_score: float | None,
    higher_is_better: bool,
) -> Cell:
    """Return a score with its percentage of the upper bound's.

    Args:
        bound: the record of the upper bound.
        bound_score: None for a number that is no share of another one.
    """
    remarks = record_remarks(record)
    cell = Cell(score, None, record, remarks=remarks, higher_is_better=higher_is_better)
    if None in (score, bound_score):
        return cell
    if record is not bound:
        remarks += bound_remarks(bound)
    if bound.get("overflowed"):
        nothing = Remark(
            OVERFLOWED,
            "no percentage: the upper bound's prompts are longer than the model's positions",
        )
        return replace(cell, remarks=(*remarks, nothing))
    percent = percent_of_bound(score, bound_score, higher_is_better)
    remarks += undefined_remarks(percent, higher_is_better, bound_score)
    return replace(cell, percent=percent, remarks=remarks)


def _main(task: str) -> Pick:
    def pick(row, bounds):
        if task not in row:
            return None
        record, bound = row[task], bounds[task]
        return _cell(
            record,
            record["score"],
            bound,
            bound["score"],
            is_higher_better(record, bound),
        )

    return pick


def _metrics(found: list[Record]) -> dict[str, Pick]:
    """One column for each metric of a task, on the scale of its main one."""

    def on_scale(record: Record, name: str) -> float | None:
        main, asked = (
            record["metrics"].get(metric) for metric in (record["metric"], name)
        )
        known = BENCHMARKS.get(record["task"])
        scale = known.scale if known else record["score"] / main if main else 1
        return asked and asked * scale  # None: no answer is judged yet

    def higher(name: str) -> bool:
        metric = name.partition(",")[0]  # behind a comma it names a filter
        return all(record.get("directions", {}).get(metric, True) for record in found)

    def pick_of(name: str) -> Pick:
        def pick(row, bounds):
            (record,), (bound,) = row.values(), bounds.values()
            share = not name.startswith(
                "change_"
            )  # a difference is no share of another one
            of_bound = on_scale(bound, name) if share else None
            return _cell(record, on_scale(record, name), bound, of_bound, higher(name))

        return pick

    main = found[0]["metric"]
    names = sorted(
        {name for record in found for name in record["metrics"]},
        key=lambda name: (name != main, name),
    )
    return {name if higher(name) else name + LOWER: pick_of(name) for name in names}


def _compared(table: Table, columns: list[str]) -> Table:
    """Add intervals of the percentages in these columns, and what is as good as the best of its budget.

    The upper bound itself is compared with nothing. Nor is a column of which the upper bound's prompts did not fit, or
    whose metric is no function of its samples' scores.
    """
    bound, *others = table.rows
    samples = {
        (row.label, row.tokens, name): read_scored(
            row.cells[name].record, positions=False
        )
        for row in table.rows
        for name in row.cells.keys() & {*columns}
    }

    def samples_of(row: Row, name: str) -> list[dict]:
        return samples[row.label, row.tokens, name]

    notes = [*table.notes]
    for row in table.rows:
        for name in columns:
            task = row.cells[name].record["task"] if name in row.cells else None
            if task in BENCHMARKS and BENCHMARKS[task].turns:
                notes.append(_change(row, task, samples_of(row, name)))
    silent = _without_statistics(table, columns, samples_of)
    rows = [bound]
    for group in replace(table, rows=others).groups():
        # A budget of one method has no best one, nor one that is compared with a method of its own budget.
        rivals = len(group) > 1 and table.bound == UPPER_BOUND
        best = {name: _best(group, name) if rivals else None for name in columns}
        for row in group:
            names = [
                name for name in columns if name in row.cells and name not in silent
            ]
            rows.append(_with_comparisons(row, bound, best, names, samples_of))
    return replace(table, rows=rows, notes=[*notes, *silent.values()])


SamplesOf = Callable[[Row, str], list[dict]]


def _with_comparisons(
    row: Row,
    bound: Row,
    best: dict[str, Row | None],
    names: list[str],
    samples_of: SamplesOf,
) -> Row:
    """Return a row with statistics in the columns of these names.

    Args:
        best: by column the best row of the budget, None where there are no others.
    """
    from zipeval.reporting import stats

    cells, pairs = dict(row.cells), []
    for name in names:
        cell, first = cells[name], best[name]
        pair = (cell.record["task"], samples_of(row, name), samples_of(bound, name))
        pairs.append(pair)
        tied = first is not None and stats.tied(*pair[:2], samples_of(first, name))
        comparison = None
        if not bound.cells[name].record.get("overflowed"):
            comparison = stats.compare(*pair, higher_is_better=cell.higher_is_better)
        cells[name] = replace(cell, comparison=comparison, tied=tied)
    average = None
    if row.average is not None and len(names) == len(cells):
        average = stats.average(
            pairs, higher_is_better=[cells[name].higher_is_better for name in names]
        )
    return replace(row, cells=cells, average_comparison=average)


def _best(group: list[Row], name: str) -> Row | None:
    """Return the row of a budget whose score in a column is the best; the first of several."""
    scored = [
        row for row in group if name in row.cells and row.cells[name].score is not None
    ]
    if not scored:
        return None
    better = max if scored[0].cells[name].higher_is_better else min
    return better(scored, key=lambda row: row.cells[name].score)


def _without_statistics(
    table: Table, columns: list[str], samples_of: SamplesOf
) -> dict[str, str]:
    """Return the columns whose score no samples tell, and what to say of them."""
    notes = {}
    for name in columns:
        for row in table.rows:
            if name in row.cells and not follows_from_samples(
                row.cells[name].record, samples_of(row, name)
            ):
                metric = row.cells[name].record["metric"]
                notes[name] = (
                    f"{name}: no intervals. Its samples have no scores of which {metric} is the mean."
                )
    return notes


def _change(row: Row, task: str, samples: list[dict]) -> str:
    """Say what a table cannot show: two accuracies of one run, paired."""
    from zipeval.reporting import stats

    value, low, high = stats.change(task, samples)
    label = " ".join(str(part) for part in (row.label, row.tokens) if part is not None)
    interval, how = (
        (f" [{low:+.1f}, {high:+.1f}]", " (95%, paired, images drawn)")
        if isfinite(low)
        else ("", "")
    )
    return (
        f"{label}: later turns of {task} change by {value:+.1f} points{interval} where the first one's visual tokens "
        f"serve them, against a fresh selection for each{how}."
    )


def _bound_command(record: Record, results: str, bound: str) -> str:
    config = record["config"]
    given = [
        f"model={config['model']['name']}",
        f"method={bound}",
        f"tasks=[{record['task']}]",
    ]
    if bound != UPPER_BOUND:
        given += [f"{name}={config[name]}" for name in ("tokens", "budget")]
    given += (
        [f"model.family={config['model']['family']}"] if config["model"]["path"] else []
    )
    given += [f"limit={config['limit']}"] if config["limit"] else []
    if "judge" in config:
        given += [f"judge.{name}={value}" for name, value in config["judge"].items()]
    for name in ("videos", "root"):
        given += (
            [f"data.{name}={config['data'][name]}"] if config["data"].get(name) else []
        )
    given += [f"results={results}"] if results != "results/runs" else []
    names = (
        "path",
        "revision",
        "dtype",
        "device",
        "attn_implementation",
        "quantization",
        "device_map",
    )
    for name in (*names, "prompt", "image_aspect"):
        # A model's own file may set the last two, so their defaults here say nothing.
        if config["model"][name] != getattr(ModelConfig, name) or name not in names:
            given.append(f"model.{name}={config['model'][name]}")
    return " ".join(["zipeval run", *given])
