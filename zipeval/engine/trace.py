"""Which visual tokens of a prompt are left at the decoder's last layer, told by the stages that remove the others.

    with method.applied(model), trace(model) as told, torch.no_grad():
        model(**inputs)
    told.left(0, told.places(model, inputs)["image"][:1])  # of the first prompt, which has one image

What is told stays where it was computed until somebody asks: nothing waits for the device while a prompt is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from zipeval.engine.images import PIXELS, stock_positions
from zipeval.engine.ragged import take
from zipeval.utils.lazy import torch

_open: WeakKeyDictionary = WeakKeyDictionary()  # model -> its open Trace


class Trace:
    """Of the prompts that a model read last.

    The place of a token is a pair: the position that it was kept at, and the one that it was merged at; -1 where it was
    not. A position counts the patches of a picture in reading order, crop after crop. CLS, row ends, and merged tokens
    that a method gives no position, have none.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget them. What is told of the next prompts replaces it, but text alone tells nothing."""
        self._places: dict[str, list[torch.Tensor]] = {}
        self._left: torch.Tensor | None = None

    def encoded(self, kind: str, places: list[torch.Tensor]) -> None:
        """Told before the decoder: the places (k, 2) of what is left of every image, or video, in reading order."""
        self._places[kind] = places

    def decoded(
        self, given: torch.Tensor, source: torch.Tensor, visual: torch.Tensor
    ) -> None:
        """Told inside the decoder, behind all reduction there.

        Args:
            given: (B, S) bool, the visual tokens that entered it.
            source: (B, L) the slots in `given` of what is left, -1 for what is new.
            visual: (B, L) bool, the visual ones among that.
        """
        number = take(given.cumsum(1) - 1, source.clamp(min=0))
        self._left = number.masked_fill(~visual | (source < 0), -1)

    def places(self, model, inputs: dict) -> dict[str, list[torch.Tensor]]:
        """The places (k, 2) of the visual tokens that entered the decoder, for every image and every video of the
        processor's `inputs`, in reading order.
        """
        stock = {
            kind: stock_positions(model, inputs, kind)
            for kind in PIXELS
            if kind not in self._places
        }
        return {
            kind: [torch.stack([p, torch.full_like(p, -1)], 1) for p in its]
            for kind, its in stock.items()
        } | {kind: [p.cpu() for p in its] for kind, its in self._places.items()}

    def left(
        self, row: int, pictures: list[torch.Tensor]
    ) -> dict[str, list[list[int]]]:
        """The positions at which a prompt's tokens were `kept` and `merged`, of each of its pictures ascending.

        Args:
            row: of the batch, as the decoder read it: `generate` repeats a prompt for each of its beams.
            pictures: the `places` of its images and videos, in reading order.
        """
        counts = [len(places) for places in pictures]
        stays = torch.ones(sum(counts), dtype=torch.bool)
        if self._left is not None:
            numbers = self._left[row].cpu()
            stays = torch.zeros_like(stays).index_fill(0, numbers[numbers >= 0], True)
        found = [
            p[s].T.tolist() for p, s in zip(pictures, stays.split(counts), strict=True)
        ]
        return {
            name: [
                sorted(position for position in columns[i] if position >= 0)
                for columns in found
            ]
            for i, name in enumerate(("kept", "merged"))
        }


@contextmanager
def trace(model) -> Iterator[Trace]:
    """While open, methods that are applied to the model tell what they leave of the prompts that it reads.

    Raises:
        RuntimeError: if another one of this model is open.
    """
    if model in _open:
        raise RuntimeError("this model is traced already; leave that block first")
    _open[model] = Trace()
    try:
        yield _open[model]
    finally:
        del _open[model]


def observer(model) -> Trace | None:
    """To be told of a model's prompts, if anybody wants to know."""
    return _open.get(model)
