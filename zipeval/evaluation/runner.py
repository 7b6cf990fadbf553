"""A run: from a RunConfig to records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from zipeval import benchmarks, models
from zipeval.benchmarks import data, lmms_names, stack
from zipeval.config.schema import RunConfig
from zipeval.errors import (
    BudgetError,
    NotHereError,
    RunError,
    Stopped,
    TaskLockedError,
    UsageError,
)
from zipeval.evaluation import judging
from zipeval.evaluation.resuming import ShareAnswered, resumed
from zipeval.evaluation.task_record import (
    evaluate,
    evaluate_task_run,
    lmms_eval_results,
)
from zipeval.evaluation.task_run import TaskRun
from zipeval.evaluation.upper_bound import describe
from zipeval.inference import generation
from zipeval.inference.session import Session
from zipeval.inference.validation import check
from zipeval.reporting import logger
from zipeval.results import journal, records
from zipeval.results.lock import locked
from zipeval.results.schema import Record
from zipeval.utils import ranks

if TYPE_CHECKING:
    from zipeval.benchmarks.judge import Judge
    from zipeval.evaluation.chat_model import ZipEval

__all__ = ["check_feasible", "evaluate", "evaluate_run", "run"]


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
    # All that is missing is told at once, and not one thing for each try.
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
) -> tuple[Session, list[TaskRun], dict[str, Record | None]]:
    """Return a run's session, its tasks, and by task the records of before; loads no weights.

    Args:
        config: in its normal form.
        checkpoint: in place of the one that the configuration names.

    Raises:
        UsageError: for what cannot run.
    """
    logger.check(config.logger)
    # Cheap checks first: nothing here imports torch.
    folders = {task: benchmarks.task_folder(task) for task in config.tasks}
    for task in config.tasks:
        benchmarks.check_limit(task, config.limit)
    data.check_root(config.data.root)
    results = records.prepare(config.results)
    # Where no run has a record this one has none either, and is refused before torch is imported.
    new = [task for task in folders if not any(results.glob(f"*/{task}.json"))]
    _require_tasks(new, config)
    session = Session(config, checkpoint)
    task_runs = []
    for task, folder in folders.items():
        task_runs.append(TaskRun(session, task, folder, results))
    # Only the first rank looks at records, whose data it hashes; the others are told what is left to do.
    if not ranks.first():
        return session, task_runs, {}
    earlier = {task_run.task: task_run.find_record() for task_run in task_runs}
    unfinished = [task for task, record in earlier.items() if record is None]
    _require_tasks([task for task in unfinished if task not in new], config)
    return session, task_runs, earlier


def _require_tasks(tasks: list[str], config: RunConfig) -> None:
    """Check that the data of tasks is on this machine, and that their settings are known.

    Raises:
        UsageError: where they are not.
    """
    for task in tasks:
        data.require(task, config.data.root)
        _generation(task)


@ranks.raise_on_all_ranks()
def run(config: RunConfig, checkpoint: models.Checkpoint | None = None) -> list[Path]:
    """Evaluate what is not finished yet; returns the paths of all the run's records, of several ranks in the first.

    Args:
        checkpoint: in place of the one that the configuration names.
    """
    config = check(config)
    session, task_runs, earlier = _prepare(config, checkpoint)
    judge = judging.tried_judge(config.judge, earlier) if ranks.first() else None
    new = [task for task, record in earlier.items() if not record]
    # What the first rank looked up.
    unanswered = ranks.exchange(new)[0]
    if not ranks.first():
        return _help(session, [each for each in task_runs if each.task in unanswered])
    written, locks = _finish_all(session, task_runs, earlier, judge)
    # Also where other processes are still at some of the tasks.
    if config.logger:
        logger.log(task_runs[0].results, written)
    if locks:
        raise TaskLockedError("\nzipeval: ".join(map(str, locks)))
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
    # A judge that fails on some answers leaves the others scored.
    waiting = [path for path in paths if records.incomplete(records.read(path))]
    if waiting:
        names = ", ".join(map(str, waiting))
        raise RunError(
            f"{names}: answers have no verdict. Run this again to ask the judge for those."
        )
    return list(map(str, paths))


def _load_model(session: Session) -> ZipEval:
    """Return the session's model as lmms-eval talks to it."""
    # What a run imports is tried before the weights are read.
    stack.load(stack.RUN)
    from zipeval.evaluation.chat_model import ZipEval

    return ZipEval(session)


def _finish_all(
    session: Session,
    task_runs: list[TaskRun],
    earlier: dict[str, Record | None],
    judge: Judge | None,
) -> tuple[list[Path], list[TaskLockedError]]:
    """Finish all tasks of a run that no other process is at.

    Returns:
        The paths of the records, and who is at the other tasks.
    """
    # Loaded once, and not at all where every task is finished.
    load_model = cache(partial(_load_model, session))
    written, locks = [], []
    for task_run in task_runs:
        try:
            with _locked_task(task_run, earlier[task_run.task]) as record:
                _finish(task_run, record, load_model, judge)
                written.append(task_run.path)
        except TaskLockedError as error:
            locks.append(error)
    return written, locks


def _finish(
    task_run: TaskRun,
    record: Record | None,
    load_model: Callable[[], ZipEval],
    judge: Judge | None,
) -> None:
    """Answer and judge what a task's record lacks.

    Args:
        record: of before; None: there is none.
    """
    if _is_finished(record):
        _keep(task_run, record)
        return
    if not record:
        # Behind the lock: the model may take minutes, and another process would begin, too.
        _answer(load_model(), task_run)
        record = records.read(task_run.path)
    if task_run.is_judged:
        record = judging.judge_record(judge, task_run.directory, record)
    print(f"{task_run.label}: {_outcome(record)} -> {task_run.path}")


def _is_finished(record: Record | None) -> bool:
    return bool(record) and not records.incomplete(record)


@contextmanager
def _locked_task(task_run: TaskRun, record: Record | None) -> Iterator[Record | None]:
    """Lock a task that is not finished within the block; yields its record as it is then.

    Args:
        record: as it was before.

    Raises:
        TaskLockedError: if another process is in such a block.
    """
    if _is_finished(record):
        yield record
        return
    with ExitStack() as lock:
        try:
            lock.enter_context(locked(task_run.lock_path))
        except TaskLockedError:
            if not record:
                # The others wait to help.
                ranks.exchange(False)
            raise
        # Another process may have finished it meanwhile.
        current = task_run.find_record()
        if not record:
            ranks.exchange(not current)
        yield current


def _keep(task_run: TaskRun, record: Record) -> None:
    """Say that a finished record stays, and what it was made with if that is not what would make it now."""
    label, path = task_run.label, task_run.path
    print(f"{label}: finished before, kept. Delete {path} to run it again.")
    identity = task_run.session.known_data_identity(task_run.task, task_run.folder)
    if identity is None:
        print(
            f"{label}: its data set is not on this machine, so that it was not compared with the record's."
        )
    data_hash = identity.data_hash if identity else record["data_hash"]
    changed = records.changes(record, task_run.made_with(data_hash))
    if changed:
        print(f"{label}: was made with {', '.join(changed)}.")
    # Of a process that died before it could.
    journal.remove(task_run.directory, task_run.task)


def _answer(model: ZipEval, task_run: TaskRun) -> None:
    """Make a task's record, from where an earlier process left it.

    Raises:
        BudgetError: where the method leaves other tokens than it says.
        Stopped: when the process was asked to stop, with every answer kept.
    """
    task, directory = task_run.task, task_run.directory
    answers = task_run.open_journal()
    if answers.done:
        print(
            f"{task_run.label}: {len(answers.done)} answers kept from before, going on."
        )
    for note in _generation(task).notes():
        print(f"{task_run.label}: its generation setting {note}.")
    with resumed(model, answers) as is_stopping:
        try:
            record, samples = evaluate_task_run(model, task_run, answers.sessions)
        except BudgetError:
            # What counted right before is the same method's.
            journal.remove(directory, task)
            raise
        images = _take_images(model, task)
        records.write(directory, record, samples, images)
        journal.remove(directory, task)
        # It was answered when the signal came: the record is written all the same.
        if is_stopping():
            raise Stopped(
                f"{task_run.label}: stopped, every answer is kept. The same command goes on from there."
            )


def _take_images(model: ZipEval, task: str) -> dict[int, bytes]:
    """Take a task's pictures out of the model's, by doc_id."""
    images = {}
    for key in list(model.images):
        if key[0] == task:
            images[key[1]] = model.images.pop(key)
    return images


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


def _help(session: Session, task_runs: list[TaskRun]) -> list[Path]:
    """Answer the share of a run that ranks other than the first have; they write no record."""
    model = _load_model(session)
    for task_run in task_runs:
        is_first_answering = ranks.exchange(None)[0]
        if not is_first_answering:
            # Another process is at it, or has finished it.
            continue
        with ExitStack() as block:
            answers = task_run.open_journal()
            block.enter_context(data.copies_below(session.config.data.root))
            block.enter_context(suppress(ShareAnswered))
            block.enter_context(resumed(model, answers))
            lmms_eval_results(model, task_run.task, task_run.folder)
    return []


def _outcome(record: Record) -> str:
    """Describe the score of a record, and what it lacks."""
    parts = ["no score"]
    # Tasks that only write a file to submit have none.
    if record["score"] is not None:
        parts = [f"{record['metric']} {record['score']:.4g}"]
    if record["failed"]:
        parts.append(f"{record['failed']} samples could not be read")
    # Records of before have no such entry.
    if record.get("overflowed"):
        parts.append(
            f"{record['overflowed']} prompts are longer than the model's positions"
        )
    if records.incomplete(record):
        count = record["samples"]["count"]
        parts.append(
            f"{record['unscored']} of {count} answers have no verdict: "
            "run this again to ask the judge for those only"
        )
    return ", ".join(parts)
