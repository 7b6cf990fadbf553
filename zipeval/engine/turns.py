"""Go on with a conversation, on the cache of a prompt that was shortened before it was read.

Callers go on with the prompt as they gave it, placeholders and all. Its shortened version,
which is what the cache holds, stands in for it; the visual tokens that were left for the
first question serve the later ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from weakref import WeakKeyDictionary

from zipeval.engine import hf_names
from zipeval.engine.ragged import visual_slots
from zipeval.utils.lazy import torch

# The arguments that a processor makes of pictures.
PICTURES = (hf_names.SIZES, *chain.from_iterable(hf_names.PIXELS.values()))
NEW_PICTURE = "a picture in a later turn: only those of the first turn are supported; begin a new cache"


@dataclass(frozen=True)
class FirstTurn:
    """Hold B prompts that a cache begins with.

    Attributes:
        original_ids: (B, L) as the caller has them.
        ids: (B, S) as they were read, S <= L, padded on the left.
        mask: (B, S) of those.
        padded: (B) bool, whether a prompt was given with padding on its right.
        shortened: whether a prompt lost tokens. Its row is then padded anew, also where S = L: another row, the longest
            one, may have lost nothing.
    """

    original_ids: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    padded: torch.Tensor
    shortened: bool


class ConversationCache:
    """Know the first turns of a model's caches, for as long as these live."""

    def __init__(self, model):
        self.model = model
        self.first: WeakKeyDictionary = WeakKeyDictionary()
        # By the call in progress.
        self.reading: FirstTurn | None = None
        # `generate` calls with the mask of what was read, a caller with that of what was
        # given.
        self.generating = False

    def record(self, module, args, output) -> None:
        """Remember what a cache begins with: a forward hook of the model.

        That is whatever was read just now, perhaps in several chunks.
        """
        first = self.reading
        # A call that ended in an exception has no output.
        failed = output is None
        keeps_no_cache = failed or isinstance(output, tuple)
        cache = None if keeps_no_cache else hf_names.returned_cache(output)
        if first is not None and cache is not None:
            is_partly_read = cache.get_seq_length() < first.ids.shape[1]
            if is_partly_read:
                return
            self.first[cache] = first
        self.reading = None

    def find_first(self, inputs: dict) -> FirstTurn | None:
        """Return what the cache of a later turn begins with; None for a first turn.

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

    def continue_generate(self, inputs: dict) -> dict | None:
        """Return inputs for `generate` on the cache of an earlier turn.

        Args:
            inputs: `input_ids` (B, M) of the conversation so far and its
                `attention_mask`. Pictures of the first turn may be among them and are not
                looked at. Of the mask of the first turn counts what is behind its last
                picture: the earlier question can be masked out, the pictures cannot.

        Returns:
            None for a first turn.

        Raises:
            ValueError: if the prompt does not begin with that of the first turn, has a
                new picture, or has no mask.
        """
        first, ids = self.find_first(inputs), inputs["input_ids"]
        if first is None:
            self._check_first(inputs)
            return None
        self._check_later(first, inputs)
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        new_ids = ids[:, first.original_ids.shape[1] :]
        return {
            **drop_pictures(inputs),
            "input_ids": torch.cat([first.ids, new_ids], 1),
            "attention_mask": self._shorten_mask(first, mask),
        }

    def _check_first(self, inputs: dict) -> None:
        """Raise ValueError for pictures on a cache that this block did not begin."""
        cache = hf_names.given_cache(inputs)
        if cache is None or cache.get_seq_length() == 0:
            return
        if visual_slots(inputs["input_ids"], self.model.config).any():
            raise ValueError(
                "cache: it was not begun with this prompt in this block; give the pictures in the first "
                "turn, or begin a new cache"
            )

    def _check_later(self, first: FirstTurn, inputs: dict) -> None:
        """Raise ValueError for a prompt that does not go on with that of the first turn."""
        ids, width = inputs["input_ids"], first.original_ids.shape[1]
        rows = hf_names.prompts_in(hf_names.given_cache(inputs))
        # A search with several beams leaves a row for each of them in the cache.
        if rows != len(first.original_ids):
            raise ValueError(
                f"cache: it has {rows} rows of {len(first.original_ids)} prompts; begin a new cache"
            )
        if not torch.equal(ids[:, :width], first.original_ids.to(ids.device)):
            raise ValueError(
                "input_ids: a later turn has to begin with the prompt that its cache was begun with, padding included, "
                f"{len(first.original_ids)} x {width} ids; then come the answers so far and the next question"
            )
        if visual_slots(ids[:, width:], self.model.config).any():
            raise ValueError(f"input_ids: {NEW_PICTURE}")
        if inputs.get("attention_mask") is None and len(ids) > 1:
            raise ValueError(
                f"attention_mask=None with {len(ids)} prompts: pass the mask of the whole conversation"
            )

    def continue_forward(self, inputs: dict) -> dict | None:
        """Return inputs for `forward` on the cache of an earlier turn.

        Args:
            inputs: as for the stock model: the new ids, and the mask of the whole
                conversation, which `generate` passes on shortened.

        Returns:
            None for a first turn.

        Raises:
            ValueError: if there is a new picture.
        """
        ids, first = inputs.get("input_ids"), self.find_first(inputs)
        if first is None or ids is None:
            return None
        # A decoding step has one id: it is not looked at, so that nothing waits for it.
        if ids.shape[1] > 1 and visual_slots(ids, self.model.config).any():
            raise ValueError(f"input_ids: {NEW_PICTURE}")
        mask = self._continue_mask(first, inputs)
        if mask is not None:
            inputs = {**inputs, "attention_mask": mask}
        return self.add_positions(drop_pictures(inputs), first)

    def _continue_mask(self, first: FirstTurn, inputs: dict) -> torch.Tensor | None:
        """Return the mask of a conversation as its cache has it; None without one."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        cached = hf_names.given_cache(inputs).get_seq_length()
        length, read_length = cached + ids.shape[1], first.ids.shape[1]
        if mask is None:
            # Prompts that lost other numbers of tokens are padded now.
            if len(ids) == len(first.ids) > 1:
                after = first.mask.new_ones(len(ids), length - read_length)
                return torch.cat([first.mask, after], 1)
            return None
        given_length = length - read_length + first.original_ids.shape[1]
        is_as_given = mask.shape[1] == given_length
        # One of `generate` is as long as what was read, and only by chance as given.
        if is_as_given and first.shortened and not self.generating:
            return self._shorten_mask(first, mask)
        return mask

    @staticmethod
    def add_positions(inputs: dict, first: FirstTurn | None) -> dict:
        """Return inputs for `forward` with positions, where prompts became shorter.

        They are counted as generate() counts them: a caller who goes on by hand, or by
        generate(), knows nothing of padding that is new. Otherwise they are the stock
        model's.
        """
        mask = inputs.get("attention_mask")
        if first is None or not first.shortened:
            return inputs
        if mask is None or inputs.get("position_ids") is not None:
            return inputs
        # The first token that is no padding is at position 0, as in generate().
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {**inputs, "position_ids": positions[:, -inputs["input_ids"].shape[1] :]}

    def _shorten_mask(self, first: FirstTurn, mask: torch.Tensor) -> torch.Tensor:
        """Return the mask (B, L + R) of a conversation as its cache has it: (B, S + R)."""
        if first.padded.any():
            raise ValueError(
                "attention_mask: a later turn needs prompts padded on the left (processor.tokenizer.padding_side)"
            )
        width = first.original_ids.shape[1]
        visual = visual_slots(first.original_ids, self.model.config)
        prompt_mask = still_valid(first.mask, visual, mask[:, :width])
        return torch.cat([prompt_mask.to(mask), mask[:, width:]], 1)


def still_valid(
    read_mask: torch.Tensor, visual: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return what a later turn sees of its first one: (B, S).

    That is all that was valid, but for text behind the last picture that its mask leaves
    out. That text is as far from the end of the prompt as it was read as of the prompt as
    given.

    Args:
        read_mask: (B, S) mask of the prompt as it was read.
        visual: (B, L) bool, visual tokens of the prompt as given, S <= L.
        mask: (B, L) what the later turn says of it.
    """
    # Counted from the end: text has no visual token behind it.
    is_after_pictures = visual.flip(1).cumsum(1).flip(1) == 0
    left_out = is_after_pictures & ~mask.to(visual.device).bool()
    # Aligned at the end: [B, L] -> [B, S]
    return read_mask.masked_fill(left_out[:, visual.shape[1] - read_mask.shape[1] :], 0)


def drop_pictures(inputs: dict) -> dict:
    """Return what a later turn needs of the inputs: all but the pictures.

    Raises:
        ValueError: if it is to have several answers to a prompt.
    """
    for name in ("num_beams", "num_return_sequences"):
        if (inputs.get(name) or 1) > 1:
            raise ValueError(
                f"{name}={inputs[name]}: a later turn goes on with one answer to a prompt"
            )
    return {name: value for name, value in inputs.items() if name not in PICTURES}
