"""Images in crops: the packing of LLaVA-NeXT and its budgets, on every grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_visionzip import transcription
from tiny import GRIDS, llava_next, prompts

from zipeval.cli import compose
from zipeval.engine.budget import Shape, VisualInput
from zipeval.engine.images import pictures
from zipeval.engine.vision import WithImageNewlines, reduced_inputs
from zipeval.errors import UsageError
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.methods.random import Random
from zipeval.methods.visionzip import VisionZip
from zipeval.results import records

SIDE = 6
LLAVA_NEXT = Shape(2880, 2880, 32, grids=((3, 0), (4, 0), (5, 0)))


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
                patches[(tile // columns) * SIDE + y, (tile % columns) * SIDE + x] = (
                    feature
                )
        merged += list(features[len(kept) :])
    return np.array(
        [*whole, *(patches[place] for place in sorted(patches)), *cls, *merged]
    )


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
    inputs |= {
        "pixel_values": inputs["pixel_values"].double()[:, :5],
        "image_sizes": sizes,
    }
    pixel_values = torch.randn(
        2, 5, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed)
    ).double()
    inputs["pixel_values"] = pixel_values
    counts = [picture.tokens for picture in pictures(model, inputs)]
    ids = [[1, *[model.config.image_token_id] * count, 5] for count in counts]
    width = max(map(len, ids))
    inputs["input_ids"] = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    with torch.no_grad():
        reduced = reduced_inputs(
            model, inputs, VisionZip(dominant=dominant, contextual=contextual)
        )
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
    assert method.num_tokens(LLAVA_NEXT.picture) == tokens


@pytest.mark.parametrize("budget", ["mean", "final"])
@pytest.mark.parametrize("method", [VisionZip, Random])
def test_other_budgets_are_met_on_every_grid(model, method, budget):
    inputs = prompts(model, [[5]], [len(GRIDS)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    made = method.for_budget(
        47, budget, Shape(180, 180, 3, grids=((3, 0), (4, 0), (5, 0)))
    )
    with torch.no_grad():
        features = reduced_inputs(model, inputs, made)["mm_encoder_outputs"][
            "image"
        ].pooler_output
    assert [len(f) for f in features] == [47] * len(GRIDS)


def test_a_budget_beyond_an_image_leaves_it_as_the_model_makes_it(model):
    """Padding that the model cuts off can leave fewer tokens than crops x share."""
    inputs = prompts(model, [[5]], [len(GRIDS)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    made = pictures(model, inputs)
    budget = min(picture.tokens for picture in made)
    method = Random.for_budget(
        budget, "mean", Shape(180, 180, 3, grids=((3, 0), (4, 0), (5, 0)))
    )
    with torch.no_grad():
        features = reduced_inputs(model, inputs, method)["mm_encoder_outputs"][
            "image"
        ].pooler_output
    assert [len(f) for f in features] == [
        method.num_tokens(picture) for picture in made
    ]
    smallest = min(range(len(made)), key=lambda i: made[i].tokens)
    with torch.no_grad():
        stock = model.model.get_image_features(
            inputs["pixel_values"], image_sizes=inputs["image_sizes"], return_dict=True
        ).pooler_output
    torch.testing.assert_close(features[smallest], stock[smallest])


def test_pictures_are_those_of_the_processor():
    session = Session(compose(["model=tiny_next"]))
    model, _ = session.load()
    sizes = [
        (96, 96),
        (200, 90),
        (90, 200),
        (192, 192),
        (300, 80),
        (80, 310),
        (10, 400),
    ]
    for size in sizes:
        content = [
            {"type": "image", "url": Image.new("RGB", size)},
            {"type": "text", "text": "What?"},
        ]
        inputs = session.inputs([[{"role": "user", "content": content}]])
        (picture,) = pictures(model, inputs)
        assert picture.tokens == int(
            (inputs["input_ids"] == model.config.image_token_id).sum()
        )


@pytest.mark.parametrize("seed", range(10))
def test_row_ends_stay_behind_their_rows(model, seed):
    """packing=newline: the published order, and behind every row of the image that the tiles make up its end."""
    rng = np.random.default_rng(seed)
    dominant, contextual = int(rng.integers(2, 20)), int(rng.integers(0, 5))
    inputs = prompts(model, [[5]], [len(GRIDS)], seed)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    method = VisionZip(dominant=dominant, contextual=contextual)
    with torch.no_grad():
        published = reduced_inputs(model, inputs, method)["mm_encoder_outputs"][
            "image"
        ].pooler_output
        newline = reduced_inputs(model, inputs, WithImageNewlines(method))[
            "mm_encoder_outputs"
        ]["image"].pooler_output
    for image, (rows, columns) in enumerate(GRIDS):
        end = (newline[image] == model.model.image_newline).all(1)
        assert torch.equal(newline[image][~end], published[image])
        assert int(end.sum()) == rows * SIDE
        whole, tiles = dominant + contextual, rows * columns
        of_rows = newline[image][whole : len(newline[image]) - tiles * (1 + contextual)]
        assert (
            of_rows[-1] == model.model.image_newline
        ).all()  # CLS and merged tokens come after all rows
        with torch.no_grad():
            kept = [
                transcription(model, crop, dominant, contextual)[0]
                for crop in inputs["pixel_values"][image]
            ]
        expected = [0] * (rows * SIDE)
        for tile in range(tiles):
            for position in kept[1 + tile]:
                if position:
                    expected[tile // columns * SIDE + (position - 1) // SIDE] += 1
        ends = (
            (of_rows == model.model.image_newline).all(1).nonzero().flatten().tolist()
        )
        assert [b - a - 1 for a, b in zip([-1, *ends], ends, strict=False)] == expected


@pytest.mark.parametrize(
    "method, budget",
    [
        ("visionzip", "paper"),
        ("visionzip", "mean"),
        ("random", "paper"),
        ("random", "final"),
        ("chain", "mean"),
    ],
)
def test_row_ends_are_on_top_of_a_share_and_part_of_a_budget(method, budget):
    tokens = (
        ["method.first.tokens=160", "tokens=80"]
        if method == "chain"
        else ["tokens=160"]
    )
    session = Session(
        compose(
            [
                "model=tiny_next",
                "packing=newline",
                f"method={method}",
                f"budget={budget}",
                *tokens,
            ]
        )
    )
    entering = [
        session.entering([VisualInput(720, crops, 144, rows)])[0]
        for crops, rows in ((5, 24), (4, 36), (3, 12))
    ]
    assert entering == ([184, 164, 108] if budget == "paper" else [160] * 3)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["model=tiny_llava", "packing=newline"],
            "packing=newline: the images of tiny_llava have no row ends",
        ),
        (
            ["packing=newline", "budget=mean", "tokens=39"],
            "tokens=39: too few for an image of 4 crops and 36 row ends",
        ),
        (["budget=mean", "tokens=3"], "tokens=3: too few for an image of 4 crops"),
        (
            ["packing=newline", "method=fastv", "tokens=300", "budget=mean"],
            "packing=newline is of methods before",
        ),
        (
            ["method=pool", "budget=mean", "tokens=51"],
            "no height x width within 12 x 12",
        ),
        (["packing=rows"], "packing=rows: expected one of published, newline"),
    ],
)
def test_what_cannot_be_packed_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        Session(
            compose(["model=tiny_next", "method=visionzip", "tokens=40", *overrides])
        )


def test_row_ends_are_measured_too(tmp_path):
    overrides = [
        "model=tiny_next",
        "method=visionzip",
        "tokens=160",
        "packing=newline",
        f"results={tmp_path}",
    ]
    (path,) = run(compose([*overrides, "limit=4"]))
    assert (
        records.read(path)["visual_tokens"]["mean"] == 3 * 32 + 12
    )  # square images become two tiles side by side
