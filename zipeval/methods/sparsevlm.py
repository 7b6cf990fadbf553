"""SparseVLM (Zhang et al., ICML 2025; code of its version 1.5): text tokens rate the visual ones at three layers.

After each of these layers the best rated tokens stay, and part of the rest is recycled: clustered by density peaks and
merged. Positions are renumbered. Semantics of the official code, for any batch size; its density noise, which can
decide ties, is drawn per prompt here, so that an answer does not depend on who shares the batch. Version 2, SparseVLM+,
corrects the attention for distance, lets the heads rate that look at the image most, merges and renumbers nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from zipeval.engine import density_peaks
from zipeval.engine.decoder import Kept, Prompts, Read, keep_best
from zipeval.engine.ragged import on_device, take
from zipeval.engine.staged import Staged
from zipeval.utils.lazy import torch

PUBLISHED = {
    1.5: {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 64: (66, 34, 20)},
}
AFTER = (2, 6, 15)


@dataclass(frozen=True)
class SparseVLM(Staged):
    """Sections 3.2 to 3.4; version 2: sections 4.2 and 4.3 of SparseVLM+.

    Args:
        counts, after, of: as in Staged.
        version: 1.5 or 2. With `use_cache=False`, raters and tokens are chosen anew at every step.
        heads: that rate in version 2.
        noise: scale of the density noise.
        seed: of the noise.
    """

    after: tuple[int, ...] = AFTER
    version: float = 1.5
    heads: int = 14
    noise: float = 1e-6
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.published(self.version)
        if self.heads < 1:
            raise ValueError(f"heads={self.heads}: a number of heads from 1 up")

    @classmethod
    def published(cls, version: float = 1.5, **options):
        if version not in PUBLISHED:
            raise ValueError(f"version={version}: 1.5 or 2")
        return PUBLISHED[version], AFTER

    @property
    def renumber(self) -> bool:
        return self.version < 2

    def merged(self, dropped: int) -> int:
        return int(_recycled(dropped) / 10) + 1 if dropped and self.version < 2 else 0

    def reduce(self, layer: int, prompts: Prompts) -> Kept:
        score, counts = self.score(prompts), self.kept(layer, prompts)
        kept = keep_best(score, prompts, counts)
        dropped = [
            here - count for here, count in zip(prompts.counts, counts, strict=True)
        ]
        if self.version == 2 or not any(dropped):
            return Kept(kept)
        score = score.masked_fill(kept | ~prompts.visual, float("-inf"))
        return Kept(kept, *self._recycle(layer, prompts, score, dropped))

    def score(self, prompts: Prompts) -> torch.Tensor:
        """(B, L): attention that a token gets from the raters, averaged over heads, then over raters."""
        rates = raters(prompts)
        slots = torch.arange(prompts.valid.shape[1], device=rates.device)
        rows = slots[len(slots) - rates.shape[1] :].expand(len(rates), -1)
        weights = rates[..., None].float()
        if self.version == 2:
            weights = torch.where(rates[..., None], 1 / prompts.gravity(rows), 0)
        received = prompts.received(rows, weights)
        if self.version == 2:
            look = received.masked_fill(~prompts.visual[:, None], 0).sum(2)
            received = take(received, look.topk(min(self.heads, look.shape[1])).indices)
        return received.mean(1) / rates.sum(1, keepdim=True)

    def _recycle(
        self, layer: int, prompts: Prompts, score: torch.Tensor, dropped: list[int]
    ):
        """What is made of the best rated ones of `dropped[b]` tokens, those with a score (B, L) above -inf."""
        sizes = [_recycled(number) if number else 0 for number in dropped]
        best = score.argsort(dim=1, descending=True, stable=True)[:, : max(sizes)]
        drawn = [
            self._draw(size, self._generator(prompt, layer))
            for size, prompt in zip(sizes, prompts.given.read, strict=True)
        ]
        noise = (
            torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True).to(
                score.device, non_blocking=True
            )
            * self.noise
        )
        return density_peaks.merge(
            take(prompts.hidden, best), sizes, [*map(self.merged, dropped)], noise
        )

    def _generator(self, prompt: Read, layer: int) -> torch.Generator:
        """Seeded by the prompt's own ids and the layer, whatever stands beside it in the batch."""
        return torch.Generator().manual_seed(
            crc32(prompt.ids.tobytes(), self.seed + layer)
        )

    def _draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(count, generator=generator)


def _recycled(dropped: int) -> int:
    return int(0.3 * dropped) + 1


def raters(prompts: Prompts) -> torch.Tensor:
    """(B, T) bool, of the last T slots: text behind the image that is more similar to it than the average of that text
    (section 3.2).

    Similarity is the dot product of what enters the first layer, softmaxed over the text and averaged over the image.
    How many rate is known to the device alone; T is the most text that any prompt has there.

    Raises:
        ValueError: for a prompt that ends in its image.
    """
    given = prompts.given
    behind = [prompt.behind if prompt.visual else 1 for prompt in given.read]
    if min(behind) == 0:
        raise ValueError(
            "input_ids: a prompt ends in an image; SparseVLM needs text behind it that rates"
        )
    slots = torch.arange(-max(behind), 0, device=given.ids.device)
    text = slots >= -on_device(behind, given.ids.device)[:, None]
    embedded = (
        given.embedded.float()
    )  # its products may be larger than float16 can hold
    similarity = embedded @ embedded[:, -max(behind) :].mT
    shares = (
        similarity.masked_fill(~text[:, None], float("-inf"))
        .softmax(2)
        .masked_fill(~given.visual[..., None], 0)
    )
    relevance = _mean(shares, given.visual.sum(1, keepdim=True))
    rates = text & (
        relevance > _mean(relevance.masked_fill(~text, 0), text.sum(1))[:, None]
    )
    nobody = ~rates.any(
        1, keepdim=True
    )  # nothing stands out, as in a single token of text
    return rates | (nobody & (slots == -1))


def _mean(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Of `count` entries of x (B, n, ...) along its second dimension, all others 0; rounded as `x.mean(1)` is."""
    return (
        x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)) / count.clamp(min=1)
    ).to(x.dtype)
