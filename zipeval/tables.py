"""Tables from records: raw scores and percentages of the upper bound. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean

from zipeval import records
from zipeval.benchmarks import BENCHMARKS
from zipeval.budget import BUDGETS
from zipeval.config import PACKINGS, ModelConfig
from zipeval.errors import UsageError
from zipeval.records import incomplete

Record = dict
UPPER_BOUND = "vanilla"
OF_EVERY_ROW = ("name", "_target_", "tokens", "seed")


def render(results: str, task: str | None = None) -> str:
    """Markdown: one table per model setting, a row per method and budget.

    Args:
        results: directory of runs.
        task: show all metrics of this task instead of the main one of every task.

    Raises:
        UsageError: without records, without their upper bound, or with two records for one cell.
    """
    found = [r for r in records.read_all(results) if task in (None, r["task"])]
    if not found:
        wanted = f" of task={task}" if task else ""
        raise UsageError(
            f"results={results}: no records{wanted}. `zipeval run` makes them; results=DIR looks elsewhere."
        )
    settings: dict[tuple, list[Record]] = {}
    for record in found:
        try:
            settings.setdefault(_setting(record), []).append(record)
        except KeyError as error:
            raise UsageError(f"{record['path']}: lacks {error}. Move it away and run its command again.") from error
    return "\n\n".join(_table(rs, task, results) for of in settings.values() for rs in _by_judge(of))


def _by_judge(found: list[Record]) -> list[list[Record]]:
    """Once for each judge that scored some of them, with those that no judge scored."""
    judges = {_judge(record): None for record in found if _judge(record)}
    return [[r for r in found if _judge(r) in (None, judge)] for judge in judges] or [found]


def _judge(record: Record) -> str | None:
    judge = record["config"].get("judge")
    return judge and f"judge={judge['model']} at {judge['url']}"


def _setting(record: Record) -> tuple:
    """What records must agree on to stand in one table."""
    config, resolved = record["config"], record["resolved"]
    device = resolved["device"].partition(":")[0]
    held = [resolved["dtype"], device, resolved["attn_implementation"]]
    for name in ("quantization", "device_map"):
        held += [f"{name}={resolved[name]}"] if resolved[name] != getattr(ModelConfig, name) else []
    read = [f"{name}={config['model'][name]}" for name in ("prompt", "image_aspect")]
    model = config["model"]
    return model["name"], resolved["fingerprint"], model["family"], *held, *read, config["limit"] or 0


def _row(record: Record) -> tuple:
    """(method and its options that are not at their default, budget)."""
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


def _table(found: list[Record], task: str | None, results: str) -> str:
    cells: dict[tuple, dict[str, Record]] = {}
    for record in found:
        row = cells.setdefault(_row(record), {})
        if record["task"] in row:
            raise UsageError(
                f"two records for one cell: {row[record['task']]['path']} and {record['path']}. Move one of them away."
            )
        row[record["task"]] = record
    bounds = {r["task"]: r for r in found if r["config"]["method"]["name"] == UPPER_BOUND}
    for record in found:
        bound = bounds.get(record["task"])
        if bound is None or any(bound.get(h) != record.get(h) for h in ("task_hash", "data_hash")):
            raise UsageError(f"{record['path']} has no upper bound. Make it with `{_bound_command(record, results)}`.")
    columns = _metrics(found) if task else {_heading(bounds[t]): _main(t) for t in bounds}
    header = ["method", "tokens", "mean", "final", *columns, *(["average"] if len(columns) > 1 and not task else [])]
    lines = [header]
    for (label, tokens), row in sorted(cells.items(), key=_order):
        counts = [f"{fmean(r['visual_tokens'][which] for r in row.values()):.1f}" for which in ("mean", "final")]
        asked = "-" if tokens is None else str(tokens)
        line = [label, "all" if label == UPPER_BOUND else asked, *counts]
        percentages = []
        for pick in columns.values():
            value, bound = pick(row), pick(bounds)
            if value is None or bound is None:
                line.append("-")
                continue
            percentages.append(100 * value / bound if bound else float("nan"))
            shown = f"{value:.1f}" if abs(bound) > 10 else f"{value:.3g}"  # a metric from 0 to 1 needs its digits
            line.append(f"{shown} ({percentages[-1]:.1f}%)" if bound else f"{shown} (of 0)")
        if "average" in header:
            complete = len(percentages) == len(columns)
            line.append(f"{fmean(percentages):.1f}%" if complete else "-")
        lines.append(line)
    model, fingerprint, _, *held, limit = _setting(found[0])
    held += {judge: None for record in found if (judge := _judge(record))}
    about = f"{model} ({fingerprint}), {', '.join(held)}" + (f", first {limit} samples" if limit else "")
    note = (
        "Score (% of the upper bound, vanilla). tokens: visual tokens asked for; mean, final: measured, "
        "entering the decoder's layers on average and its last one."
    )
    remarks = [remark for record in found for remark in _remarks(record)]
    return "\n".join([f"{about}\n\n{markdown(lines)}\n\n{note}", *remarks])


def _remarks(record: Record) -> Iterator[str]:
    row = " ".join(str(part) for part in _row(record) if part is not None)
    total = f"of the {record['samples']['count']} samples of {record['task']}"
    if record["failed"]:
        yield f"{row}: {record['failed']} {total} could not be read and count as wrong."
    if incomplete(record):
        yield (
            f"{row}: INCOMPLETE, {record['unscored']} {total} have no verdict and do not count. The command that "
            "made it asks the judge for those."
        )


def _order(item) -> tuple:
    (label, tokens), _ = item
    return label != UPPER_BOUND, -(tokens or 0), label


def _heading(record: Record) -> str:
    """The papers' name of a benchmark; of any other task its own, with its metric, lmms-eval's first one."""
    known = BENCHMARKS.get(record["task"])
    return known.column if known else f"{record['task']} ({record['metric']})"


def _main(task: str) -> Callable[[dict[str, Record]], float | None]:
    return lambda row: row[task]["score"] if task in row else None


def _metrics(found: list[Record]) -> dict[str, Callable[[dict[str, Record]], float | None]]:
    """One column for each metric of a task, on the scale of its main one."""

    def pick(name):
        def value(row):
            (record,) = row.values()
            main, asked = (record["metrics"].get(metric) for metric in (record["metric"], name))
            return asked and asked * (record["score"] / main if main else 1)  # None: no answer is judged yet

        return value

    main = found[0]["metric"]
    names = {name for record in found for name in record["metrics"]}
    return {name: pick(name) for name in sorted(names, key=lambda name: (name != main, name))}


def _bound_command(record: Record, results: str) -> str:
    config = record["config"]
    given = [f"model={config['model']['name']}", "method=vanilla", f"tasks=[{record['task']}]"]
    given += [f"model.family={config['model']['family']}"] if config["model"]["path"] else []
    given += [f"limit={config['limit']}"] if config["limit"] else []
    if "judge" in config:
        given += [f"judge.{name}={value}" for name, value in config["judge"].items()]
        given += [f"data.videos={config['data']['videos']}"]
    given += [f"data.root={config['data']['root']}"] if config["data"]["root"] else []
    given += [f"results={results}"] if results != "results/runs" else []
    names = ("path", "revision", "dtype", "device", "attn_implementation", "quantization", "device_map")
    for name in (*names, "prompt", "image_aspect"):
        # A model's own file may set the last two, so their defaults here say nothing.
        if config["model"][name] != getattr(ModelConfig, name) or name not in names:
            given.append(f"model.{name}={config['model'][name]}")
    return " ".join(["zipeval run", *given])


def markdown(lines: list[list[str]]) -> str:
    """A table whose columns line up, the first one to the left; `lines[0]` is the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def join(line):
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([join(lines[0]), rule, *map(join, lines[1:])])
