"""Decide which records stand in one table, which row is theirs, and which record is their upper bound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from zipeval.config.schema import BUDGETS, PACKINGS, UPPER_BOUND, ModelConfig
from zipeval.reporting.tables.model import Record
from zipeval.results import records
from zipeval.results.identity import judge_identity

# Options that every method has: they are no part of a row's label, or have a place of
# their own there.
COMMON_OPTIONS = ("name", "_target_", "tokens", "seed", "projector")


def setting_of(record: Record) -> tuple:
    """Return what records must agree on to stand in one table: model, weights, precision, prompt, limit."""
    config, resolved = record["config"], record["resolved"]
    model = config["model"]
    # `cuda:0` and `cuda:1` are one kind of device.
    device = resolved["device"].partition(":")[0]
    precision = [resolved["dtype"], device, resolved["attn_implementation"]]
    # They are named only where they are set, as tables of before did not have them.
    for name in ("quantization", "device_map"):
        if resolved[name] != getattr(ModelConfig, name):
            precision.append(f"{name}={resolved[name]}")
    return (
        model["name"],
        resolved["fingerprint"],
        model["family"],
        *precision,
        f"prompt={model['prompt']}",
        f"image_aspect={model['image_aspect']}",
        config["limit"] or 0,
    )


def budget_of(record: Record) -> tuple:
    """Return the budget of a record: its visual tokens, and where they are counted."""
    return record["config"]["tokens"], record["config"]["budget"]


def key(record: Record) -> tuple[str, int | None]:
    """Return the row of a record, or of a line of `zipeval bench`.

    Returns:
        The method and its options that are not at their default, and the budget.
    """
    config = record["config"]
    label = method_label(config["method"])
    if config["seed"]:
        label += f" seed={config['seed']}"
    for name, default in (("budget", BUDGETS[0]), ("packing", PACKINGS[0])):
        if config[name] != default:
            label += f" {name}={config[name]}"
    return label, record["visual_tokens"]["requested"]


def row_name(record: Record) -> str:
    """Return the row of a record as notes name it: `fastv K=3 64`."""
    label, tokens = key(record)
    return label if tokens is None else f"{label} {tokens}"


def method_label(method: dict) -> str:
    """Return `fastv K=3`; of a chain `chain first=visionzip:128 second=sparsevlm:64`."""
    label = method["name"]
    for name, value in method.items():
        if isinstance(value, dict):
            label += f" {name}={method_label(value)}:{value.get('tokens')}"
        elif name not in COMMON_OPTIONS and value is not None:
            label += f" {name}={value}"
    return label


def upper_bound_of(record: Record, results: str) -> Record | None:
    """Return the record of another one's upper bound in a directory of results; None without one."""
    return bound_among(record, records.read_all(results))


def bound_among(record: Record, candidates: Sequence[Record]) -> Record | None:
    """Return of some records the upper bound of another one: of the same setting, task, data and judge."""
    wanted = _question_of(record)
    for candidate in candidates:
        is_bound = candidate["config"]["method"]["name"] == UPPER_BOUND
        if is_bound and _question_of(candidate) == wanted:
            return candidate
    return None


def _question_of(record: Record) -> tuple:
    """Return all that a record and its upper bound agree on: what was asked, of which model, and who scored it."""
    return (
        record["task"],
        record.get("task_hash"),
        record.get("data_hash"),
        setting_of(record),
        judge_of(record),
    )


def bounds_by_task(table_records: list[Record], method: str) -> dict[str, Record]:
    """Return the record of the upper bound for each task.

    Args:
        table_records: the records of one table.
        method: label of the method that is the upper bound.
    """
    bounds = {}
    for record in table_records:
        if method_label(record["config"]["method"]) == method:
            bounds[record["task"]] = record
    return bounds


def is_bound_of(bound: Record | None, record: Record) -> bool:
    """Return whether a record of the upper bound is of the task and the data of another record."""
    if bound is None:
        return False
    same_task = bound.get("task_hash") == record.get("task_hash")
    return same_task and bound.get("data_hash") == record.get("data_hash")


def split_by_judge(table_records: list[Record]) -> list[list[Record]]:
    """Return the records once for each judge that scored some of them, with those that no judge scored.

    A judge is a model at an address, whatever the port. Records of before may tell of the same cell twice, scored at
    two ports: these may have been two judges, so that they stand in two tables, as they always did.
    """
    judges = _grouped(table_records, judge_of)
    not_judged = judges.pop(None, [])
    groups = []
    for judged in judges.values():
        cells = {(key(record), record["task"]) for record in judged}
        is_twice = len(cells) < len(judged)
        groups += _grouped(judged, _address).values() if is_twice else [judged]
    return [group + not_judged for group in groups] or [table_records]


def _grouped(
    table_records: list[Record], trait: Callable[[Record], str | None]
) -> dict[str | None, list[Record]]:
    """Return records by a trait of theirs, in their order."""
    groups: dict[str | None, list[Record]] = defaultdict(list)
    for record in table_records:
        groups[trait(record)].append(record)
    return groups


def _address(record: Record) -> str:
    """Return the whole address of a record's judge, with its port."""
    return record["config"]["judge"]["url"]


def judge_of(record: Record) -> str | None:
    """Return the name of the judge that scored a record."""
    judge = judge_identity(record["config"].get("judge"))
    return judge and f"judge={judge['model']} at {judge['url']}"


def judge_names(table_records: list[Record]) -> list[str]:
    """Return the judges of a table as its heading names them: with the port, where all records have one."""
    judges = _grouped(table_records, judge_of)
    judges.pop(None, None)
    names = []
    for judge, judged in judges.items():
        model = judge.partition(" at ")[0]
        urls = set(map(_address, judged))
        names.append(f"{model} at {urls.pop()}" if len(urls) == 1 else judge)
    return names
