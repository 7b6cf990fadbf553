"""Build the tables of a directory of records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import fmean

from zipeval.config.schema import UPPER_BOUND, ModelConfig
from zipeval.errors import UsageError
from zipeval.reporting.tables.cells import (
    Pick,
    heading,
    main_columns,
    metric_columns,
)
from zipeval.reporting.tables.comparisons import with_comparisons
from zipeval.reporting.tables.model import Record, Row, Table
from zipeval.reporting.tables.notes import table_notes
from zipeval.reporting.tables.settings import (
    bounds_by_task,
    budget_of,
    is_bound_of,
    judge_names,
    key,
    setting_of,
    split_by_judge,
)
from zipeval.results import records


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
    """Return a table for each setting in which models ran.

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
    settings: dict[tuple, list[Record]] = defaultdict(list)
    for record in records.read_all(results):
        try:
            if _is_wanted(record, task, model, columns, methods, paths):
                setting = setting_of(record)
                # A rival's budget is its own upper bound's: each has its own table.
                if methods:
                    setting += budget_of(record)
                settings[setting].append(record)
        except KeyError as error:
            raise UsageError(
                f"{record['path']}: lacks {error}. Move it away and run its command again."
            ) from error
    if not settings:
        raise UsageError(_no_records(results, task, model, methods))
    comparable = []
    for setting_records in settings.values():
        comparable += split_by_judge(setting_records)
    bound = methods[0] if methods else UPPER_BOUND
    notes: list[list[str]] = [[] for _ in comparable]
    if under_way:
        comparable, notes = _leave_out_unbounded(comparable, results, bound)
    built = []
    for table_records, more in zip(comparable, notes, strict=True):
        table = _table(table_records, task, columns, results, bound)
        table = replace(table, notes=[*table.notes, *more])
        if statistics:
            # Samples tell the main number only, which is the first of a task's.
            compared = table.columns[:1] if task else table.columns
            table = with_comparisons(table, compared)
        built.append(table)
    return built


def _is_wanted(
    record: Record,
    task: str | None,
    model: str | None,
    columns: list[str] | None,
    methods: Sequence[str],
    paths: Collection[str] | None,
) -> bool:
    """Return whether a record is one of those that `tables` was asked for.

    Raises:
        KeyError: if it lacks what tells so.
    """
    # An empty choice is a choice of all.
    choices = [
        (record["task"], task and [task]),
        (record["config"]["model"]["name"], model and [model]),
        (record["config"]["method"]["name"], methods or None),
        (record["path"], paths),
    ]
    if columns is not None:
        choices.append((heading(record), columns))
    return all(choice is None or value in choice for value, choice in choices)


def _no_records(
    results: str, task: str | None, model: str | None, methods: Sequence[str]
) -> str:
    """Return the error of a choice that no record meets."""
    choices = {"task": task, "model": model, "method": ",".join(methods)}
    wanted = ""
    for name, value in choices.items():
        if value:
            wanted += f" of {name}={value}"
    return f"results={results}: no records{wanted}. `zipeval run` makes them; results=DIR looks elsewhere."


def _table(
    table_records: list[Record],
    task: str | None,
    order: list[str] | None,
    results: str,
    first: str,
) -> Table:
    """Return the table of some records.

    Args:
        table_records: records of one setting and one judge.
        task: show all metrics of this task.
        order: headings of columns; None: all, as the papers order them.
        results: directory of runs.
        first: the method that percentages are of.

    Raises:
        UsageError: with two records for one cell, or without an upper bound.
    """
    by_row = _records_by_row(table_records)
    bounds = bounds_by_task(table_records, first)
    for record in table_records:
        _require_bound(record, bounds.get(record["task"]), results, first)
    columns = metric_columns(table_records) if task else main_columns(bounds)
    if order is not None:
        columns = {name: columns[name] for name in order if name in columns}

    def place(row: tuple[str, int | None]) -> tuple:
        """Put the upper bound first, then large budgets before small ones."""
        label, tokens = row
        return label != first, -(tokens or 0), label

    rows = []
    for label, tokens in sorted(by_row, key=place):
        row_records = by_row[label, tokens]
        row = _row(label, tokens, row_records, bounds, columns)
        # The metrics of one task have no average.
        rows.append(replace(row, average=None) if task else row)
    notes = table_notes(table_records, bounds, several=len(by_row) > 1)
    return Table(_about(table_records), list(columns), rows, notes, first)


def _records_by_row(
    table_records: list[Record],
) -> dict[tuple[str, int | None], dict[str, Record]]:
    """Return records by row, then by task.

    Raises:
        UsageError: with two records for one cell.
    """
    by_row: dict[tuple, dict[str, Record]] = defaultdict(dict)
    for record in table_records:
        row, task = by_row[key(record)], record["task"]
        if task in row:
            raise UsageError(
                f"two records for one cell: {row[task]['path']} and {record['path']}. Move one of them away."
            )
        row[task] = record
    return by_row


def _require_bound(
    record: Record, bound: Record | None, results: str, first: str
) -> None:
    """Raise UsageError where a record has no upper bound of its task and data."""
    if is_bound_of(bound, record):
        return
    other = ""
    if bound is not None:
        other = f" of the same task and data, that of {bound['path']} is of another"
    command = _bound_command(record, results, first)
    raise UsageError(
        f"{record['path']} has no upper bound{other}. Make it with `{command}`."
    )


def _row(
    label: str,
    tokens: int | None,
    row_records: dict[str, Record],
    bounds: dict[str, Record],
    columns: dict[str, Pick],
) -> Row:
    """Return a row, with an average if each of several columns has a percentage."""
    cells = {}
    for name, pick in columns.items():
        cell = pick(row_records, bounds)
        if cell is not None:
            cells[name] = cell
    percentages = [cell.percent for cell in cells.values()]
    average = None
    if len(cells) == len(columns) > 1 and None not in percentages:
        average = fmean(percentages)
    mean, final, flops = [], [], []
    for task, record in row_records.items():
        visual_tokens = record["visual_tokens"]
        mean.append(visual_tokens["mean"])
        final.append(visual_tokens["final"])
        bound_flops = bounds[task]["prefill"]["flops_exact"]
        flops.append(record["prefill"]["flops_exact"] / bound_flops)
    return Row(
        label,
        tokens,
        cells,
        mean=fmean(mean),
        final=fmean(final),
        flops=fmean(flops),
        average=average,
    )


def _about(table_records: list[Record]) -> str:
    """Return what the records of a table have in common, as its heading."""
    model, fingerprint, _, *rest, limit = setting_of(table_records[0])
    common = ", ".join(rest + judge_names(table_records))
    about = f"{model} ({fingerprint}), {common}"
    return f"{about}, first {limit} samples" if limit else about


def _leave_out_unbounded(
    comparable: list[list[Record]], results: str, first: str
) -> tuple[list[list[Record]], list[list[str]]]:
    """Return the records that have an upper bound, and by table notes on those that do not have one yet.

    Args:
        comparable: the records of each table.
        results: directory of runs.
        first: the method that percentages are of.

    Raises:
        UsageError: where no record has one.
    """
    complete, notes = [], []
    for table_records in comparable:
        bounds = bounds_by_task(table_records, first)
        bounded, waiting = [], []
        for record in table_records:
            if is_bound_of(bounds.get(record["task"]), record):
                bounded.append(record)
            else:
                waiting.append(
                    f"{record['path']} is left out: it has no upper bound yet."
                )
        if bounded:
            complete.append(bounded)
            notes.append(waiting)
    if not complete:
        command = _bound_command(comparable[0][0], results, first)
        raise UsageError(
            f"results={results}: no record has an upper bound yet. `{command}` makes one."
        )
    return complete, notes


# Settings of the model that decide what its records can be compared with.
MODEL_SETTINGS = (
    "path",
    "revision",
    "dtype",
    "device",
    "attn_implementation",
    "quantization",
    "device_map",
)


def _bound_command(record: Record, results: str, bound: str) -> str:
    """Return the command that makes the upper bound of a record."""
    config = record["config"]
    model = config["model"]
    settings = [
        f"model={model['name']}",
        f"method={bound}",
        f"tasks=[{record['task']}]",
    ]
    if bound != UPPER_BOUND:
        settings += [f"{name}={config[name]}" for name in ("tokens", "budget")]
    if model["path"]:
        settings.append(f"model.family={model['family']}")
    if config["limit"]:
        settings.append(f"limit={config['limit']}")
    for name, value in config.get("judge", {}).items():
        settings.append(f"judge.{name}={value}")
    for name in ("videos", "root"):
        if config["data"].get(name):
            settings.append(f"data.{name}={config['data'][name]}")
    if results != "results/runs":
        settings.append(f"results={results}")
    return " ".join(["zipeval run", *settings, *_model_settings(model)])


def _model_settings(model: dict) -> list[str]:
    """Return the settings of a record's model that are not at their default."""
    settings = []
    for name in MODEL_SETTINGS:
        if model[name] != getattr(ModelConfig, name):
            settings.append(f"model.{name}={model[name]}")
    # A model's own file may set these two, so their defaults here say nothing.
    for name in ("prompt", "image_aspect"):
        settings.append(f"model.{name}={model[name]}")
    return settings
