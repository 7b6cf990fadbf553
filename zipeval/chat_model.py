"""The model that lmms-eval talks to: chat messages in, answers out, and what every prompt cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import groupby

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from zipeval.budget import Picture
from zipeval.engine import flops
from zipeval.errors import BudgetError, MediaError, UsageError
from zipeval.media import decoding

SAMPLING = ("temperature", "top_p", "top_k")
PICTURED = 8  # samples of a task whose picture is kept
DEFAULT_NEW_TOKENS = 1024  # for tasks that set none, as lmms-eval's own models


class ZipEval(lmms):
    """A model under a reduction method.

    Args:
        session: an open session; without one, the other arguments are `zipeval run` overrides.
        batch_size, device: lmms-eval's own options; they override `batch_size` and `model.device`.
    """

    is_simple = False  # lmms-eval's word for: takes chat messages

    def __init__(self, session=None, batch_size=None, max_batch_size=None, device=None, **overrides):
        super().__init__()
        if session is None:
            from zipeval.cli import compose
            from zipeval.runner import Session

            overrides |= {"batch_size": batch_size} if batch_size else {}
            overrides |= {"model.device": device} if device else {}
            session = Session(compose([f"{k}={v}" for k, v in overrides.items()]))
        self.session = session
        self.measured: dict[tuple[str, int], dict] = {}  # (task, doc_id) -> token counts and cost of that sample;
        # its `latency` is the seconds from its batch's first image to its batch's last token
        self.images: dict[tuple[str, int], bytes] = {}  # of the first samples of a task, likewise: a JPEG file

    def __repr__(self) -> str:
        """Part of the key of lmms-eval's response cache: has to tell methods and budgets apart."""
        return f"ZipEval({self.session.run_id})"

    @property
    def device(self):
        return self.session.placement.device

    def clean(self) -> None:
        """Keep the model: lmms-eval would delete it, and the next task of the run needs it."""

    def loglikelihood(self, requests):
        raise UsageError("a task compares likelihoods; zipeval runs tasks that generate answers")

    def generate_until_multi_round(self, requests):
        raise UsageError("a task asks in several rounds; zipeval runs tasks that ask once")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; what each prompt cost is kept in `measured`."""
        import torch

        from zipeval.engine.ledger import ledger
        from zipeval.engine.trace import trace
        from zipeval.progress import progress

        answers: list[GenerationResult] = []
        model, _ = self.session.load()
        label = f"{self.session.run_id} {requests[0].args[4]}"
        with (
            torch.inference_mode(),
            self.session.method.applied(model),
            ledger(model) as prefills,
            trace(model) as told,
            progress(label, len(requests)) as advance,
        ):
            for batch in _batches(requests, self.session.config.batch_size):
                prefills.clear()
                told.clear()
                start = time.perf_counter()
                answers += self._answers(model, batch, prefills, told)
                seconds = time.perf_counter() - start
                for request in batch:
                    self.measured[request.args[4], request.args[3]] |= {"latency": seconds, "batch": len(batch)}
                advance(len(batch))
        return answers

    def _answers(self, model, batch: list[Instance], prefills, told) -> list[GenerationResult]:
        """Those of a batch; of a question whose image or video cannot be decoded, an empty one."""
        readable, conversations, answers = [], [], [GenerationResult("", TokenCounts(0, 0))] * len(batch)
        for number, request in enumerate(batch):
            try:
                conversations.append(self.session.decoded(self._messages(request)))
                readable.append(number)
            except MediaError as error:
                self.measured[request.args[4], request.args[3]] = {"error": str(error)}
        if readable:
            generated = self._answer(model, [batch[i] for i in readable], conversations, prefills, told)
            for number, answer in zip(readable, generated, strict=True):
                answers[number] = answer
        return answers

    def _answer(self, model, batch: list[Instance], conversations: list, prefills, told) -> list[GenerationResult]:
        from zipeval.engine.images import PIXELS, pictures, pixels

        generation = dict(batch[0].args[2])
        stops = [s for s in generation.pop("until", None) or [] if s]
        inputs = self.session.inputs(conversations)
        self._picture(batch, conversations, {kind: pixels(inputs, kind) for kind in PIXELS})
        images = _by_prompt(conversations, {kind: pictures(model, inputs, kind) for kind in PIXELS})
        start = inputs["input_ids"].shape[1]
        new = self._generate(model, inputs, generation)[:, start:]
        (prefill,) = prefills
        texts = self.session.decode(new)
        eos = model.generation_config.eos_token_id
        beams = len(prefill.entered) // len(batch)  # generate() repeats a prompt for each of its beams
        left = self._left(told, model, inputs, conversations, beams)
        results = []
        decoder = model.base_model.language_model.config
        for row, request in enumerate(batch):
            text = texts[row]
            for stop in stops:
                text = text.split(stop)[0]
            written = _written(new[row].tolist(), [eos] if isinstance(eos, int) else eos or [])
            entered, visual = prefill.entered[row * beams], prefill.visual(row * beams)
            self._check_budget(request, images[row], visual)
            self.measured[request.args[4], request.args[3]] = {
                "crops": [image.crops for image in images[row]],
                "visual_tokens": visual,
                "prompt_tokens": entered[0],
                "kv_entries": sum(entered),
                "flops_formula": flops.formula(entered, decoder),
                "flops_exact": flops.exact(entered, decoder),
                "output_tokens": written,
                **left[row],
            }
            counts = TokenCounts(input_tokens=entered[0], output_tokens=written)
            results.append(GenerationResult(text.strip(), counts))
        return results

    def _picture(self, batch: list[Instance], conversations: list, given: dict) -> None:
        """Of a task's first samples, keep the first picture of the prompt, if it has one."""
        found = {kind: its for kind, its in given.items() if its is not None}
        for request, its in zip(batch, _by_prompt(conversations, found), strict=True):
            if its and request.args[3] < PICTURED:
                self.images[request.args[4], request.args[3]] = self.session.jpeg(its[0])

    def _left(self, told, model, inputs, conversations: list, beams: int) -> list[dict]:
        """The visual tokens that the method left of each prompt, if it removes any."""
        if not self.session.reduces:
            return [{}] * len(conversations)
        places = _by_prompt(conversations, told.places(model, inputs))
        return [told.left(row * beams, its) for row, its in enumerate(places)]

    def _generate(self, model, inputs, generation: dict):
        import torch

        try:
            return model.generate(**inputs, **_generation_options(generation))
        except torch.OutOfMemoryError:
            pass  # and not its cause below: it would keep what is on the device
        size = len(inputs["input_ids"])
        smaller = f"batch_size={size // 2}" if size > 1 else "model.quantization=4bit, or where there is more memory"
        raise UsageError(
            f"batch_size={self.session.config.batch_size}: {self.device} ran out of memory with {size} prompts "
            f"together. Run it again with {smaller}; finished tasks are kept."
        )

    def _check_budget(self, request: Instance, images: list[Picture], measured: list[int]) -> None:
        """Raises BudgetError where the visual tokens that entered some layer are not what the method has to leave."""
        expected = self.session.entering(images)
        for layer, counts in enumerate(zip(measured, expected, strict=True)):
            if counts[0] != counts[1]:
                raise BudgetError(
                    f"{self.session.run_id} {request.args[4]}: in sample {request.args[3]}, {counts[0]} visual tokens "
                    f"entered layer {layer}, and {counts[1]} should have. Nothing of this task was recorded."
                )

    def _messages(self, request: Instance) -> list[dict]:
        _, to_messages, _, doc_id, task, split = request.args
        with decoding():  # what a data set holds is decoded as soon as its row is looked up
            return to_messages(self.task_dict[task][split][doc_id])


def _by_prompt(conversations: list, found: dict[str, Iterable]) -> list[list]:
    """What was found of all images and of all videos, in reading order, put together by prompts."""
    remaining = {kind: iter(its) for kind, its in found.items()}
    parts = [[part["type"] for message in messages for part in message["content"]] for messages in conversations]
    return [[next(remaining[kind]) for kind in kinds if kind in remaining] for kinds in parts]


def _batches(requests: list[Instance], size: int) -> Iterator[list[Instance]]:
    """Neighbours that are generated under the same options, at most `size` together."""
    for _, same in groupby(requests, key=lambda r: (r.args[4], repr(r.args[2]))):
        same = list(same)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _generation_options(given: dict) -> dict:
    """lmms-eval's generation_kwargs as `generate` wants them; greedy unless sampling is asked for and possible."""
    sample = bool(given.get("do_sample")) and (given.get("temperature") or 0) > 0
    return {
        "max_new_tokens": int(given.get("max_new_tokens", DEFAULT_NEW_TOKENS)),
        "num_beams": int(given.get("num_beams") or 1),
        "do_sample": sample,
        **{k: given.get(k) if sample else None for k in SAMPLING},
    }


def _written(ids: list[int], ends: list[int]) -> int:
    """Tokens up to and including the first end token."""
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
