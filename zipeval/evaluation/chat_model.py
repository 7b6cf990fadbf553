"""The model that lmms-eval talks to: chat messages in, answers out, and what every prompt cost."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain, count
from math import inf
from zlib import crc32

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from zipeval.benchmarks import BENCHMARKS, SEVERAL_ROUNDS, lmms_names
from zipeval.benchmarks.lmms_names import RequestArgs, RequestKey
from zipeval.engine import flops, hf_names
from zipeval.engine.budget import VisualInput
from zipeval.engine.images import pixels
from zipeval.engine.logits import NO_NUMBERS, NOT_NUMBERS
from zipeval.errors import BudgetError, RunError, UsageError
from zipeval.evaluation.resuming import Resumption
from zipeval.inference.answering import Answer, BatchGenerator, answering
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

# Samples of a task whose picture is kept.
PICTURED = 8
# Samples without numbers for logits at the beginning, after which nothing else is expected.
ENOUGH = 32
# Batches of prompts that wait together, from which those of one length are taken.
WINDOW = 4
# Prompts: a prepared picture in tiles is 7 MB.
MOST_WAITING = 256


class ZipEval(lmms):
    """A model under a reduction method.

    Args:
        session: an open session; without one, the other arguments are `zipeval run` overrides.
        batch_size, device: lmms-eval's own options; they override `batch_size` and `model.device`.

    Attributes:
        measured: token counts and cost of every request. Its `latency` is the seconds from its batch's prepared inputs
            to its batch's last token; of conversations all rounds count, and the later ones' fresh selections too.
        images: of the first samples of a task, by (task, doc_id), a JPEG file.
        keep: called with every batch's (request, answer) as it is answered, but with nothing that cannot be decoded.
        resumption: answers requests from a task's journal, see zipeval/evaluation/resuming.py; None: there is none.
    """

    # lmms-eval's word for a model that takes chat messages is that it is not simple.
    is_simple = False

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
        self.measured: dict[RequestKey, dict] = {}
        self.images: dict[tuple[str, int], bytes] = {}
        self.keep: Callable[[list[tuple]], None] | None = None
        self.resumption: Resumption | None = None

    def __repr__(self) -> str:
        """Return a part of the key of lmms-eval's response cache, which has to tell methods and budgets apart."""
        return f"ZipEval({self.session.run_id})"

    @property
    def device(self):
        """Return the device that prompts are answered on."""
        return self.session.placement.device

    def clean(self) -> None:
        """Keep the model: lmms-eval would delete it, and the next task of the run needs it."""

    def loglikelihood(self, requests):
        """Refuse a task that compares likelihoods.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a task compares likelihoods; zipeval runs tasks that generate answers"
        )

    def generate_until_multi_round(
        self, requests: list[Instance]
    ) -> list[GenerationResult]:
        """Return the answers to all rounds of conversations about the pictures of their first round.

        zipeval/inference/conversing.py says how they are held.

        Raises:
            UsageError: for a task of any other kind: nothing says what a second answer to a round would be to it.
        """
        for task in dict.fromkeys(RequestArgs.of(request).task for request in requests):
            if task not in BENCHMARKS or not BENCHMARKS[task].turns:
                raise UsageError(SEVERAL_ROUNDS.format(task))
        return self._generate(requests)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the answers in the order of the requests; the cost of each prompt is kept in `measured`."""
        return self._generate(requests)

    def _generate(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the answers in the order of the requests, from a journal where it has them."""
        if self.resumption is None:
            return self._answer_requests(requests)
        return self.resumption.answer_all(requests, self._answer_requests)

    def _answer_requests(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the model's answers in the order of the requests.

        Raises:
            RunError: where the model's logits are not numbers.
        """
        from zipeval.utils.progress import progress

        if not requests:
            return []
        requests = lmms_names.numbered(requests)
        groups = _group_by_options(requests)
        for numbers in groups:
            # Unknown settings are refused before the weights are read.
            _generation(requests[numbers[0]])
        label = f"{self.session.run_id} {RequestArgs.of(requests[0]).task}"
        goes_on = self.resumption is not None and self.resumption.goes_on
        guard = _LogitsGuard(label, goes_on)
        # Batches are sorted by length, so that answers come in any order.
        answers: dict[int, GenerationResult] = {}
        with (
            answering(self.session) as model,
            progress(label, len(requests)) as advance,
        ):
            for numbers in groups:
                for new in self._answer_group(model, requests, numbers):
                    answers |= new
                    advance(len(new))
                    batch = [(requests[number], new[number]) for number in new]
                    self._keep_batch(batch, guard)
        return [answers[number] for number in range(len(requests))]

    def _keep_batch(self, batch: list[tuple], guard: _LogitsGuard) -> None:
        """Hand the answers of a batch on to whoever keeps them; what failed is no answer."""
        answered, broken = [], 0
        for request, answer in batch:
            error = self.measured[RequestKey.of(request)].get("error")
            broken += error == NOT_NUMBERS
            if error is None:
                answered.append((request, answer))
        # On the disk before the next batch begins.
        if answered and self.resumption is not None:
            self.resumption.keep(answered)
        if answered and self.keep is not None:
            self.keep(answered)
        guard.count_batch(len(answered), broken)

    def _answer_group(
        self, model: BatchGenerator, requests: list[Instance], numbers: list[int]
    ) -> Iterator[dict[int, GenerationResult]]:
        """Answer the requests with these numbers, which have the same generation options; yields batch by batch."""
        sharing = self.session.reuse != "none"
        # Answers that would depend on the rest of their batch have none.
        is_one_by_one = _generation(requests[numbers[0]]).is_one_by_one
        setting = 1 if is_one_by_one else self.session.config.batch_size
        batch_size = BatchSize(setting, self.device)
        stream = feed(
            self.session,
            lambda number: self.messages(requests[number]),
            self._sort(requests, numbers, sharing),
            sharing,
            lambda number: _name(requests[number]),
        )
        with closing(stream):
            yield from self._batches(model, requests, stream, batch_size)

    def _batches(
        self,
        model: BatchGenerator,
        requests: list[Instance],
        stream: Iterator[PreparedPrompt],
        batch_size: BatchSize,
    ) -> Iterator[dict[int, GenerationResult]]:
        """Answer the prompts of a stream; yields the answers of each batch by the numbers of their requests."""
        waiting: list[PreparedPrompt] = []
        # The first batch does not wait until many prompts are prepared.
        for batches in count(1):
            window = min(min(batches, WINDOW) * batch_size.size, MOST_WAITING)
            room = max(batch_size.size, window)
            while len(waiting) < room and (prompt := next(stream, None)):
                request = requests[prompt.number]
                if prompt.error:
                    yield {prompt.number: self._fail(request, prompt.error, 1)}
                else:
                    self._keep_picture(request, prompt)
                    waiting.append(prompt)
            if not waiting:
                return
            # Neighbours of one length waste no padding.
            waiting = _sort_waiting(waiting)
            batch = waiting[: batch_size.size]
            answers = self._answer_batch(model, batch, requests)
            if answers is None:
                # The same prompts again, fewer at a time.
                batch_size.halve()
                continue
            waiting = waiting[batch_size.size :]
            batch_size.grow(len(batch))
            yield answers

    def _sort(
        self, requests: list[Instance], numbers: list[int], sharing: bool
    ) -> list[int]:
        """Sort requests so that neighbours are of one picture, if pictures are shared, and of about one length."""
        args = [RequestArgs.of(requests[number]) for number in numbers]
        # Without sharing, every document is a group of its own.
        groups = [each.doc_id for each in args]
        if sharing:
            documents = lmms_names.documents(self, args[0])
            groups = list(map(same_picture(documents), groups))
        order = sort_by_group_and_length(groups, [len(each.context) for each in args])
        return [numbers[place] for place in order]

    def _answer_batch(
        self,
        model: BatchGenerator,
        batch: list[PreparedPrompt],
        requests: list[Instance],
    ) -> dict[int, GenerationResult] | None:
        """Answer a batch; returns its answers by number, or None where memory ran out."""
        import torch

        start = time.perf_counter()
        try:
            answers = self._generate_answers(model, batch, requests)
        except torch.OutOfMemoryError:
            # The caller tries again, not this block: the exception would keep what is on the device.
            return None
        # The texts are on the host by now, so that the device has finished.
        seconds = time.perf_counter() - start
        results = {}
        for prompt, answer in zip(batch, answers, strict=True):
            request = requests[prompt.number]
            if answer.failed:
                failed = self._fail(request, answer.failed, len(batch))
                results[prompt.number] = failed
                continue
            # Of a conversation also every time that its pictures were read again.
            for visual in (answer.visual, *answer.reread):
                self._check_budget(request, answer.pictures, visual)
            cost = _cost(model, prompt, answer)
            # Of the whole batch: its share is `latency` / `batch`.
            cost |= {"latency": seconds, "batch": len(batch)}
            self.measured[RequestKey.of(request)] = cost
            counts = TokenCounts(
                input_tokens=answer.entered[0], output_tokens=answer.output_tokens
            )
            results[prompt.number] = GenerationResult(answer.text, counts)
        return results

    def _generate_answers(
        self,
        model: BatchGenerator,
        batch: list[PreparedPrompt],
        requests: list[Instance],
    ) -> list[Answer]:
        """Return the answers of a batch, whose requests all have the options of the first one.

        Raises:
            torch.OutOfMemoryError: if it is too large.
        """
        import torch

        first = requests[batch[0].number]
        generation = _generation(first)
        if generation.is_sampled:
            # The batch is this prompt alone: see Generation.is_one_by_one.
            seed = self.session.config.seed + generation.seed
            torch.manual_seed(_seed(RequestKey.of(first), seed))
        if lmms_names.is_conversation(first):
            return self._converse(model, batch, requests)
        return model.answer(batch, RequestArgs.of(first).gen_kwargs)

    def _converse(
        self,
        model: BatchGenerator,
        batch: list[PreparedPrompt],
        requests: list[Instance],
    ) -> list[Answer]:
        """Return the answers of lmms-eval's rounds.

        A task says what comes after the answers so far, or that there is nothing left.

        Raises:
            UsageError: for a task that shows pictures in later rounds.
        """
        args = [RequestArgs.of(requests[prompt.number]) for prompt in batch]
        documents = [lmms_names.document(self, each) for each in args]

        def next_round(place: int, replies: list[str]) -> list[dict] | None:
            messages, is_over, *_ = args[place].doc_to_messages(
                documents[place], round_idx=len(replies), previous_output=replies
            )
            if is_over:
                return None
            parts = chain.from_iterable(message["content"] for message in messages)
            if any(part["type"] != "text" for part in parts):
                raise UsageError(
                    f"tasks=[{args[place].task}]: it shows pictures in later rounds; zipeval holds conversations about "
                    "those of the first one."
                )
            return messages

        first = []
        for each, document in zip(args, documents, strict=True):
            first.append(each.doc_to_messages(document))
        return converse(model, batch, first, next_round, args[0].gen_kwargs)

    def _fail(self, request: Instance, error: str, batch: int) -> GenerationResult:
        """Note why a request has no answer; returns the empty one that lmms-eval scores in its place."""
        self.measured[RequestKey.of(request)] = {"error": error, "batch": batch}
        return GenerationResult("", TokenCounts(0, 0))

    def _keep_picture(self, request: Instance, prompt: PreparedPrompt) -> None:
        """Keep the first picture of a prompt of a task's first samples, if it has one."""
        key = RequestKey.of(request)
        # A text has none; the later questions about a document show the same.
        if prompt.kinds and key.doc_id < PICTURED and key.number == 0:
            kind, inputs = next(prompt.pictures())
            jpeg = self.session.jpeg(pixels(inputs, kind)[0])
            self.images[key.task, key.doc_id] = jpeg

    def _check_budget(
        self, request: Instance, images: list[VisualInput], measured: list[int]
    ) -> None:
        """Check the visual tokens that entered the layers, (layers), against what the method has to leave.

        Raises:
            BudgetError: where they differ.
        """
        # Every prompt is counted: a method that leaves other tokens would be compared unfairly.
        announced, args = self.session.entering(images), RequestArgs.of(request)
        pairs = zip(measured, announced, strict=True)
        for layer, (entered, expected) in enumerate(pairs):
            if entered != expected:
                raise BudgetError(
                    f"{self.session.run_id} {args.task}: in sample {args.doc_id}, {entered} visual tokens "
                    f"entered layer {layer}, and {expected} should have. Nothing of this task was recorded."
                )

    def messages(self, request: Instance) -> list[dict]:
        """Return the chat messages of a request, pictures as the data set has them."""
        args = RequestArgs.of(request)
        # A data set decodes what it holds as soon as its row is looked up.
        with decoding():
            return args.doc_to_messages(in_eight_bits(lmms_names.document(self, args)))


class _LogitsGuard:
    """Stops a task at whose beginning no sample has numbers for logits.

    Args:
        label: of the run and the task.
        goes_on: whether some questions have an answer of before: then nothing is stopped.
    """

    def __init__(self, label: str, goes_on: bool):
        self.label = label
        self.broken = -inf if goes_on else 0

    def count_batch(self, answered: int, broken: int) -> None:
        """Count the answers of a batch, and the samples of it without numbers.

        Raises:
            RunError: where there were too many, and no answer.
        """
        self.broken = -inf if answered else self.broken + broken
        if self.broken >= ENOUGH:
            raise RunError(f"{self.label}: {NO_NUMBERS.format(self.broken)}")


def _sort_waiting(waiting: list[PreparedPrompt]) -> list[PreparedPrompt]:
    """Sort prepared prompts so that a batch is of one picture, and of about one length."""
    # A prompt without keys is of no picture that others share.
    groups = [tuple(prompt.keys) or prompt.number for prompt in waiting]
    order = sort_by_group_and_length(groups, [prompt.length for prompt in waiting])
    return [waiting[place] for place in order]


def _cost(model: BatchGenerator, prompt: PreparedPrompt, answer: Answer) -> dict:
    """Return the token counts and the cost of an answered prompt, without the seconds."""
    # FLOPs are counted of what entered each layer, with the decoder's widths.
    decoder = hf_names.decoder(model.model).config
    return {
        "pictures": prompt.picture_hashes,
        "crops": [picture.crops for picture in answer.pictures],
        "visual_tokens": answer.visual,
        "prompt_tokens": answer.entered[0],
        "kv_entries": sum(answer.entered),
        "flops_formula": flops.formula(answer.entered, decoder),
        "flops_exact": flops.exact(answer.entered, decoder),
        "output_tokens": answer.output_tokens,
        **_overflow(answer, hf_names.positions(model.model)),
        **answer.positions,
        "digest": answer.digest,
    }


def _overflow(answer: Answer, positions: int | None) -> dict[str, int]:
    """Return by how many tokens the longest prompt of an answer exceeds the decoder's positions, if it does.

    Args:
        positions: None for a decoder without a limit.
    """
    longest = max([answer.entered[0], *answer.later_prompts])
    excess = longest - (positions or inf)
    return {"overflow": excess} if excess > 0 else {}


def _name(request: Instance) -> str:
    """Return what an error calls a request."""
    key = RequestKey.of(request)
    return f"tasks=[{key.task}]: sample {key.doc_id}"


def _generation(request: Instance) -> Generation:
    """Return how the answer to a request is generated.

    Raises:
        UsageError: for a setting of its task that is unknown.
    """
    args = RequestArgs.of(request)
    return resolve(args.gen_kwargs, args.task, lmms_names.is_conversation(request))


def _seed(key: RequestKey, seed: int) -> int:
    """Return the seed of the answer to a request: its own, whatever is answered before or beside it."""
    place = (key.task, key.doc_id)
    # The first request about a document has the seed of a document that has no other.
    text = f"{(*place, key.number)}" if key.number else f"{place}"
    return crc32(text.encode(), seed)


def _group_by_options(requests: list[Instance]) -> list[list[int]]:
    """Return the numbers of requests in groups that are generated under the same options."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        args = RequestArgs.of(request)
        groups[args.task, repr(args.gen_kwargs)].append(number)
    return list(groups.values())
