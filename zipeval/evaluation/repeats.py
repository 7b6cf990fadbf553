"""The cost of a sample whose question was answered more than once, or that asks more than one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from zipeval.benchmarks.lmms_names import RequestKey

Cost = dict[str, Any]
# Fields that every answer states; the others only where they differ from the first's.
ALWAYS = ("output_tokens", "latency", "batch")


def by_document(measured: dict[RequestKey, Cost], task: str) -> dict[int, list[Cost]]:
    """Take the costs of a task's requests out of `measured`.

    Returns:
        By doc_id, in the order of its requests.
    """
    costs: dict[int, list[Cost]] = defaultdict(list)
    for key in sorted(measured):
        if key.task == task:
            costs[key.doc_id].append(measured.pop(key))
    return dict(costs)


def merged(costs: list[Cost], texts: list[Any]) -> Cost:
    """Return what a sample cost.

    That of its only answer; of several the first one's prompt, all tokens and seconds, and every answer with its own.
    A sample has failed where one of its answers has, since no score is right that counts an answer that is not there;
    the record then tells of the others all the same.

    Args:
        costs: those of its requests.
        texts: their answers, before any filter.
    """
    if len(costs) == 1:
        return costs[0]
    failed = next((cost for cost in costs if "error" in cost), None)
    # The others are told apart from it.
    first = failed or costs[0]
    answers = []
    for text, cost in zip(texts, costs, strict=True):
        answers.append({"text": text, **_own_fields(cost, first)})
    if failed:
        return {**failed, "answers": answers}
    seconds, output_tokens = 0.0, 0
    for cost in costs:
        # A sample's share of its batch's seconds is `latency` / `batch`.
        seconds += cost["latency"] / cost["batch"]
        output_tokens += cost["output_tokens"]
    return {
        **first,
        "output_tokens": output_tokens,
        "latency": seconds * first["batch"],
        "answers": answers,
    }


def _own_fields(cost: Cost, first: Cost) -> Cost:
    """Return what an answer's cost says beyond that of the first one."""
    fields = {}
    for name, value in cost.items():
        if name in ALWAYS or value != first.get(name):
            fields[name] = value
    return fields
