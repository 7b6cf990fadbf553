"""Samples a second of a whole task: zipeval against lmms-eval's own LLaVA model on the same weights and questions.

    python scripts/bench_lmms_eval.py PAIRS LIMIT [OVERRIDE ...]
    python scripts/bench_lmms_eval.py 5 128
    python scripts/bench_lmms_eval.py 5 128 batch_size=64

Theirs is `llava_hf` as a chat model, which takes one question at a time. Both are loaded before; an evaluation is all
of lmms-eval's: reading the task, asking, scoring. Ours counts tokens and writes none of them. The two take turns, their
prompts and answers have to be the same (model.prompt=hf), and the first pair only warms up.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from statistics import median
from types import ModuleType

from zipeval import benchmarks
from zipeval.config.compose import compose
from zipeval.evaluation.chat_model import ZipEval
from zipeval.evaluation.task_record import lmms_eval_results
from zipeval.inference.session import Session
from zipeval.utils.foreign_patches import _hidden_bar


def builtin(session: Session):
    """lmms-eval's own model with the session's weights, device and numbers."""
    try:
        import_module("decord")
    except ModuleNotFoundError:  # they need it for videos, of which there are none here
        sys.modules["decord"] = stand_in = ModuleType("decord")
        stand_in.VideoReader = stand_in.cpu = None
    from lmms_eval.models.chat import llava_hf

    llava_hf.tqdm = partial(_hidden_bar, llava_hf.tqdm)

    class Kept(llava_hf.LlavaHf):
        def clean(self) -> None:
            """Keep the model: lmms-eval would delete it after its first evaluation."""

    placement = session.placement
    model = Kept(
        pretrained=str(session.checkpoint.path),
        device=placement.device,
        device_map=placement.device,  # their default, an empty one, is what transformers refuses
        dtype=placement.dtype,
        attn_implementation=placement.attn_implementation,
    )
    model.session = session  # what lmms_eval_results reads its settings from
    return model


def main(pairs: int, limit: int, overrides: list[str]) -> None:
    session = Session(
        compose([f"limit={limit}", "method=vanilla", "model.prompt=hf", *overrides])
    )
    (task,) = session.config.tasks
    folder = benchmarks.task_folder(task)
    ours, theirs = ZipEval(session), builtin(session)

    def evaluated(model) -> tuple[float, list[str]]:
        """(samples a second, answers)"""
        start = time.perf_counter()
        samples = lmms_eval_results(model, task, folder)["samples"][task]
        return len(samples) / (time.perf_counter() - start), [
            s["filtered_resps"][0].strip() for s in samples
        ]

    rates: list[tuple[float, float]] = []
    for pair in range(pairs + 1):
        (our_rate, our_answers), (their_rate, their_answers) = in_turn(
            evaluated, ours, theirs, pair
        )
        if our_answers != their_answers:
            differ = [
                i
                for i, its in enumerate(zip(our_answers, their_answers, strict=True))
                if its[0] != its[1]
            ]
            sys.exit(
                f"answers differ: {[(i, our_answers[i], their_answers[i]) for i in differ[:5]]}"
            )
        warm = "" if pair else "  (warm-up)"
        print(
            f"zipeval {our_rate:7.1f}, llava_hf {their_rate:7.1f} samples/s{warm}",
            flush=True,
        )
        rates += [(our_rate, their_rate)] * bool(pair)
    ratios = [a / b for a, b in rates]
    ours_median, theirs_median = (median(column) for column in zip(*rates, strict=True))
    print(
        f"{task}, {limit} questions, {len(set(our_answers))} different answers, all the same: "
        f"median {ours_median:.1f} against {theirs_median:.1f} samples/s, "
        f"{median(ratios):.2f}x (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


def in_turn(function: Callable, first, second, turn: int) -> tuple:
    """Its results for both, called in this order or, every other turn, in the other one."""
    if turn % 2:
        later, earlier = function(second), function(first)
        return earlier, later
    return function(first), function(second)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
