"""Prepare prompts ahead of the device: worker processes decode their images while the model answers others.

Which prompts stand beside each other decides how fast they are answered, and never what the answers are: those of one
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
from itertools import chain, count, starmap
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from zipeval.engine.images import PIXELS, join_pictures
from zipeval.engine.ragged import left_padded
from zipeval.errors import MediaError, RunError, UsageError
from zipeval.media import picture_hash

# Prompts that the workers are ahead, together.
AHEAD = 64
MOST_WORKERS = 8
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Columns that name a picture which another data set, or a file, holds.
NAMES = ("imageId", "video")
# The processor's inputs that hold pictures of a kind; sizes are those of images in tiles.
INPUT_NAMES = {"image": (*PIXELS["image"], "image_sizes"), "video": PIXELS["video"]}


@dataclass
class PreparedPrompt:
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
        """Return the tokens of the prompt before reduction."""
        return self.inputs["input_ids"].shape[1]

    def pictures(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield (kind, the processor's inputs of that picture alone), in reading order."""
        numbers = {kind: count() for kind in PIXELS}
        for kind in self.kinds:
            number = next(numbers[kind])
            inputs = {}
            for name in INPUT_NAMES[kind]:
                if name in self.inputs:
                    # One row, and still a batch: [1, ...].
                    inputs[name] = self.inputs[name][number : number + 1]
            yield kind, inputs


@dataclass(frozen=True)
class _Fault:
    """An error that stopped the preparation of a prompt, as it travels from a worker to the owner.

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
        reason = f"{type(error).__name__}: {message} ({place})"
        return cls(number, reason, traceback.format_exc())


class _PromptDataset(Dataset):
    """The prompts that a DataLoader's workers prepare, by their places in `numbers`."""

    def __init__(
        self,
        session,
        messages: Callable[[int], list[dict]],
        numbers: list[int],
        keyed: bool,
    ):
        self.session = session
        self.messages = messages
        self.numbers = numbers
        self.keyed = keyed

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index) -> PreparedPrompt | UsageError | _Fault:
        number = self.numbers[index]
        try:
            return self._prepare(number)
        except UsageError as error:
            # Raised again by the owner: a worker would add its own traceback.
            return error
        # A task's functions and a processor are foreign code, and raise anything.
        except Exception as error:
            return _Fault.of(number, error)

    def _prepare(self, number: int) -> PreparedPrompt:
        try:
            messages = self.session.decoded(self.messages(number))
        except MediaError as error:
            return PreparedPrompt(number, error=str(error))
        parts = chain.from_iterable(message["content"] for message in messages)
        pictures = [part for part in parts if part["type"] in PIXELS]
        prompt = PreparedPrompt(
            number,
            inputs=dict(self.session.inputs([messages])),
            kinds=[part["type"] for part in pictures],
            picture_hashes=[picture_hash(part["url"]) for part in pictures],
        )
        if self.keyed:
            prompt.keys = list(starmap(_digest, prompt.pictures()))
        return prompt


def processes(session, prompts: int) -> int:
    """Return how many workers prepare so many prompts: `runner.workers`, or what suits them and the machine."""
    if session.config.runner.workers is not None:
        return session.config.runner.workers
    cores = _usable_cores()
    if prompts <= AHEAD or cores == 1:
        return 0
    # torchrun's processes on this machine share the cores, and each needs one itself.
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(MOST_WORKERS, max(1, cores // local_processes - 1))


def _usable_cores() -> int:
    """Return the number of cores that this process may use; macOS tells only how many there are."""
    if hasattr(psutil.Process, "cpu_affinity"):
        return len(psutil.Process().cpu_affinity())
    return os.cpu_count() or 1


def feed(
    session,
    messages: Callable[[int], list[dict]],
    numbers: list[int],
    keyed: bool,
    name: Callable[[int], str] = "question {}".format,
) -> Iterator[PreparedPrompt]:
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
    dataset = _PromptDataset(session, messages, numbers, keyed)
    # Or tokenizers complain in every worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _lifeline() as begin_worker:
        loader = _loader(dataset, workers, begin_worker)
        for prepared in _received(iter(loader), workers):
            # Workers send bytes: see _loader.
            prompt = pickle.loads(prepared) if workers else prepared
            if isinstance(prompt, UsageError):
                raise prompt
            if isinstance(prompt, _Fault):
                print(prompt.trace, end="", file=sys.stderr, flush=True)
                sample = name(prompt.number)
                raise RunError(
                    f"{sample} could not be prepared: {prompt.reason}. Its traceback is above."
                )
            yield prompt


def _loader(
    dataset: _PromptDataset, workers: int, begin_worker: Callable[[int], None]
) -> DataLoader:
    """Return the loader of a data set's prompts, one by one; without workers this process prepares them."""
    # The random seeds of workers come from a generator of their own; the global one is the task's.
    generator = torch.Generator()
    if not workers:
        return DataLoader(dataset, batch_size=None, generator=generator)
    return DataLoader(
        dataset,
        batch_size=None,
        generator=generator,
        num_workers=workers,
        multiprocessing_context="fork",
        prefetch_factor=max(2, AHEAD // workers),
        # Not through shared memory: containers have little of it, and every tensor in it takes a file descriptor.
        collate_fn=pickle.dumps,
        worker_init_fn=begin_worker,
    )


def _received(prepared: Iterator, workers: int) -> Iterator:
    """Yield what a DataLoader yields.

    Raises:
        RunError: if a worker was killed.
    """
    try:
        yield from prepared
    # The loader's own error: what is wrong with a prompt comes as a value.
    except RuntimeError as error:
        # torch has no class of its own for it.
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
    # Behind multiprocessing's own registration, and so called before its handler.
    atexit.register(owner_end.close)
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
    # A copy, which a fork brings; with one open, the pipe would not be closed.
    owner_end.close()
    threading.Thread(target=_end_with_owner, args=[worker_end], daemon=True).start()


def _end_with_owner(worker_end: Connection) -> None:
    """End this process once the other end of the pipe is closed."""
    worker_end.poll(None)
    # At once, and not as a failure, which torch would report.
    os._exit(0)


def _digest(kind: str, inputs: dict[str, torch.Tensor]) -> str:
    """Return a hash of a picture's inputs, equal for what the encoder cannot tell apart."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name, value in inputs.items():
        digest.update(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def same_picture(dataset) -> Callable[[int], Hashable]:
    """Return a function of a document's number whose values are equal for documents of one picture.

    A hint, which decodes nothing: where the data set does not tell, no two of them seem to have one picture.
    """
    from datasets import Features

    features = Features(getattr(dataset, "features", None) or {})
    columns = [name for name, feature in features.items() if _holds_images(feature)]
    columns = columns or [name for name in NAMES if name in features]
    if not columns:
        return lambda document: document
    # In this format a row has the bytes of a picture, or its path.
    raw = dataset.select_columns(columns).with_format("arrow")

    def hash_pictures(document: int) -> bytes:
        return hashlib.blake2b(pickle.dumps(raw[document].to_pylist())).digest()

    return hash_pictures


def _holds_images(feature) -> bool:
    """Return whether a column of a data set holds images, or lists of them."""
    from datasets import Image

    # A list is a feature with an inner one, or in older data sets a list of one.
    inner = getattr(feature, "feature", None)
    if isinstance(feature, list):
        inner = inner or feature[0]
    return isinstance(feature, Image) or (inner is not None and _holds_images(inner))


def sort_by_group_and_length(groups: list[Hashable], lengths: list[int]) -> list[int]:
    """Return the order of prompts with these groups and lengths: groups stay together, the longest first.

    The longest first, so that what does not fit into memory shows at once.
    """
    longest: dict[Hashable, int] = {}
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(length, longest.get(group, 0))
    # Sorting is stable: groups of one length stay in the order of the data set.
    ordered = sorted(longest, key=longest.__getitem__, reverse=True)
    ranks = {group: rank for rank, group in enumerate(ordered)}
    return sorted(range(len(groups)), key=lambda i: (ranks[groups[i]], -lengths[i]))


def collate(prompts: list[PreparedPrompt], padding: int) -> dict[str, torch.Tensor]:
    """Return the processor's inputs of several prompts, as it would make them of all together: left-padded."""
    inputs = [prompt.inputs for prompt in prompts]
    ids, mask = left_padded([single["input_ids"][0] for single in inputs], padding)
    return {"input_ids": ids, "attention_mask": mask, **join_pictures(inputs)}
