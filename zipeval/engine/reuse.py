"""Share what questions about one picture have in common.

That is the encoder's output, and the cache of a prompt up to its last visual token. The
first holds for every method, and for other budgets too; the second where what is left of
a picture does not depend on the question. Answers are those of every prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache

from zipeval import moved
from zipeval.engine import hf_names
from zipeval.engine.budget import VisualInput
from zipeval.engine.guard import check_scores
from zipeval.engine.images import PIXELS, SIZES, join_pictures, pictures
from zipeval.engine.ragged import left_padded, visual_slots
from zipeval.engine.vision import (
    Crops,
    Encoded,
    VisionMethod,
    encode_crops,
    reduce_and_pack,
)

# By model, its EncoderCache.
_caches: WeakKeyDictionary = WeakKeyDictionary()


def forget() -> None:
    """Forget the encoder's output of all pictures, for every model."""
    _caches.clear()


class EncoderCache:
    """Keep what an encoder made of pictures, on the host.

    First come, first kept, until there is no more room: every method and budget of a
    sweep asks for the same pictures in about the same order, and to replace the oldest
    would lose each of them just before it is wanted again.
    """

    def __init__(self):
        self.crops: dict[str, Crops] = {}
        self.bytes = 0

    @classmethod
    def of_model(cls, model) -> EncoderCache:
        """Return the cache of a model, which lives as long as the model."""
        return _caches.setdefault(model, cls())

    def add(self, key: str, crops: Crops, most: float) -> None:
        """Keep the crops of a picture, if all that is kept then takes `most` bytes at most."""
        size = 0
        for name, tensor in crops.tensors().items():
            # It is a view of `hidden`, also after a move: see `_move_to`.
            if name != "selected":
                size += tensor.nbytes
        if key not in self.crops and self.bytes + size <= most:
            self.bytes += size
            self.crops[key] = _move_to(crops, "cpu")


def _move_to(crops: Crops, device) -> Crops:
    """Return crops on a device, but for their pixels, which stay where they are."""
    moved = {}
    for name, tensor in crops.tensors().items():
        if name not in ("selected", "pixels"):
            moved[name] = tensor.to(device)
    # What the model selects is the end of what the layer puts out.
    selected = moved["hidden"][:, -crops.selected.shape[1] :]
    return replace(crops, **moved, selected=selected)


def encode_and_reduce(
    model,
    kind: str,
    wanted: dict[str, dict[str, torch.Tensor]],
    method: VisionMethod,
    most: float,
) -> dict[str, tuple[VisualInput, Encoded]]:
    """Return what `method` leaves of pictures, with what they are without it.

    Args:
        kind: image or video.
        wanted: by key, the processor's inputs of one picture alone, on the host.
        most: bytes of encoder output to keep for others.

    Returns:
        By the key of each picture.

    Raises:
        RunError: where scores that tokens were chosen by hold NaN.
    """
    # The inputs of each key are those of one picture: the first is the only one.
    images = {key: pictures(model, inputs, kind)[0] for key, inputs in wanted.items()}
    crops_by_key = _encode_missing(model, kind, wanted, images, most)
    crops = _concatenate([crops_by_key[key] for key in wanted])
    # Only models that pack tiles have sizes.
    sizes = [inputs[SIZES] for inputs in wanted.values() if SIZES in inputs]
    remaining = reduce_and_pack(
        model, crops, [*images.values()], torch.cat(sizes) if sizes else None, method
    )
    check_scores(type(method).__name__, crops.no_numbers)
    by_key = {}
    for key, encoded_picture in zip(images, remaining, strict=True):
        by_key[key] = images[key], encoded_picture
    return by_key


def _encode_missing(
    model,
    kind: str,
    wanted: dict[str, dict[str, torch.Tensor]],
    images: dict[str, VisualInput],
    most: float,
) -> dict[str, Crops]:
    """Return the crops of pictures by key; the encoder sees those that are not cached."""
    cache = EncoderCache.of_model(model)
    crops_by_key: dict[str, Crops] = {}
    missing: dict[str, dict[str, torch.Tensor]] = {}
    for key, inputs in wanted.items():
        if key in cache.crops:
            crops_by_key[key] = _move_to(cache.crops[key], model.device)
        else:
            missing[key] = inputs
    if not missing:
        return crops_by_key
    inputs = join_pictures([*missing.values()])
    # Sizes stay on the host, where they are asked for.
    for name in PIXELS[kind]:
        if name in inputs:
            inputs[name] = inputs[name].to(model.device, model.dtype)
    # The next method may want the pixels, whether this one reads them or not.
    crops = encode_crops(model, inputs, kind, reads_pixels=True)
    start = 0
    for key in missing:
        end = start + images[key].crops
        crops_by_key[key] = crops.select([*range(start, end)])
        cache.add(key, crops_by_key[key], most)
        start = end
    return crops_by_key


def _concatenate(crops: list[Crops]) -> Crops:
    """Return the crops of several pictures as one batch."""
    joint = {}
    for name in crops[0].tensors():
        joint[name] = torch.cat([getattr(picture, name) for picture in crops])
    return replace(crops[0], **joint)


def prefill_prefixes(
    model,
    ids: list[torch.Tensor],
    groups: list[Hashable],
    pixel_arguments: Callable[[list[int]], dict],
    padding: int,
) -> tuple[dict, list[int], list[int]]:
    """Return inputs for `generate` whose cache holds every prompt's prefix already.

    A prefix ends with the last visual token. It is read once for all prompts that share
    it.

    Args:
        ids: (L_i) every prompt, with as many placeholders as visual tokens are left of
            its pictures, at least one.
        groups: equal where the pictures are.
        pixel_arguments: returns what stands for the pixels of the prompts with these
            numbers.
        padding: the id of it.

    Returns:
        The inputs; of each prompt, the row of its prefix among those that were read; the
        number of tokens behind it.
    """
    ends = []
    for row in ids:
        last_visual = int(visual_slots(row, model.config).nonzero().max())
        ends.append(last_visual + 1)
    readers, rows = _share_prefixes(ids, groups, ends)
    # [prefixes that differ, longest prefix], padded on the left
    prefixes, prefix_mask = left_padded([ids[n][: ends[n]] for n in readers], padding)
    cache = DynamicCache(config=model.config)
    model(
        input_ids=prefixes.to(model.device),
        attention_mask=prefix_mask.to(model.device),
        position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        **pixel_arguments(readers),
        use_cache=True,
        logits_to_keep=1,
        **hf_names.cache_argument(model, cache),
    )
    if len(readers) < len(ids):
        # Indices on the host: layers may be on several devices.
        cache.batch_select_indices(torch.tensor(rows))
    # What differs: the text behind the pictures, which `generate` reads.
    questions = [row[end:] for row, end in zip(ids, ends, strict=True)]
    question_ids, question_mask = left_padded(questions, padding)
    input_ids = torch.cat([prefixes[rows], question_ids], 1)
    mask = torch.cat([prefix_mask[rows], question_mask], 1)
    inputs = {
        "input_ids": input_ids.to(model.device),
        "attention_mask": mask.to(model.device),
        **hf_names.cache_argument(model, cache),
    }
    return inputs, rows, [*map(len, questions)]


def _share_prefixes(
    ids: list[torch.Tensor], groups: list[Hashable], ends: list[int]
) -> tuple[list[int], list[int]]:
    """Return the first prompt with each prefix, and the row of every prompt's prefix."""
    readers: list[int] = []
    row_of: dict[Hashable, int] = {}
    rows = []
    for number, (group, prompt, end) in enumerate(zip(groups, ids, ends, strict=True)):
        # Equal placeholders stand for equal tokens only where the pictures are equal.
        prefix = (group, *prompt[:end].tolist())
        if prefix not in row_of:
            row_of[prefix] = len(readers)
            readers.append(number)
        rows.append(row_of[prefix])
    return readers, rows


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
