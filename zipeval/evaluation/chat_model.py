"""The model that lmms-eval talks to: chat messages in, answers out, and what every prompt cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from math import inf
from zlib import crc32

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from zipeval.benchmarks import BENCHMARKS, SEVERAL_ROUNDS, lmms_names
from zipeval.benchmarks.lmms_names import RequestArgs, RequestKey
from zipeval.engine import flops, hf_names
from zipeval.engine.budget import Picture
from zipeval.engine.images import pixels
from zipeval.engine.logits import NO_NUMBERS, NOT_NUMBERS
from zipeval.errors import BudgetError, RunError, UsageError
from zipeval.inference.answering import Answer, answering
from zipeval.inference.batch_size import BatchSize
from zipeval.inference.conversing import converse
from zipeval.inference.feed import (
    PreparedPrompt,
    feed,
    same_picture,
    sort_by_group_and_length,
)
from zipeval.inference.generation import Generation, resolve
from zipeval.media import decoding, in_eight_bits

PICTURED = 8  # samples of a task whose picture is kept
ENOUGH = 32  # samples without numbers for logits at the beginning, after which nothing else is expected
WINDOW = 4  # batches of questions that wait together, from which those of one length are taken
MOST_WAITING = 256  # questions: a prepared picture in tiles is 7 MB


class ZipEval(lmms):
    """A model under a reduction method.

    Args:
        session: an open session; without one, the other arguments are `zipeval run` overrides.
        batch_size, device: lmms-eval's own options; they override `batch_size` and `model.device`.
    """

    is_simple = False  # lmms-eval's word for: takes chat messages

    def __init__(
        self,
        session=None,
        batch_size=None,
        max_batch_size=None,
        device=None,
        **overrides,
    ):
        super().__init__()
        if session is None:
            from zipeval.config.compose import compose
            from zipeval.inference.session import Session

            overrides |= {"batch_size": batch_size} if batch_size else {}
            overrides |= {"model.device": device} if device else {}
            session = Session(compose([f"{k}={v}" for k, v in overrides.items()]))
        self.session = session
        self.measured: dict[
            RequestKey, dict
        ] = {}  # token counts and cost of every request;
        # its `latency` is the seconds from its batch's prepared inputs to its batch's last token; of conversations all
        # rounds count, and the later ones' fresh selections too
        self.images: dict[
            tuple[str, int], bytes
        ] = {}  # (task, doc_id) -> of the first samples of a task: a JPEG file
        # Told of every batch's (request, answer) as it is answered; of what cannot be decoded it is not.
        self.keep: Callable[[list[tuple]], None] | None = None
        self.goes_on = (
            False  # with a task of which an earlier process answered some questions
        )

    def __repr__(self) -> str:
        """Part of the key of lmms-eval's response cache: has to tell methods and budgets apart."""
        return f"ZipEval({self.session.run_id})"

    @property
    def device(self):
        return self.session.placement.device

    def clean(self) -> None:
        """Keep the model: lmms-eval would delete it, and the next task of the run needs it."""

    def loglikelihood(self, requests):
        raise UsageError(
            "a task compares likelihoods; zipeval runs tasks that generate answers"
        )

    def generate_until_multi_round(
        self, requests: list[Instance]
    ) -> list[GenerationResult]:
        """Answers to all rounds of conversations about the pictures of their first round.

        zipeval/inference/conversing.py says how they are held.

        Raises:
            UsageError: for a task of any other kind: nothing says what a second answer to a round would be to it.
        """
        for task in dict.fromkeys(RequestArgs.of(request).task for request in requests):
            if task not in BENCHMARKS or not BENCHMARKS[task].turns:
                raise UsageError(SEVERAL_ROUNDS.format(task))
        return self._generate(requests)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; what each prompt cost is kept in `measured`."""
        return self._generate(requests)

    def _generate(self, requests: list[Instance]) -> list[GenerationResult]:
        from zipeval.utils.progress import progress

        answers: dict[int, GenerationResult] = {}
        broken = (
            -inf if self.goes_on else 0
        )  # samples without numbers for logits, before any that has them
        if not requests:
            return []
        requests = lmms_names.numbered(requests)
        alike = _alike(requests)
        for numbers in alike:  # refused before the weights are read, if they are
            _generation(requests[numbers[0]])
        label = f"{self.session.run_id} {RequestArgs.of(requests[0]).task}"
        with (
            answering(self.session) as model,
            progress(label, len(requests)) as advance,
        ):
            for numbers in alike:
                for found in self._answered(model, requests, numbers):
                    answers |= found
                    advance(len(found))
                    batch = [
                        (requests[number], answer) for number, answer in found.items()
                    ]
                    answered = [
                        pair
                        for pair in batch
                        if "error" not in self.measured[RequestKey.of(pair[0])]
                    ]
                    if self.keep and answered:
                        self.keep(answered)
                    broken = -inf if answered else broken + self._without_numbers(batch)
                    if broken >= ENOUGH:
                        raise RunError(f"{label}: {NO_NUMBERS.format(broken)}")
        return [answers[number] for number in range(len(requests))]

    def _answered(
        self, model, requests: list[Instance], numbers: list[int]
    ) -> Iterator[dict[int, GenerationResult]]:
        """Batch by batch, of the requests with these numbers, which have the same generation options."""
        sharing, generation = (
            self.session.reuse != "none",
            _generation(requests[numbers[0]]),
        )
        size = BatchSize(
            1 if generation.is_one_by_one else self.session.config.batch_size,
            self.device,
        )
        stream = feed(
            self.session,
            lambda number: self.messages(requests[number]),
            self._in_order(requests, numbers, sharing),
            sharing,
            lambda number: "tasks=[{}]: sample {}".format(
                *RequestKey.of(requests[number])
            ),
        )
        with closing(stream):
            yield from self._batches(model, requests, stream, size)

    def _batches(
        self,
        model,
        requests: list[Instance],
        stream: Iterator[PreparedPrompt],
        size: BatchSize,
    ) -> Iterator[dict[int, GenerationResult]]:
        """Answer the questions of a stream; yields the answers of each batch by the numbers of their requests."""
        waiting: list[PreparedPrompt] = []
        for batches in count(1):  # the first does not wait until many are prepared
            while len(waiting) < max(
                size.size, min(min(batches, WINDOW) * size.size, MOST_WAITING)
            ):
                question = next(stream, None)
                if question is None:
                    break
                if question.error:
                    self.measured[RequestKey.of(requests[question.number])] = {
                        "error": question.error,
                        "batch": 1,
                    }
                    yield {question.number: GenerationResult("", TokenCounts(0, 0))}
                else:
                    self._picture(requests[question.number], question)
                    waiting.append(question)
            if not waiting:
                return
            groups = [tuple(q.keys) or q.number for q in waiting]
            waiting = [
                waiting[i]
                for i in sort_by_group_and_length(groups, [q.length for q in waiting])
            ]
            batch = waiting[: size.size]
            found = self._answer(model, batch, requests)
            if found is None:
                size.halve()
                continue
            waiting = waiting[size.size :]
            size.grow(len(batch))
            yield found

    def _in_order(
        self, requests: list[Instance], numbers: list[int], sharing: bool
    ) -> list[int]:
        """The requests so that neighbours are of one picture, if pictures are shared, and of about one length."""
        asked = [RequestArgs.of(requests[number]) for number in numbers]
        hint = (
            same_picture(lmms_names.documents(self, asked[0]))
            if sharing
            else (lambda doc_id: doc_id)
        )
        groups = [hint(args.doc_id) for args in asked]
        return [
            numbers[i]
            for i in sort_by_group_and_length(
                groups, [len(args.context) for args in asked]
            )
        ]

    def _answer(
        self, model, batch: list[PreparedPrompt], requests: list[Instance]
    ) -> dict[int, GenerationResult] | None:
        """By number; None where memory ran out."""
        import torch

        decoder, positions = (
            hf_names.decoder(model.model).config,
            hf_names.positions(model.model),
        )
        start = time.perf_counter()
        try:
            first = requests[batch[0].number]
            options, generation = RequestArgs.of(first).gen_kwargs, _generation(first)
            if generation.is_sampled:
                torch.manual_seed(
                    _seed(
                        RequestKey.of(first), self.session.config.seed + generation.seed
                    )
                )
            if lmms_names.is_conversation(first):
                answers = self._conversed(model, batch, requests)
            else:
                answers = model.answer(batch, options)
        except torch.OutOfMemoryError:
            return None  # and not below: the exception would keep what is on the device
        seconds = time.perf_counter() - start
        found = {}
        for question, answer in zip(batch, answers, strict=True):
            request = requests[question.number]
            if answer.failed:
                self.measured[RequestKey.of(request)] = {
                    "error": answer.failed,
                    "batch": len(batch),
                }
                found[question.number] = GenerationResult("", TokenCounts(0, 0))
                continue
            for visual in (answer.visual, *answer.reread):
                self._check_budget(request, answer.pictures, visual)
            self.measured[RequestKey.of(request)] = {
                "pictures": question.picture_hashes,
                "crops": [picture.crops for picture in answer.pictures],
                "visual_tokens": answer.visual,
                "prompt_tokens": answer.entered[0],
                "kv_entries": sum(answer.entered),
                "flops_formula": flops.formula(answer.entered, decoder),
                "flops_exact": flops.exact(answer.entered, decoder),
                "output_tokens": answer.output_tokens,
                **_overflow(answer, positions),
                **answer.left,
                "digest": answer.digest,
                "latency": seconds,
                "batch": len(batch),
            }
            counts = TokenCounts(
                input_tokens=answer.entered[0], output_tokens=answer.output_tokens
            )
            found[question.number] = GenerationResult(answer.text, counts)
        return found

    def _conversed(
        self, model, batch: list[PreparedPrompt], requests: list[Instance]
    ) -> list[Answer]:
        """lmms-eval's rounds: a task says what comes after the answers so far, or that there is nothing left."""
        asked = [RequestArgs.of(requests[question.number]) for question in batch]
        docs = [lmms_names.document(self, args) for args in asked]

        def next_round(place: int, said: list[str]) -> list[dict] | None:
            args = asked[place]
            messages, over, *_ = args.doc_to_messages(
                docs[place], round_idx=len(said), previous_output=said
            )
            if over:
                return None
            if any(
                part["type"] != "text"
                for message in messages
                for part in message["content"]
            ):
                raise UsageError(
                    f"tasks=[{args.task}]: it shows pictures in later rounds; zipeval holds conversations about "
                    "those of the first one."
                )
            return messages

        first = [
            args.doc_to_messages(doc) for args, doc in zip(asked, docs, strict=True)
        ]
        return converse(model, batch, first, next_round, asked[0].gen_kwargs)

    def _without_numbers(self, batch: list[tuple]) -> int:
        """Count the requests of a batch at which the model's logits were not numbers."""
        return sum(
            self.measured[RequestKey.of(request)].get("error") == NOT_NUMBERS
            for request, _ in batch
        )

    def _picture(self, request: Instance, question: PreparedPrompt) -> None:
        """Of a task's first samples, keep the first picture of the prompt, if it has one."""
        key = RequestKey.of(request)
        if question.kinds and key.doc_id < PICTURED and key.number == 0:
            kind, inputs = next(question.pictures())
            self.images[key.task, key.doc_id] = self.session.jpeg(
                pixels(inputs, kind)[0]
            )

    def _check_budget(
        self, request: Instance, images: list[Picture], measured: list[int]
    ) -> None:
        """Raises BudgetError where the visual tokens that entered some layer are not what the method has to leave."""
        expected, args = self.session.entering(images), RequestArgs.of(request)
        for layer, counts in enumerate(zip(measured, expected, strict=True)):
            if counts[0] != counts[1]:
                raise BudgetError(
                    f"{self.session.run_id} {args.task}: in sample {args.doc_id}, {counts[0]} visual tokens "
                    f"entered layer {layer}, and {counts[1]} should have. Nothing of this task was recorded."
                )

    def messages(self, request: Instance) -> list[dict]:
        """Return the chat messages of a request, pictures as the data set has them."""
        args = RequestArgs.of(request)
        with (
            decoding()
        ):  # what a data set holds is decoded as soon as its row is looked up
            return args.doc_to_messages(in_eight_bits(lmms_names.document(self, args)))


def _overflow(answer: Answer, positions: int | None) -> dict[str, int]:
    """Return by how many tokens the longest prompt of an answer exceeds the decoder's positions, if it does."""
    excess = max([answer.entered[0], *answer.later_prompts]) - (positions or inf)
    return {"overflow": excess} if excess > 0 else {}


def _generation(request: Instance) -> Generation:
    """Return how the answer to a request is generated.

    Raises:
        UsageError: for a setting of its task that is unknown.
    """
    args = RequestArgs.of(request)
    return resolve(args.gen_kwargs, args.task, lmms_names.is_conversation(request))


def _seed(key: RequestKey, seed: int) -> int:
    """Return what the answer to a request is drawn with: by itself, whatever is answered before or beside it."""
    place = (key.task, key.doc_id)
    text = f"{(*place, key.number)}" if key.number else f"{place}"
    return crc32(text.encode(), seed)


def _alike(requests: list[Instance]) -> list[list[int]]:
    """The numbers of requests that are generated under the same options."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, request in enumerate(requests):
        args = RequestArgs.of(request)
        found.setdefault((args.task, repr(args.gen_kwargs)), []).append(number)
    return [*found.values()]
