"""The baselines that belong in every honest table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import IMAGE, Watched, llava, prompts
from torch.nn.functional import avg_pool2d

from zipeval.methods.none import Blind
from zipeval.methods.pool import Pool
from zipeval.methods.pool import grid as pooled_grid
from zipeval.methods.uniform import Uniform, grid


@pytest.fixture(scope="module")
def model():
    return llava(side=6)


def reduced(model, method):
    watched = Watched(method)
    with torch.no_grad(), watched.applied(model):
        model(**prompts(model, [[5, 6], [7]], [1, 2]))
    return watched


@given(
    st.integers(1, 30).flatmap(
        lambda side: st.tuples(st.just(side), st.integers(1, side * side))
    )
)
def test_a_grid_of_any_number_of_different_patches_in_order(case):
    side, count = case
    patches = grid(count, side)
    assert len(patches) == count
    assert patches == sorted(set(patches))
    assert patches[0] >= 0 and patches[-1] < side * side


def test_square_numbers_make_a_square_grid(model):
    assert grid(9, 6) == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    watched = reduced(model, Uniform(tokens=9))
    assert watched.reduced.kept.tolist() == [[p + 1 for p in grid(9, 6)]] * 3
    assert torch.equal(
        watched.reduced.features, watched.crops.hidden[:, watched.reduced.kept[0]]
    )


@given(
    st.integers(2, 30).flatmap(
        lambda side: st.tuples(
            st.just(side), st.integers(1, side), st.integers(1, side)
        )
    )
)
def test_every_product_within_the_grid_has_a_shape(case):
    side, a, b = case
    height, width = pooled_grid(a * b, side)
    assert height * width == a * b
    assert height <= width <= side


def test_numbers_without_factors_are_refused():
    with pytest.raises(
        ValueError, match="tokens=13 is no height x width within 12 x 12"
    ):
        pooled_grid(13, 12)


def test_pooling_averages_blocks(model):
    watched = reduced(model, Pool(tokens=9))
    image = watched.crops.hidden[:, 1:].reshape(3, 6, 6, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        watched.reduced.features, avg_pool2d(image, 2).flatten(2).mT
    )


def test_no_visual_token_is_a_prompt_without_them(model):
    inputs = prompts(model, [[5, 6, 8], [7]], [1, 2])
    with torch.no_grad(), Blind().applied(model):
        logits = model(**inputs).logits[:, -1]
        for row, ids in enumerate(inputs["input_ids"]):
            text = ids[(ids != IMAGE) & inputs["attention_mask"][row].bool()][None]
            alone = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[
                0, -1
            ]
            torch.testing.assert_close(logits[row], alone, atol=1e-4, rtol=1e-4)
        assert (
            model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1]
            == inputs["input_ids"].shape[1] + 3
        )
