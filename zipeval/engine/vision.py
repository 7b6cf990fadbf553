"""Reduce visual tokens between the vision encoder and the language model.

This works on stock classes, without touching their attention. Hooks on one encoder layer
and on the projector let a method replace the features that the projector is about to
get. The prompt's image placeholders then shrink to match. SDPA or FlashAttention stays on
in every layer: queries and keys of the one layer a method scores by are the outputs of its
`q_proj` and `k_proj`, seen on their way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain, islice

from zipeval import moved
from zipeval.engine import hf_names
from zipeval.engine.budget import Shape, VisualInput
from zipeval.engine.guard import Applied, Guard
from zipeval.engine.hf_names import PIXELS, SIZES
from zipeval.engine.images import (
    check_model,
    cls_tokens,
    largest_picture,
    packing_order,
    pictures,
    pixels,
    side,
    stock_packing,
    tower,
)
from zipeval.engine.method import Method, Stages
from zipeval.engine.ragged import compact_index, on_device, take, visual_slots
from zipeval.engine.received import attention_received
from zipeval.engine.trace import observer
from zipeval.engine.turns import ConversationCache, FirstTurn
from zipeval.errors import BudgetError
from zipeval.utils.lazy import torch

# A label that no loss counts, as transformers has it.
IGNORED = -100


@dataclass(frozen=True)
class Crops:
    """Hold N images as the encoder layer that features are read from sees them.

    Each image has S tokens, P of them patches.

    Attributes:
        hidden: (N, S, D) output of that layer, the CLS token first where the encoder has one.
        queries: (N, S, H * d) of that layer's self-attention, bias included.
        keys: (N, S, H * d), likewise.
        heads: H.
        prefix: number of tokens before the patches: 1 for CLIP (CLS), 0 for SigLIP.
        selected: (N, K, D) what the model itself would hand to the projector (LLaVA: the patches without CLS).
        pixels: (N, 3, height, width) what the encoder was given; on the CPU if a method wants it (`reads_pixels`).
        no_numbers: bool for each attention so far, whether it holds NaN, on the device.
    """

    hidden: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    heads: int
    prefix: int
    selected: torch.Tensor
    pixels: torch.Tensor
    no_numbers: list[torch.Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the attributes that are tensors, by name."""
        tensors = {}
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if torch.is_tensor(value):
                tensors[attribute.name] = value
        return tensors

    def select(self, rows: list[int]) -> Crops:
        """Return some of the crops, by their numbers on the host."""
        selected = {}
        for name, tensor in self.tensors().items():
            selected[name] = tensor.index_select(0, on_device(rows, tensor.device))
        return replace(self, **selected)

    def everything(self) -> Reduced:
        """Return what the model itself would take; not even CLS comes in."""
        length = self.hidden.shape[1]
        # What the model selects is the end of the sequence: all tokens but CLS, or all.
        first = length - self.selected.shape[1]
        positions = torch.arange(first, length, device=self.hidden.device)
        return Reduced(self.selected, positions.expand(len(self.hidden), -1))

    def attention(self) -> torch.Tensor:
        """Return the attention that every patch receives: (N, H, P) float32.

        See zipeval/engine/received.py.
        """
        scores = attention_received(self.queries, self.keys, self.heads, self.prefix)
        # Read only after the prompt, so that the host does not wait for the device here.
        self.no_numbers.append(scores.isnan().any())
        return scores

    def mean_keys(self) -> torch.Tensor:
        """Return the keys averaged over heads: (N, S, d)."""
        return self.keys.unflatten(-1, (self.heads, -1)).mean(2)


@dataclass(frozen=True)
class Reduced:
    """Hold what a method leaves of N images.

    Attributes:
        features: (N, k, D) for the projector; the first `kept.shape[1]` are tokens of
            the encoder, the rest merged.
        kept: (N, <= k) their positions in `Crops.hidden`, ascending (with CLS: 0 is CLS,
            patch p is p + 1).
        merged: (N, k - kept.shape[1]) likewise, where the merged ones stand; None if in
            no one place.
    """

    features: torch.Tensor
    kept: torch.Tensor
    merged: torch.Tensor | None = None


class VisionMethod(Method):
    """Reduce visual tokens between encoder and projector.

    Attributes:
        tokens: visual tokens that a crop is left with; most images are one crop.
        row_ends: whether the tiles' rows of patches keep the model's row ends; the
            official VisionZip drops them.
        reads_pixels: whether it needs `Crops.pixels` on the CPU. They are copied before
            the encoder starts, so that nothing has to wait for it.
    """

    tokens: int
    row_ends = False
    reads_pixels = False

    @abstractmethod
    def reduce(self, crops: Crops) -> Reduced:
        """Return what is left of some crops."""

    @classmethod
    def for_budget(
        cls, tokens: int, budget: str, shape: Shape, **options
    ) -> VisionMethod:
        """Return the method with its settings for a budget.

        What is left of an image enters every layer of the decoder. Where an image has
        several crops, `paper` gives every crop the same share, whatever their number is,
        as published; otherwise the tokens of an image are divided over the crops that it
        has.

        Raises:
            ValueError: for a budget that cannot be met.
        """
        # With one crop, a budget for an image is one for the crop.
        if shape.crops == 1:
            return cls(tokens=tokens, **options)
        if budget == "paper":
            if tokens % shape.crops:
                raise ValueError(
                    f"tokens={tokens}: with budget=paper every one of {shape.crops} crops gets an equal share"
                )
            return cls(tokens=tokens // shape.crops, **options)
        make = partial(cls, **options)
        # A picture may have any of these grids: all of them are tried before the run.
        for picture in shape.pictures:
            _check_division(tokens, picture, make)
        return SplitAcrossCrops(tokens, make)

    @property
    def reduction_stages(self) -> Stages:
        """Return the method as one that acts before the decoder alone."""
        return Stages(vision=self)

    def of_crops(self, picture: VisualInput) -> list[VisionMethod]:
        """Return the method for each crop of an image."""
        return [self] * picture.crops

    def less_row_ends(self, picture: VisualInput) -> VisionMethod:
        """Return the method for an image whose row ends come on top of its tokens."""
        return self

    def project(self, model, features: torch.Tensor) -> torch.Tensor:
        """Return what the language model gets of features, by the model's own projector.

        Args:
            features: (N, k, D).

        Returns:
            (N, k, E).
        """
        return hf_names.projector(model)(features)

    def left(self, patches: int) -> int:
        """Return how many tokens are left of a crop of so many patches."""
        return min(patches, self.tokens)

    def num_tokens(self, picture: VisualInput) -> int:
        """Return how many tokens are left of an image, never more than the model makes.

        The model adds row ends to the patches of tiles, and cuts off those of padding.
        """
        counts = [method.left(picture.patches) for method in self.of_crops(picture)]
        # Where no patch leaves, the model itself packs the image.
        if min(counts) == picture.patches:
            return picture.tokens
        total = sum(counts)
        if self.row_ends:
            total += picture.rows
        return min(picture.tokens, total)

    def tokens_per_layer(self, images: list[VisualInput], depth: int) -> list[int]:
        """Return the visual tokens that enter each of `depth` decoder layers.

        Args:
            images: the images or videos of one prompt.
            depth: number of decoder layers.
        """
        return [sum(map(self.num_tokens, images))] * depth

    @property
    def requested_tokens(self) -> int | None:
        """Return the number of tokens that are to be left of a crop; None without one."""
        return getattr(self, "tokens", None)

    def check_removes(self, largest: VisualInput) -> None:
        """Raise ValueError where more tokens are to be left of a crop than it has patches."""
        requested = self.requested_tokens
        if requested is not None and requested > largest.patches:
            where = "an image" if largest.crops == 1 else "a crop of an image"
            raise ValueError(
                f"tokens={requested}: this model has {largest.patches} visual tokens in {where}, so that nothing "
                f"would be removed. Choose from 1 to {largest.patches}"
            )

    @contextmanager
    def applied(self, model) -> Iterator[Applied]:
        """Let `model(...)` and `model.generate(...)` reduce the images of their inputs.

        The inputs are the processor's usual ones. The block is given what was left of
        the prompts that were read last.

        `generate` returns the prompt it was given, placeholders and all, followed by the
        new tokens, so that callers slice it as they always do. With its cache
        (`past_key_values=`, one's own or that of `return_dict_in_generate=True`), what it
        returned and a next question behind it are a later turn, which the visual tokens
        serve that were left in the first one. Nothing of this is left on the model after
        the block, nor after an exception.

        Raises:
            ValueError: for a model that is not built as LLaVA is, and for settings that
                would remove nothing.
            IncompatibleError: in a call, where the model does not call its decoder as is
                expected.
        """
        check_model(model)
        self.check_removes(largest_picture(model))
        if "generate" in vars(model):
            raise RuntimeError(
                "a vision-stage method is already applied to this model; leave its block first"
            )
        prompt_hooks = PromptHooks(self, model)
        hooks = [
            model.register_forward_pre_hook(prompt_hooks.enter, with_kwargs=True),
            model.register_forward_hook(prompt_hooks.turns.record, always_call=True),
        ]
        model.generate = prompt_hooks.generate
        try:
            # Opened last, so that the guard sees what the hooks above leave.
            with prompt_hooks.guard.watching():
                yield prompt_hooks.applied
        finally:
            for hook in hooks:
                hook.remove()
            del model.generate


def _check_division(
    tokens: int, picture: VisualInput, make: Callable[..., VisionMethod]
) -> None:
    """Raise ValueError where tokens of an image cannot be divided over its crops."""
    if tokens < picture.crops + picture.rows:
        rows = f" and {picture.rows} row ends" if picture.rows else ""
        raise ValueError(
            f"tokens={tokens}: too few for an image of {picture.crops} crops{rows}"
        )
    # A method may refuse the share of a crop: VisionZip's dominant tokens, for example.
    SplitAcrossCrops(tokens - picture.rows, make).of_crops(picture)


class PromptHooks:
    """Stand before a model's `forward` and `generate` while a method is applied to it."""

    def __init__(self, method: VisionMethod, model):
        self.method, self.model, self.stock_generate = method, model, model.generate
        self.turns, self.applied = ConversationCache(model), Applied()
        self.guard = Guard(model, type(method).__name__, inside=False)

    def enter(self, module, args, kwargs):
        """Replace the arguments of a call: a forward pre-hook of the model."""
        # A model's first argument may come without a name.
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        later = self.turns.continue_forward(kwargs)
        if later:
            return args[1:], later
        first = self.first_turn(kwargs)
        return args[1:], self.turns.add_positions(first, self.turns.reading)

    def generate(self, inputs=None, **kwargs):
        """Return what the model's own `generate` does, behind the prompts as given."""
        prompt = kwargs.pop("input_ids", inputs)
        kwargs = {"input_ids": prompt, **kwargs}
        kwargs = self.turns.continue_generate(kwargs) or self.first_turn(kwargs)
        self.turns.generating = True
        try:
            with self.guard.generating(kwargs):
                output = self.stock_generate(**kwargs)
        finally:
            self.turns.reading, self.turns.generating = None, False
        is_structured = not torch.is_tensor(output)
        sequences = output.sequences if is_structured else output
        # Callers slice the answer off behind the prompt that they gave, placeholders and
        # all. A prompt has a row for each of its returned answers.
        answers = sequences[:, kwargs["input_ids"].shape[1] :]
        prompts = prompt.repeat_interleave(len(sequences) // len(prompt), 0)
        sequences = torch.cat([prompts, answers], 1)
        if not is_structured:
            return sequences
        output.sequences = sequences
        return output

    def first_turn(self, inputs: dict) -> dict:
        """Return the inputs of a first turn with fewer placeholders.

        Inputs of later calls come back as they are.
        """
        reduced_prompts, shortened, scores = reduce_prompts(
            self.model, inputs, self.method
        )
        ids = reduced_prompts.get("input_ids")
        if ids is not None and hf_names.is_empty(hf_names.given_cache(reduced_prompts)):
            check_pixels(self.model, reduced_prompts)
            visual = visual_slots(ids, self.model.config).sum(1)
            depth = len(self.guard.layers)
            # Counted on the device; the host asks for the numbers when somebody does.
            self.applied.record(lambda: [[count] * depth for count in visual.tolist()])
        if reduced_prompts is not inputs:
            # Padding on the right is told to a later turn, which cannot go on behind it.
            initial, mask = inputs["input_ids"], inputs.get("attention_mask")
            last = initial[:, -1]
            padded = torch.zeros_like(last) if mask is None else mask[:, -1] == 0
            self.turns.reading = FirstTurn(
                initial,
                ids,
                reduced_prompts["attention_mask"],
                padded.bool(),
                shortened,
            )
            self.guard.check_later(scores)
        return reduced_prompts


@dataclass(frozen=True)
class KeepAll(VisionMethod):
    """Leave the model as it is.

    This stands for a method where its budget is too large for an image, and where no
    method acts before the decoder.
    """

    requested_tokens = None

    def left(self, patches: int) -> int:
        return patches

    def reduce(self, crops: Crops) -> Reduced:
        return crops.everything()


def _crop_methods(
    method: VisionMethod, images: list[VisualInput]
) -> list[VisionMethod]:
    """Return the method for each crop of some images, one image after another.

    Where the method makes no fewer tokens than the model, the model does as it does.
    """
    methods: list[VisionMethod] = []
    for image in images:
        # A budget for large images may be more than a small one has.
        if method.num_tokens(image) == image.tokens:
            methods += [KeepAll()] * image.crops
        else:
            methods += method.of_crops(image)
    return methods


@dataclass(frozen=True)
class SplitAcrossCrops(VisionMethod):
    """Divide a budget for whole images over their crops.

    Args:
        tokens: visual tokens that an image is left with.
        make: the method with `tokens=` for a crop.
    """

    tokens: int
    make: Callable[..., VisionMethod]
    # `tokens` is a number for an image, and `requested_tokens` one for a crop.
    requested_tokens = None

    def of_crops(self, picture: VisualInput) -> list[VisionMethod]:
        share, rest = divmod(self.tokens, picture.crops)
        methods = []
        for crop in range(picture.crops):
            # The first crops, of which one is the whole image, get what is left over.
            tokens = share + 1 if crop < rest else share
            methods.append(self.make(tokens=min(picture.patches, tokens)))
        return methods

    def less_row_ends(self, picture: VisualInput) -> VisionMethod:
        """Return the method with tokens put by for the row ends of an image."""
        return replace(self, tokens=self.tokens - picture.rows)

    def reduce(self, crops: Crops) -> Reduced:
        return self.make(tokens=self.tokens).reduce(crops)

    def project(self, model, features: torch.Tensor) -> torch.Tensor:
        return self.make(tokens=self.tokens).project(model, features)


@dataclass(frozen=True)
class WithImageNewlines(VisionMethod):
    """Leave the row ends of LLaVA-NeXT's tiles (`packing=newline`) beside a method's tokens.

    They come on top of what each crop is left with; of a budget for whole images they are
    a part.
    """

    method: VisionMethod
    row_ends = True

    @property
    def requested_tokens(self) -> int | None:
        return self.method.requested_tokens

    def of_crops(self, picture: VisualInput) -> list[VisionMethod]:
        return self.method.less_row_ends(picture).of_crops(picture)

    def reduce(self, crops: Crops) -> Reduced:
        return self.method.reduce(crops)

    def project(self, model, features: torch.Tensor) -> torch.Tensor:
        return self.method.project(model, features)


def check_pixels(model, inputs: dict) -> None:
    """Raise ValueError where prompts have places of pictures that nothing fills.

    They are filled by encoded features; inputs with pixels have these by now.
    """
    if hf_names.FEATURES in inputs:
        return
    if visual_slots(inputs["input_ids"], model.config).any():
        names = ", ".join(chain.from_iterable(PIXELS.values()))
        raise ValueError(
            f"input_ids: they have places of images or videos, and none of {names} is given"
        )


def reduced_inputs(model, inputs: dict, method: VisionMethod) -> dict:
    """Return the processor's inputs with features in place of pixels.

    They have as many placeholders as features are left. Inputs without images and videos
    (text, decoding steps, a later turn) come back as they are. `labels` lose what the
    prompts lose. The features can be differentiated by the projector's weights.
    """
    return reduce_prompts(model, inputs, method)[0]


def reduce_prompts(
    model, inputs: dict, method: VisionMethod
) -> tuple[dict, bool, list[torch.Tensor]]:
    """Reduce the pictures of prompts, see `reduced_inputs`.

    Returns:
        The reduced inputs; whether a prompt lost tokens; for each score whether it holds
        NaN, on the device.

    Raises:
        ValueError: for inputs that cannot be shortened.
    """
    kinds = [kind for kind in PIXELS if pixels(inputs, kind) is not None]
    if not kinds:
        return inputs, False, []
    _check_prompts(inputs)
    inputs = dict(inputs)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    # All that has to be known of the inputs is asked before anything is computed: to ask
    # is to wait for the device.
    if inputs.get(SIZES) is not None:
        inputs[SIZES] = inputs[SIZES].cpu()
    images = {kind: pictures(model, inputs, kind) for kind in kinds}
    counts = {kind: [*map(method.num_tokens, images[kind])] for kind in kinds}
    ids, mask, labels = shrink_placeholders(
        model, ids, mask, images, counts, inputs.get("labels")
    )
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if labels is not None:
        inputs["labels"] = labels

    encoded, scores, shortened = {}, [], False
    for kind in kinds:
        methods = _crop_methods(method, images[kind])
        reads_pixels = any(part.reads_pixels for part in methods)
        crops = encode_crops(model, inputs, kind, reads_pixels)
        encoded[kind] = reduce_and_pack(
            model, crops, images[kind], inputs.get(SIZES), method
        )
        scores += crops.no_numbers
        for image, count in zip(images[kind], counts[kind], strict=True):
            shortened |= count < image.tokens
    # The features stand for the pixels from here on.
    for name in (SIZES, *chain.from_iterable(PIXELS.values())):
        inputs.pop(name, None)
    return {**inputs, **encoder_outputs(model, encoded)}, shortened, scores


def _check_prompts(inputs: dict) -> None:
    """Raise ValueError for inputs with pictures that cannot be shortened."""
    ids, labels = inputs["input_ids"], inputs.get("labels")
    if inputs.get("position_ids") is not None:
        raise ValueError(
            "position_ids: prompts lose tokens, so leave their positions to the model; pack no prompts"
        )
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(
            f"labels: {tuple(labels.shape)} for prompts of {tuple(ids.shape)}: give one for every token"
        )
    # One prompt has no padding; of several, only the mask tells it.
    if inputs.get("attention_mask") is None and len(ids) > 1:
        raise ValueError(
            f"attention_mask=None with {len(ids)} prompts: pass the mask that the processor returns"
        )


def shrink_placeholders(
    model,
    ids: torch.Tensor,
    mask: torch.Tensor,
    images: dict[str, list[VisualInput]],
    counts: dict[str, list[int]],
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return prompts with as many placeholders as are left of each of their pictures.

    Args:
        ids, mask, labels: (B, L).
        images: by kind, the pictures of all prompts, in reading order.
        counts: by kind, how many tokens are left of each.

    Returns:
        ids, mask, labels: (B, L'), left-padded anew; without labels, there are none in
        the end either.

    Raises:
        ValueError: where placeholders and pictures do not fit.
    """
    # On the host: where L' comes from a tensor of the device, the host waits for it.
    host_ids, keep = ids.cpu(), mask.cpu().bool()
    for kind, kind_images in images.items():
        placeholders = host_ids == getattr(model.config, f"{kind}_token_id")
        # The first placeholders of a picture stay; which tokens they stand for, the
        # features say.
        stays = []
        for image, count in zip(kind_images, counts[kind], strict=True):
            stays.append(torch.arange(image.tokens) < count)
        stay = torch.cat(stays)
        if int(placeholders.sum()) != len(stay):
            raise ValueError(
                f"the prompts hold {int(placeholders.sum())} placeholders, the images or videos {len(stay)} tokens"
            )
        keep[placeholders] &= stay
    index, valid = compact_index(keep)  # [B, L']
    if labels is not None:
        taken = take(labels.cpu(), index)
        labels = taken.masked_fill(~valid, IGNORED).to(labels.device)
    shorter = take(host_ids, index).masked_fill(~valid, 0)
    return shorter.to(ids.device), valid.to(mask), labels


@dataclass(frozen=True)
class Encoded:
    """Hold an image or a video as the decoder gets it.

    Attributes:
        features: (k, D).
        places: (k, 2) where they are, as in `Trace`; None if nobody asked.
    """

    features: torch.Tensor
    places: torch.Tensor | None


def encoder_outputs(model, encoded: dict[str, list[Encoded]]) -> dict:
    """Return the arguments of `forward` and `generate` that stand for pixels.

    They are fresh objects, as generate() writes into them.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    open_trace = observer(model)
    # Models that take videos hold the features of all pictures in one tensor.
    in_one_tensor = hasattr(model.base_model, "get_video_features")
    by_kind = {}
    for kind, kind_pictures in encoded.items():
        if open_trace is not None:
            open_trace.encoded(kind, [picture.places for picture in kind_pictures])
        features = [picture.features for picture in kind_pictures]
        if in_one_tensor:
            features = torch.stack(features)
        by_kind[kind] = BaseModelOutputWithPooling(pooler_output=features)
    return {hf_names.FEATURES: by_kind}


def encode_crops(model, inputs: dict, kind: str, reads_pixels: bool) -> Crops:
    """Return all crops of the images, or of the videos, of the processor's inputs.

    They come in reading order, as the encoder sees them.

    Args:
        kind: image or video.
        reads_pixels: whether a method that they are for does.

    Raises:
        IncompatibleError: where the model does not call what the hooks are on.
    """
    base, layer = model.base_model, scored_layer(model, kind)
    attention = layer.self_attn
    observed = {}

    def take_pixels(module, args):
        observed["pixels"] = args[0].cpu() if reads_pixels else args[0]

    def take_output(name):
        return lambda module, args, output: observed.update({name: output})

    def empty_projector_input(module, args):
        observed["selected"] = args[0]
        # Only what is left will be projected, later: [N, 0, D] costs nothing here.
        return (args[0][:, :0],)

    hooks = [
        tower(model, kind).embeddings.register_forward_pre_hook(take_pixels),
        layer.register_forward_hook(take_output("hidden")),
        attention.q_proj.register_forward_hook(take_output("queries")),
        attention.k_proj.register_forward_hook(take_output("keys")),
        hf_names.projector(model).register_forward_pre_hook(empty_projector_input),
    ]
    sized = {}
    if inputs.get(SIZES) is not None:
        sized[SIZES] = inputs[SIZES]
        # The features of tiles are packed behind the reduction; here are none to pack.
        base.pack_image_features = lambda features, *_, **options: (features, None)
    try:
        encode = getattr(base, f"get_{kind}_features")
        encode(pixels(inputs, kind), **sized, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
        vars(base).pop("pack_image_features", None)
    missing = {"pixels", "hidden", "queries", "keys", "selected"} - observed.keys()
    if missing:
        hf_names.incompatible(
            f"get_{kind}_features does not call what gives {', '.join(sorted(missing))}"
        )
    # What lies between encoder and projector (Mini-Gemini's mining) is in what the
    # projector is given: CLS as the layer has it, then the selected tokens.
    hidden, selected = observed["hidden"], observed["selected"]
    unselected = hidden[:, : hidden.shape[1] - selected.shape[1]]
    observed["hidden"] = torch.cat([unselected, selected], 1)
    return Crops(**observed, heads=attention.num_heads, prefix=cls_tokens(model))


def reduce_and_pack(
    model,
    crops: Crops,
    images: list[VisualInput],
    sizes: torch.Tensor | None,
    method: VisionMethod,
) -> list[Encoded]:
    """Return what `method` leaves of every image or video, projected and packed.

    Where it leaves everything, an image is packed as the model packs it.

    Args:
        crops: of all of them, one image after another.
        sizes: (N, 2) height and width of every image, where the model packs tiles.

    Raises:
        BudgetError: if it leaves another number of tokens than it says.
    """
    # All images are reduced and projected at once, and told apart behind that.
    features, reductions = _reduce_crops(crops, _crop_methods(method, images))
    projected = method.project(model, features.to(crops.selected.dtype))
    remaining = zip(projected, reductions, strict=True)
    row_end = getattr(model.base_model, "image_newline", None)
    patches = side(model) ** 2
    encoded = []
    for number, image in enumerate(images):
        size = None if sizes is None else sizes[number]
        rows, image_crops = zip(*islice(remaining, image.crops), strict=True)
        order = _packing_order(model, method, image, size, image_crops)
        # Crops are padded to the longest of the batch: what is theirs comes first.
        tokens = [
            row[: len(crop.features)]
            for row, crop in zip(rows, image_crops, strict=True)
        ]
        packed = _in_order(torch.cat(tokens), order, row_end)
        expected = method.num_tokens(image)
        if len(packed) != expected:
            name = type(method).__name__
            raise BudgetError(
                f"{name} leaves {len(packed)} visual tokens of an image, and {expected} as it says itself."
            )
        places = None
        if observer(model) is not None:
            places = _places(image_crops, crops.prefix, patches)
            places = _in_order(places, order, places.new_full((2,), -1))
        encoded.append(Encoded(packed, places))
    return encoded


def _packing_order(
    model,
    method: VisionMethod,
    image: VisualInput,
    size: torch.Tensor | None,
    crops: tuple[Reduced, ...],
) -> torch.Tensor | None:
    """Return the order of an image's tokens; None where crops just follow each other."""
    if size is None:
        return None
    if method.num_tokens(image) == image.tokens:
        device = crops[0].features.device
        return stock_packing(model, size).to(device, non_blocking=True)
    counts = [len(crop.features) for crop in crops]
    positions = [crop.kept for crop in crops]
    return packing_order(model, counts, positions, size, method.row_ends)


def _in_order(
    rows: torch.Tensor, order: torch.Tensor | None, row_end: torch.Tensor | None
) -> torch.Tensor:
    """Return rows (n, D) as `order` has them; without one, as they stand.

    A number of -1 stands for the row end (D).
    """
    if order is None:
        return rows
    # The row end is put last, where -1 finds it.
    return torch.cat([rows, row_end.to(rows)[None]])[order]


def _places(crops: tuple[Reduced, ...], prefix: int, patches: int) -> torch.Tensor:
    """Return the places (n, 2) of a picture's tokens, crop after crop, as in `Trace`."""
    places = []
    for number, crop in enumerate(crops):
        selected = crop.kept - prefix
        if crop.merged is None:
            without_place = len(crop.features) - len(selected)
            merged = selected.new_full((without_place,), -1)
        else:
            merged = crop.merged - prefix
        # Column 0 of a pair is for tokens that were kept, column 1 for merged ones.
        column = torch.cat([torch.zeros_like(selected), torch.ones_like(merged)])
        position = torch.cat([selected, merged])
        # Below 0 are CLS and what has no place; all others count on from crop to crop.
        position = torch.where(position < 0, -1, position + number * patches)
        pairs = position.new_full((len(position), 2), -1)
        places.append(pairs.scatter(1, column[:, None], position[:, None]))
    return torch.cat(places)


def scored_layer(model, kind: str) -> torch.nn.Module:
    """Return the encoder layer that features are read from; methods score by its attention.

    Raises:
        ValueError: for a model that reads them from several.
    """
    number = model.config.vision_feature_layer
    if not isinstance(number, int):
        raise ValueError(
            f"vision_feature_layer={number!r}: reduction reads features from one layer"
        )
    # Numbers from 0 up are those of hidden states, the first of which is the embedding.
    layer = number if number < 0 else number - 1
    return tower(model, kind).encoder.layers[layer]


def _reduce_crops(
    crops: Crops, methods: list[VisionMethod]
) -> tuple[torch.Tensor, list[Reduced]]:
    """Reduce N crops by a method each; crops under equal methods are reduced together.

    Returns:
        Features (N, k, D), padded behind to the longest; and what is left of each crop,
        without a batch dimension.
    """
    groups = _group_rows(methods)
    results = []
    for method, rows in groups:
        # Most often all crops are in one group, and nothing is copied.
        group = crops if len(groups) == 1 else crops.select(rows)
        results.append(method.reduce(group))

    longest = max(result.features.shape[1] for result in results)
    padded = []
    for result in results:
        padding = longest - result.features.shape[1]
        # Counted from the last dimension: D stays, behind the k tokens come zeros.
        padded.append(torch.nn.functional.pad(result.features, (0, 0, 0, padding)))
    features = padded[0]
    if len(groups) > 1:
        # Groups stand one after another now. The argsort of their crops' numbers is the
        # inverse of that order, and puts the crops back.
        grouped_rows = torch.tensor([*chain.from_iterable(rows for _, rows in groups)])
        order = grouped_rows.argsort().to(features.device, non_blocking=True)
        features = torch.cat(padded).index_select(0, order)

    by_row: dict[int, Reduced] = {}
    for (_, rows), result in zip(groups, results, strict=True):
        for i, row in enumerate(rows):
            # Methods that merge nothing, or nowhere in particular, have no such positions.
            merged = None if result.merged is None else result.merged[i]
            by_row[row] = Reduced(result.features[i], result.kept[i], merged)
    return features, [by_row[row] for row in range(len(methods))]


def _group_rows(
    methods: list[VisionMethod],
) -> list[tuple[VisionMethod, list[int]]]:
    """Return each different method with the numbers of its crops."""
    groups: list[tuple[VisionMethod, list[int]]] = []
    for row, method in enumerate(methods):
        # Not a dictionary: a method need not be hashable.
        rows = next((rows for other, rows in groups if other == method), None)
        if rows is None:
            rows = []
            groups.append((method, rows))
        rows.append(row)
    return groups


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
