"""Records of `zipeval bench`: how fast methods are, read and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from zipeval.config.schema import UPPER_BOUND
from zipeval.errors import UsageError

SCHEMA = 1
RESULTS = "results/efficiency"


def read(path: Path) -> dict:
    """Return a record that `bench` wrote, with its `run_id`.

    Raises:
        UsageError: if it is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA or "rows" not in record:
            raise ValueError(f"schema {record['schema']}, this zipeval reads {SCHEMA}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a record of `zipeval bench` ({error}). Move it away."
        ) from error
    return {**record, "run_id": path.stem}


def vanilla_of(record: dict, row: dict) -> dict:
    """Return the upper bound's row at the same batch size."""
    for other in record["rows"]:
        method = other["config"]["method"]["name"]
        if method == UPPER_BOUND and other["batch"] == row["batch"]:
            return other
    raise KeyError(f"{record['run_id']} has no row of {UPPER_BOUND}")


def first(times: dict) -> float:
    """Return the milliseconds to the first token."""
    return times["ttft"]


def total(times: dict) -> float:
    """Return the milliseconds of a whole answer."""
    return times["ttft"] + times["decode"]


def speed_up(record: dict, row: dict, time: Callable[[dict], float]) -> float | None:
    """Return vanilla's time over the row's: the median of the rounds that both have.

    Args:
        record: the record.
        row: one of its rows.
        time: `first` or `total`.
    """
    bound = {times["round"]: time(times) for times in vanilla_of(record, row)["rounds"]}
    ratios = []
    for times in row["rounds"]:
        if times["round"] in bound:
            ratios.append(bound[times["round"]] / time(times))
    return median(ratios) if ratios else None


def limit(record: dict, row: dict) -> float:
    """Return the milliseconds to the first token at the highest rate of operations that was measured."""
    return 1000 * sum(row["flops"].values()) / max(record["matrix_flops"])


def about(record: dict) -> str:
    """Return what the rows of a record have in common, as the heading of their table."""
    settings, resolved = record["settings"], record["resolved"]
    weights = resolved["fingerprint"]
    if settings["init"] == "random":
        weights = "random weights"
    parts = [
        f"{record['model']['name']} ({weights})",
        record["machine"]["device"],
        resolved["dtype"],
        resolved["attn_implementation"],
    ]
    if resolved["quantization"] != "none":
        parts.append(resolved["quantization"])
    if record["compile"]:
        parts.append("compiled")
    parts.append(f"{settings['prompt_tokens']} tokens of text")
    parts.append(f"{settings['new_tokens']} new tokens")
    parts.append(f"medians of {len(record['matrix_flops'])} rounds (quartiles)")
    return ", ".join(parts)
