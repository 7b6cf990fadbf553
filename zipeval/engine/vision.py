"""Reduction between the vision encoder and the language model, on stock classes and without touching their attention.

Hooks on one encoder layer and on the projector let a method replace the features that the projector is about to get.
The prompt's image placeholders then shrink to match. SDPA or FlashAttention stays on in every layer: queries and keys
of the one layer a method scores by are the outputs of its `q_proj` and `k_proj`, seen on their way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain, islice

from zipeval.engine import hf_names
from zipeval.engine.budget import Picture, Shape
from zipeval.engine.guard import Applied, Guard
from zipeval.engine.hf_names import PIXELS
from zipeval.engine.images import (
    check_model,
    cls_tokens,
    largest_picture,
    packing,
    pictures,
    pixels,
    side,
    stock_packing,
    tower,
)
from zipeval.engine.ragged import compact_index, on_device, take, visual_slots
from zipeval.engine.received import received
from zipeval.engine.trace import observer
from zipeval.engine.turns import FirstTurn, Turns
from zipeval.errors import BudgetError
from zipeval.utils.lazy import torch

IGNORED = -100  # a label that no loss counts, as transformers has it


@dataclass(frozen=True)
class Crops:
    """N images as the encoder layer that features are read from sees them; S tokens each, P of them patches.

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

    def select(self, rows: list[int]) -> Crops:
        """Some of them."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x for name, x in held.items() if torch.is_tensor(x)}
        return replace(
            self,
            **{
                name: x.index_select(0, on_device(rows, x.device))
                for name, x in tensors.items()
            },
        )

    def everything(self) -> Reduced:
        """What the model itself would take; not even CLS comes in."""
        first = self.hidden.shape[1] - self.selected.shape[1]
        kept = torch.arange(first, self.hidden.shape[1], device=self.hidden.device)
        return Reduced(self.selected, kept.expand(len(self.hidden), -1))

    def attention(self) -> torch.Tensor:
        """(N, H, P) float32: the attention that every patch receives, see zipeval/engine/received.py."""
        scores = received(self.queries, self.keys, self.heads, self.prefix)
        self.no_numbers.append(scores.isnan().any())
        return scores

    def mean_keys(self) -> torch.Tensor:
        """(N, S, d): keys averaged over heads."""
        return self.keys.unflatten(-1, (self.heads, -1)).mean(2)


@dataclass(frozen=True)
class Reduced:
    """What a method leaves of N images.

    Attributes:
        features: (N, k, D) for the projector; the first `kept.shape[1]` are tokens of the encoder, the rest merged.
        kept: (N, <= k) their positions in `Crops.hidden`, ascending (with CLS: 0 is CLS, patch p is p + 1).
        merged: (N, k - kept.shape[1]) likewise, where the merged ones stand; None if in no one place.
    """

    features: torch.Tensor
    kept: torch.Tensor
    merged: torch.Tensor | None = None


class VisionMethod(ABC):
    """A method that acts between encoder and projector.

    Attributes:
        tokens: visual tokens that a crop is left with; most images are one crop.
        row_ends: whether the tiles' rows of patches keep the model's row ends; the official VisionZip drops them.
        reads_pixels: whether it needs `Crops.pixels` on the CPU. They are copied before the encoder starts, so that
            nothing has to wait for it.
    """

    tokens: int
    row_ends = False
    reads_pixels = False

    @abstractmethod
    def reduce(self, crops: Crops) -> Reduced:
        """What is left of some images."""

    @classmethod
    def for_budget(
        cls, tokens: int, budget: str, shape: Shape, **options
    ) -> VisionMethod:
        """The method with its settings for a budget: what is left of an image enters every layer of the decoder.

        Where an image has several crops, `paper` gives every crop the same share, whatever their number is, as
        published; otherwise the tokens of an image are divided over the crops that it has.

        Raises:
            ValueError: for a budget that cannot be met.
        """
        if shape.crops == 1:
            return cls(tokens=tokens, **options)
        if budget != "paper":
            for picture in shape.pictures:
                if tokens < picture.crops + picture.rows:
                    rows = f" and {picture.rows} row ends" if picture.rows else ""
                    raise ValueError(
                        f"tokens={tokens}: too few for an image of {picture.crops} crops{rows}"
                    )
                Divided(tokens - picture.rows, partial(cls, **options)).of_crops(
                    picture
                )  # raises where it cannot
            return Divided(tokens, partial(cls, **options))
        if tokens % shape.crops:
            raise ValueError(
                f"tokens={tokens}: with budget=paper every one of {shape.crops} crops gets an equal share"
            )
        return cls(tokens=tokens // shape.crops, **options)

    def of_crops(self, picture: Picture) -> list[VisionMethod]:
        """The method for each crop of an image."""
        return [self] * picture.crops

    def project(self, model, features: torch.Tensor) -> torch.Tensor:
        """(N, k, D) -> (N, k, E), what the language model gets of them: by the model's own projector."""
        return hf_names.projector(model)(features)

    def left(self, patches: int) -> int:
        """What is left of a crop of so many patches."""
        return min(patches, self.tokens)

    def left_of(self, picture: Picture) -> int:
        """What is left of an image: all that the model makes of it if no patch leaves, and never more than that.

        The model adds row ends to the patches of tiles, and cuts off those of padding.
        """
        left = [method.left(picture.patches) for method in self.of_crops(picture)]
        total = sum(left) + (picture.rows if self.row_ends else 0)
        return (
            picture.tokens
            if min(left) == picture.patches
            else min(picture.tokens, total)
        )

    def entering(self, images: list[Picture], depth: int) -> list[int]:
        """Visual tokens that enter each of `depth` decoder layers, of a prompt with these images."""
        return [sum(map(self.left_of, images))] * depth

    @property
    def asked(self) -> int | None:
        """The number of visual tokens that the method is asked to leave of a crop; None where it has no such number."""
        return getattr(self, "tokens", None)

    def check_removes(self, largest: Picture) -> None:
        """Raises ValueError where more visual tokens are to be left of a crop than it has patches."""
        if self.asked is not None and self.asked > largest.patches:
            where = "an image" if largest.crops == 1 else "a crop of an image"
            raise ValueError(
                f"tokens={self.asked}: this model has {largest.patches} visual tokens in {where}, so that nothing "
                f"would be removed. Choose from 1 to {largest.patches}"
            )

    @contextmanager
    def applied(self, model) -> Iterator[Applied]:
        """While open, `model(...)` and `model.generate(...)` reduce the images of the processor's usual inputs. The
        block is given what was left of the prompts that were read last.

        `generate` returns the prompt it was given, placeholders and all, followed by the new tokens, so that callers
        slice it as they always do. With its cache (`past_key_values=`, one's own or that of
        `return_dict_in_generate=True`), what it returned and a next question behind it are a later turn, which the
        visual tokens serve that were left in the first one. Nothing of this is left on the model after the block, nor
        after an exception.

        Raises:
            ValueError: for a model that is not built as LLaVA is, and for settings that would remove nothing.
            IncompatibleError: in a call, where the model does not call its decoder as is expected.
        """
        check_model(model)
        self.check_removes(largest_picture(model))
        if "generate" in vars(model):
            raise RuntimeError(
                "a vision-stage method is already applied to this model; leave its block first"
            )
        calls = _Calls(self, model)
        hooks = [
            model.register_forward_pre_hook(calls.enter, with_kwargs=True),
            model.register_forward_hook(calls.turns.read, always_call=True),
        ]
        model.generate = calls.generate
        try:
            with calls.guard.watching():
                yield calls.applied
        finally:
            for hook in hooks:
                hook.remove()
            del model.generate


class _Calls:
    """What stands before a model's `forward` and `generate` while a method is applied to it."""

    def __init__(self, method: VisionMethod, model):
        self.method, self.model, self.stock_generate = method, model, model.generate
        self.turns, self.applied = Turns(model), Applied()
        self.guard = Guard(model, type(method).__name__, inside=False)

    def enter(self, module, args, kwargs):
        """A forward pre-hook of the model."""
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        later = self.turns.call(kwargs)
        return args[1:], later or self.turns.numbered(
            self.first_turn(kwargs), self.turns.reading
        )

    def generate(self, inputs=None, **kwargs):
        """Return what the model's own `generate` does, behind the prompts as they were given."""
        prompt = kwargs.pop("input_ids", inputs)
        kwargs = {"input_ids": prompt, **kwargs}
        kwargs = self.turns.prompt(kwargs) or self.first_turn(kwargs)
        self.turns.generating = True
        try:
            with self.guard.generating(kwargs):
                out = self.stock_generate(**kwargs)
        finally:
            self.turns.reading, self.turns.generating = None, False
        structured = not torch.is_tensor(out)
        sequences = out.sequences if structured else out
        prompts = prompt.repeat_interleave(len(sequences) // len(prompt), 0)
        sequences = torch.cat(
            [prompts, sequences[:, kwargs["input_ids"].shape[1] :]], 1
        )
        if not structured:
            return sequences
        out.sequences = sequences
        return out

    def first_turn(self, inputs: dict) -> dict:
        """Return the inputs of prompts that are read now, with fewer placeholders; of later calls, as they are."""
        reduced, shortened, scores = reduce_prompts(self.model, inputs, self.method)
        ids = reduced.get("input_ids")
        if ids is not None and hf_names.is_empty(hf_names.given_cache(reduced)):
            check_pixels(self.model, reduced)
            visual, depth = (
                visual_slots(ids, self.model.config).sum(1),
                len(self.guard.layers),
            )
            self.applied.record(lambda: [[count] * depth for count in visual.tolist()])
        if reduced is not inputs:
            given, mask = inputs["input_ids"], inputs.get("attention_mask")
            padded = (
                torch.zeros_like(given[:, -1]) if mask is None else mask[:, -1] == 0
            )
            self.turns.reading = FirstTurn(
                given, ids, reduced["attention_mask"], padded.bool(), shortened
            )
            self.guard.check_later(scores)
        return reduced


@dataclass(frozen=True)
class Everything(VisionMethod):
    """The model as it is: of images that a budget is too large for, or that no method before the decoder reduces."""

    asked = None

    def left(self, patches: int) -> int:
        return patches

    def reduce(self, crops: Crops) -> Reduced:
        return crops.everything()


def _parts(method: VisionMethod, picture: Picture) -> list[VisionMethod]:
    """The method for each crop; what the model itself does where that makes no fewer tokens."""
    if method.left_of(picture) == picture.tokens:
        return [Everything()] * picture.crops
    return method.of_crops(picture)


@dataclass(frozen=True)
class Divided(VisionMethod):
    """A method with a budget for whole images, divided over their crops.

    Args:
        tokens: visual tokens that an image is left with.
        make: the method with `tokens=` for a crop.
    """

    tokens: int
    make: Callable[..., VisionMethod]
    asked = None  # of a crop

    def of_crops(self, picture: Picture) -> list[VisionMethod]:
        share, rest = divmod(self.tokens, picture.crops)
        return [
            self.make(tokens=min(picture.patches, share + (crop < rest)))
            for crop in range(picture.crops)
        ]

    def reduce(self, crops: Crops) -> Reduced:
        return self.make(tokens=self.tokens).reduce(crops)

    def project(self, model, features: torch.Tensor) -> torch.Tensor:
        return self.make(tokens=self.tokens).project(model, features)


@dataclass(frozen=True)
class RowEnds(VisionMethod):
    """A method that leaves the row ends of LLaVA-NeXT's tiles (`packing=newline`).

    They come on top of what each crop is left with; of a budget for whole images they are a part.
    """

    method: VisionMethod
    row_ends = True

    @property
    def asked(self) -> int | None:
        return self.method.asked

    def of_crops(self, picture: Picture) -> list[VisionMethod]:
        method = self.method
        if isinstance(method, Divided):
            method = replace(method, tokens=method.tokens - picture.rows)
        return method.of_crops(picture)

    def reduce(self, crops: Crops) -> Reduced:
        return self.method.reduce(crops)

    def project(self, model, features: torch.Tensor) -> torch.Tensor:
        return self.method.project(model, features)


def check_pixels(model, inputs: dict) -> None:
    """Raise ValueError where prompts have places of images or videos, and no features and no known pixels fill them."""
    if (
        hf_names.FEATURES not in inputs
        and visual_slots(inputs["input_ids"], model.config).any()
    ):
        names = ", ".join(chain.from_iterable(PIXELS.values()))
        raise ValueError(
            f"input_ids: they have places of images or videos, and none of {names} is given"
        )


def reduced_inputs(model, inputs: dict, method: VisionMethod) -> dict:
    """Return the processor's inputs with features in place of pixels and as many placeholders as features are left.

    Inputs without images and videos (text, decoding steps, a later turn) come back as they are. `labels` lose what the
    prompts lose. The features can be differentiated by the projector's weights.
    """
    return reduce_prompts(model, inputs, method)[0]


def reduce_prompts(
    model, inputs: dict, method: VisionMethod
) -> tuple[dict, bool, list[torch.Tensor]]:
    """Return `reduced_inputs`, whether a prompt lost tokens, and for each score whether it holds NaN, on the device."""
    if all(pixels(inputs, kind) is None for kind in PIXELS):
        return inputs, False, []
    if inputs.get("position_ids") is not None:
        raise ValueError(
            "position_ids: prompts lose tokens, so leave their positions to the model; pack no prompts"
        )
    inputs = dict(inputs)
    ids, mask, labels = (
        inputs["input_ids"],
        inputs.get("attention_mask"),
        inputs.get("labels"),
    )
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(
            f"labels: {tuple(labels.shape)} for prompts of {tuple(ids.shape)}: give one for every token"
        )
    if mask is None:
        if len(ids) > 1:
            raise ValueError(
                f"attention_mask=None with {len(ids)} prompts: pass the mask that the processor returns"
            )
        mask = torch.ones_like(ids)
    # All that has to be known of the inputs is asked before anything is computed: to ask is to wait for the device.
    sizes = inputs.pop("image_sizes", None)
    sized = {} if sizes is None else {"image_sizes": sizes.cpu()}
    found = {
        kind: pictures(model, {**inputs, **sized}, kind)
        for kind in PIXELS
        if pixels(inputs, kind) is not None
    }
    left = {
        kind: [method.left_of(picture) for picture in its]
        for kind, its in found.items()
    }
    inputs["input_ids"], inputs["attention_mask"], shortened = shrunk(
        model, ids, mask, found, left, labels
    )
    inputs |= {} if labels is None else {"labels": shortened}
    encoded, scores = {}, []
    for kind, its in found.items():
        reads_pixels = any(
            part.reads_pixels for picture in its for part in _parts(method, picture)
        )
        crops = see(model, {**inputs, **sized}, kind, reads_pixels)
        encoded[kind] = reduced(model, crops, its, sized.get("image_sizes"), method)
        scores += crops.no_numbers
    for name in chain.from_iterable(PIXELS.values()):
        inputs.pop(name, None)
    fewer = [
        count < picture.tokens
        for kind, its in found.items()
        for picture, count in zip(its, left[kind], strict=True)
    ]
    return {**inputs, **outputs(model, encoded)}, any(fewer), scores


def shrunk(
    model,
    ids,
    mask,
    found: dict[str, list[Picture]],
    left: dict[str, list[int]],
    labels=None,
):
    """Prompts with as many placeholders as are left of each of their images and videos, in reading order.

    ids, mask, labels: (B, L) -> (B, L') left-padded anew; without labels, there are none in the end either.
    """
    of, keep = ids.cpu(), mask.cpu().bool()
    for kind, its in found.items():
        at = of == getattr(model.config, f"{kind}_token_id")
        counts = zip([picture.tokens for picture in its], left[kind], strict=True)
        kept = torch.cat([torch.arange(before) < after for before, after in counts])
        if int(at.sum()) != len(kept):
            raise ValueError(
                f"the prompts hold {int(at.sum())} placeholders, the images or videos {len(kept)} tokens"
            )
        keep[at] &= kept
    index, valid = compact_index(keep)
    if labels is not None:
        labels = (
            take(labels.cpu(), index).masked_fill(~valid, IGNORED).to(labels.device)
        )
    return take(of, index).masked_fill(~valid, 0).to(ids.device), valid.to(mask), labels


@dataclass(frozen=True)
class Encoded:
    """An image or a video as the decoder gets it.

    Attributes:
        features: (k, D).
        places: (k, 2) where they are, as in `Trace`; None if nobody asked.
    """

    features: torch.Tensor
    places: torch.Tensor | None


def outputs(model, encoded: dict[str, list[Encoded]]) -> dict:
    """Return the arguments of `forward` and `generate` that stand for pixels: fresh objects, as generate() writes into
    them.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    told, made = observer(model), {}
    for kind, its in encoded.items():
        if told is not None:
            told.encoded(kind, [picture.places for picture in its])
        features = [picture.features for picture in its]
        if hasattr(
            model.base_model, "get_video_features"
        ):  # such models hold them in one tensor
            features = torch.stack(features)
        made[kind] = BaseModelOutputWithPooling(pooler_output=features)
    return {hf_names.FEATURES: made}


def see(model, inputs: dict, kind: str, reads_pixels: bool) -> Crops:
    """All crops of the images, or of the videos, of the processor's inputs, in reading order.

    Args:
        reads_pixels: whether a method that they are for does.
    """
    base, encoder, layer = model.base_model, tower(model, kind), scored(model, kind)
    attention, seen = layer.self_attn, {}

    def start(module, args):
        seen["pixels"] = args[0].cpu() if reads_pixels else args[0]

    def remember(name):
        return lambda module, args, output: seen.update({name: output})

    def stop(module, args):
        seen["selected"] = args[0]
        return (args[0][:, :0],)  # what is left is projected later

    hooks = [
        encoder.embeddings.register_forward_pre_hook(start),
        layer.register_forward_hook(remember("hidden")),
        attention.q_proj.register_forward_hook(remember("queries")),
        attention.k_proj.register_forward_hook(remember("keys")),
        hf_names.projector(model).register_forward_pre_hook(stop),
    ]
    sizes = inputs.get("image_sizes")
    if sizes is not None:
        base.pack_image_features = lambda features, *given, **options: (features, None)
    try:
        sized = {} if sizes is None else {"image_sizes": sizes}
        getattr(base, f"get_{kind}_features")(
            pixels(inputs, kind), **sized, return_dict=True
        )
    finally:
        for hook in hooks:
            hook.remove()
        vars(base).pop("pack_image_features", None)
    if missing := {"pixels", "hidden", "queries", "keys", "selected"} - seen.keys():
        hf_names.incompatible(
            f"get_{kind}_features does not call what gives {', '.join(sorted(missing))}"
        )
    selected = seen["selected"]
    # What lies between encoder and projector (Mini-Gemini's mining) is in what the projector is given.
    seen["hidden"] = torch.cat(
        [seen["hidden"][:, : seen["hidden"].shape[1] - selected.shape[1]], selected], 1
    )
    return Crops(**seen, heads=attention.num_heads, prefix=cls_tokens(model))


def reduced(
    model,
    crops: Crops,
    images: list[Picture],
    sizes: torch.Tensor | None,
    method: VisionMethod,
) -> list[Encoded]:
    """What `method` leaves of every image or video; where it leaves everything, packed as the model packs it.

    Args:
        crops: of all of them, one image after another.
        sizes: (N, 2) height and width of every image, where the model packs tiles.

    Raises:
        BudgetError: if it leaves another number of tokens than it says.
    """
    features, parts = _reduce(
        crops, [part for image in images for part in _parts(method, image)]
    )
    projected = method.project(model, features.to(crops.selected.dtype))
    remaining = zip(projected, parts, strict=True)
    row_end, told = (
        getattr(model.base_model, "image_newline", None),
        observer(model) is not None,
    )
    found = []
    for number, image in enumerate(images):
        rows, its = zip(*islice(remaining, image.crops), strict=True)
        features = [
            row[: len(part.features)] for row, part in zip(rows, its, strict=True)
        ]
        order = None
        if sizes is not None and method.left_of(image) == image.tokens:
            order = stock_packing(model, sizes[number]).to(
                crops.hidden.device, non_blocking=True
            )
        elif sizes is not None:
            order = packing(
                model,
                [*map(len, features)],
                [part.kept for part in its],
                sizes[number],
                method.row_ends,
            )
        places = _places(its, crops.prefix, side(model) ** 2) if told else None
        if told:
            places = _in_order(places, order, places.new_full((2,), -1))
        packed = _in_order(torch.cat(features), order, row_end)
        if len(packed) != (said := method.left_of(image)):
            name = type(method).__name__
            raise BudgetError(
                f"{name} leaves {len(packed)} visual tokens of an image, and {said} as it says itself."
            )
        found.append(Encoded(packed, places))
    return found


def _in_order(
    rows: torch.Tensor, order: torch.Tensor | None, row_end: torch.Tensor | None
) -> torch.Tensor:
    """rows (n, D) as `order` has them, -1 for the row end (D); without one, as they stand."""
    return rows if order is None else torch.cat([rows, row_end.to(rows)[None]])[order]


def _places(crops: list[Reduced], prefix: int, patches: int) -> torch.Tensor:
    """(n, 2): the places of a picture's tokens, crop after crop, as in `Trace`."""
    places = []
    for crop, reduced in enumerate(crops):
        kept, merged = reduced.kept - prefix, reduced.merged
        nowhere = kept.new_full((len(reduced.features) - len(kept),), -1)
        merged = nowhere if merged is None else merged - prefix
        column = torch.cat([torch.zeros_like(kept), torch.ones_like(merged)])
        position = torch.cat([kept, merged])
        position = torch.where(position < 0, -1, position + crop * patches)
        places.append(
            position.new_full((len(position), 2), -1).scatter(
                1, column[:, None], position[:, None]
            )
        )
    return torch.cat(places)


def scored(model, kind: str) -> torch.nn.Module:
    """The layer of the encoder that features are read from; its attention is what methods score by.

    Raises:
        ValueError: for a model that reads them from several.
    """
    number = model.config.vision_feature_layer
    if not isinstance(number, int):
        raise ValueError(
            f"vision_feature_layer={number!r}: reduction reads features from one layer"
        )
    return tower(model, kind).encoder.layers[
        number if number < 0 else number - 1
    ]  # hidden_states[0]: the embedding


def _reduce(
    crops: Crops, methods: list[VisionMethod]
) -> tuple[torch.Tensor, list[Reduced]]:
    """What is left of N crops under a method each: features (N, k, D), padded behind to the longest, and what they are
    of, crop by crop without a batch dimension. Crops under equal methods are reduced together.
    """
    groups: list[tuple[VisionMethod, list[int]]] = []  # a method need not be hashable
    for row, method in enumerate(methods):
        rows = next((rows for other, rows in groups if other == method), None)
        if rows is None:
            groups.append((method, rows := []))
        rows.append(row)
    results = [
        method.reduce(crops if len(groups) == 1 else crops.select(rows))
        for method, rows in groups
    ]
    longest = max(result.features.shape[1] for result in results)
    padded = [
        torch.nn.functional.pad(
            result.features, (0, 0, 0, longest - result.features.shape[1])
        )
        for result in results
    ]
    features = padded[0]
    if len(groups) > 1:
        places = {
            row: place
            for place, row in enumerate(row for _, rows in groups for row in rows)
        }
        order = on_device([places[row] for row in range(len(methods))], features.device)
        features = torch.cat(padded).index_select(0, order)
    reduced: list[Reduced] = [None] * len(methods)
    for (_, rows), result in zip(groups, results, strict=True):
        for i, row in enumerate(rows):
            merged = None if result.merged is None else result.merged[i]
            reduced[row] = Reduced(result.features[i], result.kept[i], merged)
    return features, reduced
