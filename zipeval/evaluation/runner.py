"""A run: from a RunConfig to records."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from numbers import Real
from pathlib import Path
from statistics import fmean

from zipeval import benchmarks, methods, models
from zipeval.benchmarks import data, lmms_names, stack
from zipeval.benchmarks.protocols import PROTOCOLS, no_key, pending, summary
from zipeval.checkpoints.placement import machine
from zipeval.config.schema import REUSES, RunConfig
from zipeval.engine.logits import NO_NUMBERS, NOT_NUMBERS
from zipeval.errors import (
    BudgetError,
    NotHereError,
    RunError,
    Stopped,
    TaskLockedError,
    UsageError,
)
from zipeval.evaluation import repeats, task_scores
from zipeval.evaluation.answer_choices import answer_choices
from zipeval.evaluation.resuming import Helped, resumed
from zipeval.evaluation.upper_bound import describe
from zipeval.inference import generation
from zipeval.inference.session import Session
from zipeval.inference.validation import check
from zipeval.reporting import logger
from zipeval.results import journal, records
from zipeval.results.identity import recorded
from zipeval.results.lock import locked
from zipeval.utils import ranks
from zipeval.utils.progress import progress
from zipeval.utils.stopping import stoppable

COSTS = (
    "prompt_tokens",
    "kv_entries",
    "flops_formula",
    "flops_exact",
)  # of a sample's prompt, averaged in the record
JUDGED_AT_ONCE, MOST_WRITES = (
    64,
    50,
)  # answers, between two writes of a task's: verdicts cost money


def check_feasible(
    config: RunConfig, checkpoint: models.Checkpoint | None = None
) -> None:
    """Refuse a run that cannot be, as far as that shows before its weights are loaded.

    Args:
        checkpoint: in place of the one that the configuration names.

    Raises:
        UsageError: as `run` does. For a model that is not on this machine, it tells of data sets that are not here
            either, and of what would be evaluated.
    """
    try:
        _prepare(check(config), checkpoint)
    except NotHereError as error:
        if config.model.embedded:
            raise
        raise UsageError("\nzipeval: ".join(_missing(config, checkpoint))) from error


def _missing(config: RunConfig, checkpoint: models.Checkpoint | None) -> list[str]:
    """Return what has to be fetched before a run, and what the run evaluates then."""
    checks = [] if checkpoint else [partial(models.find, config.model)]
    checks += [partial(data.require, task, config.data.root) for task in config.tasks]
    missing = []
    for check_one in checks:
        try:
            check_one()
        except NotHereError as error:
            missing.append(str(error))
    return [*missing, f"With these, this command evaluates {describe(config)}."]


def _prepare(
    config: RunConfig, checkpoint: models.Checkpoint | None
) -> tuple[Session, dict[str, dict | None], dict[str, Path], Path]:
    """Return a run's session, its records of before, and the folders of its tasks and results; loads no weights.

    Args:
        config: in its normal form.
        checkpoint: in place of the one that the configuration names.

    Raises:
        UsageError: for what cannot run.
    """
    logger.check(config.logger)
    folders = {task: benchmarks.task_folder(task) for task in config.tasks}
    for task in config.tasks:
        benchmarks.check_limit(task, config.limit)
    data.check_root(config.data.root)
    results = records.prepare(config.results)
    session, found = _open(config, folders, results, checkpoint)
    return session, found, folders, results


@ranks.raise_on_all_ranks()
def run(config: RunConfig, checkpoint: models.Checkpoint | None = None) -> list[Path]:
    """Evaluate what is not finished yet; returns the paths of all the run's records, of several ranks in the first.

    Args:
        checkpoint: in place of the one that the configuration names.
    """
    config = check(config)
    session, found, folders, results = _prepare(config, checkpoint)
    judge = _tried_judge(session, found) if ranks.first() else None
    unanswered = ranks.exchange([task for task, record in found.items() if not record])[
        0
    ]
    if not ranks.first():
        return _help(session, {task: folders[task] for task in unanswered}, results)
    written, held = _written(session, found, folders, results, judge)
    if config.logger:
        logger.log(results, written)
    if held:
        raise TaskLockedError("\nzipeval: ".join(map(str, held)))
    return written


def evaluate_run(
    config: RunConfig, checkpoint: models.Checkpoint | None = None
) -> list[str]:
    """Evaluate what is not finished of a run; returns the paths of its records.

    Args:
        checkpoint: in place of the one that the configuration names.

    Raises:
        UsageError, RunError: as the run does, and where answers have no verdict.
    """
    paths = run(config, checkpoint)
    if waiting := [
        str(path) for path in paths if records.incomplete(records.read(path))
    ]:
        raise RunError(
            f"{', '.join(waiting)}: answers have no verdict. Run this again to ask the judge for those."
        )
    return [str(path) for path in paths]


def _written(
    session: Session,
    found: dict[str, dict | None],
    folders: dict[str, Path],
    results: Path,
    judge,
) -> tuple[list[Path], list[TaskLockedError]]:
    """The paths of the records, those made that were not there, and who is at the others."""

    @cache
    def model():
        stack.load(stack.RUN)  # before the weights
        from zipeval.evaluation.chat_model import ZipEval

        return ZipEval(session)

    written, held = [], []
    for task, folder in folders.items():
        directory = results / session.record_id(task)
        path = directory / f"{task}.json"
        try:
            with _turn(session, task, folder, results, found[task]) as record:
                if record and not records.incomplete(record):
                    _keep(session, task, folder, path, record)
                else:
                    if not record:
                        _answer(model(), task, folder, directory)
                        record = records.read(path)
                    if task in PROTOCOLS:
                        record = _judge(judge, directory, record)
                    print(f"{directory.name} {task}: {_outcome(record)} -> {path}")
                written.append(path)
        except TaskLockedError as error:
            held.append(error)
    return written, held


@contextmanager
def _turn(
    session: Session, task: str, folder: Path, results: Path, record: dict | None
) -> Iterator[dict | None]:
    """A block in which a task that is not finished is this process's; yields its record as it is now.

    Raises:
        TaskLockedError: if another process is in such a block.
    """
    if record and not records.incomplete(record):
        yield record
        return
    with ExitStack() as lock:
        try:
            lock.enter_context(
                locked(results / session.record_id(task) / f"{task}.lock")
            )
        except TaskLockedError:
            if not record:
                ranks.exchange(False)  # the others wait to help
            raise
        now = _found(session, task, folder, results)  # finished meanwhile, perhaps
        if not record:
            ranks.exchange(not now)
        yield now


def _keep(session: Session, task: str, folder: Path, path: Path, record: dict) -> None:
    """Say that a finished record stays, and what it was made with if that is not what would make it now."""
    run = path.parent.name
    print(f"{run} {task}: finished before, kept. Delete {path} to run it again.")
    identity = session.known_data_identity(task, folder)
    if identity is None:
        print(
            f"{run} {task}: its data set is not on this machine, so that it was not compared with the record's."
        )
    data_hash = identity.data_hash if identity else record["data_hash"]
    if changed := records.changes(record, _made_with(session, task, folder, data_hash)):
        print(f"{run} {task}: was made with {', '.join(changed)}.")
    journal.remove(path.parent, task)  # of a process that died before it could


def _answer(model, task: str, folder: Path, directory: Path) -> None:
    """Make a task's record, from where an earlier process left it."""
    kept = _journal(model.session, task, folder, directory)
    if kept.done:
        print(
            f"{directory.name} {task}: {len(kept.done)} answers kept from before, going on."
        )
    for note in _generation(task).notes():
        print(f"{directory.name} {task}: its generation setting {note}.")
    with resumed(model, kept) as asked:
        try:
            record, samples = evaluate(model, task, folder, kept.sessions)
        except BudgetError:  # what counted right before is the same method's
            journal.remove(directory, task)
            raise
        images = {
            doc_id: model.images.pop((task, doc_id))
            for of, doc_id in [*model.images]
            if of == task
        }
        records.write(directory, record, samples, images)
        journal.remove(directory, task)
        if asked():
            raise Stopped(
                f"{directory.name} {task}: stopped, every answer is kept. The same command goes on from there."
            )


def _open(
    config: RunConfig,
    folders: dict[str, Path],
    results: Path,
    checkpoint: models.Checkpoint | None,
) -> tuple[Session, dict[str, dict | None]]:
    """The session and by task the record of an earlier run, if there is one; the data of the others are there.

    Only the first rank looks at records, whose data it hashes; the others are told what is left to do.
    """
    # Where no run has a record this one has none either, and is refused before torch is imported.
    new = [task for task in folders if not any(results.glob(f"*/{task}.json"))]
    for task in new:
        data.require(task, config.data.root)
        _generation(task)
    session = Session(config, checkpoint)
    if not ranks.first():
        return session, {}
    found = {
        task: _found(session, task, folder, results) for task, folder in folders.items()
    }
    for task, record in found.items():
        if record is None and task not in new:
            data.require(task, config.data.root)
            _generation(task)
    return session, found


def _generation(task: str) -> generation.Generation:
    """Return how a task's answers are generated, as its YAML says.

    Raises:
        UsageError: for a setting of it that is unknown.
    """
    known = benchmarks.BENCHMARKS.get(task)
    _, file = benchmarks.task_files()[task]
    settings, conversation = lmms_names.generation_settings(
        file, known.settings if known else {}
    )
    return generation.resolve(settings, task, conversation)


def _help(session: Session, folders: dict[str, Path], results: Path) -> list[Path]:
    """What ranks other than the first do of a run: their share of the answers. They write no record."""
    stack.load(stack.RUN)
    from zipeval.evaluation.chat_model import ZipEval

    model = ZipEval(session)
    for task, folder in folders.items():
        if not ranks.exchange(None)[0]:
            continue  # somebody else is at it, or has finished it
        kept = _journal(session, task, folder, results / session.record_id(task))
        with (
            data.copies_below(session.config.data.root),
            suppress(Helped),
            resumed(model, kept),
        ):
            _lmms_eval(model, task, folder)
    return []


def _made_with(
    session: Session, task: str, folder: Path, data_hash: str | None
) -> dict:
    """What a task's answers depend on beyond the run's identity."""
    return {
        "task_hash": session.task_hash(task, folder),
        "data_hash": data_hash,  # None: beside the task, and in its hash
        "code": records.code(methods.modules(session.config.method)),
        "versions": records.versions(),
    }


def _journal(
    session: Session, task: str, folder: Path, directory: Path
) -> journal.Journal:
    """Open a task's journal, in all ranks; the first one says what its answers are made with."""
    made_with = None
    if (
        ranks.first()
    ):  # a hash of all data is the work of minutes, and the same in every rank
        made_with = _made_with(
            session, task, folder, session.data_identity(task, folder).data_hash
        )
    made_with = ranks.exchange(made_with)[0]
    return journal.Journal(directory, task, made_with, _begun(session))


def _begun(session: Session) -> dict:
    """What a record says of every process that answered some of its questions."""
    its = {
        "reuse": session.reuse,
        "processes": ranks.here().count,
        "machine": machine(session.placement),
    }
    return {"started": records.now(), **its}


def _tried_judge(session: Session, found: dict[str, dict | None]):
    """A judge that answers, where one is needed; asked before the model is loaded."""
    waiting = [
        task
        for task, r in found.items()
        if task in PROTOCOLS and (not r or records.incomplete(r))
    ]
    if not waiting:
        return None
    from zipeval.benchmarks.judge import Judge

    judge = Judge(session.config.judge)
    judge.check({PROTOCOLS[task]: None for task in waiting})  # of each kind one
    return judge


def _found(session: Session, task: str, folder: Path, results: Path) -> dict | None:
    """The record of an earlier run, if there is one."""
    path = results / session.record_id(task) / f"{task}.json"
    if not path.exists():
        return None
    record = records.read(path)
    if record["task_hash"] != session.task_hash(task, folder):
        raise UsageError(
            f"{path} is of another version of tasks=[{task}]. Move it away and run this again."
        )
    identity = session.known_data_identity(task, folder)
    if identity and identity.data_hash != record["data_hash"]:
        hashes = f"data_hash {record['data_hash']}, now {identity.data_hash}"
        raise UsageError(
            f"{identity.setting}: {path} is of other data ({hashes}). "
            "Move it away and run this again, or choose another results=DIR."
        )
    return record


def _judge(judge, directory: Path, record: dict) -> dict:
    """The record with what a judge says of its unscored answers, written now and then."""
    record.pop("path")
    task = record["task"]
    samples = records.read_samples(directory, record)
    unscored = [sample for sample in samples if "unscored" in sample]
    at_once = max(JUDGED_AT_ONCE, len(samples) // MOST_WRITES)
    with (
        progress(f"{directory.name} {task} judge", len(unscored)) as advance,
        stoppable() as asked,
    ):
        for start in range(0, len(unscored), at_once):
            try:
                judge.score(PROTOCOLS[task], unscored[start : start + at_once], advance)
            finally:  # also what was judged until an interruption
                scored = summary(task, samples)
                record |= {
                    **scored,
                    "from_samples": _follows(task, samples, scored["score"]),
                    "ended": records.now(),
                }
                records.write(directory, record, samples)
            if asked():
                raise Stopped(
                    f"{directory.name} {task}: stopped, every verdict is kept. The same command goes on."
                )
    return record


def _outcome(record: dict) -> str:
    score = (
        "no score"
        if record["score"] is None
        else f"{record['metric']} {record['score']:.4g}"
    )
    failed = (
        f", {record['failed']} samples could not be read" if record["failed"] else ""
    )
    if record.get("overflowed"):
        failed += (
            f", {record['overflowed']} prompts are longer than the model's positions"
        )
    if not records.incomplete(record):
        return score + failed
    missing = (
        f"{record['unscored']} of {record['samples']['count']} answers have no verdict"
    )
    return f"{score}{failed}, {missing}: run this again to ask the judge for those only"


def evaluate(
    model, task: str, folder: Path, sessions: Sequence[dict] = ()
) -> tuple[dict, list[dict]]:
    """One task through lmms-eval: (record, samples).

    Args:
        model: a ZipEval.
        folder: where the task is defined; lmms-eval then has to read nothing else.
        sessions: of the processes that work on it, this one the last.
    """
    config, clock = model.session.config, time.monotonic()
    sessions = sessions or [_begun(model.session)]
    provenance = _provenance(model.session, task, folder)
    with data.copies_below(config.data.root):
        results = _lmms_eval(model, task, folder)
    costs = repeats.by_document(model.measured, task)
    directions = lmms_names.directions(results, task)
    metric = task_scores.main_metric(task, lmms_names.scores(results, task), directions)
    higher = task_scores.is_higher_better(metric, directions)
    samples = [
        _sample(
            task,
            logged,
            repeats.merged(costs[logged["doc_id"]], lmms_names.responses(logged)),
            metric,
            higher,
        )
        for logged in results["samples"][task]
    ]
    read = [s for s in samples if "error" not in s]
    if not read and samples[0]["error"] == NOT_NUMBERS:
        raise RunError(f"tasks=[{task}]: {NO_NUMBERS.format(len(samples))}")
    if not read:
        raise UsageError(
            f"tasks=[{task}]: none of its {len(samples)} samples could be read: {samples[0]['error']}."
        )
    scored = (
        summary(task, samples) if task in PROTOCOLS else _scored(task, results, samples)
    )
    visual = [s["visual_tokens"] for s in read]
    record = {
        **provenance,
        "failed": len(samples) - len(read),  # their answers are empty
        "overflowed": sum(
            "overflow" in s for s in read
        ),  # prompts longer than the decoder has positions
        **scored,
        "from_samples": _follows(task, samples, scored["score"]),
        "visual_tokens": {
            "requested": config.tokens,
            "budget": config.budget,
            "patches": model.session.shape.picture.patches,  # that a crop is cut into
            "mean": fmean(map(fmean, visual)),
            "final": fmean(v[-1] for v in visual),
            "entering": [fmean(layer) for layer in zip(*visual, strict=True)],
        },
        "prefill": {name: fmean(s[name] for s in read) for name in COSTS},
        "generation": generation.recorded(*lmms_names.generation(results, task)),
    }
    return record | _times(sessions, time.monotonic() - clock), samples


def _times(sessions: Sequence[dict], seconds: float) -> dict:
    """When, for how long and by what a task was answered; the last of the sessions took so many seconds."""
    *earlier, last = sessions
    sessions = [*earlier, {**last, "seconds": round(seconds, 2)}]
    return {
        "reuse": max((its["reuse"] for its in sessions), key=REUSES.index),
        "started": sessions[0]["started"],
        "ended": records.now(),  # or when the last verdict came
        "seconds": round(sum(its["seconds"] for its in sessions), 2),
        "sessions": sessions,
    }


def _provenance(session: Session, task: str, folder: Path) -> dict:
    """What a task was answered with: all that is needed to answer it again, and to trust the answers."""
    config, identity = session.config, session.data_identity(task, folder)
    return {
        "run_id": session.record_id(task),
        "task": task,
        **_made_with(session, task, folder, identity.data_hash),
        "data_revision": identity.revision,  # None: the cache does not tell, or the data is not of the hub
        "model_revision": session.checkpoint.revision,  # None: no commit of the hub, see resolved.fingerprint
        "config": recorded(config, task in PROTOCOLS),
        "resolved": session.resolved,
        "machine": machine(session.placement),
        "processes": ranks.here().count,  # like the first's, each on a device of its own
        "git": records.git_revision(),
    }


def _scored(task: str, results: dict, samples: list[dict]) -> dict:
    """Return the part of a record that lmms-eval's own scores make."""
    return task_scores.scores(task, results, samples)


def _lmms_eval(model, task: str, folder: Path) -> dict:
    """What lmms-eval itself returns."""
    from lmms_eval import evaluator

    config, questions = model.session.config, model.session.questions.get(task)
    known = benchmarks.BENCHMARKS.get(task)
    ours = (
        {**known.settings, **(known.functions() if known.functions else {})}
        if known
        else {}
    )
    with ExitStack() as block:
        block.enter_context(no_key())
        block.enter_context(ranks.alone())
        block.enter_context(lmms_names.explained_failures(task, folder))
        block.enter_context(
            stack.explained("lmms_eval")
        )  # a task's own functions may import what nothing else does
        block.enter_context(lmms_names.patched(questions))
        return evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=lmms_names.task_manager(folder, ours),
            limit=config.limit,
            bootstrap_iters=0,  # our own statistics come from the samples
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            process_docs_parallel=1,  # or a seeded guess, as of MMMU, would be another one every time
            # Score from the answers alone: otherwise every image is decoded a second time.
            cli_args=argparse.Namespace(
                process_with_media=False, output_path=None, reasoning_tags=None
            ),
        )


def _follows(task: str, samples: list[dict], score: float | None) -> bool:
    """Return whether a score follows from its samples' scores, so that it can be checked and intervals be drawn."""
    from zipeval.reporting import stats

    return stats.agrees(task, samples, score)


def _sample(
    task: str,
    logged: dict,
    measured: dict,
    metric: str | None = None,
    higher_is_better: bool = True,
) -> dict:
    """Return what is kept of a sample: question, answer, scores and what they came of, not the document.

    Args:
        metric: of which the sample's `score` is the value.
    """
    known, question = (
        benchmarks.BENCHMARKS.get(task),
        [lmms_names.question(logged), logged["target"]],
    )
    sample = {
        "doc_id": logged["doc_id"],
        "question_hash": hashlib.sha256(
            json.dumps(question, default=str).encode()
        ).hexdigest()[:16],
        "question": lmms_names.question(logged),
        "target": logged["target"],
        "prediction": lmms_names.prediction(logged),
        **measured,
    }
    if choices := answer_choices(logged.get("doc")):
        sample["choices"] = choices
    if task in PROTOCOLS:
        return pending(task, sample, logged["doc"])
    if known and known.sample:
        sample |= known.sample(logged)
    else:
        skipped = {*sample, *lmms_names.NOT_SCORES}
        scores = {
            k: v
            for k, v in logged.items()
            if k not in skipped and isinstance(v, (Real, dict))
        }
        sample |= {"score": task_scores.sample_value(logged, metric), "scores": scores}
    if (
        "error" in sample
    ):  # an empty answer may be a perfect one where less is better, and no error is the worst
        sample["score"] = 0.0 if higher_is_better else None
    return sample
