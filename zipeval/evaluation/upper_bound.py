"""The upper bound of a run: the model without reduction, on the same samples. Percentages are shares of its score."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from zipeval.benchmarks import BENCHMARKS
from zipeval.config.schema import BUDGETS, PACKINGS, UPPER_BOUND, RunConfig
from zipeval.inference.validation import check
from zipeval.results.identity import run_identity

# A run's overrides that say how it reduces tokens, which its upper bound does not do.
OF_THE_METHOD = ("method", "tokens", "budget", "packing", "projector", "seed")

Composed = tuple[list[str], RunConfig]


def upper_bound(config: RunConfig) -> RunConfig | None:
    """Return the configuration whose scores are the upper bound of another one's.

    Returns:
        None for a run that is an upper bound itself, and where bound=none leaves it out.
    """
    if config.bound == "none" or config.method["name"] == UPPER_BOUND:
        return None
    # Without a budget, a projector and a seed: one bound serves every budget and every draw of a method.
    return replace(
        config,
        method=dict(_vanilla()),
        tokens=None,
        budget=BUDGETS[0],
        packing=PACKINGS[0],
        projector=None,
        seed=RunConfig.seed,
    )


@cache
def _vanilla() -> dict[str, Any]:
    """Return the method's node, as Hydra composes it."""
    from omegaconf import OmegaConf

    import zipeval.configs

    file = Path(zipeval.configs.__path__[0], "method", f"{UPPER_BOUND}.yaml")
    return OmegaConf.to_container(OmegaConf.load(file))


def with_upper_bounds(runs: Iterable[Composed]) -> list[Composed]:
    """Return the runs of a sweep with the upper bounds that are not among them, each before the first that needs it.

    Args:
        runs: overrides and configuration of every run.
    """
    runs = list(runs)
    present = {run_identity(_normal(config)) for _, config in runs}
    completed: list[Composed] = []
    for overrides, config in runs:
        bound = upper_bound(config)
        # Runs that differ by their method alone share one bound.
        identity = bound and run_identity(_normal(bound))
        if identity and identity not in present:
            present.add(identity)
            completed.append((bound_overrides(overrides), bound))
        completed.append((overrides, config))
    return completed


def _normal(config: RunConfig) -> RunConfig:
    """Return a configuration in its normal form, or as it is where it will be refused."""
    from zipeval.errors import UsageError

    try:
        return check(config)
    except UsageError:
        return config


def bound_overrides(overrides: list[str]) -> list[str]:
    """Return the command line of a run's upper bound."""
    shared = []
    for override in overrides:
        # Of +method.K=3 or method@other=x: method.
        name = re.match(r"[+~]*([^=@.]*)", override)[1]
        if name not in OF_THE_METHOD:
            shared.append(override)
    return [*shared, f"method={UPPER_BOUND}"]


def describe(config: RunConfig) -> str:
    """Return in a line what `zipeval run` evaluates: the methods, the tasks and the number of their samples."""
    from zipeval.results.samples import count

    runs = [f"{UPPER_BOUND} (the upper bound)"] if upper_bound(config) else []
    budget = "" if config.tokens is None else f" {config.tokens}"
    runs.append(f"{config.method['name']}{budget}")
    tasks = []
    for task in config.tasks:
        column = BENCHMARKS[task].column if task in BENCHMARKS else task
        # Tasks of one's own may be of any number of samples.
        samples = count(task, config)
        tasks.append(column if samples is None else f"{column} ({samples:,} samples)")
    return f"{config.model.name}: {' and '.join(runs)} on {', '.join(tasks)}"
