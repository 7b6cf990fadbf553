"""Answer batches of prompts, each with its cost; what prompts share is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

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
from zipeval.inference.feed import PreparedPrompt, collate
from zipeval.inference.generation import generation_options, resolve
from zipeval.methods._stages import stages

# Of a picture, by its key: its shape, and the features that are left of it.
EncodedPictures = dict[str, tuple[VisualInput, Encoded]]


@dataclass(frozen=True)
class Answer:
    """An answer of a model, and what reading the prompt cost.

    Attributes:
        text: of a conversation, those of its rounds.
        pictures: of the prompt, in reading order, without reduction.
        entered: (layers) tokens of the prompt that entered each layer of the decoder.
        visual: (layers) visual tokens among them.
        output_tokens: up to and including the first end token.
        positions: `kept` and `merged` positions, as Trace.left tells them; empty for a method that removes nothing.
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
    positions: dict[str, list[list[int]]]
    reread: list[list[int]] = field(default_factory=list)
    later_prompts: list[int] = field(default_factory=list)
    failed: str | None = None
    # Not compared, as rounding moves it.
    digest: dict[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class PromptInputs:
    """A batch of prompts before anything is generated.

    Attributes:
        inputs: for `generate`.
        pictures: of every prompt.
        prefix_rows: of every prompt, the row of its prefix among those that were read already; None if nothing was.
        suffix_lengths: of every prompt, the tokens behind that prefix.
    """

    inputs: dict
    pictures: list[list[VisualInput]]
    prefix_rows: list[int] | None
    suffix_lengths: list[int]


class BatchGenerator:
    """A session's model under its method; see `answering`.

    Args:
        prefills: what the model's prefills cost, as `ledger` adds them.
        kept_tokens: which visual tokens are left, as `trace` notes them.
        logits: the watch over the model's logits.
    """

    def __init__(
        self, session, prefills: list[Prefill], kept_tokens: Trace, logits: LogitsWatch
    ):
        self.session = session
        self.prefills = prefills
        self.kept_tokens = kept_tokens
        self.logits = logits
        self.model, processor = session.load()
        self.tokenizer = processor.tokenizer
        self.padding = self.tokenizer.pad_token_id
        # transformers has one end token, a list of them, or None.
        ends = self.model.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else ends or []

    def answer(self, batch: list[PreparedPrompt], options: dict) -> list[Answer]:
        """Return the answer to every prompt.

        Args:
            options: lmms-eval's generation_kwargs.

        Raises:
            torch.OutOfMemoryError: with nothing left behind on the device but the weights.
        """
        beams = resolve(options, conversation=True).arguments["num_beams"]
        prompts = self.prepare(batch, beams)
        start = prompts.inputs["input_ids"].shape[1]
        sequences = self.generate(prompts.inputs, options)
        return self.collect_answers(batch, prompts, sequences[:, start:], options)

    def prepare(self, batch: list[PreparedPrompt], beams: int = 1) -> PromptInputs:
        """Return the inputs of `generate` for a batch, reading what its prompts share."""
        # What was measured of the batch before.
        self.prefills.clear()
        self.kept_tokens.clear()
        if self.session.reuse == "none":
            return self._prepare_apart(batch)
        return self._prepare_shared(batch, beams)

    def generate(self, inputs: dict, options: dict) -> torch.Tensor:
        """Return prompts and what is generated behind them, (batch, tokens)."""
        self.logits.clear()
        return self.model.generate(**inputs, **generation_options(options))

    def decode_texts(self, new: torch.Tensor, options: dict) -> list[str]:
        """Return the text of generated tokens (batch, tokens), up to what ends it."""
        stops = resolve(options, conversation=True).stops
        texts = []
        for text in self.session.decode(new):
            # The stop itself is no part of the answer.
            for stop in stops:
                text = text.split(stop)[0]
            texts.append(text.strip())
        return texts

    def collect_answers(
        self,
        batch: list[PreparedPrompt],
        prompts: PromptInputs,
        new: torch.Tensor,
        options: dict,
    ) -> list[Answer]:
        """Return the generated tokens (batch, tokens) as answers, with the cost of reading their prompts.

        Raises:
            IncompatibleError: if the model did not read its prompts once.
        """
        if len(self.prefills) != 1:
            hf_names.incompatible(
                f"the model read its prompts {len(self.prefills)} times for one answer each"
            )
        (prefill,) = self.prefills
        rows = self._prefill_rows(prefill, prompts, len(batch))
        positions = self._positions(batch, rows)
        not_numbers = self.logits.failed(len(batch))
        digests = self.logits.digests(len(batch))
        answers = []
        for number, text in enumerate(self.decode_texts(new, options)):
            row, suffix = rows[number], prompts.suffix_lengths[number]
            answer = Answer(
                text,
                prompts.pictures[number],
                # Tokens behind the prefix are text, which no method removes.
                [count + suffix for count in prefill.entered[row]],
                prefill.visual(row),
                _count_tokens(new[number].tolist(), self.ends),
                positions[number],
                failed=NOT_NUMBERS if not_numbers[number] else None,
                digest=digests[number],
            )
            answers.append(answer)
        return answers

    def _prefill_rows(
        self, prefill: Prefill, prompts: PromptInputs, count: int
    ) -> list[int]:
        """Return the row of each prompt in what the decoder read."""
        if prompts.prefix_rows is not None:
            return prompts.prefix_rows
        # generate() repeats a prompt for each of its beams.
        beams = len(prefill.entered) // count
        return [number * beams for number in range(count)]

    def _positions(
        self, batch: list[PreparedPrompt], rows: list[int]
    ) -> list[dict[str, list[list[int]]]]:
        """Return the positions of each prompt that the method kept and merged; nothing if it removes none."""
        if not self.session.reduces:
            return [{} for _ in batch]
        inputs = join_pictures([prompt.inputs for prompt in batch])
        places = _group_by_prompt(batch, self.kept_tokens.places(self.model, inputs))
        return list(map(self.kept_tokens.left, rows, places))

    def _prepare_apart(self, batch: list[PreparedPrompt]) -> PromptInputs:
        """Return inputs in which every prompt has its own pictures."""
        inputs = collate(batch, self.padding)
        by_kind = {kind: pictures(self.model, inputs, kind) for kind in PIXELS}
        on_device = {name: self._to_device(tensor) for name, tensor in inputs.items()}
        return PromptInputs(
            on_device, _group_by_prompt(batch, by_kind), None, [0] * len(batch)
        )

    def _prepare_shared(self, batch: list[PreparedPrompt], beams: int) -> PromptInputs:
        """Return inputs in which every picture is encoded once.

        Where that is enough to know what is left of a picture, every prefix is read once, too.
        """
        encoded_pictures = self._encode(batch)
        ids, shapes = [], []
        for prompt in batch:
            ids.append(self._shrink(prompt, encoded_pictures))
            shapes.append([encoded_pictures[key][0] for key in prompt.keys])
        # What stands for the pixels of the prompts with some numbers.
        features = partial(self._features, batch, encoded_pictures)
        all_prompts = range(len(batch))
        if self._can_share_prefixes(ids, beams):
            keys = [tuple(prompt.keys) for prompt in batch]
            inputs, rows, suffixes = prefill_prefixes(
                self.model, ids, keys, features, self.padding
            )
            # The trace now knows of the pictures of one prompt for each prefix: tell it
            # of all prompts, as their answers are collected by them.
            features(all_prompts)
            return PromptInputs(inputs, shapes, rows, suffixes)
        padded, mask = left_padded(ids, self.padding)
        inputs = {
            "input_ids": self._to_device(padded),
            "attention_mask": self._to_device(mask),
            **features(all_prompts),
        }
        return PromptInputs(inputs, shapes, None, [0] * len(batch))

    def _can_share_prefixes(self, ids: list[torch.Tensor], beams: int) -> bool:
        """Return whether prompts can go on from a cache: generate() repeats no cache for its beams."""
        if self.session.reuse != "prefix" or beams > 1:
            return False
        # A prompt without pictures has no prefix that ends at one.
        return all(visual_slots(row, self.model.config).any() for row in ids)

    def _encode(self, batch: list[PreparedPrompt]) -> EncodedPictures:
        """Return the pictures of a batch, each encoded and reduced once."""
        method, _ = stages(self.session.method)
        cache_bytes = self.session.config.runner.cache_gib * 2**30
        # By kind and key: a picture that several prompts show is wanted once.
        wanted: dict[str, dict[str, dict]] = {kind: {} for kind in PIXELS}
        for prompt in batch:
            pairs = zip(prompt.keys, prompt.pictures(), strict=True)
            for key, (kind, inputs) in pairs:
                wanted[kind][key] = inputs
        results: EncodedPictures = {}
        # Images and videos have encoders of their own.
        for kind, inputs_by_key in wanted.items():
            if inputs_by_key:
                results |= encode_and_reduce(
                    self.model, kind, inputs_by_key, method, cache_bytes
                )
        return results

    def _features(
        self,
        batch: list[PreparedPrompt],
        encoded_pictures: EncodedPictures,
        numbers: Iterable[int],
    ) -> dict:
        """Return the arguments that stand for the pixels of the prompts with these numbers."""
        by_kind: dict[str, list[Encoded]] = defaultdict(list)
        for number in numbers:
            prompt = batch[number]
            for kind, key in zip(prompt.kinds, prompt.keys, strict=True):
                by_kind[kind].append(encoded_pictures[key][1])
        # Images first, in whatever order the prompts show them.
        return encoder_outputs(
            self.model, {k: by_kind[k] for k in PIXELS if k in by_kind}
        )

    def _shrink(
        self, prompt: PreparedPrompt, encoded_pictures: EncodedPictures
    ) -> torch.Tensor:
        """Return the ids of a prompt, (tokens), with as many placeholders as tokens are left of its pictures."""
        before: dict[str, list[VisualInput]] = defaultdict(list)
        after: dict[str, list[int]] = defaultdict(list)
        for kind, key in zip(prompt.kinds, prompt.keys, strict=True):
            shape, picture = encoded_pictures[key]
            before[kind].append(shape)
            after[kind].append(len(picture.features))
        ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"]
        # [1, tokens] -> [tokens]
        return shrink_placeholders(self.model, ids, mask, dict(before), dict(after))[0][
            0
        ]

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the model's device, pixels in its dtype and ids as they are."""
        dtype = self.model.dtype if tensor.is_floating_point() else None
        return tensor.to(self.model.device, dtype)


@contextmanager
def answering(session) -> Iterator[BatchGenerator]:
    """Apply the session's method to its model until the block ends."""
    model, _ = session.load()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_applied(session, model))
        if session.config.runner.compile:
            stack.enter_context(compile_blocks(model, session.method))
        prefills = stack.enter_context(record_prefill(model))
        kept_tokens = stack.enter_context(trace_kept_tokens(model))
        logits = stack.enter_context(watching_logits(model))
        yield BatchGenerator(session, prefills, kept_tokens, logits)


def _applied(session, model):
    """Return a block in which the model is under the part of the method that acts within `generate`."""
    if session.reuse == "none":
        return session.method.applied(model)
    # What acts before the decoder is applied to each picture as it is encoded.
    _, inside_decoder = stages(session.method)
    return inside_decoder.applied(model) if inside_decoder else nullcontext()


def _group_by_prompt(
    batch: list[PreparedPrompt], by_kind: dict[str, Iterable]
) -> list[list]:
    """Return the values of all images and of all videos, in reading order, put together by prompts."""
    # The processor keeps images and videos apart, each in reading order.
    remaining = {kind: iter(values) for kind, values in by_kind.items()}
    groups = []
    for prompt in batch:
        groups.append([next(remaining[kind]) for kind in prompt.kinds])
    return groups


def _count_tokens(ids: list[int], ends: list[int]) -> int:
    """Return the number of tokens up to and including the first end token."""
    places = (place for place, token in enumerate(ids, 1) if token in ends)
    return next(places, len(ids))
