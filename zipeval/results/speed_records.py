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
    """A record that `bench` wrote, with its `run_id`.

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
    """The upper bound's row at the same batch size."""
    rows = (other for other in record["rows"] if other["batch"] == row["batch"])
    return next(
        other for other in rows if other["config"]["method"]["name"] == UPPER_BOUND
    )


def first(times: dict) -> float:
    """Milliseconds to the first token."""
    return times["ttft"]


def total(times: dict) -> float:
    """Milliseconds of a whole answer."""
    return times["ttft"] + times["decode"]


def speed_up(record: dict, row: dict, of: Callable[[dict], float]) -> float | None:
    """Median over the rounds that both have of vanilla's time over the row's."""
    bound = {times["round"]: of(times) for times in vanilla_of(record, row)["rounds"]}
    ratios = [
        bound[times["round"]] / of(times)
        for times in row["rounds"]
        if times["round"] in bound
    ]
    return median(ratios) if ratios else None


def limit(record: dict, row: dict) -> float:
    """Milliseconds to the first token if every operation took place at the highest rate that was measured."""
    return 1000 * sum(row["flops"].values()) / max(record["matrix_flops"])


def about(record: dict) -> str:
    """What its rows have in common."""
    settings, resolved = record["settings"], record["resolved"]
    weights = (
        "random weights" if settings["init"] == "random" else resolved["fingerprint"]
    )
    said = [
        f"{record['model']['name']} ({weights})",
        record["machine"]["device"],
        resolved["dtype"],
    ]
    said += [
        resolved["attn_implementation"],
        *[resolved["quantization"]] * (resolved["quantization"] != "none"),
    ]
    said += ["compiled"] * record["compile"]
    said += [
        f"{settings['prompt_tokens']} tokens of text",
        f"{settings['new_tokens']} new tokens",
    ]
    return ", ".join(
        [*said, f"medians of {len(record['matrix_flops'])} rounds (quartiles)"]
    )
