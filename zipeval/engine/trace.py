"""Record which visual tokens of a prompt reach the decoder's last layer.

    with method.applied(model), trace_kept_tokens(model) as trace, torch.no_grad():
        model(**inputs)
    # Of the first prompt, which has one image:
    trace.left(0, trace.places(model, inputs)["image"][:1])

The stages that remove tokens report to the trace. What they report stays where it was
computed until somebody asks: nothing waits for the device while a prompt is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from zipeval import moved
from zipeval.engine.images import PIXELS, stock_positions
from zipeval.engine.ragged import take
from zipeval.utils.lazy import torch

_open: WeakKeyDictionary = WeakKeyDictionary()  # model -> its open Trace


class Trace:
    """Hold the places of the visual tokens of the prompts that a model read last.

    The place of a token is a pair: the position that it was kept at, and the one that
    it was merged at; -1 where it was not. A position counts the patches of a picture in
    reading order, crop after crop. CLS, row ends, and merged tokens that a method gives
    no position, have none.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget these prompts.

        What is reported of the next ones replaces it, but prompts of text alone report
        nothing.
        """
        self._places: dict[str, list[torch.Tensor]] = {}
        self._left: torch.Tensor | None = None

    def encoded(self, kind: str, places: list[torch.Tensor]) -> None:
        """Take the report of a stage before the decoder.

        Args:
            kind: image or video.
            places: (k, 2) of what is left of every image, or video, in reading order.
        """
        self._places[kind] = places

    def decoded(
        self, entered: torch.Tensor, source: torch.Tensor, visual: torch.Tensor
    ) -> None:
        """Take the report of a stage inside the decoder, behind all reduction there.

        Args:
            entered: (B, S) bool, the visual tokens that entered it.
            source: (B, L) the slots in `entered` of what is left, -1 for what is new.
            visual: (B, L) bool, the visual ones among that.
        """
        # A visual token's number among those of its prompt: places are listed by it.
        number = take(entered.cumsum(1) - 1, source.clamp(min=0))  # [B, L]
        self._left = number.masked_fill(~visual | (source < 0), -1)

    def places(self, model, inputs: dict) -> dict[str, list[torch.Tensor]]:
        """Return the places of the visual tokens that entered the decoder.

        Returns:
            By kind, for every image or video of the processor's `inputs`, in reading
            order: (k, 2).
        """
        places = {}
        for kind in PIXELS:
            if kind in self._places:
                places[kind] = [pairs.cpu() for pairs in self._places[kind]]
                continue
            # No stage reported: the model packed its pictures itself, and merged none.
            positions = stock_positions(model, inputs, kind)
            places[kind] = [
                torch.stack([p, torch.full_like(p, -1)], 1) for p in positions
            ]
        return places

    def left(
        self, row: int, pictures: list[torch.Tensor]
    ) -> dict[str, list[list[int]]]:
        """Return the ascending positions at which tokens of each picture are left.

        Args:
            row: of the batch, as the decoder read it: `generate` repeats a prompt for
                each of its beams.
            pictures: the `places` of the prompt's images and videos, in reading order.

        Returns:
            A list for each picture, under `kept` and under `merged`.
        """
        counts = [len(places) for places in pictures]
        stays = torch.ones(sum(counts), dtype=torch.bool)
        if self._left is not None:
            numbers = self._left[row].cpu()
            stays = torch.zeros_like(stays).index_fill(0, numbers[numbers >= 0], True)
        positions: dict[str, list[list[int]]] = {"kept": [], "merged": []}
        for places, stay in zip(pictures, stays.split(counts), strict=True):
            remaining = places[stay]  # [left of this picture, 2]
            for column, name in enumerate(positions):
                position = remaining[:, column]
                positions[name].append(position[position >= 0].sort().values.tolist())
        return positions


@contextmanager
def trace_kept_tokens(model) -> Iterator[Trace]:
    """Let applied methods report what they leave of the prompts that the model reads.

    Raises:
        RuntimeError: if another trace of this model is open.
    """
    if model in _open:
        raise RuntimeError("this model is traced already; leave that block first")
    _open[model] = Trace()
    try:
        yield _open[model]
    finally:
        del _open[model]


def observer(model) -> Trace | None:
    """Return the open trace of a model; None if nobody wants to know."""
    return _open.get(model)


# Names of before, for a release.
__getattr__ = moved.renamed(__name__)
