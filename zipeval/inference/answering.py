"""A batch of questions becomes answers, each with what its prompt cost; what they share is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from zipeval.engine import hf_names
from zipeval.engine.budget import VisualInput
from zipeval.engine.compiled import compile_blocks
from zipeval.engine.images import PIXELS, join_pictures, pictures
from zipeval.engine.ledger import Prefill, record_prefill
from zipeval.engine.logits import NOT_NUMBERS, LogitsWatch, watching_logits
from zipeval.engine.ragged import left_padded, visual_slots
from zipeval.engine.reuse import encode_and_reduce, prefill_prefixes
from zipeval.engine.trace import Trace, trace_kept_tokens
from zipeval.engine.vision import Encoded, encoder_outputs, shrink_placeholders
from zipeval.inference.feed import Question, collate
from zipeval.inference.generation import generation_options, resolve
from zipeval.methods._stages import stages


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and what reading the prompt cost.

    Attributes:
        text: of a conversation, those of its rounds.
        pictures: of the prompt, in reading order, without reduction.
        entered: (layers) tokens of the prompt that entered each layer of the decoder.
        visual: (layers) visual tokens among them.
        output_tokens: up to and including the first end token.
        left: `kept` and `merged` positions, as Trace.left tells them; empty for a method that removes nothing.
        reread: of a conversation, `visual` of every time that its pictures were read again.
        later_prompts: of a conversation, the tokens of each of these prompts, which hold all rounds before.
        failed: why it is no answer, where the model's logits are not numbers.
        digest: `logit` and `logsumexp` of the first token, see zipeval/engine/logits.py.
    """

    text: str | list[str]
    pictures: list[VisualInput]
    entered: list[int]
    visual: list[int]
    output_tokens: int
    left: dict[str, list[list[int]]]
    reread: list[list[int]] = field(default_factory=list)
    later_prompts: list[int] = field(default_factory=list)
    failed: str | None = None
    digest: dict[str, float] = field(
        default_factory=dict, compare=False
    )  # rounding moves it


@dataclass(frozen=True)
class _Read:
    """What a batch of prompts becomes before anything is generated.

    Attributes:
        inputs: for `generate`.
        pictures: of every prompt.
        rows: of every prompt, the row of what was read of it already; None if nothing was.
        behind: tokens of every prompt that were not.
    """

    inputs: dict
    pictures: list[list[VisualInput]]
    rows: list[int] | None
    behind: list[int]


class Answering:
    """A session's model under its method; see `answering`."""

    def __init__(
        self, session, prefills: list[Prefill], told: Trace, logits: LogitsWatch
    ):
        self.session, self.prefills, self.told, self.logits = (
            session,
            prefills,
            told,
            logits,
        )
        self.model, processor = session.load()
        self.tokenizer = processor.tokenizer
        self.padding = self.tokenizer.pad_token_id
        ends = self.model.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else ends or []

    def answer(self, batch: list[Question], options: dict) -> list[Answer]:
        """Of every question.

        Args:
            options: lmms-eval's generation_kwargs.

        Raises:
            torch.OutOfMemoryError: with nothing left behind on the device but the weights.
        """
        read = self.read(
            batch, resolve(options, conversation=True).arguments["num_beams"]
        )
        start = read.inputs["input_ids"].shape[1]
        return self.answers(
            batch, read, self.generated(read.inputs, options)[:, start:], options
        )

    def read(self, batch: list[Question], beams: int = 1) -> _Read:
        """What is given to `generate` of questions."""
        self.prefills.clear()
        self.told.clear()
        return (
            self._together(batch)
            if self.session.reuse == "none"
            else self._sharing(batch, beams)
        )

    def generated(self, inputs: dict, options: dict) -> torch.Tensor:
        """(B, L): prompts and what is generated behind them."""
        self.logits.clear()
        return self.model.generate(**inputs, **generation_options(options))

    def texts(self, new: torch.Tensor, options: dict) -> list[str]:
        """What was generated, up to what ends it."""
        stops = resolve(options, conversation=True).stops
        found = []
        for text in self.session.decode(new):
            for stop in stops:
                text = text.split(stop)[0]
            found.append(text.strip())
        return found

    def answers(
        self, batch: list[Question], read: _Read, new: torch.Tensor, options: dict
    ) -> list[Answer]:
        """What was generated for questions, and what reading them cost."""
        if len(self.prefills) != 1:
            hf_names.incompatible(
                f"the model read its prompts {len(self.prefills)} times for one answer each"
            )
        (prefill,) = self.prefills
        beams = (
            len(prefill.entered) // len(batch) if read.rows is None else 1
        )  # generate() repeats a prompt for each
        places = []
        if self.session.reduces:
            given = join_pictures([question.inputs for question in batch])
            places = _by_prompt(batch, self.told.places(self.model, given))
        answers, not_numbers = [], self.logits.failed(len(batch))
        digests = self.logits.digests(len(batch))
        for number, text in enumerate(self.texts(new, options)):
            row = number * beams if read.rows is None else read.rows[number]
            answers.append(
                Answer(
                    text,
                    read.pictures[number],
                    [count + read.behind[number] for count in prefill.entered[row]],
                    prefill.visual(row),
                    _written(new[number].tolist(), self.ends),
                    self.told.left(row, places[number]) if self.session.reduces else {},
                    failed=NOT_NUMBERS if not_numbers[number] else None,
                    digest=digests[number],
                )
            )
        return answers

    def _together(self, batch: list[Question]) -> _Read:
        """Every prompt with its own pictures."""
        inputs = collate(batch, self.padding)
        found = _by_prompt(
            batch, {kind: pictures(self.model, inputs, kind) for kind in PIXELS}
        )
        placed = {name: self._placed(x) for name, x in inputs.items()}
        return _Read(placed, found, None, [0] * len(batch))

    def _sharing(self, batch: list[Question], beams: int) -> _Read:
        """Every picture encoded once; where that is enough to know what is left of it, every prefix read once."""
        model, (method, _) = self.model, stages(self.session.method)
        wanted: dict[str, dict[str, dict]] = {kind: {} for kind in PIXELS}
        for question in batch:
            for key, (kind, inputs) in zip(
                question.keys, question.pictures(), strict=True
            ):
                wanted[kind][key] = inputs
        most = self.session.config.runner.cache_gib * 2**30
        known = {
            key: its
            for kind, of in wanted.items()
            if of
            for key, its in encode_and_reduce(model, kind, of, method, most).items()
        }

        def given(numbers: list[int]) -> dict:
            """Return the arguments that stand for the pixels of these prompts."""
            found = {kind: [] for kind in PIXELS}
            for number in numbers:
                for kind, key in zip(
                    batch[number].kinds, batch[number].keys, strict=True
                ):
                    found[kind].append(known[key][1])
            return encoder_outputs(
                model, {kind: its for kind, its in found.items() if its}
            )

        ids = [self._shrunk(question, known) for question in batch]
        everything, found = (
            [*range(len(batch))],
            [[known[key][0] for key in question.keys] for question in batch],
        )
        seen = all(visual_slots(row, model.config).any() for row in ids)
        if (
            self.session.reuse == "prefix" and seen and beams == 1
        ):  # generate() repeats no cache for its beams
            inputs, rows, behind = prefill_prefixes(
                model, ids, [tuple(q.keys) for q in batch], given, self.padding
            )
            given(everything)  # tells whoever traces of all prompts
            return _Read(inputs, found, rows, behind)
        ids, mask = left_padded(ids, self.padding)
        inputs = {"input_ids": self._placed(ids), "attention_mask": self._placed(mask)}
        return _Read({**inputs, **given(everything)}, found, None, [0] * len(batch))

    def _shrunk(
        self, question: Question, known: dict[str, tuple[VisualInput, Encoded]]
    ) -> torch.Tensor:
        """(L): the ids of a prompt, with as many placeholders as are left of its pictures."""
        before: dict[str, list[VisualInput]] = {}
        left: dict[str, list[int]] = {}
        for kind, key in zip(question.kinds, question.keys, strict=True):
            picture, its = known[key]
            before.setdefault(kind, []).append(picture)
            left.setdefault(kind, []).append(len(its.features))
        ids, mask = question.inputs["input_ids"], question.inputs["attention_mask"]
        return shrink_placeholders(self.model, ids, mask, before, left)[0][0]

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        """On the device, numbers in its dtype."""
        return x.to(
            self.model.device, self.model.dtype if x.is_floating_point() else None
        )


@contextmanager
def answering(session) -> Iterator[Answering]:
    """The session's model, its method applied, until the block ends."""
    model, _ = session.load()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_applied(session, model))
        if session.config.runner.compile:
            stack.enter_context(compile_blocks(model, session.method))
        prefills, told = (
            stack.enter_context(record_prefill(model)),
            stack.enter_context(trace_kept_tokens(model)),
        )
        yield Answering(
            session, prefills, told, stack.enter_context(watching_logits(model))
        )


def _applied(session, model):
    if session.reuse == "none":
        return session.method.applied(model)
    _, inside = stages(session.method)
    return inside.applied(model) if inside else nullcontext()


def _by_prompt(batch: list[Question], found: dict[str, Iterable]) -> list[list]:
    """What was found of all images and of all videos, in reading order, put together by prompts."""
    remaining = {kind: iter(its) for kind, its in found.items()}
    return [[next(remaining[kind]) for kind in question.kinds] for question in batch]


def _written(ids: list[int], ends: list[int]) -> int:
    """Tokens up to and including the first end token."""
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
