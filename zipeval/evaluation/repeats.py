"""What a sample cost whose question was answered more than once, or that asks more than one."""

from __future__ import annotations

from typing import Any

from zipeval.benchmarks.lmms_names import RequestKey

Cost = dict[str, Any]
ALWAYS = (
    "output_tokens",
    "latency",
    "batch",
)  # told of every answer; the rest where it differs from the first's


def by_document(measured: dict[RequestKey, Cost], task: str) -> dict[int, list[Cost]]:
    """Take the costs of a task's requests out of `measured`.

    Returns:
        By doc_id, in the order of its requests.
    """
    costs: dict[int, list[Cost]] = {}
    for key in sorted(key for key in measured if key.task == task):
        costs.setdefault(key.doc_id, []).append(measured.pop(key))
    return costs


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
    first = failed or costs[0]
    answers = [
        {
            "text": text,
            **{
                name: cost[name]
                for name in cost
                if name in ALWAYS or cost[name] != first.get(name)
            },
        }
        for text, cost in zip(texts, costs, strict=True)
    ]
    if failed:
        return {**failed, "answers": answers}
    # A sample's share of its batch's seconds is `latency` / `batch`.
    seconds = sum(cost["latency"] / cost["batch"] for cost in costs) * first["batch"]
    return {
        **first,
        "output_tokens": sum(cost["output_tokens"] for cost in costs),
        "latency": seconds,
        "answers": answers,
    }
