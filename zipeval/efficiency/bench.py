"""`zipeval bench`: the speed of methods beside the model as it is, as a record.

    results/efficiency/MODEL-TIME-DIGEST.json    one file for every run of the command

Inputs are synthetic, weights need not be real: what is computed does not depend on what they show. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from zipeval import models
from zipeval.checkpoints import projector
from zipeval.checkpoints.placement import machine
from zipeval.config.schema import ModelConfig, RunConfig
from zipeval.errors import UsageError
from zipeval.reporting.tables import key
from zipeval.results import records
from zipeval.results.speed_records import (
    RESULTS,
    SCHEMA,
    about,
    first,
    limit,
    speed_up,
    total,
)

if TYPE_CHECKING:
    from zipeval.inference.session import Session

INITS = ("checkpoint", "random")
HEADER = (
    "method",
    "tokens",
    "batch",
    "mean",
    "final",
    "encoder",
    "reducer",
    "projector",
    "prefill",
    "other",
)
HEADER += (
    "TTFT",
    "x vanilla",
    "limit",
    "TTFT/limit",
    "decode/token",
    "total",
    "x vanilla",
    "KV MiB",
    "peak MiB",
)


@dataclass(frozen=True)
class Settings:
    """Declare what is measured.

    Attributes:
        init: whose weights are timed; checkpoint is the model's, random needs none.
        batch (N,...): numbers of prompts in one call.
        new_tokens (N): tokens of an answer.
        prompt_tokens (N): tokens of text in a prompt; at least one is behind the picture.
        repeats (N): rounds, in each of which everything is timed once.
        results (DIR): directory of the records.
    """

    init: str = INITS[0]
    batch: tuple[int, ...] = (1,)
    new_tokens: int = 32
    prompt_tokens: int = 50
    repeats: int = 10
    results: str = RESULTS

    def __post_init__(self):
        if self.init not in INITS:
            raise UsageError(f"init={self.init}: expected one of {', '.join(INITS)}.")
        for name in ("new_tokens", "prompt_tokens", "repeats", "batch"):
            value = getattr(self, name)
            for number in value if name == "batch" else (value,):
                if number < 1:
                    raise UsageError(
                        f"{name}={number}: expected a whole number from 1 up."
                    )


def bench(configs: list[RunConfig], settings: Settings) -> Path:
    """Measure every configuration at every batch size; returns the record's path.

    Args:
        configs: of one model; the first is of vanilla.

    Raises:
        UsageError: for what cannot be measured, before weights are made.
    """
    sessions = _sessions(configs, settings)
    results = records.prepare(settings.results)
    from zipeval.efficiency import timing

    session = sessions[0]
    if settings.init == "random":
        model = models.draw(
            session.config.model, session.placement, session.config.seed
        )
    else:
        model, _ = session.load()
    record = {
        "schema": SCHEMA,
        "started": records.now(),
        "model": asdict(session.config.model),
        "settings": {
            name: value for name, value in asdict(settings).items() if name != "results"
        },
        "resolved": {
            **asdict(session.placement),
            "fingerprint": session.checkpoint.fingerprint,
        },
        "reuse": "none",
        "compile": session.config.runner.compile,
        "machine": machine(session.placement),
        "versions": records.versions(),
        "git": records.git_revision(),
        "status": "interrupted",
    }
    compiles = session.config.runner.compile
    cases = []
    for batch in settings.batch:
        for case_session in sessions:
            row = _row(case_session, batch)
            cases.append(timing.Case(case_session.method, batch, row, compiles))
    record |= {"matrix_flops": [], "rows": [case.row for case in cases]}
    noise = models.family(session.config.model).noise
    inputs = {
        batch: timing.prompts(
            model, noise, batch, settings.prompt_tokens, session.config.seed
        )
        for batch in settings.batch
    }
    try:
        with timing.on(model.device):
            for rate in timing.measure(
                model,
                cases,
                inputs,
                settings.new_tokens,
                settings.repeats,
                session.config.seed,
            ):
                record["matrix_flops"].append(rate)
        record["status"] = "success"
    finally:  # an interrupted command keeps its rounds
        if record["matrix_flops"]:
            path = _write(results, record | {"ended": records.now()})
    return path


def _sessions(configs: list[RunConfig], settings: Settings) -> list[Session]:
    """One for each configuration; those that come to the same are one."""
    from zipeval.inference.session import Session

    config = configs[0].model
    if config.device_map:
        raise UsageError(
            f"model.device_map={config.device_map}: only a model on one device is timed. Leave it out."
        )
    if settings.init == "random" and config.quantization != ModelConfig.quantization:
        raise UsageError(
            f"model.quantization={config.quantization}: weights have to be real for it. Leave out init=."
        )
    checkpoint = (
        models.sketch(config) if settings.init == "random" else models.find(config)
    )
    sessions: list[Session] = []
    for config in configs:
        session = Session(config, checkpoint)
        if settings.init == "random" and session.config.projector:
            raise UsageError(
                f"method={session.config.method['name']}: init=random has no tuned projector. With it a method costs "
                f"the same as method={projector.METHOD}. Time that, or leave out init=."
            )
        _ = session.projector  # refused before weights are made
        if session.config not in [
            other.config for other in sessions
        ]:  # vanilla has no tokens
            sessions.append(session)
    return sessions


def _row(session: Session, batch: int) -> dict:
    config = session.config
    settings = {
        name: getattr(config, name)
        for name in ("method", "tokens", "budget", "packing", "seed")
    }
    requested = {"visual_tokens": {"requested": config.tokens}}
    return {
        "batch": batch,
        "config": settings,
        "method": repr(session.method),
        **requested,
        "rounds": [],
    }


def _write(results: Path, record: dict) -> Path:
    content = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    path = (
        results
        / f"{record['model']['name']}-{record['started'][:19].replace(':', '')}-{digest}.json"
    )
    records.atomic_write(path, content)
    return path


def render(record: dict) -> str:
    """The record as a Markdown table."""
    from zipeval.reporting.render import aligned

    lines = [_line(record, row) for row in record["rows"]]
    rate = max(record["matrix_flops"]) / 1e12
    return "\n".join(
        [
            f"{about(record)}\n",
            *aligned([list(HEADER), *lines]),
            "",
            "ms, of a whole batch. TTFT: from the inputs on the device to the first token, the sum of the stages "
            "before it; x vanilla: how many times faster, median of the rounds; limit: FLOPs of encoder, projector and "
            f"decoder at {rate:.3g} TFLOP/s, the rate of large matrix products in this run; total: of all new tokens; "
            "peak: over the weights.",
            *(
                f"{key(row)[0]}, batch {row['batch']}: {row['failed']}."
                for row in record["rows"]
                if "failed" in row
            ),
        ]
    )


def _line(record: dict, row: dict) -> list[str]:
    (label, tokens), rounds, counts = key(row), row["rounds"], row["visual_tokens"]
    head = [label, "all" if tokens is None else str(tokens), str(row["batch"])]
    head += [_number(counts.get(name)) for name in ("mean", "final")]
    if not rounds:
        return head + ["-"] * (len(HEADER) - len(head))

    def middle(of: Callable[[dict], float]) -> float:
        return median(map(of, rounds))

    def times_vanilla(of: Callable[[dict], float]) -> str:
        ratio = speed_up(record, row, of)
        return "-" if ratio is None else f"{ratio:.2f}x"

    stages = [
        _number(middle(lambda times, stage=stage: times[stage]))
        for stage in HEADER[5:10]
    ]
    # Of a single round there are no quartiles: it is all of them.
    low, _, high = quantiles(
        [*map(first, rounds)] * (1 + (len(rounds) == 1)), method="inclusive"
    )
    least, steps = limit(record, row), record["settings"]["new_tokens"] - 1
    peak = max(
        (times["peak_bytes"] for times in rounds if times["peak_bytes"] is not None),
        default=None,
    )
    return [
        *head,
        *stages,
        f"{_number(middle(first))} ({_number(low)}-{_number(high)})",
        times_vanilla(first),
        _number(least),
        f"{middle(first) / least:.2f}",
        _number(middle(lambda times: times["decode"] / steps) if steps else None),
        _number(middle(total)),
        times_vanilla(total),
        _number(row["kv_bytes"] / 2**20),
        _number(None if peak is None else peak / 2**20),
    ]


def _number(value: float | None) -> str:
    """Three digits at least, one behind the point."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
