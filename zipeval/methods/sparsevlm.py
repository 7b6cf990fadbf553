"""SparseVLM (Zhang et al., ICML 2025; code of its version 1.5): text tokens rate the visual ones at three layers.

After each of these layers the best rated tokens stay, and part of the rest is recycled: clustered by density peaks and
merged. Positions are renumbered. Semantics of the official code, for any batch size; its density noise, which can
decide ties, is drawn per prompt here, so that an answer does not depend on who shares the batch. Version 2, SparseVLM+,
corrects the attention for distance, lets the heads rate that look at the image most, merges and renumbers nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch
from torch.nn.utils.rnn import pad_sequence

from zipeval.engine import density_peaks
from zipeval.engine.decoder import Given, Kept, Prompts, keep_best
from zipeval.engine.ragged import compact_index, take
from zipeval.engine.staged import Staged

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
        score = self.score(prompts)
        kept = keep_best(score, prompts, self.kept(layer, prompts))
        if self.version == 2:
            return Kept(kept)
        dropped = prompts.visual & ~kept
        merged = [
            self._recycle(prompts.hidden[b, dropped[b]], score[b, dropped[b]], self._generator(prompts.given, b, layer))
            for b in range(len(kept))
        ]
        sizes = torch.tensor([len(m) for m in merged], device=kept.device)
        valid = torch.arange(int(sizes.max()), device=kept.device) < sizes[:, None]
        return Kept(kept, pad_sequence(merged, batch_first=True), valid)

    def score(self, prompts: Prompts) -> torch.Tensor:
        """(B, L): attention that a token gets from the raters, averaged over heads, then over raters."""
        rows, used = compact_index(raters(prompts))
        attention = prompts.attention(rows) * used[:, None, :, None]
        if self.version == 2:
            attention = attention / prompts.gravity(rows)[:, None]
            look = (attention * prompts.visual[:, None, None]).sum((2, 3))
            attention = take(attention, look.topk(min(self.heads, look.shape[1])).indices)
        return attention.mean(1).sum(1) / used.sum(1, keepdim=True)

    def _recycle(self, hidden: torch.Tensor, score: torch.Tensor, generator) -> torch.Tensor:
        """Dropped tokens (d, D) and their score (d,) -> (clusters, D)."""
        if len(hidden) == 0:
            return hidden
        best = hidden[score.topk(_recycled(len(hidden))).indices]
        noise = self._draw(len(best), generator).to(hidden.device) * self.noise
        return density_peaks.merge(best, self.merged(len(hidden)), noise)

    def _generator(self, given: Given, row: int, layer: int) -> torch.Generator:
        """Seeded by the prompt's own ids and the layer, whatever stands beside it in the batch."""
        ids = given.ids[row, given.valid[row]].cpu().numpy()
        return torch.Generator().manual_seed(crc32(ids.tobytes(), self.seed + layer))

    def _draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(count, generator=generator)


def _recycled(dropped: int) -> int:
    return int(0.3 * dropped) + 1


def raters(prompts: Prompts) -> torch.Tensor:
    """(B, L) bool: text behind the image that is more similar to it than the average of that text (section 3.2).

    Similarity is the dot product of what enters the first layer, softmaxed over the text and averaged over the image.

    Raises:
        ValueError: for a prompt that ends in its image.
    """
    given = prompts.given
    if given.visual[:, -1].any():
        raise ValueError("input_ids: a prompt ends in an image; SparseVLM needs text behind it that rates")
    rates = torch.zeros_like(given.valid)
    for row, embedded in enumerate(given.embedded):
        seen = given.visual[row].nonzero()[:, 0]
        if len(seen):
            text = slice(int(seen[-1]) + 1, None)
            relevance = (embedded[seen] @ embedded[text].T).softmax(1).mean(0)
            rates[row, text] = relevance > relevance.mean()
        if not rates[row].any():
            rates[row, -1] = True  # nothing stands out, as in a single token of text
    return take(rates, prompts.source.clamp(min=0)) & (prompts.source >= 0) & prompts.valid
