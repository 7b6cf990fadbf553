"""Refuse configurations that cannot be evaluated, as far as that shows without a checkpoint. Imports nothing heavy."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from operator import attrgetter
from typing import Any

from zipeval.benchmarks.protocols import PROTOCOLS
from zipeval.benchmarks.videoqa import SETS
from zipeval.checkpoints import projector
from zipeval.config.schema import BUDGETS, CHOICES, PACKINGS, RunConfig, with_tasks
from zipeval.errors import UsageError
from zipeval.results.identity import _nodes
from zipeval.utils.urls import public_url

# http://HOST:PORT/PATH, also with a user's name; IPv6 hosts stand in brackets.
ADDRESS = re.compile(
    r"https?://([^/@?#\s]*@)?([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[^@?#\s]*)?"
)
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
# Entries of a method's node that say nothing of how it reduces.
NOT_OPTIONS = ("name", "_target_", "seed")
# Settings that are counts, with the one value beside numbers that each may have, and a hint of it.
COUNTS = {
    "tokens": (None, ""),
    "limit": (None, ""),
    "batch_size": ("auto", ", or auto"),
}


def check(config: RunConfig) -> RunConfig:
    """Refuse what can be refused without looking at a checkpoint; returns the config in its normal form.

    Raises:
        UsageError: for a value out of range.
    """
    config = with_tasks(config)
    _check_numbers(config)
    _check_choices(config)
    _check_device(config)
    if not config.tasks:
        raise UsageError(
            "tasks=[]: name at least one task, such as tasks=[zipeval_shapes], or a suite=."
        )
    config = _with_judge(config)
    _check_videos(config)
    return _with_projector(_with_budget(config))


def _check_choices(config: RunConfig) -> None:
    for name, choices in CHOICES.items():
        value = attrgetter(name)(config)
        if value not in choices:
            expected = ", ".join(choice or "null" for choice in choices)
            raise UsageError(f"{name}={value}: expected one of {expected}.")


def _check_device(config: RunConfig) -> None:
    device = config.model.device
    if not DEVICE.fullmatch(device):
        raise UsageError(f"model.device={device}: expected auto, cpu, cuda or cuda:N.")
    if config.model.device_map and device != "auto":
        raise UsageError(
            f"model.device={device}: model.device_map=auto takes all GPUs. Set one of the two."
        )


def _check_numbers(config: RunConfig) -> None:
    for name, (word, hint) in COUNTS.items():
        value = getattr(config, name)
        # `type`, because True is an int for isinstance.
        is_count = type(value) is int and value > 0
        if value != word and not is_count:
            raise UsageError(
                f"{name}={value}: expected a whole number from 1 up, such as {name}=16{hint}."
            )
    for name in ("workers", "cache_gib"):
        value = getattr(config.runner, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"runner.{name}={value}: expected a number from 0 up.")
    # What numpy takes as a seed.
    if not 0 <= config.seed < 2**32:
        raise UsageError(
            f"seed={config.seed}: expected a whole number from 0 to {2**32 - 1}."
        )


def _with_judge(config: RunConfig) -> RunConfig:
    """Return the configuration with the judge's address in its normal form; refuses what judged tasks lack."""
    judge = config.judge
    if judge.url is not None:
        url = judge.url.strip().rstrip("/").removesuffix("/chat/completions")
        if not ADDRESS.fullmatch(url):
            raise UsageError(
                f"judge.url={public_url(url)}: expected an address, such as http://localhost:8000/v1."
            )
        judge = replace(judge, url=url)
    # What a task needs is refused before any is answered.
    judged = next(filter(PROTOCOLS.__contains__, config.tasks), None)
    if judged and not (judge.url and judge.model):
        raise UsageError(
            f"tasks=[{judged}]: a judge model scores its answers. Set judge.url= (an OpenAI-compatible server, "
            "such as judge.url=http://localhost:8000/v1) and judge.model=; its key goes into the environment as "
            "OPENAI_API_KEY."
        )
    return replace(config, judge=judge)


def _check_videos(config: RunConfig) -> None:
    about_videos = next(filter(SETS.__contains__, config.tasks), None)
    if about_videos and not config.data.videos:
        raise UsageError(
            f"tasks=[{about_videos}]: its videos are not on the hub. Set data.videos=DIR: see docs/benchmarks.md."
        )


def method_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of a run's method that say how it reduces."""
    return {k: v for k, v in config.method.items() if k not in NOT_OPTIONS}


def _with_budget(config: RunConfig) -> RunConfig:
    """Return the configuration without a budget where its method takes none; refuses one that is set twice."""
    options = method_options(config)
    if "tokens" not in options:
        # Without a budget, as vanilla: one run for a whole sweep.
        return replace(config, tokens=None, budget=BUDGETS[0], packing=PACKINGS[0])
    if config.tokens is None:
        # There is nothing that another kind of budget could count.
        config = replace(config, budget=BUDGETS[0])
    # Chains hold methods within methods, each with a seed of its own in its node.
    for where, method in _nodes("method", config.method):
        seed = method.get("seed", config.seed)
        if seed != config.seed:
            raise UsageError(
                f"{where}.seed={seed}: the seed of everything is set by seed={seed}."
            )
    tokens = options["tokens"]
    if tokens != config.tokens:
        raise UsageError(
            f"method.tokens={tokens}: the budget is set by tokens={tokens}."
        )
    # None of the options is set, the budget among them.
    if options == dict.fromkeys(options):
        raise UsageError(
            f"tokens is not set: method={config.method['name']} needs a budget, such as tokens=16."
        )
    return config


def _with_projector(config: RunConfig) -> RunConfig:
    """Return the configuration with the path of a tuned projector where the method has one, and no path otherwise."""
    # The caller's configuration stays as it was composed.
    method, path = deepcopy(config.method), None
    for where, node in _nodes("method", method):
        if "projector" not in node:
            continue
        if node["projector"] != config.projector:
            raise UsageError(
                f"{where}.projector={node['projector']}: set by projector={node['projector']}."
            )
        path = config.projector
        if not path:
            path = str(projector.place(config.model.name, node["tokens"]))
        node["projector"] = path
    return replace(config, method=method, projector=path)
