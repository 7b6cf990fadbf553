"""What questions about one picture share: the encoder's output, and the cache of a prompt up to its last visual token.

The first holds for every method, and for other budgets too; the second where what is left of a picture does not depend
on the question. Answers are those of every prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache

from zipeval.engine import hf_names
from zipeval.engine.budget import Picture
from zipeval.engine.guard import check_scores
from zipeval.engine.images import PIXELS, joined, pictures
from zipeval.engine.ragged import left_padded, visual_slots
from zipeval.engine.vision import Crops, Encoded, VisionMethod, reduced, see

_seen: WeakKeyDictionary = WeakKeyDictionary()  # model -> its Seen


def forget() -> None:
    """Everything that is kept of pictures."""
    _seen.clear()


class Seen:
    """What an encoder made of pictures, on the host: first come, first kept, until there is no more room.

    Every method and budget of a sweep asks for the same pictures in about the same order. To replace the oldest would
    then lose each of them just before it is wanted again.
    """

    def __init__(self):
        self.crops: dict[str, Crops] = {}
        self.bytes = 0

    @classmethod
    def by(cls, model) -> Seen:
        """That of a model, for as long as it lives."""
        return _seen.setdefault(model, cls())

    def add(self, key: str, crops: Crops, most: float) -> None:
        """Keep the crops of a picture if all that is kept then takes at most so many bytes."""
        size = sum(
            x.nbytes for x in _tensors(crops).values() if x is not crops.selected
        )
        if key not in self.crops and self.bytes + size <= most:
            self.bytes += size
            self.crops[key] = _on(crops, "cpu")


def _tensors(crops: Crops) -> dict[str, torch.Tensor]:
    held = {field.name: getattr(crops, field.name) for field in fields(crops)}
    return {name: value for name, value in held.items() if torch.is_tensor(value)}


def _on(crops: Crops, device) -> Crops:
    """On a device, but for the pixels; `selected` is the end of `hidden`."""
    moved = {
        name: x.to(device)
        for name, x in _tensors(crops).items()
        if name not in ("selected", "pixels")
    }
    return replace(
        crops, **moved, selected=moved["hidden"][:, -crops.selected.shape[1] :]
    )


def encoded(
    model,
    kind: str,
    wanted: dict[str, dict[str, torch.Tensor]],
    method: VisionMethod,
    most: float,
) -> dict[str, tuple[Picture, Encoded]]:
    """What `method` leaves of pictures, with what they are without it, by their keys.

    Args:
        kind: image or video.
        wanted: by key, the processor's inputs of one picture alone, on the host.
        most: bytes of encoder output to keep for others.
    """
    seen = Seen.by(model)
    new = {key: inputs for key, inputs in wanted.items() if key not in seen.crops}
    found = {
        key: _on(seen.crops[key], model.device) for key in wanted if key in seen.crops
    }
    shapes = {key: pictures(model, inputs, kind)[0] for key, inputs in wanted.items()}
    if new:
        inputs = joined([*new.values()])
        given = {
            name: x.to(model.device, model.dtype) if name in PIXELS[kind] else x
            for name, x in inputs.items()
        }
        crops, start = see(model, given, kind, reads_pixels=True), 0
        for key in new:
            end = start + shapes[key].crops
            found[key], start = crops.select([*range(start, end)]), end
            seen.add(key, found[key], most)
    crops = _concatenated([found[key] for key in wanted])
    sizes = [
        inputs["image_sizes"] for inputs in wanted.values() if "image_sizes" in inputs
    ]
    left = reduced(
        model, crops, [*shapes.values()], torch.cat(sizes) if sizes else None, method
    )
    check_scores(type(method).__name__, crops.no_numbers)
    return {
        key: (shape, its)
        for (key, shape), its in zip(shapes.items(), left, strict=True)
    }


def _concatenated(crops: list[Crops]) -> Crops:
    return replace(
        crops[0],
        **{
            name: torch.cat([getattr(its, name) for its in crops])
            for name in _tensors(crops[0])
        },
    )


def prefixed(
    model,
    ids: list[torch.Tensor],
    groups: list[Hashable],
    given: Callable[[list[int]], dict],
    padding: int,
) -> tuple[dict, list[int], list[int]]:
    """Inputs for `generate` in which every prompt up to its last visual token is in the cache already, read once for
    all prompts that share it.

    Args:
        ids: (L_i) every prompt, with as many placeholders as visual tokens are left of its pictures, at least one.
        groups: equal where the pictures are.
        given: the arguments that stand for the pixels of the prompts with these numbers.
        padding: the id of it.

    Returns:
        The inputs; of each prompt, the row of its prefix among those that were read; the tokens behind it.
    """
    ends = [int(visual_slots(row, model.config).nonzero().max()) + 1 for row in ids]
    read: dict[Hashable, int] = {}  # prefix -> the first prompt that has it
    prefixes = [
        (group, *row[:end].tolist())
        for group, row, end in zip(groups, ids, ends, strict=True)
    ]
    for number, prefix in enumerate(prefixes):
        read.setdefault(prefix, number)
    order = {prefix: row for row, prefix in enumerate(read)}
    rows = [order[prefix] for prefix in prefixes]
    before, seen = left_padded(
        [ids[number][: ends[number]] for number in read.values()], padding
    )
    cache = DynamicCache(config=model.config)
    model(
        input_ids=before.to(model.device),
        attention_mask=seen.to(model.device),
        position_ids=(seen.cumsum(1) - 1).clamp(min=0).to(model.device),
        **given([*read.values()]),
        use_cache=True,
        logits_to_keep=1,
        **hf_names.cache_argument(model, cache),
    )
    if len(read) < len(ids):
        cache.batch_select_indices(
            torch.tensor(rows)
        )  # layers may be on several devices
    behind, mask = left_padded(
        [row[end:] for row, end in zip(ids, ends, strict=True)], padding
    )
    inputs = {
        "input_ids": torch.cat([before[rows], behind], 1).to(model.device),
        "attention_mask": torch.cat([seen[rows], mask], 1).to(model.device),
        **hf_names.cache_argument(model, cache),
    }
    return inputs, rows, [len(row) - end for row, end in zip(ids, ends, strict=True)]
