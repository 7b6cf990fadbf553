"""A task goes on where an earlier process left it: the model answers only what the journal has not."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch
from zlib import crc32

from zipeval.benchmarks.lmms_names import GENERATE, RequestArgs, RequestKey, numbered
from zipeval.errors import Stopped, UsageError
from zipeval.results.journal import Journal
from zipeval.utils import ranks
from zipeval.utils.stopping import stoppable

PER_SAMPLE = (
    "measured",
    "images",
)  # what a ZipEval keeps of samples, by task and doc_id


class Helped(Exception):
    """A rank other than the first has answered its share of a task; it has nothing to score."""


@contextmanager
def resumed(model, journal: Journal) -> Iterator[Callable[[], bool]]:
    """A block in which a ZipEval, of all ranks, answers what the journal has not, and keeps every batch in it.

    Yields what tells whether the process was asked to stop.

    Raises:
        Stopped: behind a batch, when the process was asked to stop.
        Helped: in other ranks than the first.
        UsageError: if what the journal has was asked otherwise.
    """
    start = time.monotonic()
    with stoppable() as asked:

        def keep(batch: list[tuple]) -> None:
            at = round(time.monotonic() - start, 2)
            journal.append([_entry(model, at, *answered) for answered in batch])
            if asked():
                raise Stopped(
                    f"{journal.path}: stopped, every answer is kept. The same command goes on from there."
                )

        with ExitStack() as patches:
            patches.enter_context(patch.object(model, "keep", keep))
            patches.enter_context(patch.object(model, "goes_on", bool(journal.done)))
            for name in GENERATE:
                # Of the class, not of the object: scripts that count its calls replace that.
                generate = partial(getattr(type(model), name), model)
                patches.enter_context(
                    patch.object(model, name, partial(_all, model, journal, generate))
                )
            yield asked


def _all(model, journal: Journal, generate: Callable, requests: list) -> list:
    """Of all requests, in their order."""
    requests = numbered(requests)
    done = [_entry_key(request) in journal.done for request in requests]
    unanswered = [
        request
        for request, answered in zip(requests, done, strict=True)
        if not answered
    ]
    new = iter(_together(model, generate, unanswered))
    return [
        _restored(model, journal, request) if answered else next(new)
        for request, answered in zip(requests, done, strict=True)
    ]


def _together(model, generate: Callable, requests: list) -> list:
    """All ranks' answers in the order of the requests, with what `model` keeps of the samples; in the first rank."""
    if ranks.here().count == 1:
        return generate(requests)
    answers, kept = (
        generate(ranks.share(requests)),
        [getattr(model, name) for name in PER_SAMPLE],
    )
    found = ranks.gather((answers, *kept))
    if found is None:
        for of_samples in kept:
            of_samples.clear()
        raise Helped
    for _, *its in found:
        for of_samples, of_rank in zip(kept, its, strict=True):
            of_samples.update(of_rank)
    return [answer for its, *_ in found for answer in its]


def _entry(model, at: float, request, answer) -> dict:
    """What a journal keeps of an answer."""
    key = RequestKey.of(request)
    image = None if key.number else model.images.get((key.task, key.doc_id))
    return {
        "doc_id": key.doc_id,
        "number": key.number,
        "question": _digest(request),
        "at": at,
        "text": answer.text,
        "counts": [answer.token_counts.input_tokens, answer.token_counts.output_tokens],
        "measured": model.measured[key],
        "image": image and base64.b64encode(image).decode(),
    }


def _restored(model, journal: Journal, request):
    from lmms_eval.api.instance import GenerationResult, TokenCounts

    key = RequestKey.of(request)
    kept = journal.answers[_entry_key(request)]
    if kept["question"] != _digest(request):
        raise UsageError(
            f"{journal.first}: its answer {key.doc_id} is to another question than the task asks now. Delete "
            f"{journal.task}.journal*.jsonl there to answer the questions anew."
        )
    model.measured[key] = kept["measured"]
    if kept["image"]:
        model.images[key.task, key.doc_id] = base64.b64decode(kept["image"])
    inputs, outputs = kept["counts"]
    return GenerationResult(
        kept["text"], TokenCounts(input_tokens=inputs, output_tokens=outputs)
    )


def _entry_key(request) -> tuple[int, int]:
    """Return what a journal knows the answer to a request by."""
    key = RequestKey.of(request)
    return key.doc_id, key.number


def _digest(request) -> int:
    """Of the prompt and of how it is to be answered."""
    args = RequestArgs.of(request)
    return crc32(repr((args.context, args.gen_kwargs)).encode())
