"""Reduction between decoder layers while the prompt is read (prefill), on stock Llama-like classes.

`LlamaModel.forward` hands one mask and one set of rotary embeddings to all of its layers. Forward pre-hooks shorten
what enters a layer and replace both from there on; the cache then simply holds fewer entries in the later layers,
which transformers supports. Attention stays SDPA or FlashAttention in every layer: scores are computed on the side, for
the rows that a method asks for, from what `q_proj` and `k_proj` of one layer put out.

The device is not waited for while it reads a prompt: how many tokens stay is arithmetic on what the host read of the
prompt before anything was launched. What a method leaves is held against that when everything is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from zipeval.engine import hf_names
from zipeval.engine.budget import Picture, Shape
from zipeval.engine.guard import Applied, Guard, reduced_inside
from zipeval.engine.images import check_model, largest_picture
from zipeval.engine.ragged import compact_index, on_device, take, visual_slots
from zipeval.engine.trace import observer
from zipeval.engine.turns import later, still_valid
from zipeval.errors import BudgetError
from zipeval.utils.lazy import torch

DECODERS = ("llama", "mistral", "qwen2", "gemma")
BLOCK = 256  # rows of one attention map at a time


@dataclass(frozen=True)
class Read:
    """What the host knows of a prompt before anything of it is computed.

    Attributes:
        ids: (n) without padding.
        visual: number of visual tokens.
        behind: number of tokens behind the last visual one; all of them where there is none.
    """

    ids: np.ndarray
    visual: int
    behind: int


@dataclass(frozen=True)
class Given:
    """B prompts of S slots as they entered the first layer, padding on the left.

    Attributes:
        ids: (B, S).
        visual: (B, S) bool.
        valid: (B, S) bool, False for padding.
        embedded: (B, S, D).
        read: (B) what the host knows of them.
    """

    ids: torch.Tensor
    visual: torch.Tensor
    valid: torch.Tensor
    embedded: torch.Tensor
    read: list[Read]


@dataclass
class Prompts:
    """The same prompts between two later layers; L slots, padding on the left.

    Attributes:
        given: what they were.
        hidden: (B, L, D) what is about to enter the next layer.
        visual: (B, L) bool.
        valid: (B, L) bool, False for padding.
        positions: (B, L) rotary positions.
        source: (B, L) slot in `given`, -1 for a merged token.
        counts: (B) visual tokens of each, known to the host.
        queries, keys: (B, L, heads * head_dim) of the layer above, before the rotary embedding.
        rotary: its cos and sin, (B or 1, L, head_dim).
        head_dim: of the decoder.
        no_numbers: bool for each score so far, whether it holds NaN, on the device.
    """

    given: Given
    hidden: torch.Tensor
    visual: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    source: torch.Tensor
    counts: list[int]
    head_dim: int
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    no_numbers: list[torch.Tensor] = field(default_factory=list)

    def attention(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of the attention map of the layer above, softmaxed over all they may see.

        Args:
            rows: (B, R) slots whose queries are wanted; padding sees nothing but itself.

        Returns:
            (B, heads, R, L) float32.
        """
        cos, sin = (x.expand(len(rows), -1, -1) for x in self.rotary)
        # In float32: products in float16 overflow where the model's own attention, which adds up in float32, does not.
        queries = _rotated(
            take(self.queries, rows), take(cos, rows), take(sin, rows), self.head_dim
        ).float()
        keys = _rotated(self.keys, cos, sin, self.head_dim).float()
        grouped = queries.unflatten(
            1, (keys.shape[1], -1)
        )  # grouped-query attention: several query heads to a key
        logits = (grouped @ keys[:, :, None].mT).flatten(1, 2) * self.head_dim**-0.5
        slots = torch.arange(self.valid.shape[1], device=rows.device)
        seen = (slots <= rows[..., None]) & self.valid[:, None] | (
            slots == rows[..., None]
        )
        return logits.masked_fill(~seen[:, None], float("-inf")).softmax(
            -1, dtype=torch.float32
        )

    def received(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Attention that every slot gets from some rows, weighted and added up; `BLOCK` rows are held at a time.

        Args:
            rows: (B, R) slots.
            weights: (B, R, 1) of the rows, or (B, R, L) of their entries.

        Returns:
            (B, heads, L) float32.
        """
        blocks = zip(rows.split(BLOCK, 1), weights.split(BLOCK, 1), strict=True)
        return sum((self.attention(some) * its[:, None]).sum(2) for some, its in blocks)

    def gravity(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, R, L): the logits of `attention(rows)` if all queries and keys were ones: what distance alone does."""
        cos, sin = (x.expand(len(rows), -1, -1).float() for x in self.rotary)
        ones = _rotated(torch.ones_like(cos), cos, sin, self.head_dim)[:, 0]
        return take(ones, rows) @ ones.mT * self.head_dim**-0.5

    def last_rows(self) -> torch.Tensor:
        """(B, 1): the last slot, which answers begin at."""
        return torch.full(
            (len(self.valid), 1), self.valid.shape[1] - 1, device=self.valid.device
        )


def _rotated(x, cos, sin, head_dim):
    """(B, L, heads * d) -> (B, heads, L, d) with rotary positions."""
    x = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return x * cos[:, None] + hf_names.rotate_half(x) * sin[:, None]


@dataclass(frozen=True)
class Kept:
    """What a method leaves.

    Attributes:
        visual: (B, L) bool, the visual tokens that stay; all else stays anyway.
        merged: (B, M, D) new tokens, placed after the last visual one.
        merged_valid: (B, M) bool; prompts may have fewer than M.
    """

    visual: torch.Tensor
    merged: torch.Tensor | None = None
    merged_valid: torch.Tensor | None = None


class DecoderMethod(ABC):
    """A method that acts between decoder layers.

    Attributes:
        renumber: positions become 0, 1, 2, ... after every reduction, instead of staying what they were.
    """

    renumber = False

    @property
    def asked(self) -> int | None:
        """The number of visual tokens that the method is asked to leave of a prompt; None where it is a share."""
        return None

    @abstractmethod
    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers before which tokens leave, 0-based, ascending, from 1 up, for a decoder of `depth` layers."""

    @abstractmethod
    def reduce(self, layer: int, prompts: Prompts) -> Kept:
        """What is left of some prompts before `layer`."""

    @abstractmethod
    def schedule(self, visual: int, depth: int) -> list[int]:
        """Visual tokens that enter each of `depth` layers, of a prompt that brings `visual` of them."""

    @classmethod
    @abstractmethod
    def for_budget(
        cls, tokens: int, budget: str, shape: Shape, **options
    ) -> DecoderMethod:
        """The method with its settings for a budget; `options` are the user's.

        Raises:
            ValueError: for a budget that cannot be met.
        """

    def entering(self, images: list[Picture], depth: int) -> list[int]:
        """Visual tokens that enter each of `depth` layers, of a prompt with these images."""
        return self.schedule(sum(image.tokens for image in images), depth)

    @contextmanager
    def applied(self, model) -> Iterator[Applied]:
        """While open, `model(...)` and `model.generate(...)` drop visual tokens as prompts are read. The block is given
        what was left of the prompts that were read last.

        Later calls on the cache of such a prompt (decoding steps, another turn) see what was kept; the logits of a
        prompt are those of the slots that are left. The mask of another turn may leave out earlier answers, and text
        of the prompt behind its last picture. With `use_cache=False` tokens are chosen anew at every step, as in
        FastV's code. Nothing remains on the model after the block.

        Raises:
            ValueError: for a decoder that is too shallow, or one with sliding-window attention, and for a model that is
                not built as LLaVA is, and for settings that would remove nothing of an image.
            IncompatibleError: in a call, where the model does not call its decoder as the hooks expect.
        """
        check_model(model)
        decoder = hf_names.decoder(model)
        self.check(len(decoder.layers))
        self.check_removes(largest_picture(model))
        _check_decoder(decoder.config)
        if model in reduced_inside:
            raise RuntimeError(
                "a decoder-stage method is already applied to this model; leave its block first"
            )
        guard = Guard(model, type(self).__name__, inside=True)
        calls = _Calls(self, model, self.layers(len(decoder.layers)), guard)
        hooks = calls.register()
        reduced_inside.add(model)
        try:
            with guard.watching(), _whole_prompts(model, calls):
                yield calls.applied
        finally:
            reduced_inside.discard(model)
            for hook in hooks:
                hook.remove()

    def check(self, depth: int) -> None:
        """Raises ValueError where a decoder of `depth` layers does not have those that tokens leave before."""
        layers = self.layers(depth)
        if not layers or layers[0] < 1 or layers[-1] >= depth:
            raise ValueError(
                f"layers={list(layers)}: this decoder has layers 1 to {depth - 1} to drop tokens before"
            )

    def check_removes(self, largest: Picture) -> None:
        """Raises ValueError where more visual tokens are to be left than the model's largest image or video has."""
        if self.asked is not None and self.asked > largest.tokens:
            raise ValueError(
                f"{type(self).__name__}: {self.asked} visual tokens are to be left, and an image has {largest.tokens} "
                f"here, so that nothing would be removed. Choose from 0 to {largest.tokens}"
            )


def _check_decoder(config) -> None:
    """Scores are computed from projections as these decoders do; others scale, normalise or rotate otherwise."""
    if config.model_type not in DECODERS:
        raise ValueError(
            f"text_config.model_type={config.model_type}: methods in the decoder know {DECODERS}"
        )
    kinds = getattr(config, "layer_types", None)
    windowed = (
        any("sliding" in kind for kind in kinds)
        if kinds
        else getattr(config, "sliding_window", None) is not None
    )
    if windowed:
        raise ValueError(
            f"sliding_window={config.sliding_window}: dropped tokens would move the window"
        )


@contextmanager
def _whole_prompts(model, calls: _Calls) -> Iterator[None]:
    """While open, `generate` refuses to read a prompt in chunks: its first chunk would be taken for all of it. Where it
    fails, nothing of the prompt stays on the device.
    """
    before = vars(model).get(
        "generate"
    )  # that of a vision-stage method, if there is one
    generate = model.generate

    def checked(*args, **kwargs):
        config = kwargs.get("generation_config") or model.generation_config
        size = kwargs.get(
            "prefill_chunk_size", getattr(config, "prefill_chunk_size", None)
        )
        if size is not None:
            raise ValueError(
                f"prefill_chunk_size={size}: a prompt that is reduced has to be read at once"
            )
        if hf_names.given_cache(kwargs) in calls.segments:  # a later turn
            kwargs = later(kwargs)
        try:
            with calls.guard.generating(kwargs):
                return generate(*args, **kwargs)
        except BaseException:
            calls.forget()
            raise

    model.generate = checked
    try:
        yield
    finally:
        del model.generate
        if before is not None:
            model.generate = before


@dataclass
class _Segment:
    """The layers between two reductions of one cache.

    Attributes:
        read: (B, entries of the prompt) bool, False for padding.
        visual: (B, S) bool, as it was given.
        entries: of its keys so far, prompts and answers.
        full: what `entries` would be without any reduction.
        valid: (B, entries) bool, None while nothing is padded.
        count: (B, 1) valid ones among them: the next position where positions are renumbered.
    """

    read: torch.Tensor
    visual: torch.Tensor
    entries: int
    full: int
    valid: torch.Tensor | None
    count: torch.Tensor

    def masked(self, mask: torch.Tensor) -> None:
        """Another turn says with its mask (B, full) what counts of what was said so far, such as no padding."""
        width = self.visual.shape[1]
        self.valid = torch.cat(
            [still_valid(self.read, self.visual, mask[:, :width]), mask[:, width:]], 1
        )
        self.count = self.valid.sum(1, keepdim=True)


class _Calls:
    """What the hooks share: the call in progress, and the segments of every cache that is alive."""

    def __init__(
        self, method: DecoderMethod, model, layers: tuple[int, ...], guard: Guard
    ):
        self.method, self.model, self.layers, self.guard = method, model, layers, guard
        self.applied = Applied()
        self.decoder = hf_names.decoder(model)
        self.segments: WeakKeyDictionary = WeakKeyDictionary()
        self.forget()

    def forget(self) -> None:
        """The call in progress."""
        self.prompts: Prompts | None = None
        self.arrived = self.new = self.said = None  # `said` by the mask of another turn
        self.ready: dict[
            int, dict
        ] = {}  # layer of a reduction -> what the layers from there on are given
        self.missed: list[torch.Tensor] = []  # (B) bool for each reduction

    def register(self) -> list:
        blocks = self.decoder.layers
        hooks = [
            self.model.register_forward_pre_hook(self.enter, with_kwargs=True),
            blocks[0].register_forward_pre_hook(self.begin, with_kwargs=True),
            self.model.register_forward_hook(self.leave),
        ]
        for layer in range(self.layers[0], len(blocks)):
            hooks.append(
                blocks[layer].register_forward_pre_hook(
                    self.before(layer), with_kwargs=True
                )
            )
        for layer in (
            self.layers
        ):  # behind the hooks above: a layer's scores are of what it was given
            attention = blocks[layer - 1].self_attn
            hooks += [
                blocks[layer - 1].register_forward_pre_hook(
                    self.see_rotary, with_kwargs=True
                ),
                attention.q_proj.register_forward_hook(self.see("queries")),
                attention.k_proj.register_forward_hook(self.see("keys")),
            ]
        return hooks

    # ------------------------------------------------------------------------------------ before the first layer

    def enter(self, module, args, kwargs):
        """What kind of call this is, and where its visual tokens are. All that is read from the device is read here."""
        if kwargs.get("labels") is not None:
            raise ValueError(
                "labels: training through a reduced prompt is not supported; compute the loss from logits"
            )
        ids, cache = (
            args[0] if args else kwargs.get("input_ids"),
            hf_names.given_cache(kwargs),
        )
        if ids is None:
            raise ValueError(
                "inputs_embeds: pass input_ids, which tell visual tokens from text"
            )
        hf_names.check_cache_is_growing(cache)
        mask = kwargs.get("attention_mask")
        self.new = (
            torch.ones_like(ids, dtype=torch.bool)
            if mask is None
            else mask[:, -ids.shape[1] :].bool()
        )
        self.said = self.prompts = None
        self.reading = hf_names.is_empty(cache)
        if self.reading:
            self.read = _read(ids.cpu(), self.new.cpu(), self.model.config)
            _check_positions(kwargs.get("position_ids"), self.new)
            self.arrived = (
                ids,
                visual_slots(ids, self.model.config) & self.new,
                self.new,
            )
        elif cache not in self.segments:
            raise ValueError(
                "cache: it was filled outside of the method's block; begin a new one"
            )
        elif ids.shape[1] > 1:
            self.said = None if mask is None else mask[:, : -ids.shape[1]].bool()
            if visual_slots(ids, self.model.config).cpu().any():
                raise ValueError(
                    "visual tokens in a later call: neither chunked prefill nor another image is supported"
                )

    def begin(self, module, args, kwargs):
        self.guard.check_model_is_called()
        call = hf_names.LayerCall.read(args, kwargs)
        hidden = call.hidden
        self.ready, self.missed = {}, []
        if self.reading:
            given = Given(*self.arrived, hidden, self.read)
            slots = torch.arange(hidden.shape[1], device=hidden.device).expand(
                len(hidden), -1
            )
            positions = call.positions.expand(len(hidden), -1)
            counts = [prompt.visual for prompt in self.read]
            depth, head_dim = (
                len(self.decoder.layers),
                self.decoder.layers[0].self_attn.head_dim,
            )
            self.schedules = {
                visual: self.method.schedule(visual, depth) for visual in {*counts}
            }
            self.prompts = Prompts(
                given,
                hidden,
                given.visual,
                given.valid,
                positions,
                slots,
                counts,
                head_dim,
            )
            self.guard.check_later(self.prompts.no_numbers)
            self.now: dict[int, _Segment] = {}
            schedules = [self.schedules[visual] for visual in counts]
            self.applied.record(lambda: schedules)
            if call.cache is not None:
                self.segments[call.cache] = self.now
        else:
            self.now = self.segments[call.cache]

    def leave(self, module, args, output):
        """Everything is launched: whether methods left what the arithmetic was done with."""
        if self.reading and len(self.missed) < len(self.layers):
            hf_names.incompatible(
                f"the decoder does not call layers {[*self.layers]}, so that no token was dropped"
            )
        if self.reading and torch.stack(self.missed).any():
            name = type(self.method).__name__
            raise BudgetError(
                f"{name}: visual tokens that its `reduce` leaves are not as many as its `schedule` says"
            )

    # -------------------------------------------------------------------------------------------- what scores need

    def see(self, name):
        def hook(module, args, output):
            if (
                self.prompts is not None
            ):  # a prompt is being read, and not yet behind the last reduction
                setattr(self.prompts, name, output)

        return hook

    def see_rotary(self, module, args, kwargs):
        if self.prompts is not None:
            self.prompts.rotary = hf_names.LayerCall.read(args, kwargs).rotary

    # ------------------------------------------------------------------- before every layer from the first reduction

    def before(self, layer):
        start = max(k for k in self.layers if k <= layer)

        def hook(module, args, kwargs):
            call = hf_names.LayerCall.read(args, kwargs)
            hidden = call.hidden
            if layer == start:
                if self.reading:
                    hidden = self.shrink(layer, hidden, call.cache)
                else:
                    self.extend(layer, hidden, call.cache)
            return (hidden, *args[1:]), {**kwargs, **self.ready[start]}

        return hook

    def shrink(self, layer, hidden, cache):
        """While a prompt is read: what the method leaves of `hidden`."""
        p = self.prompts
        p.hidden = hidden
        if p.queries is None or p.keys is None:
            hf_names.incompatible(
                f"the attention of decoder layer {layer - 1} does not call its q_proj and k_proj"
            )
        kept = self.method.reduce(layer, p)
        p.counts = [self.schedules[prompt.visual][layer] for prompt in p.given.read]
        lengths = [
            len(prompt.ids) - prompt.visual + n
            for prompt, n in zip(p.given.read, p.counts, strict=True)
        ]
        self.missed.append(_number(kept, p) != on_device(p.counts, hidden.device))
        keep = p.valid & (kept.visual | ~p.visual)
        index, valid, joined = _placed(p, keep, kept, max(lengths))
        p.hidden, p.visual, p.positions, p.source = (take(x, index) for x in joined)
        p.visual, p.valid = p.visual & valid, valid
        count = valid.sum(1, keepdim=True)
        if self.method.renumber:
            p.positions = (valid.cumsum(1) - 1).clamp(min=0)
        padded = valid if min(lengths) < max(lengths) else None
        self.now[layer] = _Segment(
            valid, p.given.visual, valid.shape[1], p.given.ids.shape[1], padded, count
        )
        self.ready[layer] = self.arguments(layer, p.hidden, cache, p.positions, padded)
        self.guard.lengths[layer:] = [valid.shape[1]] * (
            len(self.decoder.layers) - layer
        )
        hidden, p.hidden = p.hidden, None
        p.queries = p.keys = p.rotary = (
            None  # the next scores are those of another layer
        )
        if layer == self.layers[-1]:
            if (told := observer(self.model)) is not None:
                told.decoded(p.given.visual, p.source, p.visual)
            self.prompts = None  # holds activations of full length
        return hidden

    def extend(self, layer, hidden, cache):
        """Decoding steps and later turns: nothing leaves, the layers from here on have fewer keys."""
        segment, new = self.now[layer], self.new
        length = new.shape[1]
        if (cache.get_seq_length(layer), cache.get_seq_length() - length) != (
            segment.entries,
            segment.full,
        ):
            raise ValueError(
                "cache: entries were added or cropped outside of the method's block"
            )
        if self.said is not None:
            segment.masked(self.said)
        if segment.valid is not None:
            segment.valid = torch.cat([segment.valid, new], 1)
        positions = segment.count + new.cumsum(1) - 1 if self.method.renumber else None
        segment.count = segment.count + new.sum(1, keepdim=True)
        segment.entries, segment.full = segment.entries + length, segment.full + length
        self.ready[layer] = self.arguments(
            layer, hidden, cache, positions, segment.valid
        )

    def arguments(self, layer, hidden, cache, positions, valid) -> dict:
        """Return what replaces the model's own arguments in the layers from `layer` on."""
        mask = hf_names.causal_mask(self.decoder.config, hidden, valid, cache, layer)
        if positions is None:
            return hf_names.layer_arguments(mask)
        return hf_names.layer_arguments(
            mask, hf_names.rotary_embeddings(self.decoder, hidden, positions)
        )


def _read(ids: torch.Tensor, valid: torch.Tensor, config) -> list[Read]:
    """What the host knows of prompts (B, S) on the CPU, True in `valid` where they are not padding."""
    if not valid[:, -1].all():
        raise ValueError(
            "attention_mask: prompts have to be padded on the left (processor.tokenizer.padding_side)"
        )
    prompts = [row[its] for row, its in zip(ids, valid, strict=True)]
    places = [visual_slots(row, config).nonzero()[:, 0] for row in prompts]
    return [
        Read(
            row.numpy(), len(its), len(row) - 1 - int(its[-1]) if len(its) else len(row)
        )
        for row, its in zip(prompts, places, strict=True)
    ]


def _check_positions(positions: torch.Tensor | None, valid: torch.Tensor) -> None:
    """Raise ValueError for positions (B or 1, L) that a caller gives and that start again within a row: prompts that
    are packed into one row, which the mask behind a reduction would not tell apart.
    """
    if positions is None:
        return
    rows = zip(positions.expand(len(valid), -1).cpu(), valid.cpu(), strict=True)
    if any((row[is_valid].diff() < 0).any() for row, is_valid in rows):
        raise ValueError(
            "position_ids: they start again within a row. Give every prompt a row of its own"
        )


def _number(kept: Kept, p: Prompts) -> torch.Tensor:
    """(B): visual tokens that are left."""
    stay = (kept.visual & p.visual).sum(1)
    return stay if kept.merged is None else stay + kept.merged_valid.sum(1)


def _placed(p: Prompts, keep: torch.Tensor, kept: Kept, length: int):
    """Merged tokens behind the last visual one, `length` slots in all: (index, valid, (hidden, visual, positions,
    source) to be indexed).
    """
    joined = p.hidden, p.visual, p.positions, p.source
    if kept.merged is None:
        return *compact_index(keep, length=length), joined
    rows, count = kept.merged_valid.shape
    slots = torch.arange(keep.shape[1], device=keep.device).expand(rows, -1)
    last = slots.masked_fill(~p.visual, -1).amax(1, keepdim=True)
    order = torch.cat(
        [
            slots + count * (slots > last),
            last + 1 + torch.arange(count, device=keep.device),
        ],
        1,
    )
    new = (
        kept.merged.to(p.hidden.dtype),
        kept.merged_valid,
        take(p.positions, last.clamp(min=0)).expand(-1, count),
        p.source.new_full((rows, count), -1),
    )
    joined = tuple(torch.cat(pair, 1) for pair in zip(joined, new, strict=True))
    return *compact_index(
        torch.cat([keep, kept.merged_valid], 1), order, length
    ), joined


def keep_best(score: torch.Tensor, prompts: Prompts, counts: list[int]) -> torch.Tensor:
    """(B, L) bool: of the b-th prompt the `counts[b]` visual tokens with the highest score (B, L).

    Scores that are no numbers stop the run when its prompt is read: they would be sorted before all others.
    """
    prompts.no_numbers.append((score.isnan() & prompts.visual).any())
    order = score.masked_fill(~prompts.visual, float("-inf")).argsort(
        dim=1, descending=True, stable=True
    )
    best = (
        torch.arange(score.shape[1], device=score.device)
        < on_device(counts, score.device)[:, None]
    )
    return torch.zeros_like(prompts.visual).scatter(1, order, best)
