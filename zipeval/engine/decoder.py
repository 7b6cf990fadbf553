"""Reduce visual tokens between decoder layers, while the prompt is read (prefill).

This works on stock Llama-like classes. `LlamaModel.forward` hands one mask and one set of
rotary embeddings to all of its layers. Forward pre-hooks shorten what enters a layer and
replace both from there on; the cache then simply holds fewer entries in the later layers,
which transformers supports. Attention stays SDPA or FlashAttention in every layer: scores
are computed on the side, for the rows that a method asks for, from what `q_proj` and
`k_proj` of one layer put out.

The device is not waited for while it reads a prompt: how many tokens stay is arithmetic on
what the host read of the prompt before anything was launched. What a method leaves is held
against that when everything is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from zipeval import moved
from zipeval.engine import hf_names
from zipeval.engine.budget import Shape, VisualInput
from zipeval.engine.guard import Applied, Guard, reduced_inside
from zipeval.engine.images import check_model, largest_picture
from zipeval.engine.method import Method, Stages
from zipeval.engine.ragged import compact_index, on_device, take, visual_slots
from zipeval.engine.trace import observer
from zipeval.engine.turns import drop_pictures, still_valid
from zipeval.errors import BudgetError
from zipeval.utils.lazy import torch

# Decoders whose scores are computed from projections as Llama's are.
DECODERS = ("llama", "mistral", "qwen2", "gemma")
# Rows of an attention map that are held at a time: a whole one has L x L entries.
BLOCK = 256


@dataclass(frozen=True)
class PromptInfo:
    """Hold what the host knows of a prompt before anything of it is computed.

    Attributes:
        ids: (n) without padding.
        visual: number of visual tokens.
        text_after: number of tokens behind the last visual one; all of them where there is none.
    """

    ids: np.ndarray
    visual: int
    text_after: int


@dataclass(frozen=True)
class InitialPrompts:
    """Hold B prompts of S slots as they entered the first layer, padded on the left.

    Attributes:
        ids: (B, S).
        visual: (B, S) bool.
        valid: (B, S) bool, False for padding.
        embedded: (B, S, D).
        infos: (B) what the host knows of them.
    """

    ids: torch.Tensor
    visual: torch.Tensor
    valid: torch.Tensor
    embedded: torch.Tensor
    infos: list[PromptInfo]


@dataclass
class PromptBatch:
    """Hold the same prompts between two later layers; L slots, padded on the left.

    Attributes:
        initial: the prompts as they were.
        hidden: (B, L, D) what is about to enter the next layer.
        visual: (B, L) bool.
        valid: (B, L) bool, False for padding.
        positions: (B, L) rotary positions.
        source: (B, L) slot in `initial`, -1 for a merged token.
        counts: (B) visual tokens of each, known to the host.
        queries, keys: (B, L, heads * head_dim) of the layer above, before the rotary embedding.
        rotary: its cos and sin, (B or 1, L, head_dim).
        head_dim: of the decoder.
        no_numbers: bool for each score so far, whether it holds NaN, on the device.
    """

    initial: InitialPrompts
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
        """Return some rows of the attention map of the layer above.

        They are softmaxed over all slots that they may see.

        Args:
            rows: (B, R) slots whose queries are wanted; padding sees nothing but itself.

        Returns:
            (B, heads, R, L) float32.
        """
        cos, sin = (x.expand(len(rows), -1, -1) for x in self.rotary)
        # In float32: products in float16 overflow where the model's own attention, which
        # adds up in float32, does not.
        queries = _rotated(
            take(self.queries, rows), take(cos, rows), take(sin, rows), self.head_dim
        ).float()
        keys = _rotated(self.keys, cos, sin, self.head_dim).float()
        # Grouped-query attention has several query heads to a key:
        # [batch, key heads, queries per key, rows, head_dim]
        grouped = queries.unflatten(1, (keys.shape[1], -1))
        logits = (grouped @ keys[:, :, None].mT).flatten(1, 2) * self.head_dim**-0.5
        slots = torch.arange(self.valid.shape[1], device=rows.device)
        is_causal = slots <= rows[..., None]  # [batch, rows, slots]
        # A row of padding would be softmaxed over nothing, which gives NaN.
        is_itself = slots == rows[..., None]
        visible = is_causal & self.valid[:, None] | is_itself
        logits = logits.masked_fill(~visible[:, None], float("-inf"))
        return logits.softmax(-1, dtype=torch.float32)

    def received(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the attention that every slot gets from some rows, weighted and added up.

        `BLOCK` rows are held at a time.

        Args:
            rows: (B, R) slots.
            weights: (B, R, 1) of the rows, or (B, R, L) of their entries.

        Returns:
            (B, heads, L) float32.
        """
        total = 0
        blocks = zip(rows.split(BLOCK, 1), weights.split(BLOCK, 1), strict=True)
        for block, block_weights in blocks:
            # [batch, heads, rows, slots] times [batch, 1, rows, slots]
            weighted = self.attention(block) * block_weights[:, None]
            total = total + weighted.sum(2)
        return total

    def gravity(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of `attention(rows)` if all queries and keys were ones.

        That is what distance alone does.

        Returns:
            (B, R, L).
        """
        cos, sin = (x.expand(len(rows), -1, -1).float() for x in self.rotary)
        # One head is enough: all would be equal. [batch, slots, head_dim]
        ones = _rotated(torch.ones_like(cos), cos, sin, self.head_dim)[:, 0]
        return take(ones, rows) @ ones.mT * self.head_dim**-0.5

    def last_rows(self) -> torch.Tensor:
        """Return the last slot of each prompt, which answers begin at: (B, 1)."""
        count, length = self.valid.shape
        return torch.full((count, 1), length - 1, device=self.valid.device)


def _rotated(x, cos, sin, head_dim):
    """Return x (B, L, heads * d) with rotary positions, as (B, heads, L, d)."""
    x = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return x * cos[:, None] + hf_names.rotate_half(x) * sin[:, None]


@dataclass(frozen=True)
class Selection:
    """Select the tokens that a method leaves.

    Attributes:
        visual: (B, L) bool, the visual tokens that stay; all else stays anyway.
        merged: (B, M, D) new tokens, placed after the last visual one.
        merged_valid: (B, M) bool; prompts may have fewer than M.
    """

    visual: torch.Tensor
    merged: torch.Tensor | None = None
    merged_valid: torch.Tensor | None = None


class DecoderMethod(Method):
    """Reduce visual tokens between decoder layers.

    Attributes:
        renumber: positions become 0, 1, 2, ... after every reduction, instead of staying
            what they were.
    """

    renumber = False

    @property
    def reduction_stages(self) -> Stages:
        """Return the method as one that acts inside the decoder alone."""
        return Stages(decoder=self)

    @property
    def requested_tokens(self) -> int | None:
        """Return the number of visual tokens to leave of a prompt; None where it is a share."""
        return None

    @abstractmethod
    def layers(self, depth: int) -> tuple[int, ...]:
        """Return the layers before which tokens leave, of a decoder of `depth` layers.

        They are 0-based, ascending, and from 1 up.
        """

    @abstractmethod
    def reduce(self, layer: int, prompts: PromptBatch) -> Selection:
        """Return what is left of some prompts before `layer`."""

    @abstractmethod
    def schedule(self, visual: int, depth: int) -> list[int]:
        """Return the visual tokens that enter each of `depth` layers.

        Args:
            visual: the number that the prompt brings.
        """

    @classmethod
    @abstractmethod
    def for_budget(
        cls, tokens: int, budget: str, shape: Shape, **options
    ) -> DecoderMethod:
        """Return the method with its settings for a budget; `options` are the user's.

        Raises:
            ValueError: for a budget that cannot be met.
        """

    def tokens_per_layer(self, images: list[VisualInput], depth: int) -> list[int]:
        """Return the visual tokens that enter each layer, of a prompt with these images."""
        return self.schedule(sum(image.tokens for image in images), depth)

    @contextmanager
    def applied(self, model) -> Iterator[Applied]:
        """Let `model(...)` and `model.generate(...)` drop visual tokens as prompts are read.

        The block is given what was left of the prompts that were read last.

        Later calls on the cache of such a prompt (decoding steps, another turn) see what
        was kept; the logits of a prompt are those of the slots that are left. The mask of
        another turn may leave out earlier answers, and text of the prompt behind its last
        picture. With `use_cache=False` tokens are chosen anew at every step, as in FastV's
        code. Nothing remains on the model after the block.

        Raises:
            ValueError: for a decoder that is too shallow, or one with sliding-window
                attention, and for a model that is not built as LLaVA is, and for settings
                that would remove nothing of an image.
            IncompatibleError: in a call, where the model does not call its decoder as the
                hooks expect.
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
        prefill_hooks = PrefillHooks(
            self, model, self.layers(len(decoder.layers)), guard
        )
        hooks = prefill_hooks.register()
        reduced_inside.add(model)
        try:
            # The guard's hooks come last, so that it sees what those above leave.
            with guard.watching(), _whole_prompts(model, prefill_hooks):
                yield prefill_hooks.applied
        finally:
            reduced_inside.discard(model)
            for hook in hooks:
                hook.remove()

    def check(self, depth: int) -> None:
        """Raise ValueError where a decoder is too shallow for the layers that tokens leave before."""
        layers = self.layers(depth)
        if not layers or layers[0] < 1 or layers[-1] >= depth:
            raise ValueError(
                f"layers={list(layers)}: this decoder has layers 1 to {depth - 1} to drop tokens before"
            )

    def check_removes(self, largest: VisualInput) -> None:
        """Raise ValueError where more tokens are to be left than the largest picture has."""
        requested = self.requested_tokens
        if requested is not None and requested > largest.tokens:
            raise ValueError(
                f"{type(self).__name__}: {requested} visual tokens are to be left, and an image has {largest.tokens} "
                f"here, so that nothing would be removed. Choose from 0 to {largest.tokens}"
            )


def _check_decoder(config) -> None:
    """Raise ValueError for a decoder that scores cannot be computed for.

    They come from projections as Llama has them; others scale, normalise or rotate
    otherwise.
    """
    if config.model_type not in DECODERS:
        raise ValueError(
            f"text_config.model_type={config.model_type}: methods in the decoder know {DECODERS}"
        )
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        is_windowed = any("sliding" in layer_type for layer_type in layer_types)
    else:
        is_windowed = getattr(config, "sliding_window", None) is not None
    if is_windowed:
        raise ValueError(
            f"sliding_window={config.sliding_window}: dropped tokens would move the window"
        )


@contextmanager
def _whole_prompts(model, prefill_hooks: PrefillHooks) -> Iterator[None]:
    """Refuse a `generate` that reads a prompt in chunks.

    Its first chunk would be taken for all of the prompt. Where `generate` fails, nothing
    of the prompt stays on the device.
    """
    # A vision-stage method may have put a `generate` of its own on the model.
    replaced = vars(model).get("generate")
    generate = model.generate

    def checked(*args, **kwargs):
        size = hf_names.generation_setting(model, kwargs, "prefill_chunk_size")
        if size is not None:
            raise ValueError(
                f"prefill_chunk_size={size}: a prompt that is reduced has to be read at once"
            )
        is_later_turn = hf_names.given_cache(kwargs) in prefill_hooks.segments
        if is_later_turn:
            kwargs = drop_pictures(kwargs)
        try:
            with prefill_hooks.guard.generating(kwargs):
                return generate(*args, **kwargs)
        except BaseException:
            # Out of memory, a caller may try again with fewer prompts.
            prefill_hooks.forget()
            raise

    model.generate = checked
    try:
        yield
    finally:
        del model.generate
        if replaced is not None:
            model.generate = replaced


@dataclass
class CacheSegment:
    """Describe the entries of one cache in the layers between two reductions.

    Attributes:
        prompt_valid: (B, entries of the prompt) bool, False for padding.
        visual: (B, S) bool, the visual tokens of the prompt as it was given.
        entries: of its keys so far, prompts and answers.
        full: what `entries` would be without any reduction.
        valid: (B, entries) bool, None while nothing is padded.
        count: (B, 1) valid ones among them: the next position where positions are
            renumbered.
    """

    prompt_valid: torch.Tensor
    visual: torch.Tensor
    entries: int
    full: int
    valid: torch.Tensor | None
    count: torch.Tensor

    def apply_mask(self, mask: torch.Tensor) -> None:
        """Take the mask of another turn: (B, full).

        It says what counts of the conversation so far, such as no padding.
        """
        width = self.visual.shape[1]
        prompt = still_valid(self.prompt_valid, self.visual, mask[:, :width])
        self.valid = torch.cat([prompt, mask[:, width:]], 1)
        self.count = self.valid.sum(1, keepdim=True)

    def extend(self, new: torch.Tensor) -> None:
        """Take new entries (B, L), False for padding: a decoding step or another turn."""
        length = new.shape[1]
        if self.valid is not None:
            self.valid = torch.cat([self.valid, new], 1)
        self.count = self.count + new.sum(1, keepdim=True)
        self.entries += length
        self.full += length


class PrefillHooks:
    """Share the state of a method's hooks: the call in progress, and the caches.

    Attributes:
        segments: by cache that is alive, its segments by the layer that they begin with.
        prompts: the prompts that are being read, up to the last reduction.
        new: (B, L) bool, the slots of this call, False for padding.
        turn_mask: (B, full) what another turn says of the conversation before it.
        arguments_from: by the layer of a reduction, what it and the layers behind it are
            given in place of the model's own arguments.
        wrong_counts: (B) bool for each reduction, where a prompt is left with another
            number of tokens than the method's schedule says.
    """

    def __init__(
        self, method: DecoderMethod, model, layers: tuple[int, ...], guard: Guard
    ):
        self.method, self.model, self.layers, self.guard = method, model, layers, guard
        self.applied = Applied()
        self.decoder = hf_names.decoder(model)
        # Weakly: a cache that nobody uses any more takes its segments along.
        self.segments: WeakKeyDictionary = WeakKeyDictionary()
        self.forget()

    def forget(self) -> None:
        """Forget the call in progress."""
        self.prompts: PromptBatch | None = None
        self.ids = self.new = self.turn_mask = None
        self.arguments_from: dict[int, dict] = {}
        self.wrong_counts: list[torch.Tensor] = []

    def register(self) -> list:
        """Put the hooks on the model, and return them."""
        blocks = self.decoder.layers
        hooks = [
            self.model.register_forward_pre_hook(self.enter, with_kwargs=True),
            blocks[0].register_forward_pre_hook(self.begin, with_kwargs=True),
            self.model.register_forward_hook(self.leave),
        ]
        for number in range(self.layers[0], len(blocks)):
            hook = self.replace_arguments(number)
            hooks.append(
                blocks[number].register_forward_pre_hook(hook, with_kwargs=True)
            )
        # Behind the hooks above: a layer's scores are of what it was given.
        for number in self.layers:
            block = blocks[number - 1]
            attention = block.self_attn
            hooks += [
                block.register_forward_pre_hook(self.remember_rotary, with_kwargs=True),
                attention.q_proj.register_forward_hook(self.remember_output("queries")),
                attention.k_proj.register_forward_hook(self.remember_output("keys")),
            ]
        return hooks

    # ------------------------------------------------------------------------------------ before the first layer

    def enter(self, module, args, kwargs):
        """Find out what kind of call this is: a forward pre-hook of the model.

        All that is read from the device is read here.
        """
        if kwargs.get("labels") is not None:
            raise ValueError(
                "labels: training through a reduced prompt is not supported; compute the loss from logits"
            )
        ids = hf_names.given_ids(args, kwargs)
        cache = hf_names.given_cache(kwargs)
        if ids is None:
            raise ValueError(
                "inputs_embeds: pass input_ids, which tell visual tokens from text"
            )
        hf_names.check_cache_is_growing(cache)
        mask = kwargs.get("attention_mask")
        if mask is None:
            self.new = torch.ones_like(ids, dtype=torch.bool)
        else:
            self.new = mask[:, -ids.shape[1] :].bool()
        self.turn_mask = self.prompts = None
        self.reading = hf_names.is_empty(cache)
        if self.reading:
            self.ids = ids
            self.infos = _inspect_prompts(ids.cpu(), self.new.cpu(), self.model.config)
            _check_positions(kwargs.get("position_ids"), self.new)
        else:
            self._enter_later(ids, cache, mask)

    def _enter_later(self, ids, cache, mask) -> None:
        """Check a decoding step or another turn, which has to be of a cache that is known."""
        if cache not in self.segments:
            raise ValueError(
                "cache: it was filled outside of the method's block; begin a new one"
            )
        # A decoding step has one id: it is not looked at, so that nothing waits for it.
        if ids.shape[1] <= 1:
            return
        if mask is not None:
            self.turn_mask = mask[:, : -ids.shape[1]].bool()
        if visual_slots(ids, self.model.config).cpu().any():
            raise ValueError(
                "visual tokens in a later call: neither chunked prefill nor another image is supported"
            )

    def begin(self, module, args, kwargs):
        """Prepare a call: a forward pre-hook of the first layer."""
        self.guard.check_model_is_called()
        call = hf_names.LayerCall.read(args, kwargs)
        self.arguments_from, self.wrong_counts = {}, []
        if not self.reading:
            self.call_segments = self.segments[call.cache]
            return
        self._begin_prompts(call)
        self.call_segments: dict[int, CacheSegment] = {}
        if call.cache is not None:
            self.segments[call.cache] = self.call_segments

    def _begin_prompts(self, call: hf_names.LayerCall) -> None:
        """Take the prompts that are about to enter the first layer."""
        hidden, blocks = call.hidden, self.decoder.layers
        rows, length, _ = hidden.shape
        visual = visual_slots(self.ids, self.model.config) & self.new
        initial = InitialPrompts(self.ids, visual, self.new, hidden, self.infos)
        slots = torch.arange(length, device=hidden.device)
        counts = [info.visual for info in self.infos]
        # Prompts with as many visual tokens have one schedule.
        self.schedules = {
            count: self.method.schedule(count, len(blocks)) for count in set(counts)
        }
        self.prompts = PromptBatch(
            initial=initial,
            hidden=hidden,
            visual=initial.visual,
            valid=initial.valid,
            positions=call.positions.expand(rows, -1),
            source=slots.expand(rows, -1),
            counts=counts,
            head_dim=blocks[0].self_attn.head_dim,
        )
        # The list grows while methods score; the guard reads it behind the last layer.
        self.guard.check_later(self.prompts.no_numbers)
        schedules = [self.schedules[count] for count in counts]
        self.applied.record(lambda: schedules)

    def leave(self, module, args, output):
        """Check what methods left against their schedules: a forward hook of the model.

        By now everything is launched, and the device may be waited for.
        """
        if not self.reading:
            return
        if len(self.wrong_counts) < len(self.layers):
            hf_names.incompatible(
                f"the decoder does not call layers {[*self.layers]}, so that no token was dropped"
            )
        if torch.stack(self.wrong_counts).any():
            name = type(self.method).__name__
            raise BudgetError(
                f"{name}: visual tokens that its `reduce` leaves are not as many as its `schedule` says"
            )

    # -------------------------------------------------------------------------------------------- what scores need

    def remember_output(self, name):
        """Return a forward hook of a projection that remembers its output for scores."""

        def hook(module, args, output):
            # There are prompts while they are read, and not behind the last reduction.
            if self.prompts is not None:
                setattr(self.prompts, name, output)

        return hook

    def remember_rotary(self, module, args, kwargs):
        """Remember the rotary embeddings for scores: a forward pre-hook of a layer."""
        if self.prompts is not None:
            self.prompts.rotary = hf_names.LayerCall.read(args, kwargs).rotary

    # ------------------------------------------------------------------- before every layer from the first reduction

    def replace_arguments(self, layer):
        """Return a forward pre-hook of a layer that replaces its arguments."""
        # Layers between two reductions share the arguments that the first of them made.
        start = max(number for number in self.layers if number <= layer)

        def hook(module, args, kwargs):
            call = hf_names.LayerCall.read(args, kwargs)
            hidden = call.hidden
            if layer == start:
                if self.reading:
                    hidden = self.shrink(layer, hidden, call.cache)
                else:
                    self.extend(layer, hidden, call.cache)
            return (hidden, *args[1:]), {**kwargs, **self.arguments_from[start]}

        return hook

    def shrink(self, layer, hidden, cache):
        """Return what the method leaves of `hidden` (B, L, D) while a prompt is read."""
        p = self.prompts
        p.hidden = hidden
        if p.queries is None or p.keys is None:
            hf_names.incompatible(
                f"the attention of decoder layer {layer - 1} does not call its q_proj and k_proj"
            )
        selection = self.method.reduce(layer, p)
        # Counts and lengths by the schedule: to ask the selection is to wait for the
        # device. `leave` compares both.
        p.counts, lengths = [], []
        for info in p.initial.infos:
            count = self.schedules[info.visual][layer]
            p.counts.append(count)
            lengths.append(len(info.ids) - info.visual + count)
        expected = on_device(p.counts, hidden.device)
        self.wrong_counts.append(_count_visual(selection, p) != expected)

        # Text stays whatever the method selects.
        keep = p.valid & (selection.visual | ~p.visual)
        index, valid, joined = _insert_merged(p, keep, selection, max(lengths))
        p.hidden, p.visual, p.positions, p.source = (take(x, index) for x in joined)
        # A padding slot is a copy of some dropped one, perhaps a visual one.
        p.visual, p.valid = p.visual & valid, valid
        if self.method.renumber:
            p.positions = (valid.cumsum(1) - 1).clamp(min=0)
        # Without padding attention is merely causal, and needs no mask.
        padded = valid if min(lengths) < max(lengths) else None
        length = valid.shape[1]
        self.call_segments[layer] = CacheSegment(
            prompt_valid=valid,
            visual=p.initial.visual,
            entries=length,
            full=p.initial.ids.shape[1],
            valid=padded,
            count=valid.sum(1, keepdim=True),
        )
        self.arguments_from[layer] = self.arguments(
            layer, p.hidden, cache, p.positions, padded
        )
        self.guard.lengths[layer:] = [length] * (len(self.decoder.layers) - layer)
        return self._release(layer)

    def _release(self, layer: int) -> torch.Tensor:
        """Return the hidden states behind a reduction, and keep no reference to them.

        The next scores are those of another layer.
        """
        p = self.prompts
        hidden, p.hidden = p.hidden, None
        p.queries = p.keys = p.rotary = None
        if layer == self.layers[-1]:
            open_trace = observer(self.model)
            if open_trace is not None:
                open_trace.decoded(p.initial.visual, p.source, p.visual)
            # They hold activations of full length.
            self.prompts = None
        return hidden

    def extend(self, layer, hidden, cache):
        """Go on with a cache in a decoding step or a later turn.

        Nothing leaves: the layers from here on have fewer keys.
        """
        segment, new = self.call_segments[layer], self.new
        # The first layer's cache already has what this call brings.
        cached = cache.get_seq_length(layer), cache.get_seq_length() - new.shape[1]
        if cached != (segment.entries, segment.full):
            raise ValueError(
                "cache: entries were added or cropped outside of the method's block"
            )
        if self.turn_mask is not None:
            segment.apply_mask(self.turn_mask)
        # Without a number of our own, the model's positions go on behind the whole prompt.
        positions = None
        if self.method.renumber:
            positions = segment.count + new.cumsum(1) - 1
        segment.extend(new)
        self.arguments_from[layer] = self.arguments(
            layer, hidden, cache, positions, segment.valid
        )

    def arguments(self, layer, hidden, cache, positions, valid) -> dict:
        """Return what replaces the model's own arguments in the layers from `layer` on."""
        mask = hf_names.causal_mask(self.decoder.config, hidden, valid, cache, layer)
        if positions is None:
            return hf_names.layer_arguments(mask)
        rotary = hf_names.rotary_embeddings(self.decoder, hidden, positions)
        return hf_names.layer_arguments(mask, rotary)


def _inspect_prompts(
    ids: torch.Tensor, valid: torch.Tensor, config
) -> list[PromptInfo]:
    """Return what the host knows of prompts.

    Args:
        ids: (B, S) on the CPU.
        valid: (B, S) bool, True where they are not padding.

    Raises:
        ValueError: for prompts that are not padded on the left.
    """
    if not valid[:, -1].all():
        raise ValueError(
            "attention_mask: prompts have to be padded on the left (processor.tokenizer.padding_side)"
        )
    infos = []
    for row, row_valid in zip(ids, valid, strict=True):
        prompt = row[row_valid]
        visual = visual_slots(prompt, config).nonzero()[:, 0]
        after = len(prompt)
        if len(visual):
            after = len(prompt) - 1 - int(visual[-1])
        infos.append(PromptInfo(prompt.numpy(), len(visual), after))
    return infos


def _check_positions(positions: torch.Tensor | None, valid: torch.Tensor) -> None:
    """Raise ValueError for positions that start again within a row.

    Such rows are several prompts that a caller packed into one, which the mask behind a
    reduction would not tell apart.

    Args:
        positions: (B or 1, L), None where the model counts them itself.
        valid: (B, L) bool.
    """
    if positions is None:
        return
    rows = positions.expand(len(valid), -1).cpu()
    for row, row_valid in zip(rows, valid.cpu(), strict=True):
        if (row[row_valid].diff() < 0).any():
            raise ValueError(
                "position_ids: they start again within a row. Give every prompt a row of its own"
            )


def _count_visual(selection: Selection, p: PromptBatch) -> torch.Tensor:
    """Return the number of visual tokens that are left, on the device: (B)."""
    count = (selection.visual & p.visual).sum(1)
    if selection.merged is None:
        return count
    return count + selection.merged_valid.sum(1)


def _insert_merged(
    p: PromptBatch, keep: torch.Tensor, selection: Selection, length: int
):
    """Put merged tokens behind the last visual one, `length` slots in all.

    Args:
        keep: (B, L) bool, the slots that stay.

    Returns:
        index (B, length), valid (B, length), and what is to be indexed: hidden states,
        visual, positions and source, with the merged tokens behind all of them.
    """
    joined = p.hidden, p.visual, p.positions, p.source
    if selection.merged is None:
        return *compact_index(keep, length=length), joined
    rows, count = selection.merged_valid.shape
    device = keep.device
    slots = torch.arange(keep.shape[1], device=device).expand(rows, -1)
    last = slots.masked_fill(~p.visual, -1).amax(1, keepdim=True)  # [B, 1]
    # Slots behind the last visual one make room for all merged tokens.
    moved = slots + count * (slots > last)
    places = last + 1 + torch.arange(count, device=device)
    order = torch.cat([moved, places], 1)  # [B, L + M]
    # Merged tokens have the position of the last visual one, unless positions are
    # renumbered, and no slot that they come from.
    position = take(p.positions, last.clamp(min=0)).expand(-1, count)
    new = (
        selection.merged.to(p.hidden.dtype),
        selection.merged_valid,
        position,
        p.source.new_full((rows, count), -1),
    )
    joined = tuple(torch.cat(pair, 1) for pair in zip(joined, new, strict=True))
    keep = torch.cat([keep, selection.merged_valid], 1)
    return *compact_index(keep, order, length), joined


def topk_mask(
    score: torch.Tensor, prompts: PromptBatch, counts: list[int]
) -> torch.Tensor:
    """Return a mask of the visual tokens with the highest scores: (B, L) bool.

    Scores that are no numbers stop the run when its prompt is read: they would be sorted
    before all others.

    Args:
        score: (B, L).
        prompts: the prompts that are scored; their other tokens are not in the mask.
        counts: (B) how many tokens of each prompt to select.
    """
    prompts.no_numbers.append((score.isnan() & prompts.visual).any())
    visual_score = score.masked_fill(~prompts.visual, float("-inf"))
    # A stable sort and no topk: of equal scores the first token stays, on any device, and
    # every prompt has a count of its own.
    order = visual_score.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(score.shape[1], device=score.device)
    is_best = rank < on_device(counts, score.device)[:, None]
    return torch.zeros_like(prompts.visual).scatter(1, order, is_best)


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
