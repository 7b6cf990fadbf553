"""Tell runs apart. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from zipeval.config.schema import RunConfig
from zipeval.utils.urls import public_url

# Of a run's configuration, what its answers do not depend on: with another batch size the same sweep continues.
CIRCUMSTANCES = ("results", "logger", "batch_size", "runner", "bound")
PORT = re.compile(
    r"^(https?://(?:\[[^\]]*\]|[^/:\[]*)):\d+(?=/|$)"
)  # group 1: what stands before it


def judge_identity(judge: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return which judge a configuration names, whatever port its server listens at.

    A server that is started again, or on another node of a cluster's tunnel, is the same judge at another port.
    """
    if not judge or judge.get("url") is None:
        return judge
    return {**judge, "url": PORT.sub(r"\1", judge["url"])}


def _nodes(name: str, method: dict) -> Iterator[tuple[str, dict]]:
    """A method's node and those of the methods that it is made of."""
    yield name, method
    for option, value in method.items():
        if isinstance(value, dict):
            yield from _nodes(f"{name}.{option}", value)


def run_identity(config: RunConfig) -> str:
    """Return what two runs of a sweep are told apart by, before any checkpoint is looked at."""
    identity = {
        name: value
        for name, value in asdict(config).items()
        if name not in CIRCUMSTANCES
    }
    identity["judge"] = judge_identity(identity["judge"])
    return json.dumps(identity, sort_keys=True)


def run_id(
    config: RunConfig, resolved: dict, judged: bool = False, port: bool = False
) -> str:
    """Return a readable name with a hash of everything the answers depend on: `tiny_llava-visionzip-16-3f9a12c4d0`.

    Args:
        resolved: what `auto`, the paths of weights and the budget came to.
        judged: the judge is part of it.
        port: and so is the port that its server listens at, as in names of before.
    """
    identity = recorded(config, judged)
    if judged and not port:
        identity["judge"] = judge_identity(identity["judge"])
    # A record is per task and holds hashes of its data, wherever they lie; how fast answers come does not change them.
    for name in ("data", "batch_size", "runner"):
        identity.pop(name)
    for name in (
        "path",
        "hub",
        "revision",
    ):  # where the weights came from; the fingerprint says which they are
        identity["model"].pop(name)
    identity["model"] |= resolved | {"device": resolved["device"].partition(":")[0]}
    identity["model"].pop(
        "method"
    )  # follows from the rest; its repr may hold an address
    for _, method in _nodes("method", identity["method"]):
        method.pop("projector", None)  # where it lies; what is in it was resolved
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[
        :10
    ]
    parts = [config.model.name, config.method["name"], config.tokens, digest]
    return "-".join(str(p) for p in parts if p is not None)


def recorded(config: RunConfig, judged: bool = False) -> dict:
    """The part of a configuration that its records keep, the judge where the task has one."""
    settings = asdict(config)
    # A record is per task, whoever else is told of it; the method has the projector.
    for name in ("tasks", "results", "logger", "projector", "bound"):
        settings.pop(name)
    if judged:
        settings["judge"]["url"] = public_url(config.judge.url)
    else:
        settings.pop("judge")
    return settings
