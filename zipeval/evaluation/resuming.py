"""Go on with a task where an earlier process left it: the model answers only what the journal has not."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any
from zlib import crc32

from zipeval.benchmarks.lmms_names import RequestArgs, RequestKey, numbered
from zipeval.errors import Stopped, UsageError
from zipeval.results.journal import Journal
from zipeval.utils import ranks
from zipeval.utils.stopping import stoppable

if TYPE_CHECKING:
    from zipeval.evaluation.chat_model import ZipEval

Generate = Callable[[list], list]


class ShareAnswered(Exception):
    """A rank other than the first has answered its share of a task; it has nothing to score."""


@contextmanager
def resumed(model: ZipEval, journal: Journal) -> Iterator[Callable[[], bool]]:
    """Let a ZipEval, in all ranks, answer what the journal has not, and keep every batch in it.

    Yields a function that tells whether the process was asked to stop.

    Raises:
        Stopped: behind a batch, when the process was asked to stop.
        ShareAnswered: in other ranks than the first.
        UsageError: if what the journal has was asked otherwise.
    """
    with stoppable() as is_stopping:
        model.resumption = Resumption(model, journal, is_stopping)
        try:
            yield is_stopping
        finally:
            # The model outlives the task, and the next one has a journal of its own.
            model.resumption = None


class Resumption:
    """Answers the requests of one task, from a journal or by the model.

    Args:
        model: keeps `measured` and `images` of the samples.
        journal: the answers of before, and of now.
        is_stopping: tells whether the process was asked to stop.
    """

    def __init__(
        self, model: ZipEval, journal: Journal, is_stopping: Callable[[], bool]
    ):
        self.model = model
        self.journal = journal
        self.is_stopping = is_stopping
        self.start = time.monotonic()

    @property
    def goes_on(self) -> bool:
        """Return whether an earlier process answered some of the questions."""
        return bool(self.journal.done)

    def keep(self, batch: list[tuple]) -> None:
        """Write a batch of (request, answer) into the journal.

        Raises:
            Stopped: when the process was asked to stop.
        """
        seconds = round(time.monotonic() - self.start, 2)
        entries = [self._entry(seconds, *answered) for answered in batch]
        self.journal.append(entries)
        if self.is_stopping():
            raise Stopped(
                f"{self.journal.path}: stopped, every answer is kept. The same command goes on from there."
            )

    def answer_all(self, requests: list, generate: Generate) -> list:
        """Return the answers to all requests of a task, in their order.

        Args:
            generate: the model's answers to some requests.
        """
        # Before any is left out: a number counts the requests about a document.
        requests = numbered(requests)
        done = [_entry_key(request) in self.journal.done for request in requests]
        pairs = list(zip(requests, done, strict=True))
        unanswered = [request for request, is_done in pairs if not is_done]
        new = iter(self._answer_in_all_ranks(unanswered, generate))
        # New answers fill the gaps in the order of the requests.
        answers = []
        for request, is_done in pairs:
            answers.append(self._restore(request) if is_done else next(new))
        return answers

    def _answer_in_all_ranks(self, requests: list, generate: Generate) -> list:
        """Return all ranks' answers in the order of the requests, and what is kept of the samples, in the first rank.

        Raises:
            ShareAnswered: in the others.
        """
        if ranks.here().count == 1:
            return generate(requests)
        model = self.model
        # Neighbours, which often ask about the same picture, stay in one rank.
        answers = generate(ranks.share(requests))
        shares = ranks.gather((answers, model.measured, model.images))
        if shares is None:
            # The first rank has these now, and scores all samples.
            model.measured.clear()
            model.images.clear()
            raise ShareAnswered
        for _, measured, images in shares:
            model.measured.update(measured)
            model.images.update(images)
        return list(chain.from_iterable(answers for answers, _, _ in shares))

    def _entry(self, seconds: float, request, answer) -> dict[str, Any]:
        """Return an answer as the journal keeps it.

        Args:
            seconds: since this process began with the task.
        """
        key = RequestKey.of(request)
        # A sample has one picture, whatever the number of its requests.
        image = None if key.number else self.model.images.get((key.task, key.doc_id))
        counts = answer.token_counts
        return {
            "doc_id": key.doc_id,
            "number": key.number,
            "question": _digest(request),
            "at": seconds,
            "text": answer.text,
            "counts": [counts.input_tokens, counts.output_tokens],
            "measured": self.model.measured[key],
            # JSON holds no bytes.
            "image": image and base64.b64encode(image).decode(),
        }

    def _restore(self, request):
        """Return an answer of the journal as lmms-eval takes it, and give the model what is kept of its sample.

        Raises:
            UsageError: if it is the answer to another question.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        key = RequestKey.of(request)
        entry = self.journal.answers[_entry_key(request)]
        # A data set on the hub may have changed since, and its numbers with it.
        if entry["question"] != _digest(request):
            raise UsageError(
                f"{self.journal.first}: its answer {key.doc_id} is to another question than the task asks now. Delete "
                f"{self.journal.task}.journal*.jsonl there to answer the questions anew."
            )
        # As if the model had answered it now: the record is made of these.
        self.model.measured[key] = entry["measured"]
        if entry["image"]:
            self.model.images[key.task, key.doc_id] = base64.b64decode(entry["image"])
        inputs, outputs = entry["counts"]
        counts = TokenCounts(input_tokens=inputs, output_tokens=outputs)
        return GenerationResult(entry["text"], counts)


def _entry_key(request) -> tuple[int, int]:
    """Return what a journal knows the answer to a request by."""
    key = RequestKey.of(request)
    return key.doc_id, key.number


def _digest(request) -> int:
    """Return a checksum of the prompt and of how it is to be answered."""
    args = RequestArgs.of(request)
    return crc32(repr((args.context, args.gen_kwargs)).encode())
