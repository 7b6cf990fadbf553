"""What lmms-eval calls things: every position, key and attribute of its insides that zipeval reads or replaces.

Nothing here imports lmms-eval before it is asked to: a run is refused without those seconds.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from zipeval.errors import IncompatibleError, RunError, UsageError

TESTED = ("0.7.3", "0.7.3")  # lowest and newest lmms-eval that the tests ran on
MULTI_ROUND = (
    "generate_until_multi_round"  # request_type and output_type of a conversation
)
GENERATE = ("generate_until", MULTI_ROUND)  # what lmms-eval calls of a model
SCORE_SUFFIX, STDERR = (
    ",none",
    "_stderr",
)  # of the names of its scores: no filter was applied; an error of a score
NUMBER = "zipeval_number"  # in a request's metadata: see `numbered`
# Of a logged sample, what is no score. `doc` holds pictures, and the rest is kept under other names or not at all.
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
        types = [type(argument).__name__ for argument in arguments]
        if len(arguments) != len(cls._fields):
            raise _unexpected(
                f"a request has {len(arguments)} arguments ({', '.join(types)})",
                cls._fields,
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
        """(task, doc_id): what tells the samples of a run apart."""
        return self.task, self.doc_id


class RequestKey(NamedTuple):
    """What tells the requests of a run apart.

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
    counts: dict[tuple[str, int], int] = {}
    copies = []
    for request in requests:
        place = RequestArgs.of(request).place
        number = counts.get(place, 0)
        counts[place] = number + 1
        clone = copy(request)
        clone.metadata = {**request.metadata, NUMBER: number}
        copies.append(clone)
    return copies


def _unexpected(what: str, fields: tuple[str, ...]) -> IncompatibleError:
    """Say that the installed lmms-eval gives something else than the tested one."""
    lowest, newest = TESTED
    tested = lowest if lowest == newest else f"{lowest} to {newest}"
    return IncompatibleError(
        f"lmms-eval {version('lmms-eval')}: {what}, where lmms-eval {tested}, which zipeval is tested with, gives "
        f"{', '.join(fields)}. Run `pip install lmms-eval=={newest}`, then `zipeval doctor`."
    )


def patch_filelocks() -> None:
    """Have lmms-eval replace what it replaces in filelock: it reads names there that not every filelock has.

    It would do so first thing in an evaluation anyway, and once only; here what it lacks shows before weights are read.
    """
    from lmms_eval import evaluator

    if hasattr(
        evaluator, "_enable_reentrant_filelocks"
    ):  # not every lmms-eval that zipeval takes has to do that
        evaluator._enable_reentrant_filelocks()


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
            f"lmms-eval is not installed, so run `pip install lmms-eval=={TESTED[1]}`, then `zipeval doctor`."
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
    # lmms-eval looks for the name of its model among these; ours has none.
    of_models = (config.get("model_specific_generation_kwargs") or {}).get(
        "default"
    ) or {}
    settings = {**(config.get("generation_kwargs") or {}), **of_models}
    return settings, config.get("output_type") == MULTI_ROUND


def task_settings(file: Path) -> dict[str, Any]:
    """Return what a task's YAML and what it includes say, as lmms-eval reads them, but for the task's functions."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes None for a function, or for any other Python object."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except (yaml.YAMLError, OSError) as error:
        raise UsageError(
            f"{file} cannot be read ({' '.join(str(error).split())}). Mend it and run this again."
        ) from error
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        path = Path(name)
        merged |= task_settings(path if path.is_file() else file.parent / path)
    return merged | config


def question(logged: dict[str, Any]) -> str:
    """Return the text of a logged sample's question: what was its request's context."""
    return logged["arguments"][0]


def prediction(logged: dict[str, Any]) -> Any:
    """Return the answer of a logged sample."""
    return logged["filtered_resps"][0]


def responses(logged: dict[str, Any]) -> list[Any]:
    """Return all answers to a logged sample, before any filter: of every request, and of each its repeats."""
    return [response for of_request in logged["resps"] for response in of_request]


def generation(results: dict[str, Any], task: str) -> tuple[dict[str, Any], int]:
    """Return the generation_kwargs that a task was evaluated with, and how often each question was asked."""
    config = results["configs"][task]
    return config.get("generation_kwargs") or {}, config.get("repeats") or 1


def scores(results: dict[str, Any], task: str) -> dict[str, float]:
    """Return a task's scores by the names that its YAML gives them."""
    return {
        name.removesuffix(SCORE_SUFFIX): float(value)
        for name, value in results["results"][task].items()
        if isinstance(value, Real) and STDERR not in name and name != "samples"
    }


def directions(results: dict[str, Any], task: str) -> dict[str, bool]:
    """Return whether more is better, of a task's metrics in the order of its metric_list."""
    return {
        name: higher is not False
        for name, higher in results["higher_is_better"][task].items()
    }


def task_manager(folder: Path, settings: dict[str, Any]):
    """Return an index of the tasks in a folder, and of no other.

    Args:
        settings: replace those of the task's YAML.
    """
    from lmms_eval.tasks import TaskManager

    class Tasks(TaskManager):
        def _get_config(self, name):
            return {
                **super()._get_config(name),
                **deepcopy(settings),
            }  # lmms-eval changes them

    return Tasks(include_defaults=False, include_path=str(folder))


def datasets_cache() -> Path:
    """Return where lmms-eval has datasets keep rows: on a disk of this machine where the usual place is on no such."""
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
    # Whatever `download` reads of a task. It drops images from a copy unless it is told not to, and changes arguments.
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
    ConfigurableTask.download(stub, deepcopy(options) or None)
    videos = None
    if options.get("video"):
        home = os.path.expanduser(os.getenv("HF_HOME", "~/.cache/huggingface/"))
        videos = Path(resolve_cache_dir(options["cache_dir"], base_dir=home))
    return stub.dataset[split], videos


@contextmanager
def loading(task: str) -> Iterator[None]:
    """Within the block a data set that does not load is told in one sentence.

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
        f"tasks=[{task}]: its data set does not load ({reason}). `zipeval doctor` says whether the hub is there."
    )


@contextmanager
def explained_failures(task: str, folder: Path) -> Iterator[None]:
    """Within the block, what fails of a task is told in one sentence: its data set, or a function of its own.

    Args:
        folder: that defines the task.

    Raises:
        UsageError: where the data set does not load.
        RunError: where a function of the task fails, or the task's answers cannot be scored.
    """
    from tenacity import RetryError

    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # a task's functions raise anything
        # lmms-eval tries five times to load a data set, and to score an answer.
        cause = (
            error.last_attempt.exception() if isinstance(error, RetryError) else error
        )
        frames = traceback.extract_tb(cause.__traceback__)
        what = f"raised {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'without a reason'}"
        end = "Mend it and run this again: answers are kept."
        if function := _own_function(frames, folder):
            place = f"{Path(function.filename).name}, line {function.lineno}"
            raise RunError(
                f"tasks=[{task}]: its function {function.name} ({place}) {what}. {end}"
            ) from error
        if not isinstance(error, RetryError):
            raise
        if any(frame.name == "download" for frame in frames):
            raise not_loaded(task, cause) from error
        raise RunError(f"tasks=[{task}]: scoring its answers {what}. {end}") from error


def _own_function(
    frames: Sequence[traceback.FrameSummary], folder: Path
) -> traceback.FrameSummary | None:
    """Return the function of a task that an error comes from; None where it comes from zipeval, or from elsewhere."""
    ours = Path(__file__).resolve().parents[1]
    for frame in reversed(frames):
        file = Path(frame.filename).resolve()
        if file.is_relative_to(folder.resolve()):
            return frame
        if file.is_relative_to(ours):
            return None
    return None


@contextmanager
def patched(rows: list[dict[str, Any]] | None) -> Iterator[None]:
    """Within the block lmms-eval draws no bar, and takes `rows`, if there are any, for the data set of its task."""
    import datasets
    from lmms_eval import evaluator
    from lmms_eval.api import task

    with ExitStack() as patches:
        # It draws them for its questions and its scoring wherever it runs, also where no terminal is.
        for module in (task, evaluator):
            patches.enter_context(
                patch.object(module, "tqdm", partial(_without_bar, module.tqdm))
            )
        if rows:  # it knows data sets that datasets can load, and only those
            loaded = datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
            patches.enter_context(
                patch.object(datasets, "load_dataset", lambda **_: loaded)
            )
        yield


def _without_bar(tqdm, *args, **kwargs):
    return tqdm(*args, **{**kwargs, "disable": True})
