"""Name what lmms-eval calls things: every position, key and attribute of its insides that zipeval reads or replaces.

Nothing here imports lmms-eval before it is asked to: a run is refused without those seconds.
"""

from __future__ import annotations

import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy, deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, count
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from zipeval.errors import IncompatibleError, RunError, UsageError
from zipeval.utils import foreign_patches

# The lowest and the newest lmms-eval that the tests ran on.
TESTED = ("0.7.3", "0.7.3")
# The request_type and the output_type of a conversation.
MULTI_ROUND = "generate_until_multi_round"
# lmms-eval calls these methods of a model.
GENERATE = ("generate_until", MULTI_ROUND)
# The name of a score ends in this where no filter was applied to the answers,
SCORE_SUFFIX = ",none"
# and in this where it is the error of another score.
STDERR = "_stderr"
# In a request's metadata: see `numbered`.
NUMBER = "zipeval_number"
# Fields of a logged sample that are no scores. `doc` holds pictures, and the rest is
# kept under other names or not at all.
NOT_SCORES = {
    "doc",
    "arguments",
    "resps",
    "filtered_resps",
    "token_counts",
    "doc_hash",
    "input_media",
}


class RequestArgs(NamedTuple):
    """The arguments of a request to generate, in lmms-eval's order.

    Attributes:
        context: text of the question.
        doc_to_messages: makes chat messages of a document; of a conversation's later round also from the answers.
        gen_kwargs: the task's generation_kwargs.
        doc_id: number of the document in its split.
        task: name of the task.
        split: of the task's data set.
    """

    context: str
    doc_to_messages: Callable[..., Any]
    gen_kwargs: dict[str, Any]
    doc_id: int
    task: str
    split: str

    @classmethod
    def of(cls, request) -> RequestArgs:
        """Read the arguments of an lmms-eval Instance.

        Raises:
            IncompatibleError: if they are not what the tested lmms-eval gives.
        """
        arguments = request.args
        if len(arguments) != len(cls._fields):
            types = ", ".join(type(argument).__name__ for argument in arguments)
            raise _unexpected(
                f"a request has {len(arguments)} arguments ({types})", cls._fields
            )
        args = cls(*arguments)
        expected = (str, Callable, Mapping, int, str, str)
        for name, argument, kind in zip(cls._fields, args, expected, strict=True):
            if not isinstance(argument, kind):
                raise _unexpected(
                    f"a request's {name} is a {type(argument).__name__}", cls._fields
                )
        return args

    @property
    def place(self) -> tuple[str, int]:
        """Return (task, doc_id), which no two samples of a run share."""
        return self.task, self.doc_id


class RequestKey(NamedTuple):
    """A key that no two requests of a run share.

    Attributes:
        task: name of the task.
        doc_id: number of the document in its split.
        number: which of the task's requests about that document it is: of repeats, or of several questions.
    """

    task: str
    doc_id: int
    number: int = 0

    @classmethod
    def of(cls, request) -> RequestKey:
        """Return the key of a request; one that is not `numbered` is the first about its document."""
        return cls(*RequestArgs.of(request).place, request.metadata.get(NUMBER, 0))


def numbered(requests: list) -> list:
    """Return copies of all requests of a task that know which of those about their document they are.

    lmms-eval gives a model one and the same Instance for every repeat. Number before any of the requests are left out.
    """
    if all(NUMBER in request.metadata for request in requests):
        return requests
    numbers: defaultdict[tuple[str, int], Iterator[int]] = defaultdict(count)
    copies = []
    for request in requests:
        # Repeats share one Instance, and so its metadata: each gets its own.
        clone = copy(request)
        number = next(numbers[RequestArgs.of(request).place])
        clone.metadata = {**request.metadata, NUMBER: number}
        copies.append(clone)
    return copies


def _unexpected(what: str, fields: tuple[str, ...]) -> IncompatibleError:
    """Say that the installed lmms-eval gives something else than the tested one."""
    lowest, newest = TESTED
    tested = lowest if lowest == newest else f"{lowest} to {newest}"
    return IncompatibleError(
        f"lmms-eval {version('lmms-eval')}: {what}, where lmms-eval {tested}, which "
        "zipeval is tested with, gives "
        f"{', '.join(fields)}. Run `pip install lmms-eval=={newest}`, then `zipeval "
        "doctor`."
    )


def patch_filelocks() -> None:
    """Have lmms-eval replace what it replaces in filelock: it reads names there that not every filelock has.

    It would do so first thing in an evaluation anyway, and once only; here what it lacks shows before weights are read.
    """
    from lmms_eval import evaluator

    # Not every lmms-eval that zipeval takes has to do that.
    enable = getattr(evaluator, "_enable_reentrant_filelocks", None)
    if enable is not None:
        enable()


def is_conversation(request) -> bool:
    """Return whether a request is answered in several rounds."""
    return request.request_type == MULTI_ROUND


def document(model, args: RequestArgs) -> Any:
    """Return the row that a request is about. lmms-eval gives a model its data sets by task and split."""
    return model.task_dict[args.task][args.split][args.doc_id]


def documents(model, args: RequestArgs):
    """Return the data set that a request is about."""
    return model.task_dict[args.task][args.split]


def tasks_folder() -> Path:
    """Return where lmms-eval's own tasks are, without importing it.

    Raises:
        IncompatibleError: if lmms-eval is not installed.
    """
    package = find_spec("lmms_eval")
    if package is None:
        raise IncompatibleError(
            f"lmms-eval is not installed, so run `pip install lmms-eval=={TESTED[1]}`, "
            "then `zipeval doctor`."
        )
    return Path(package.submodule_search_locations[0]) / "tasks"


def generation_settings(
    file: Path, replaced: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Return the generation_kwargs of a task, and whether it asks in several rounds, without importing lmms-eval.

    Args:
        file: the task's YAML.
        replaced: what stands in place of settings in it.

    Raises:
        UsageError: if it, or what it includes, is no YAML.
    """
    config = {**task_settings(file), **replaced}
    settings = config.get("generation_kwargs") or {}
    # lmms-eval looks for the name of its model among these; ours is not there.
    by_model = config.get("model_specific_generation_kwargs") or {}
    for_others = by_model.get("default") or {}
    return settings | for_others, config.get("output_type") == MULTI_ROUND


def task_settings(file: Path) -> dict[str, Any]:
    """Return what a task's YAML and what it includes say, as lmms-eval reads them, but for the task's functions."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes None for a function, or for any other Python object."""

    # The empty prefix is that of every tag, such as !function, and importing is not
    # wanted.
    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except (yaml.YAMLError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{file} cannot be read ({reason}). Mend it and run this again."
        ) from error
    included = config.pop("include", [])
    if isinstance(included, str):
        included = [included]
    merged: dict[str, Any] = {}
    # The file that is named first wins, and the including file over all of them.
    for name in reversed(included):
        path = Path(name)
        merged |= task_settings(path if path.is_file() else file.parent / path)
    return merged | config


def question(logged: dict[str, Any]) -> str:
    """Return the text of a logged sample's question, which is its request's context."""
    return logged["arguments"][0]


def prediction(logged: dict[str, Any]) -> Any:
    """Return the answer of a logged sample."""
    return logged["filtered_resps"][0]


def responses(logged: dict[str, Any]) -> list[Any]:
    """Return all answers to a logged sample, before any filter: of every request, and of each its repeats."""
    return list(chain.from_iterable(logged["resps"]))


def generation(results: dict[str, Any], task: str) -> tuple[dict[str, Any], int]:
    """Return the generation_kwargs that a task was evaluated with, and how often each question was asked."""
    config = results["configs"][task]
    # A task that says nothing of repeats asks once.
    return config.get("generation_kwargs") or {}, config.get("repeats") or 1


def scores(results: dict[str, Any], task: str) -> dict[str, float]:
    """Return a task's scores by the names that its YAML gives them."""
    values = {}
    for name, value in results["results"][task].items():
        # Beside the scores there are texts, such as the task's alias, and the number of
        # samples.
        is_score = isinstance(value, Real) and STDERR not in name
        if is_score and name != "samples":
            values[name.removesuffix(SCORE_SUFFIX)] = float(value)
    return values


def directions(results: dict[str, Any], task: str) -> dict[str, bool]:
    """Return whether more is better, of a task's metrics in the order of its metric_list."""
    higher_is_better = results["higher_is_better"][task]
    # None: the YAML does not say. More is better then, as of nearly all metrics.
    return {name: higher is not False for name, higher in higher_is_better.items()}


def task_manager(folder: Path, settings: dict[str, Any]):
    """Return an index of the tasks in a folder, and of no other.

    Args:
        settings: replace those of the task's YAML.
    """
    from lmms_eval.tasks import TaskManager

    class Tasks(TaskManager):
        def _get_config(self, name):
            # lmms-eval changes the settings of a task while it runs.
            return {**super()._get_config(name), **deepcopy(settings)}

    return Tasks(include_defaults=False, include_path=str(folder))


def datasets_cache() -> Path:
    """Return where lmms-eval has datasets keep rows.

    It takes a disk of this machine where the usual place is on none.
    """
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    return Path(_resolve_hf_datasets_cache_dir())


def load_rows(task: str, folder: Path) -> tuple[Any, Path | None]:
    """Load the rows that a task is asked about, as lmms-eval does, without making a task of them.

    lmms-eval would go on to prepare every row, which takes minutes where that decodes images.

    Returns:
        The data set, and the folder that its videos were unpacked into; None: it has none.

    Raises:
        RetryError: if they do not load.
    """
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.utils import resolve_cache_dir

    config = task_manager(folder, {})._get_config(task)
    split = config.get("test_split") or config.get("validation_split")
    # Whatever `download` reads of a task. Unless `process_results_use_image` is set it
    # drops images from a copy.
    stub = SimpleNamespace(
        DATASET_PATH=config["dataset_path"],
        DATASET_NAME=config.get("dataset_name"),
        config=SimpleNamespace(
            task=task,
            test_split=split,
            process_docs=None,
            process_results_use_image=True,
        ),
    )
    options = config.get("dataset_kwargs") or {}
    # `download` removes options from what it is given.
    ConfigurableTask.download(stub, deepcopy(options) or None)
    rows = stub.dataset[split]
    if not options.get("video"):
        return rows, None
    # `download` unpacks videos there, and tells nobody.
    home = os.path.expanduser(os.getenv("HF_HOME", "~/.cache/huggingface/"))
    return rows, Path(resolve_cache_dir(options["cache_dir"], base_dir=home))


@contextmanager
def loading(task: str) -> Iterator[None]:
    """Tell in one sentence of a data set that does not load within the block.

    Raises:
        UsageError: in place of what lmms-eval and datasets raise then.
    """
    from tenacity import RetryError

    try:
        yield
    except RetryError as error:
        raise not_loaded(task, error.last_attempt.exception()) from error
    except (OSError, ValueError) as error:
        raise not_loaded(task, error) from error


def not_loaded(task: str, cause: BaseException) -> UsageError:
    """Return the error that tells of a task whose data set does not load."""
    reason = str(cause).split("\n")[0]
    return UsageError(
        f"tasks=[{task}]: its data set does not load ({reason}). `zipeval doctor` says "
        "whether the hub is there."
    )


@contextmanager
def explained_failures(task: str, folder: Path) -> Iterator[None]:
    """Tell in one sentence what fails of a task within the block: its data set, or a function of its own.

    Args:
        folder: that defines the task.

    Raises:
        UsageError: where the data set does not load.
        RunError: where a function of the task fails, or the task's answers cannot be scored.
    """

    try:
        yield
    except (UsageError, RunError):
        raise
    # A task's functions raise anything.
    except Exception as error:
        explained = _explain_failure(task, folder, error)
        if explained is None:
            raise
        raise explained from error


def _explain_failure(
    task: str, folder: Path, error: Exception
) -> UsageError | RunError | None:
    """Return the sentence for what failed of a task; None where zipeval itself is at fault."""
    from tenacity import RetryError

    # lmms-eval tries five times to load a data set, and to score an answer.
    retried = isinstance(error, RetryError)
    cause = error.last_attempt.exception() if retried else error
    reason = str(cause).splitlines()[0] if str(cause) else "without a reason"
    what = f"raised {type(cause).__name__}: {reason}"
    end = "Mend it and run this again: answers are kept."
    frames = traceback.extract_tb(cause.__traceback__)
    function = _own_function(frames, folder)
    if function is not None:
        place = f"{Path(function.filename).name}, line {function.lineno}"
        return RunError(
            f"tasks=[{task}]: its function {function.name} ({place}) {what}. {end}"
        )
    if not retried:
        return None
    # lmms-eval loads data sets in a function of this name.
    if any(frame.name == "download" for frame in frames):
        return not_loaded(task, cause)
    return RunError(f"tasks=[{task}]: scoring its answers {what}. {end}")


def _own_function(
    frames: Sequence[traceback.FrameSummary], folder: Path
) -> traceback.FrameSummary | None:
    """Return the function of a task that an error comes from; None where it comes from zipeval, or from elsewhere."""
    ours = Path(__file__).resolve().parents[1]
    # The innermost function comes last. What a task calls of other libraries counts as
    # the task's.
    for frame in reversed(frames):
        file = Path(frame.filename).resolve()
        if file.is_relative_to(folder.resolve()):
            return frame
        if file.is_relative_to(ours):
            return None
    return None


@contextmanager
def patched(rows: list[dict[str, Any]] | None) -> Iterator[None]:
    """Let lmms-eval draw no bars within the block, and take `rows`, if there are any, for the data set of its task."""
    with ExitStack() as patches:
        patches.enter_context(foreign_patches.hide_lmms_bars())
        if rows:
            patches.enter_context(_data_set_of(rows))
        yield


def _data_set_of(rows: list[dict[str, Any]]) -> AbstractContextManager[None]:
    """Put rows in place of any data set: lmms-eval knows those that datasets can load, and no others."""
    import datasets

    loaded = datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
    return foreign_patches.load_datasets_with(lambda **_: loaded)
