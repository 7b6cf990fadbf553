"""Later turns of a conversation, on the cache of a prompt that was shortened before it was read.

Callers go on with the prompt as they gave it, placeholders and all. Its shortened version, which is what the cache
holds, stands in for it; the visual tokens that were left for the first question serve the later ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from weakref import WeakKeyDictionary

from zipeval.engine import hf_names
from zipeval.engine.ragged import visual_slots
from zipeval.utils.lazy import torch

PICTURES = (
    hf_names.SIZES,
    *chain.from_iterable(hf_names.PIXELS.values()),
)  # what a processor makes of them
NEW_PICTURE = "a picture in a later turn: only those of the first turn are supported; begin a new cache"


@dataclass(frozen=True)
class FirstTurn:
    """B prompts that a cache begins with.

    Attributes:
        given: (B, L) ids as the caller has them.
        ids: (B, S) as they were read, S <= L, padded on the left.
        mask: (B, S) of those.
        padded: (B) bool, whether a prompt was given with padding on its right.
        shortened: whether a prompt lost tokens. Its row is then padded anew, also where S = L: another row, the longest
            one, may have lost nothing.
    """

    given: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    padded: torch.Tensor
    shortened: bool


class Turns:
    """The first turns of a model's caches, for as long as these live."""

    def __init__(self, model):
        self.model = model
        self.first: WeakKeyDictionary = WeakKeyDictionary()
        self.reading: FirstTurn | None = None  # by the call in progress
        self.generating = False  # `generate` calls with the mask of what was read, a caller with that of what was given

    def read(self, module, args, output) -> None:
        """A forward hook: whatever was read just now, perhaps in several chunks, is what its cache begins with."""
        first = self.reading
        if output is None:  # the call ended in an exception
            self.reading = None
            return
        cache = None if isinstance(output, tuple) else hf_names.returned_cache(output)
        if first is not None and cache is not None:
            if cache.get_seq_length() < first.ids.shape[1]:
                return
            self.first[cache] = first
        self.reading = None

    def of(self, inputs: dict) -> FirstTurn | None:
        """What the cache among the inputs of a later turn begins with; None for a first turn.

        Raises:
            ValueError: for a cache that does not begin as this block left it.
        """
        cache = hf_names.given_cache(inputs)
        first = None if cache is None else self.first.get(cache)
        if first is None:
            return None
        if cache.get_seq_length() < first.ids.shape[1]:
            raise ValueError(
                "cache: it was cropped into the prompt that its pictures are in"
            )
        return first

    def prompt(self, inputs: dict) -> dict | None:
        """Inputs for `generate` on the cache of an earlier turn; None for a first turn.

        Args:
            inputs: `input_ids` (B, M) of the conversation so far and its `attention_mask`. Pictures of the first turn
                may be among them and are not looked at. Of the mask of the first turn counts what is behind its last
                picture: the earlier question can be masked out, the pictures cannot.

        Raises:
            ValueError: if the prompt does not begin with that of the first turn, has a new picture, or has no mask.
        """
        first, ids = self.of(inputs), inputs["input_ids"]
        if first is None:
            cache = hf_names.given_cache(inputs)
            if (
                cache is not None
                and cache.get_seq_length() > 0
                and visual_slots(ids, self.model.config).any()
            ):
                raise ValueError(
                    "cache: it was not begun with this prompt in this block; give the pictures in the first "
                    "turn, or begin a new cache"
                )
            return None
        rows, width = (
            hf_names.prompts_in(hf_names.given_cache(inputs)),
            first.given.shape[1],
        )
        if rows != len(first.given):
            raise ValueError(
                f"cache: it has {rows} rows of {len(first.given)} prompts; begin a new cache"
            )
        if not torch.equal(ids[:, :width], first.given.to(ids.device)):
            raise ValueError(
                "input_ids: a later turn has to begin with the prompt that its cache was begun with, padding included, "
                f"{len(first.given)} x {width} ids; then come the answers so far and the next question"
            )
        rest = ids[:, width:]
        if visual_slots(rest, self.model.config).any():
            raise ValueError(f"input_ids: {NEW_PICTURE}")
        if (mask := inputs.get("attention_mask")) is None:
            if len(ids) > 1:
                raise ValueError(
                    f"attention_mask=None with {len(ids)} prompts: pass the mask of the whole conversation"
                )
            mask = torch.ones_like(ids)
        ids = torch.cat([first.ids, rest], 1)
        return {
            **later(inputs),
            "input_ids": ids,
            "attention_mask": self._shortened(first, mask),
        }

    def call(self, inputs: dict) -> dict | None:
        """Inputs for `forward` on the cache of an earlier turn, as for the stock model: the new ids, and the mask of
        the whole conversation, which `generate` passes on shortened; None for a first turn.
        """
        ids, mask, first = (
            inputs.get("input_ids"),
            inputs.get("attention_mask"),
            self.of(inputs),
        )
        if first is None or ids is None:
            return None
        if ids.shape[1] > 1 and visual_slots(ids, self.model.config).any():
            raise ValueError(f"input_ids: {NEW_PICTURE}")
        length, width = (
            hf_names.given_cache(inputs).get_seq_length() + ids.shape[1],
            first.given.shape[1],
        )
        if (
            mask is None and len(ids) == len(first.ids) > 1
        ):  # prompts that lost other numbers of tokens are padded now
            behind = first.mask.new_ones(len(ids), length - first.mask.shape[1])
            inputs = {**inputs, "attention_mask": torch.cat([first.mask, behind], 1)}
        as_given = (
            mask is not None and mask.shape[1] == length - first.ids.shape[1] + width
        )
        if as_given and first.shortened and not self.generating:
            inputs = {**inputs, "attention_mask": self._shortened(first, mask)}
        return self.numbered(later(inputs), first)

    @staticmethod
    def numbered(inputs: dict, first: FirstTurn | None) -> dict:
        """Inputs for `forward` with positions as generate() counts them, where prompts became shorter: a caller who
        goes on by hand, or by generate(), knows nothing of padding that is new. Otherwise they are the stock model's.
        """
        mask = inputs.get("attention_mask")
        if first is None or not first.shortened:
            return inputs
        if mask is None or inputs.get("position_ids") is not None:
            return inputs
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {**inputs, "position_ids": positions[:, -inputs["input_ids"].shape[1] :]}

    def _shortened(self, first: FirstTurn, mask: torch.Tensor) -> torch.Tensor:
        """(B, S + R): the mask (B, L + R) of a conversation as its cache has it."""
        if first.padded.any():
            raise ValueError(
                "attention_mask: a later turn needs prompts padded on the left (processor.tokenizer.padding_side)"
            )
        width = first.given.shape[1]
        begun = still_valid(
            first.mask, visual_slots(first.given, self.model.config), mask[:, :width]
        )
        return torch.cat([begun.to(mask), mask[:, width:]], 1)


def still_valid(
    read: torch.Tensor, visual: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(B, S): what a later turn sees of its first one: all that was valid, but for text behind the last picture that
    its mask leaves out. That text is as far from the end of the prompt as it was read as of the prompt as given.

    Args:
        read: (B, S) mask of the prompt as it was read.
        visual: (B, L) bool, visual tokens of the prompt as given, S <= L.
        mask: (B, L) what the later turn says of it.
    """
    behind = visual.flip(1).cumsum(1).flip(1) == 0
    left_out = behind & ~mask.to(visual.device).bool()
    return read.masked_fill(left_out[:, visual.shape[1] - read.shape[1] :], 0)


def later(inputs: dict) -> dict:
    """What a later turn needs of the inputs: no pictures.

    Raises:
        ValueError: if it is to have several answers to a prompt.
    """
    for name in ("num_beams", "num_return_sequences"):
        if (inputs.get(name) or 1) > 1:
            raise ValueError(
                f"{name}={inputs[name]}: a later turn goes on with one answer to a prompt"
            )
    return {name: value for name, value in inputs.items() if name not in PICTURES}
