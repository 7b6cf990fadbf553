"""Calls that were once answered wrongly without a word: each is right, or refused."""

from __future__ import annotations

import pytest
import torch
from test_contract import METHODS, make
from tiny import llava, prompts, single
from transformers import DynamicCache

from zipeval.engine.decoder import Kept, Prompts, keep_best
from zipeval.engine.received import received
from zipeval.errors import RunError
from zipeval.methods.fastv import FastV
from zipeval.methods.sparsevlm import SparseVLM
from zipeval.methods.visionzip import VisionZip

NEW = 4
REDUCING = [name for name in METHODS if name != "vanilla"]


@pytest.fixture(scope="module")
def model():
    return llava(side=6, layers=6, gain=1.0).double()


def ask(model, questions, images):
    inputs = prompts(model, questions, images)
    return {name: x.double() if name == "pixel_values" else x for name, x in inputs.items()}


@torch.no_grad()
def by_hand(model, inputs, tokens):
    """The logits (B, NEW, V) of a decoding loop that knows the prompts as they were given."""
    cache, mask = DynamicCache(config=model.config.text_config), inputs["attention_mask"]
    logits = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
    for step in range(NEW - 1):
        token = tokens[:, step : step + 1]
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("words", [80, 40, 3], ids=["longer than all", "in between", "shorter than what is left"])
@pytest.mark.parametrize("name", METHODS)
def test_a_decoding_loop_by_hand(model, name, words):
    """A row of text alone beside one with an image; where it is the longest, the batch keeps its width."""
    inputs = ask(model, [[5, 9, 11], list(range(2, 2 + words))], [1, 0])
    with make(name, model).applied(model):
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        logits = by_hand(model, inputs, out.sequences[:, -NEW:])
    torch.testing.assert_close(logits, torch.stack(out.logits, 1), atol=1e-5, rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", REDUCING)
def test_packed_prompts_are_refused(model, name):
    """Two prompts in one row, told apart by their positions alone."""
    inputs = ask(model, [[5, 9, 11], [7, 8, 21]], [1, 1])
    rows = [single(model, inputs, [1, 1], row) for row in range(2)]
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows], 1),
        "pixel_values": inputs["pixel_values"],
        "position_ids": torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None],
    }
    with make(name, model).applied(model), torch.no_grad(), pytest.raises(ValueError, match="position_ids"):
        model(**packed)


@pytest.mark.parametrize("prefix", [0, 1], ids=["all rows", "CLS"])
def test_scores_of_float16_are_finite(prefix):
    """Where products of queries and keys are larger than float16 can hold, as attention kernels bear it."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, 17, 64, generator=generator) * 300 for _ in range(2))
    expected = received(queries, keys, 2, prefix)
    assert (queries.abs() @ keys.abs().mT).max() > torch.finfo(torch.float16).max
    scores = received(queries.half(), keys.half(), 2, prefix)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.sum(-1), scores.new_ones(2, 2) if not prefix else scores.sum(-1))
    assert (scores.argmax(-1) == expected.argmax(-1)).float().mean() > 0.7


@pytest.mark.parametrize("method", [FastV(keep=9), SparseVLM((9,), (0,))], ids=["fastv", "sparsevlm"])
def test_scores_in_the_decoder_are_finite_in_float16(method, monkeypatch):
    scores = []
    attention = Prompts.attention
    monkeypatch.setattr(Prompts, "attention", lambda *given: scores.append(attention(*given)) or scores[-1])
    model = llava(side=6, layers=3, gain=1.0).half()
    inputs = prompts(model, [[5, 9, 11]], [1])
    inputs["pixel_values"] = inputs["pixel_values"].half()
    layer = model.model.language_model.layers[method.layers(3)[0] - 1].self_attn
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            projection.weight.mul_(200)
        assert model(**inputs).logits.isfinite().all()
        with method.applied(model):
            model(**inputs)
    assert scores
    assert all(score.isfinite().all() for score in scores)


class NoNumbers(FastV):
    """Rates every token with NaN."""

    def reduce(self, layer, given):
        score = torch.full_like(given.visual, float("nan"), dtype=torch.float32)
        return Kept(keep_best(score, given, [self._count(count) for count in given.counts]))


def test_scores_that_are_no_numbers_stop(model):
    inputs = ask(model, [[5, 9, 11]], [1])
    with NoNumbers(keep=9).applied(model), torch.no_grad(), pytest.raises(RunError, match="NaN"):
        model(**inputs)
    broken = llava(side=6, layers=6)
    with torch.no_grad():
        broken.model.vision_tower.encoder.layers[-2].self_attn.k_proj.weight[0, 0] = float("nan")
    inputs = prompts(broken, [[5, 9, 11]], [1])
    with VisionZip(tokens=9).applied(broken), torch.no_grad(), pytest.raises(RunError, match=r"VisionZip.*NaN"):
        broken(**inputs)
