"""The record of a task: lmms-eval asks and scores, and every sample is kept with its cost."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from zipeval import benchmarks
from zipeval.benchmarks import data, lmms_names, stack
from zipeval.benchmarks.protocols import PROTOCOLS, no_key, pending, summary
from zipeval.config.schema import REUSES
from zipeval.engine.logits import NO_NUMBERS, NOT_NUMBERS
from zipeval.errors import RunError, UsageError
from zipeval.evaluation import repeats, task_scores
from zipeval.evaluation.answer_choices import answer_choices
from zipeval.evaluation.task_run import TaskRun, describe_process
from zipeval.inference import generation
from zipeval.results import records
from zipeval.results.schema import Record, Sample
from zipeval.utils import ranks

if TYPE_CHECKING:
    from zipeval.evaluation.chat_model import ZipEval

# Costs of a sample's prompt, averaged in the record.
COSTS = ("prompt_tokens", "kv_entries", "flops_formula", "flops_exact")


def evaluate(
    model: ZipEval, task: str, folder: Path, sessions: Sequence[dict] = ()
) -> tuple[Record, list[Sample]]:
    """Evaluate one task through lmms-eval; returns its record and its samples.

    Args:
        folder: where the task is defined; lmms-eval then has to read nothing else.
        sessions: of the processes that work on it, this one the last.

    Raises:
        UsageError: where none of its samples could be read.
        RunError: where the model's logits were never numbers.
    """
    results = Path(model.session.config.results).expanduser()
    task_run = TaskRun(model.session, task, folder, results)
    return evaluate_task_run(model, task_run, sessions)


def evaluate_task_run(
    model: ZipEval, task_run: TaskRun, sessions: Sequence[dict] = ()
) -> tuple[Record, list[Sample]]:
    """Evaluate a task as `evaluate` does."""
    clock = time.monotonic()
    sessions = sessions or [describe_process(model.session)]
    provenance = task_run.provenance()
    # Data sets are read from local copies, where there are any.
    with data.copies_below(model.session.config.data.root):
        results = lmms_eval_results(model, task_run.task, task_run.folder)
    samples = _samples(model, task_run.task, results)
    # Costs are means over what was answered.
    readable = [sample for sample in samples if "error" not in sample]
    _check_readable(task_run.task, samples, readable)
    record = {
        **provenance,
        # The answers of these are empty.
        "failed": len(samples) - len(readable),
        # Prompts longer than the decoder has positions.
        "overflowed": sum("overflow" in sample for sample in readable),
        **_scores(task_run, results, samples),
        "visual_tokens": _visual_tokens(model, readable),
        "prefill": {cost: fmean(s[cost] for s in readable) for cost in COSTS},
        "generation": generation.recorded(
            *lmms_names.generation(results, task_run.task)
        ),
        **_times(sessions, time.monotonic() - clock),
    }
    return record, samples


def _samples(model: ZipEval, task: str, results: dict) -> list[Sample]:
    """Return lmms-eval's samples of a task as they are kept; takes their costs out of `model.measured`."""
    costs = repeats.by_document(model.measured, task)
    directions = lmms_names.directions(results, task)
    metrics = lmms_names.scores(results, task)
    metric = task_scores.main_metric(task, metrics, directions)
    higher = task_scores.is_higher_better(metric, directions)
    samples = []
    for logged in results["samples"][task]:
        responses = lmms_names.responses(logged)
        # A document may be asked about more than once.
        cost = repeats.merged(costs[logged["doc_id"]], responses)
        samples.append(make_sample(task, logged, cost, metric, higher))
    return samples


def _check_readable(task: str, samples: list[Sample], readable: list[Sample]) -> None:
    """Refuse a task of which no sample was answered: its score would be that of empty answers."""
    if readable:
        return
    error = samples[0]["error"]
    if error == NOT_NUMBERS:
        raise RunError(f"tasks=[{task}]: {NO_NUMBERS.format(len(samples))}")
    raise UsageError(
        f"tasks=[{task}]: none of its {len(samples)} samples could be read: {error}."
    )


def _scores(task_run: TaskRun, results: dict, samples: list[Sample]) -> dict[str, Any]:
    """Return the part of a record that its scores make; what a judge has to score has none yet."""
    task = task_run.task
    scores = (
        summary(task, samples)
        if task_run.is_judged
        else task_scores.scores(task, results, samples)
    )
    follows = task_scores.follows_from_samples(task, samples, scores["score"])
    return {**scores, "from_samples": follows}


def _visual_tokens(model: ZipEval, samples: list[Sample]) -> dict[str, Any]:
    """Return the visual tokens that entered the decoder's layers, over all samples."""
    config = model.session.config
    # [samples, layers]
    counts = [sample["visual_tokens"] for sample in samples]
    return {
        "requested": config.tokens,
        "budget": config.budget,
        # That a crop is cut into.
        "patches": model.session.shape.picture.patches,
        "mean": fmean(map(fmean, counts)),
        "final": fmean(layers[-1] for layers in counts),
        "entering": list(map(fmean, zip(*counts, strict=True))),
    }


def _times(sessions: Sequence[dict], seconds: float) -> dict[str, Any]:
    """Return when, for how long and by what a task was answered.

    Args:
        seconds: that the last of the sessions took; the others have theirs.
    """
    *earlier, last = sessions
    sessions = [*earlier, {**last, "seconds": round(seconds, 2)}]
    return {
        # The most that any of them shared.
        "reuse": max((entry["reuse"] for entry in sessions), key=REUSES.index),
        "started": sessions[0]["started"],
        # Or when the last verdict came.
        "ended": records.now(),
        "seconds": round(sum(entry["seconds"] for entry in sessions), 2),
        "sessions": sessions,
    }


def lmms_eval_results(model: ZipEval, task: str, folder: Path) -> dict:
    """Evaluate a task with lmms-eval; returns what lmms-eval returns.

    Args:
        folder: where the task is defined.
    """
    from lmms_eval import evaluator

    config, questions = model.session.config, model.session.questions.get(task)
    with ExitStack() as block:
        # lmms-eval's own judges insist on a key, and do not get the user's.
        block.enter_context(no_key())
        # It would divide the questions among the ranks once more.
        block.enter_context(ranks.alone())
        block.enter_context(lmms_names.explained_failures(task, folder))
        # A task's own functions may import what nothing else does.
        block.enter_context(stack.explained("lmms_eval"))
        block.enter_context(lmms_names.patched(questions))
        return evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=lmms_names.task_manager(folder, _replaced_settings(task)),
            limit=config.limit,
            # Our own statistics come from the samples.
            bootstrap_iters=0,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            # Or a seeded guess, as of MMMU, would be another one every time.
            process_docs_parallel=1,
            # Score from the answers alone: otherwise every image is decoded a second time.
            cli_args=argparse.Namespace(
                process_with_media=False, output_path=None, reasoning_tags=None
            ),
        )


def _replaced_settings(task: str) -> dict[str, Any]:
    """Return what a benchmark has in place of settings of lmms-eval's YAML."""
    known = benchmarks.BENCHMARKS.get(task)
    if known is None:
        return {}
    functions = known.functions() if known.functions else {}
    return {**known.settings, **functions}


def make_sample(
    task: str,
    logged: dict,
    cost: repeats.Cost,
    metric: str | None = None,
    higher_is_better: bool = True,
) -> Sample:
    """Return a sample as it is kept: question, answer, scores and what they came of, not the document.

    Args:
        logged: lmms-eval's.
        cost: of its prompt, with the `error` of one that was not answered.
        metric: of which the sample's `score` is the value.
    """
    # Not the document: it holds the picture.
    question, target = lmms_names.question(logged), logged["target"]
    sample = {
        "doc_id": logged["doc_id"],
        "question_hash": _hash_question(question, target),
        "question": question,
        "target": target,
        "prediction": lmms_names.prediction(logged),
        **cost,
    }
    choices = answer_choices(logged.get("doc"))
    if choices:
        sample["choices"] = choices
    if task in PROTOCOLS:
        return pending(task, sample, logged["doc"])
    known = benchmarks.BENCHMARKS.get(task)
    if known and known.sample:
        sample |= known.sample(logged)
    else:
        score = task_scores.sample_value(logged, metric)
        sample |= {"score": score, "scores": _logged_scores(logged, sample)}
    if "error" in sample:
        # An empty answer may be a perfect one where less is better, and no error is the worst.
        sample["score"] = 0.0 if higher_is_better else None
    return sample


def _hash_question(question: str, target: Any) -> str:
    """Return what tells questions apart whose numbers are the same."""
    content = json.dumps([question, target], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _logged_scores(logged: dict, sample: Sample) -> dict[str, Any]:
    """Return the scores among the entries of a logged sample, by the names of the metrics."""
    skipped = {*sample, *lmms_names.NOT_SCORES}
    scores = {}
    for name, value in logged.items():
        if name not in skipped and isinstance(value, (Real, dict)):
            scores[name] = value
    return scores
