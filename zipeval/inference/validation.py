"""Refuse configurations that cannot be evaluated, as far as that shows without a checkpoint. Imports nothing heavy."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from functools import reduce

from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.benchmarks.videoqa import SETS
from zipeval.checkpoints import projector
from zipeval.config.schema import BUDGETS, CHOICES, PACKINGS, RunConfig, with_tasks
from zipeval.errors import UsageError
from zipeval.results.identity import _nodes
from zipeval.utils.urls import public_url

ADDRESS = re.compile(
    r"https?://([^/@?#\s]*@)?([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^@?#\s]*)?"
)


def check(config: RunConfig) -> RunConfig:
    """Refuse what can be refused without looking at a checkpoint; returns the config in its normal form.

    Raises:
        UsageError: for a value out of range.
    """
    config = with_tasks(config)
    _check_numbers(config)
    for name, choices in CHOICES.items():
        value = reduce(getattr, name.split("."), config)
        if value not in choices:
            raise UsageError(
                f"{name}={value}: expected one of {', '.join(c or 'null' for c in choices)}."
            )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.model.device):
        raise UsageError(
            f"model.device={config.model.device}: expected auto, cpu, cuda or cuda:N."
        )
    if config.model.device_map and config.model.device != "auto":
        raise UsageError(
            f"model.device={config.model.device}: model.device_map=auto takes all GPUs. Set one of the two."
        )
    if not config.tasks:
        raise UsageError(
            "tasks=[]: name at least one task, such as tasks=[zipeval_shapes], or a suite=."
        )
    return _with_projector(_with_budget(_with_judge(config)))


def _check_numbers(config: RunConfig) -> None:
    for name in ("tokens", "limit", "batch_size"):
        value, auto = getattr(config, name), name == "batch_size"
        if value != ("auto" if auto else None) and not (
            type(value) is int and value > 0
        ):
            also = ", or auto" if auto else ""
            raise UsageError(
                f"{name}={value}: expected a whole number from 1 up, such as {name}=16{also}."
            )
    for name in ("workers", "cache_gib"):
        value = getattr(config.runner, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"runner.{name}={value}: expected a number from 0 up.")
    if not 0 <= config.seed < 2**32:
        raise UsageError(
            f"seed={config.seed}: expected a whole number from 0 to {2**32 - 1}."
        )


def _with_judge(config: RunConfig) -> RunConfig:
    """With the judge's address in its normal form; refuses what judged tasks and the video tasks lack."""
    judge, judged = config.judge, [task for task in config.tasks if task in PROTOCOLS]
    if judge.url is not None:
        url = judge.url.strip().rstrip("/").removesuffix("/chat/completions")
        if not ADDRESS.fullmatch(url):
            raise UsageError(
                f"judge.url={public_url(url)}: expected an address, such as http://localhost:8000/v1."
            )
        judge = replace(judge, url=url)
    if judged and not (judge.url and judge.model):
        raise UsageError(
            f"tasks=[{judged[0]}]: a judge model scores its answers. Set judge.url= (an OpenAI-compatible server, "
            "such as judge.url=http://localhost:8000/v1) and judge.model=; its key goes into the environment as "
            "OPENAI_API_KEY."
        )
    videos = [task for task in config.tasks if task in SETS]
    if videos and not config.data.videos:
        raise UsageError(
            f"tasks=[{videos[0]}]: its videos are not on the hub. Set data.videos=DIR: see docs/benchmarks.md."
        )
    return replace(config, judge=judge)


def _with_budget(config: RunConfig) -> RunConfig:
    options = {
        k: v for k, v in config.method.items() if k not in ("name", "_target_", "seed")
    }
    if "tokens" not in options:
        # Without a budget, as vanilla: one run for a whole sweep.
        return replace(config, tokens=None, budget=BUDGETS[0], packing=PACKINGS[0])
    if config.tokens is None:
        config = replace(config, budget=BUDGETS[0])  # nothing that it could count
    for where, method in _nodes("method", config.method):
        if method.get("seed", config.seed) != config.seed:
            raise UsageError(
                f"{where}.seed={method['seed']}: the seed of everything is set by seed={method['seed']}."
            )
    if options["tokens"] != config.tokens:
        raise UsageError(
            f"method.tokens={options['tokens']}: the budget is set by tokens={options['tokens']}."
        )
    if all(v is None for v in options.values()):
        raise UsageError(
            f"tokens is not set: method={config.method['name']} needs a budget, such as tokens=16."
        )
    return config


def _with_projector(config: RunConfig) -> RunConfig:
    """With the place of a tuned projector where the method has one, and without where it has none."""
    method, path = deepcopy(config.method), None
    for where, node in _nodes("method", method):
        if "projector" not in node:
            continue
        if node["projector"] != config.projector:
            raise UsageError(
                f"{where}.projector={node['projector']}: set by projector={node['projector']}."
            )
        path = node["projector"] = config.projector or str(
            projector.place(config.model.name, node["tokens"])
        )
    return replace(config, method=method, projector=path)
