"""Questions ahead of the device: worker processes decode their images and prepare them while the model answers others.

Which questions stand beside each other decides how fast they are answered, and never what the answers are: those of one
picture, and those of about one length.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from zipeval.engine.images import PIXELS, join_pictures
from zipeval.engine.ragged import left_padded
from zipeval.errors import MediaError, RunError, UsageError
from zipeval.media import picture_hash

AHEAD = 64  # questions that the workers are ahead, together
MOST_WORKERS = 8
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NAMES = (
    "imageId",
    "video",
)  # columns that name a picture which another data set, or a file, holds


@dataclass
class Question:
    """One prompt as the processor made it, on the host.

    Attributes:
        number: which of the requests it is.
        inputs: the processor's, of this prompt alone; empty if its image or video cannot be decoded.
        kinds: image or video, of each of its pictures in reading order.
        picture_hashes: of its pictures, likewise, as they were decoded.
        keys: of its pictures, likewise: equal for what the encoder cannot tell apart. Empty if nobody asked.
        error: why it cannot be decoded.
    """

    number: int
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    picture_hashes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt before reduction."""
        return self.inputs["input_ids"].shape[1]

    def pictures(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(kind, the processor's inputs of that picture alone), in reading order."""
        seen = dict.fromkeys(PIXELS, 0)
        for kind in self.kinds:
            row, seen[kind] = seen[kind], seen[kind] + 1
            names = (*PIXELS[kind], *(("image_sizes",) if kind == "image" else ()))
            yield (
                kind,
                {
                    name: self.inputs[name][row : row + 1]
                    for name in names
                    if name in self.inputs
                },
            )


@dataclass(frozen=True)
class _Fault:
    """What stopped the preparation of a question, as it travels from a worker to the owner.

    Attributes:
        number: which of the requests it is.
        reason: the error, with the file and the line that raised it.
        trace: the whole traceback, for the author of what raised it.
    """

    number: int
    reason: str
    trace: str

    @classmethod
    def of(cls, number: int, error: Exception) -> _Fault:
        """Describe an error that is being handled."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}, line {last.lineno}, in {last.name}"
        message = " ".join(str(error).split())
        return cls(
            number,
            f"{type(error).__name__}: {message} ({place})",
            traceback.format_exc(),
        )


class _Questions(Dataset):
    def __init__(
        self,
        session,
        messages: Callable[[int], list[dict]],
        numbers: list[int],
        keyed: bool,
    ):
        self.session, self.messages, self.numbers, self.keyed = (
            session,
            messages,
            numbers,
            keyed,
        )

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index) -> Question | UsageError | _Fault:
        number = self.numbers[index]
        try:
            return self._prepared(number)
        except UsageError as error:  # raised again where it can be told: a worker would add its own traceback
            return error
        except Exception as error:  # a task's functions and a processor are foreign code, and raise anything
            return _Fault.of(number, error)

    def _prepared(self, number: int) -> Question:
        try:
            messages = self.session.decoded(self.messages(number))
        except MediaError as error:
            return Question(number, error=str(error))
        pictures = [
            part
            for message in messages
            for part in message["content"]
            if part["type"] in PIXELS
        ]
        question = Question(
            number,
            inputs=dict(self.session.inputs([messages])),
            kinds=[part["type"] for part in pictures],
            picture_hashes=[picture_hash(part["url"]) for part in pictures],
        )
        if self.keyed:
            question.keys = [_digest(kind, its) for kind, its in question.pictures()]
        return question


def processes(session, prompts: int) -> int:
    """How many prepare so many prompts: `runner.workers`, or what suits them and the machine."""
    if session.config.runner.workers is not None:
        return session.config.runner.workers
    cores = (
        len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count() or 1
    )
    here = int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    )  # processes of torchrun on this machine
    return (
        min(MOST_WORKERS, max(1, cores // here - 1))
        if prompts > AHEAD and cores > 1
        else 0
    )


def feed(
    session,
    messages: Callable[[int], list[dict]],
    numbers: list[int],
    keyed: bool,
    name: Callable[[int], str] = "question {}".format,
) -> Iterator[Question]:
    """Yield the questions with these numbers, in this order. Close it (`contextlib.closing`), and its workers end.

    Args:
        messages: a question's chat messages, by its number.
        keyed: whether the pictures' `keys` are wanted.
        name: what an error calls a question, by its number.

    Raises:
        UsageError: as Session.decoded; MediaErrors are in the questions.
        RunError: if a question cannot be prepared, or a worker was killed.
    """
    workers = processes(session, len(numbers))
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # or tokenizers complain in every worker
    with _lifeline() as begin_worker:
        loader = DataLoader(
            _Questions(session, messages, numbers, keyed),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            prefetch_factor=max(2, AHEAD // workers) if workers else None,
            # Not through shared memory: containers have little of it, and every tensor in it takes a file descriptor.
            collate_fn=pickle.dumps if workers else None,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # of the workers' seeds; the global one is the task's
        )
        for prepared in _received(iter(loader), workers):
            question = pickle.loads(prepared) if workers else prepared
            if isinstance(question, UsageError):
                raise question
            if isinstance(question, _Fault):
                print(question.trace, end="", file=sys.stderr, flush=True)
                sample = name(question.number)
                raise RunError(
                    f"{sample} could not be prepared: {question.reason}. Its traceback is above."
                )
            yield question


def _received(prepared: Iterator, workers: int) -> Iterator:
    """Yield what a DataLoader yields.

    Raises:
        RunError: if a worker was killed.
    """
    try:
        yield from prepared
    except (
        RuntimeError
    ) as error:  # the loader's own: what is wrong with a question comes as a value
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"runner.workers={workers}: one of them was ended, most likely for want of memory ({error}). "
            "Run this again with runner.workers=0."
        ) from error


@contextmanager
def _lifeline() -> Iterator[Callable[[int], None]]:
    """Yield how a worker begins: it ends with this block, and with this process, whatever ends that.

    The owner holds the one end of a pipe, and a worker waits for it to close. The system closes it also for an owner
    that is killed. Nothing else would end a worker: it is deaf to SIGTERM, with which multiprocessing's exit handler
    would end it before it waits for it, and an exception keeps the loader, which would ask it to end, in its traceback.
    """
    worker_end, owner_end = multiprocessing.Pipe(duplex=False)
    atexit.register(
        owner_end.close
    )  # behind multiprocessing's own registration, and so before its handler
    try:
        yield partial(_begin_worker, worker_end, owner_end)
    finally:
        atexit.unregister(owner_end.close)
        owner_end.close()
        worker_end.close()


def _begin_worker(worker_end: Connection, owner_end: Connection, worker: int) -> None:
    """Ignore the signals that Ctrl-C and schedulers send to every process of a job, and end with the owner."""
    for number in NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    owner_end.close()  # a copy; with one open, the pipe would not be closed
    threading.Thread(target=_end_with_owner, args=[worker_end], daemon=True).start()


def _end_with_owner(worker_end: Connection) -> None:
    """End this process once the other end of the pipe is closed."""
    worker_end.poll(None)
    os._exit(0)  # at once, and not as a failure, which torch would report


def _digest(kind: str, inputs: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name, value in inputs.items():
        digest.update(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def same_picture(dataset) -> Callable[[int], Hashable]:
    """By the number of a document, something that documents of one picture have in common, without decoding it.

    A hint: where the data set does not tell, no two of them seem to have.
    """
    from datasets import Features, Image

    def holds_images(feature) -> bool:
        inner = getattr(feature, "feature", None) or (
            feature[0] if isinstance(feature, list) else None
        )
        return isinstance(feature, Image) or (inner is not None and holds_images(inner))

    features = Features(getattr(dataset, "features", None) or {})
    columns = [name for name, feature in features.items() if holds_images(feature)]
    columns = columns or [name for name in NAMES if name in features]
    if not columns:
        return lambda document: document
    raw = dataset.select_columns(columns).with_format("arrow")
    return lambda document: hashlib.blake2b(
        pickle.dumps(raw[document].to_pylist())
    ).digest()


def together(groups: list[Hashable], lengths: list[int]) -> list[int]:
    """The numbers of questions with these groups and lengths: groups stay together, the longest first.

    The longest first, so that what does not fit into memory shows at once.
    """
    longest: dict[Hashable, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    place = {
        group: number
        for number, group in enumerate(sorted(longest, key=lambda g: -longest[g]))
    }
    return sorted(range(len(groups)), key=lambda i: (place[groups[i]], -lengths[i]))


def collate(questions: list[Question], padding: int) -> dict[str, torch.Tensor]:
    """The processor's inputs of several prompts, as it would make them of all together: left-padded."""
    ids, mask = left_padded(
        [question.inputs["input_ids"][0] for question in questions], padding
    )
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **join_pictures([question.inputs for question in questions]),
    }
