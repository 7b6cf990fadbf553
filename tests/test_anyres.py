"""Images in crops: the packing of LLaVA-NeXT and its budgets, on every grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_visionzip import transcription
from tiny import GRIDS, llava_next, prompts

from zipeval.budget import Shape
from zipeval.cli import compose
from zipeval.engine.images import pictures
from zipeval.engine.vision import reduced_inputs
from zipeval.methods.random import Random
from zipeval.methods.visionzip import VisionZip
from zipeval.runner import Session, run

SIDE = 6
LLAVA_NEXT = Shape(2880, 2880, 32, grids=(3, 4, 5))


@pytest.fixture(scope="module")
def model():
    return llava_next(side=SIDE).double()


def packed(model, crops, columns, dominant, contextual):
    """The official VisionZip's order, crop by crop and token by token: (tokens, D) before the projector."""
    of_crops = [transcription(model, crop, dominant, contextual) for crop in crops]
    _, whole = of_crops[0]
    patches, cls, merged = {}, [], []
    for tile, (kept, features) in enumerate(of_crops[1:]):
        for position, feature in zip(kept, features, strict=False):
            if position == 0:
                cls.append(feature)
            else:
                y, x = divmod(position - 1, SIDE)
                patches[(tile // columns) * SIDE + y, (tile % columns) * SIDE + x] = feature
        merged += list(features[len(kept) :])
    return np.array([*whole, *(patches[place] for place in sorted(patches)), *cls, *merged])


@pytest.mark.parametrize("seed", range(100))
def test_equals_transcription(model, seed):
    """Two images of different grids in one batch."""
    rng = np.random.default_rng(seed)
    dominant = int(rng.integers(1, 20))
    contextual = int(rng.integers(0, 21 - dominant))
    inputs = prompts(model, [[5, 6], [7]], [1, 1], seed)
    grids = [GRIDS[i] for i in rng.choice(len(GRIDS), 2, replace=False)]
    pixels = model.config.vision_config.image_size
    sizes = torch.tensor([[rows * pixels, columns * pixels] for rows, columns in grids])
    inputs |= {"pixel_values": inputs["pixel_values"].double()[:, :5], "image_sizes": sizes}
    pixel_values = torch.randn(2, 5, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed)).double()
    inputs["pixel_values"] = pixel_values
    counts = [picture.tokens for picture in pictures(model, inputs)]
    ids = [[1, *[model.config.image_token_id] * count, 5] for count in counts]
    width = max(map(len, ids))
    inputs["input_ids"] = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    with torch.no_grad():
        reduced = reduced_inputs(model, inputs, VisionZip(dominant=dominant, contextual=contextual))
        for image, (rows, columns) in enumerate(grids):
            crops = pixel_values[image, : 1 + rows * columns]
            expected = torch.tensor(packed(model, crops, columns, dominant, contextual))
            expected = model.model.multi_modal_projector(expected)
            actual = reduced["mm_encoder_outputs"]["image"].pooler_output[image]
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens, each", [(640, 128), (320, 64), (160, 32)])
def test_the_published_budget_is_a_share_of_every_crop(tokens, each):
    method = VisionZip.for_budget(tokens, "paper", LLAVA_NEXT)
    assert method.split() == {128: (108, 20), 64: (54, 10), 32: (27, 5)}[each]
    assert method.left_of(LLAVA_NEXT.picture) == tokens


@pytest.mark.parametrize("budget", ["mean", "final"])
@pytest.mark.parametrize("method", [VisionZip, Random])
def test_other_budgets_are_met_on_every_grid(model, method, budget):
    inputs = prompts(model, [[5]], [len(GRIDS)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    made = method.for_budget(47, budget, Shape(180, 180, 3, grids=(3, 4, 5)))
    with torch.no_grad():
        features = reduced_inputs(model, inputs, made)["mm_encoder_outputs"]["image"].pooler_output
    assert [len(f) for f in features] == [47] * len(GRIDS)


def test_a_budget_beyond_an_image_leaves_it_as_the_model_makes_it(model):
    """Padding that the model cuts off can leave fewer tokens than crops x share."""
    inputs = prompts(model, [[5]], [len(GRIDS)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    made = pictures(model, inputs)
    budget = min(picture.tokens for picture in made)
    method = Random.for_budget(budget, "mean", Shape(180, 180, 3, grids=(3, 4, 5)))
    with torch.no_grad():
        features = reduced_inputs(model, inputs, method)["mm_encoder_outputs"]["image"].pooler_output
    assert [len(f) for f in features] == [method.left_of(picture) for picture in made]
    smallest = min(range(len(made)), key=lambda i: made[i].tokens)
    with torch.no_grad():
        stock = model.model.get_image_features(
            inputs["pixel_values"], image_sizes=inputs["image_sizes"], return_dict=True
        ).pooler_output
    torch.testing.assert_close(features[smallest], stock[smallest])


def test_pictures_are_those_of_the_processor():
    session = Session(compose(["model=tiny_next"]))
    model, _ = session.load()
    sizes = [(96, 96), (200, 90), (90, 200), (192, 192), (300, 80), (80, 310), (10, 400)]
    for size in sizes:
        content = [{"type": "image", "url": Image.new("RGB", size)}, {"type": "text", "text": "What?"}]
        inputs = session.inputs([[{"role": "user", "content": content}]])
        (picture,) = pictures(model, inputs)
        assert picture.tokens == int((inputs["input_ids"] == model.config.image_token_id).sum())


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=vanilla"],
        ["method=visionzip", "tokens=160"],
        ["method=visionzip", "tokens=100", "budget=mean"],
        ["method=fastv", "tokens=240", "budget=mean"],
        ["method=sparsevlm", "tokens=240", "budget=final"],
        ["method=pool", "tokens=80"],
        ["method=chain", "method.first.tokens=160", "tokens=90", "budget=mean"],
    ],
    ids=" ".join,
)
def test_the_embedded_stand_in_runs(overrides, tmp_path):
    (path,) = run(compose(["model=tiny_next", f"results={tmp_path}", "limit=4", *overrides]))
    assert path.exists()
