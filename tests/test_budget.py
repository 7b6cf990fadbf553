"""What `tokens=T` means: published settings, means and finals, on the shape they were published for."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llava, prompts
from torch.utils.flop_counter import FlopCounterMode

from zipeval.engine import flops
from zipeval.engine.budget import Shape, VisualInput
from zipeval.engine.ledger import record_prefill
from zipeval.methods.fastv import FastV
from zipeval.methods.none import Blind
from zipeval.methods.sparsevlm import SparseVLM
from zipeval.methods.uniform import Uniform
from zipeval.methods.vanilla import Vanilla
from zipeval.methods.visionzip import PUBLISHED, VisionZip

LLAVA15 = Shape(576, 576, 32)
LLAVA_NEXT = Shape(2880, 2880, 32)


@pytest.fixture(scope="module")
def llava15():
    """Random weights with LLaVA-1.5-7B's 32 layers and 576 visual tokens."""
    return llava(side=24, layers=32, gain=1.0)


def measured(model, method, images=1):
    """Visual tokens that entered each layer."""
    with torch.no_grad(), method.applied(model), record_prefill(model) as prefills:
        model(**prompts(model, [[5, 6, 7, 8]], [images]))
    (prefill,) = prefills
    return prefill.visual(0)


@pytest.mark.parametrize(
    "method, tokens, mean, final",
    [
        (SparseVLM, 192, 206.5, 113),
        (SparseVLM, 128, 145.4, 39),
        (SparseVLM, 64, 82.3, 18),
        (FastV, 192, 204.8, 180),
        (FastV, 128, 142.9, 114),
        (FastV, 64, 81.0, 48),
        (VisionZip, 64, 64.0, 64),
    ],
)
def test_what_published_settings_come_to(llava15, method, tokens, mean, final):
    entered = measured(llava15, method.for_budget(tokens, "paper", LLAVA15))
    assert len(entered) == 32
    assert fmean(entered) == pytest.approx(mean, abs=0.051)
    assert entered[-1] == final


@pytest.mark.parametrize("method", [SparseVLM, FastV, VisionZip, Uniform])
@pytest.mark.parametrize("images", [1, 2])
def test_a_mean_of_64_is_measured(llava15, method, images):
    entered = measured(llava15, method.for_budget(64, "mean", LLAVA15), images)
    assert fmean(entered) / images == pytest.approx(64, abs=1)


@given(
    st.sampled_from([FastV, SparseVLM]),
    st.sampled_from(["mean", "final"]),
    st.sampled_from(
        [
            LLAVA15,
            LLAVA_NEXT,
            Shape(144, 144, 6),
            Shape(576, 128, 32),
            Shape(576, 576, 40),
        ]
    ),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_any_budget_is_met_or_refused_with_what_is_feasible(
    method, budget, shape, data
):
    tokens = data.draw(st.integers(1, shape.entering))
    try:
        entering = method.for_budget(tokens, budget, shape).tokens_per_layer(
            [shape.picture], shape.layers
        )
    except ValueError as error:
        assert "feasible" in str(error)
        assert budget == "mean"
        assert (
            tokens < shape.entering * 0.6
        )  # the layers before the first reduction see everything
    else:
        assert (fmean(entering) if budget == "mean" else entering[-1]) == pytest.approx(
            tokens, abs=1
        )
        assert entering == sorted(entering, reverse=True)


@pytest.mark.parametrize("tokens", [192, 128, 64])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_fastv_solves_its_equation(tokens, K):
    """L T = K N + (L - K) R."""
    entering = FastV.for_budget(tokens, "mean", LLAVA15, K=K).tokens_per_layer(
        [LLAVA15.picture], 32
    )
    keep = (32 * tokens - K * 576) / (32 - K)
    assert entering == pytest.approx([576] * K + [keep] * (32 - K), abs=0.5)


def test_the_feasible_range_is_told():
    with pytest.raises(
        ValueError,
        match=r"tokens=160: with budget=mean, 180 to 2880 are feasible on 32 layers x 2880",
    ):
        FastV.for_budget(160, "mean", LLAVA_NEXT)


@pytest.mark.parametrize("method", [FastV, SparseVLM, VisionZip])
def test_an_unpublished_budget_is_refused(method):
    with pytest.raises(
        ValueError, match="tokens=100: published are 192, 128, 64 of 576 visual tokens"
    ):
        method.for_budget(100, "paper", LLAVA15)


def test_published_layers_move_in_shallow_decoders_only():
    deep, shallow = Shape(576, 576, 40), Shape(144, 144, 6)
    assert SparseVLM.for_budget(192, "paper", deep).after == (2, 6, 15)
    assert SparseVLM.for_budget(48, "paper", shallow).after == (0, 1, 3)
    assert [
        FastV.for_budget(t, "paper", s).K for t, s in ((192, deep), (48, shallow))
    ] == [2, 1]


def test_a_chained_method_starts_from_what_the_first_one_left():
    behind = Shape(image=576, entering=128, layers=32)
    assert (
        FastV.for_budget(64, "paper", behind).tokens_per_layer([behind.picture], 32)
        == [128] * 2 + [48] * 30
    )
    assert (
        SparseVLM.for_budget(64, "paper", behind).tokens_per_layer(
            [behind.picture], 32
        )[-1]
        == 18
    )


def test_published_splits_are_those_of_every_budget():
    for crops, (_, splits) in PUBLISHED.items():
        assert {
            tokens: VisionZip(tokens=tokens // crops).split() for tokens in splits
        } == splits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method",
    [
        Vanilla(),
        Blind(),
        VisionZip(tokens=9),
        FastV(keep=5, K=1),
        FastV(ratio=0.5, K=2),
    ],
)
def test_the_ledger_counts_what_entered(method, attention):
    """Under padding too; the cache holds as many entries."""
    model = llava(side=6, layers=4)
    model.set_attn_implementation(attention)
    inputs = prompts(model, [[5, 6, 7], [8]], [1, 2])
    with torch.no_grad(), method.applied(model), record_prefill(model) as prefills:
        cache = model(**inputs, use_cache=True).past_key_values
        model(
            input_ids=torch.tensor([[5], [6]]), past_key_values=cache
        )  # not a prefill
    (prefill,) = prefills
    assert prefill.text == [5, 4]
    assert [prefill.visual(0), prefill.visual(1)] == [
        method.tokens_per_layer([VisualInput(36, 1, 36)] * n, 4) for n in (1, 2)
    ]
    longest = [max(rows) for rows in zip(*prefill.entered, strict=True)]
    assert longest == [cache.get_seq_length(layer) - 1 for layer in range(4)]


def test_flops_of_the_paper():
    """Section 2.1 by hand: d = 2, m = 3, lengths 5 and 1."""
    config = llava(layers=1).config.text_config
    config.hidden_size, config.intermediate_size = 2, 3
    assert flops.formula([5, 1], config) == (80 + 100 + 60) + (16 + 4 + 12)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_exact_flops_are_those_that_torch_counts(family):
    model = llava(side=6, layers=3, decoder=family)
    model.set_attn_implementation(
        "eager"
    )  # torch does not count what its fused kernel for CPUs does
    decoder = model.model.language_model
    embedded = torch.randn(1, 50, decoder.config.hidden_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(inputs_embeds=embedded, use_cache=False)
    assert flops.exact([50] * 3, decoder.config) == counter.get_total_flops()
