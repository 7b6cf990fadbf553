"""SparseVLM (Zhang et al., ICML 2025; code of its version 1.5): text rates the visual tokens.

It does so after three layers. The best rated tokens stay, and part of the rest is recycled:
clustered by density peaks and merged. Positions are renumbered. Semantics of the official
code, for any batch size; its density noise, which can decide ties, is drawn per prompt
here, so that an answer does not depend on who shares the batch. Version 2, SparseVLM+,
corrects the attention for distance, lets the heads rate that look at the image most, merges
and renumbers nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from zipeval.engine import density_peaks
from zipeval.engine.decoder import PromptBatch, PromptInfo, Selection, topk_mask
from zipeval.engine.ragged import on_device, take
from zipeval.engine.staged import ScheduledDecoderMethod
from zipeval.utils.lazy import torch

# By version and budget: visual tokens that stay after each of the layers below.
PUBLISHED = {
    1.5: {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 64: (66, 34, 20)},
}
AFTER = (2, 6, 15)


@dataclass(frozen=True)
class SparseVLM(ScheduledDecoderMethod):
    """Drop and recycle tokens as in sections 3.2 to 3.4.

    Version 2: sections 4.2 and 4.3 of SparseVLM+.

    Args:
        counts, after, of: as in ScheduledDecoderMethod.
        version: 1.5 or 2. With `use_cache=False`, raters and tokens are chosen anew at
            every step.
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
        if not dropped or self.version == 2:
            return 0
        # The official code makes a cluster of about ten recycled tokens.
        return int(_recycled(dropped) / 10) + 1

    def reduce(self, layer: int, prompts: PromptBatch) -> Selection:
        score, counts = self.score(prompts), self.counts_before(layer, prompts)
        stays = topk_mask(score, prompts, counts)
        dropped = [
            entering - count
            for entering, count in zip(prompts.counts, counts, strict=True)
        ]
        if self.version == 2 or not any(dropped):
            return Selection(stays)
        # Only tokens that were dropped are recycled.
        score = score.masked_fill(stays | ~prompts.visual, float("-inf"))
        return Selection(stays, *self._recycle(layer, prompts, score, dropped))

    def score(self, prompts: PromptBatch) -> torch.Tensor:
        """Return the attention that tokens get from the raters: (B, L).

        It is averaged over heads, then over raters.
        """
        rates = raters(prompts)
        slots = torch.arange(prompts.valid.shape[1], device=rates.device)
        # Raters are text behind the image: they are among the last slots in every layer.
        rows = slots[len(slots) - rates.shape[1] :].expand(len(rates), -1)
        weights = rates[..., None].float()
        if self.version == 2:
            # What distance alone does to attention is divided out (section 4.2).
            weights = torch.where(rates[..., None], 1 / prompts.gravity(rows), 0)
        received = prompts.received(rows, weights)  # [batch, heads, slots]
        if self.version == 2:
            # The heads rate that look at the image most (section 4.3).
            on_image = received.masked_fill(~prompts.visual[:, None], 0).sum(2)
            count = min(self.heads, on_image.shape[1])
            received = take(received, on_image.topk(count).indices)
        return received.mean(1) / rates.sum(1, keepdim=True)

    def _recycle(
        self, layer: int, prompts: PromptBatch, score: torch.Tensor, dropped: list[int]
    ):
        """Return the tokens that are made of dropped ones, as `density_peaks.merge` does.

        Args:
            score: (B, L), above -inf for dropped tokens; the best rated are recycled.
            dropped: (B) number of dropped tokens.
        """
        sizes = [_recycled(number) if number else 0 for number in dropped]
        best = score.argsort(dim=1, descending=True, stable=True)[:, : max(sizes)]
        draws = []
        for size, prompt in zip(sizes, prompts.initial.infos, strict=True):
            draws.append(self._draw(size, self._generator(prompt, layer)))
        draws = torch.nn.utils.rnn.pad_sequence(draws, batch_first=True)
        noise = draws.to(score.device, non_blocking=True) * self.noise
        points, clusters = take(prompts.hidden, best), [*map(self.merged, dropped)]
        return density_peaks.merge(points, sizes, clusters, noise)

    def _generator(self, prompt: PromptInfo, layer: int) -> torch.Generator:
        """Return a generator whose seed depends on a prompt's own ids and the layer.

        It does not depend on what stands beside the prompt in the batch.
        """
        seed = crc32(prompt.ids.tobytes(), self.seed + layer)
        return torch.Generator().manual_seed(seed)

    def _draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return `count` random numbers from 0 to 1."""
        return torch.rand(count, generator=generator)


def _recycled(dropped: int) -> int:
    """Return how many of so many dropped tokens are clustered; the rest is lost."""
    return int(0.3 * dropped) + 1


def raters(prompts: PromptBatch) -> torch.Tensor:
    """Return which of the last T slots rate (section 3.2): (B, T) bool.

    It is the text behind the image that is more similar to it than the average of that
    text. Similarity is the dot product of what enters the first layer, softmaxed over the
    text and averaged over the image. How many rate is known to the device alone; T is the
    most text that any prompt has there.

    Raises:
        ValueError: for a prompt that ends in its image.
    """
    initial = prompts.initial
    lengths = [prompt.text_after if prompt.visual else 1 for prompt in initial.infos]
    if min(lengths) == 0:
        raise ValueError(
            "input_ids: a prompt ends in an image; SparseVLM needs text behind it that rates"
        )
    # Counted from the end of the prompts, which are padded on the left.
    slots = torch.arange(-max(lengths), 0, device=initial.ids.device)
    is_text = slots >= -on_device(lengths, initial.ids.device)[:, None]  # [B, T]
    # In float32: the products may be larger than float16 can hold.
    embedded = initial.embedded.float()
    similarity = embedded @ embedded[:, -max(lengths) :].mT  # [B, S, T]
    shares = similarity.masked_fill(~is_text[:, None], float("-inf")).softmax(2)
    shares = shares.masked_fill(~initial.visual[..., None], 0)
    relevance = _mean(shares, initial.visual.sum(1, keepdim=True))
    average = _mean(relevance.masked_fill(~is_text, 0), is_text.sum(1))
    rates = is_text & (relevance > average[:, None])
    # Where nothing stands out, as in a single token of text, the last token rates.
    nobody = ~rates.any(1, keepdim=True)
    return rates | (nobody & (slots == -1))


def _mean(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Return the mean of `count` entries of x (B, n, ...) along n; all others are 0.

    It is rounded as `x.mean(1)` is, which adds up half precision in float32.
    """
    total = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / count.clamp(min=1)).to(x.dtype)
