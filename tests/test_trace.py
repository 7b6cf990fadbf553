"""Which visual tokens are told to be left, held against what the decoder's layers really receive."""

from __future__ import annotations

from functools import cache

import oracle
import pytest
import torch
from test_visionzip import transcription
from tiny import kinds_of, llava, mini_gemini, pictures_of, prompts, single
from tiny_methods import FAMILIES, IMAGES, LAYERS, METHODS, SIDE, ask, make, tiny

from zipeval.engine.images import PIXELS, pixels
from zipeval.engine.ledger import record_prefill
from zipeval.engine.trace import observer, trace_kept_tokens
from zipeval.engine.vision import VisionMethod, WithImageNewlines
from zipeval.methods.chain import Chain
from zipeval.methods.fastv import FastV
from zipeval.methods.random import Random
from zipeval.methods.sparsevlm import SparseVLM
from zipeval.methods.uniform import Uniform
from zipeval.methods.visionzip import VisionZip

PATCHES = SIDE * SIDE


def read(model, method, inputs, kinds_of_rows, call=None):
    """(what is `kept` and `merged`, visual tokens measured at the last layer) of each prompt.

    Args:
        kinds_of_rows: of what kinds the pictures of each are.
    """
    with (
        torch.no_grad(),
        method.applied(model),
        record_prefill(model) as prefills,
        trace_kept_tokens(model) as told,
    ):
        (call or model)(**inputs)
        found = {kind: iter(its) for kind, its in told.places(model, inputs).items()}
        rows = [[next(found[kind]) for kind in kinds] for kinds in kinds_of_rows]
        return [
            (told.left(row, places), prefills[0].visual(row)[-1])
            for row, places in enumerate(rows)
        ]


def traced(*given):
    return [told for told, _ in read(*given)]


def one_image(model):
    inputs = prompts(model, [[5, 9]], [1])
    return {**inputs, "pixel_values": inputs["pixel_values"].double()}


class Witness:
    """Sees what enters the first and the last layer of the decoder, and what the projector makes of every patch.

    It knows neither packing nor method: a token is the patch whose features it has, and slots of the last layer are
    those of the first that have their rotary positions.
    """

    def __init__(self, model, method, inputs, images):
        self.seen = {}
        layers = model.model.language_model.layers
        with torch.no_grad():
            self.patches = self.projected(model, inputs)
            with method.applied(model):
                hooks = [
                    layers[i].register_forward_pre_hook(self.see(i), with_kwargs=True)
                    for i in (0, LAYERS - 1)
                ]
                model(**inputs)
        for hook in hooks:
            hook.remove()
        self.kinds = kinds_of(model, images)
        self.crops = [
            [picture.crops for picture in its]
            for its in pictures_of(model, inputs, images)
        ]

    def see(self, number):
        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]
            valid = (
                torch.ones(args[0].shape[:2], dtype=torch.bool)
                if mask is None
                else mask[:, 0, -1].bool()
            )
            cos = kwargs["position_embeddings"][0].expand(len(valid), -1, -1)
            self.seen[number] = args[0], cos, valid.expand(len(args[0]), -1)

        return hook

    @staticmethod
    def projected(model, inputs):
        """By kind, (crops of all pictures, PATCHES, D)."""
        made = []
        hook = model.model.multi_modal_projector.register_forward_hook(
            lambda module, args, output: made.append(output)
        )
        for kind in PIXELS:
            if (given := pixels(inputs, kind)) is not None:
                sizes = (
                    {"image_sizes": inputs["image_sizes"]}
                    if "image_sizes" in inputs
                    else {}
                )
                getattr(model.model, f"get_{kind}_features")(
                    given, **sizes, return_dict=True
                )
            else:
                made.append(torch.zeros(0, PATCHES, 1))
        hook.remove()
        return {
            kind: its.flatten(0, -3)[:, -PATCHES:]
            for kind, its in zip(PIXELS, made, strict=True)
        }

    def kept(self):
        """By prompt and picture, ascending."""
        remaining = {kind: iter(crops) for kind, crops in self.patches.items()}
        answer = []
        for row, (kinds, counts) in enumerate(zip(self.kinds, self.crops, strict=True)):
            left = self.tokens(row)
            answer.append([])
            for kind, crops in zip(kinds, counts, strict=True):
                own = torch.cat([next(remaining[kind]) for _ in range(crops)])
                same = (
                    torch.cdist(own, left, compute_mode="donot_use_mm_for_euclid_dist")
                    < 1e-6
                )
                answer[-1].append(same.any(1).nonzero()[:, 0].tolist())
        return answer

    def tokens(self, row):
        """(n, D): what entered the first layer of what is left in the last."""
        (hidden, first, entered), (_, last, valid) = (
            self.seen[i] for i in (0, LAYERS - 1)
        )
        same = (last[row][valid[row], None] == first[row]).all(-1) & entered[row]
        assert (same.sum(1) == 1).all()
        return hidden[row, same.int().argmax(1)]


WITNESSED = {
    "visionzip": VisionZip(dominant=9, contextual=3),
    "row-ends": WithImageNewlines(VisionZip(dominant=9, contextual=3)),
    "random": Random(tokens=10),
    "uniform": Uniform(tokens=10),
    "fastv": FastV(ratio=0.8, K=2),
    "sparsevlm-2": SparseVLM((60, 40, 20), (0, 2, 4), of=180, version=2, heads=2),
    "chain": Chain(VisionZip(dominant=12, contextual=4), FastV(ratio=0.5, K=2)),
    "chain-in-stages": Chain(
        Random(tokens=24), SparseVLM((36, 28, 18), (0, 2, 4), version=2, heads=2)
    ),
}


@pytest.mark.parametrize("name", WITNESSED)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_the_last_layer_receives(family, name):
    model, method = tiny(family), WITNESSED[name]
    inputs = ask(model, IMAGES)
    witness = Witness(model, method, inputs, IMAGES).kept()
    told = traced(model, method, inputs, kinds_of(model, IMAGES))
    for row, its in zip(told, witness, strict=True):
        for kept, merged, seen in zip(row["kept"], row["merged"], its, strict=True):
            # A contextual token that nobody joined has the features of its patch.
            assert kept == [position for position in seen if position not in merged]
    assert any(
        position >= PATCHES for row in told for its in row["kept"] for position in its
    ) == (family not in ("llava", "mini_gemini"))
    assert (
        len({str(its) for row in told for its in row["kept"]}) > 1 or name == "uniform"
    )


@cache
def together(family, name):
    model = tiny(family)
    return read(model, make(name, model), ask(model, IMAGES), kinds_of(model, IMAGES))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_counted_once(family, name):
    """Kept and merged ones are different patches of the picture. With those that have no place they are as many as were
    measured at the last layer.
    """
    model = tiny(family)
    method, pictures = make(name, model), pictures_of(model, ask(model, IMAGES), IMAGES)
    for its, (row, measured) in zip(pictures, together(family, name), strict=True):
        placed = 0
        for kept, merged, picture in zip(row["kept"], row["merged"], its, strict=True):
            assert kept == sorted(kept)
            assert {*kept, *merged} <= {*range(picture.crops * PATCHES)}
            assert len({*kept, *merged}) == len(kept) + len(merged)
            placed += len(kept) + len(merged)
        nowhere = measured - placed
        assert nowhere >= 0
        reduced = [
            p
            for p in its
            if isinstance(method, VisionMethod) and method.num_tokens(p) < p.tokens
        ]
        expected = (
            {
                "random": 0,
                "uniform": 0,
                "none": 0,
                "pool": sum(map(method.num_tokens, reduced)),
            }
            if reduced
            else {}
        )
        expected["visionzip"] = sum(picture.crops for picture in reduced)  # CLS
        if family not in (
            "llava_next",
            "video_llava",
        ):  # where CLS and row ends come in where nothing is reduced
            expected |= {"vanilla": 0, "fastv": 0}
        if name in expected:
            assert nowhere == expected[name]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_told_as_singles_are(family, name):
    model = tiny(family)
    inputs, method = ask(model, IMAGES), make(name, model)
    for row, (expected, _) in enumerate(together(family, name)):
        alone, kinds = single(model, inputs, IMAGES, row), kinds_of(model, IMAGES)[row]
        assert traced(model, method, alone, [kinds]) == [expected]
        assert len(expected["kept"]) == len(expected["merged"]) == len(kinds)


def dominant_and_targets(model, crop, dominant, contextual, **options):
    """Patches, by the transcription of Algorithms 1 and 2."""
    kept, _ = transcription(model, crop, dominant, contextual, **options)
    prefix = int(model.config.vision_config.model_type.startswith("clip"))
    rest = [p for p in range(prefix, PATCHES + prefix) if p not in kept]
    step = max(1, len(rest) // contextual) if contextual else 1
    return [p - prefix for p in kept if p >= prefix], [
        rest[i * step] - prefix for i in range(contextual)
    ]


@pytest.mark.parametrize("dominant, contextual", [(9, 3), (1, 5), (14, 0), (15, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_visionzip_tells_its_dominant_and_contextual_tokens(
    family, dominant, contextual
):
    model = tiny(family)
    inputs = ask(model, IMAGES)
    told = traced(
        model,
        VisionZip(dominant=dominant, contextual=contextual),
        inputs,
        kinds_of(model, IMAGES),
    )
    remaining = {
        kind: iter(pixels(inputs, kind))
        for kind in PIXELS
        if pixels(inputs, kind) is not None
    }
    for row, kinds in enumerate(kinds_of(model, IMAGES)):
        for number, kind in enumerate(kinds):
            crops = next(remaining[kind])
            if family.startswith("mini_gemini"):
                crops = model.model.low_resolution(crops[None])
            crops = crops.reshape(-1, *crops.shape[-3:])[
                : pictures_of(model, inputs, IMAGES)[row][number].crops
            ]
            tower = f"{kind}_tower" if family == "video_llava" else "vision_tower"
            kept, merged = [], []
            for crop, image in enumerate(crops):
                its = dominant_and_targets(
                    model, image, dominant, contextual, tower=tower
                )
                kept += [crop * PATCHES + p for p in its[0]]
                merged += [crop * PATCHES + p for p in its[1]]
            assert (told[row]["kept"][number], told[row]["merged"][number]) == (
                kept,
                merged,
            )


def test_without_cls_positions_are_patches():
    model = llava(side=SIDE, encoder="siglip_vision_model").double()
    inputs = one_image(model)
    kept, merged = dominant_and_targets(model, inputs["pixel_values"][0], 9, 3)
    (told,) = traced(model, VisionZip(dominant=9, contextual=3), inputs, [["image"]])
    assert told == {"kept": [kept], "merged": [merged]}


def final(method, found):
    """The oracle's method, which puts what it leaves of the prompt's visual slots into `found`."""

    def watched(number, x, slots, probabilities, given):
        x, slots = method(number, x, slots, probabilities, given)
        if number == LAYERS - 1:
            found.append(
                [
                    s["born"]
                    for s in slots
                    if s["kind"] == "visual" and s["born"] is not None
                ]
            )
        return x, slots

    return watched


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "engine, slow",
    [
        (FastV(keep=9, K=1), lambda: oracle.fastv(1, 9)),
        (FastV(keep=20, K=5, score="mean"), lambda: oracle.fastv(5, 20, mean=True)),
        (FastV(keep=0, K=3), lambda: oracle.fastv(3, 0)),
        (
            SparseVLM((30, 12, 5), (1, 2, 4), noise=0),
            lambda: oracle.sparsevlm((30, 12, 5), (1, 2, 4)),
        ),
        (
            SparseVLM((20, 10), (0, 3), version=2),
            lambda: oracle.sparsevlm_plus((20, 10), (0, 3), 4, 12),
        ),
    ],
)
def test_inside_the_decoder_it_is_what_the_oracle_keeps(engine, slow, beams):
    """Of a batch of prompts of three lengths, also where each is read once for every beam."""
    model, images = tiny("llava"), [1, 1, 1]
    inputs = ask(model, images)
    options = {"max_new_tokens": 2, "num_beams": beams, "do_sample": False}
    with engine.applied(model), trace_kept_tokens(model) as told:
        model.generate(**inputs, **options)
        places = told.places(model, inputs)["image"]
        answers = [told.left(row * beams, places[row : row + 1]) for row in range(3)]
    for row, answer in enumerate(answers):
        alone, found = single(model, inputs, images, row), []
        oracle.greedy(
            model, alone["input_ids"][0], alone["pixel_values"], final(slow(), found), 1
        )
        first = int((alone["input_ids"][0] == model.config.image_token_id).nonzero()[0])
        assert answer == {"kept": [[born - first for born in found[0]]], "merged": [[]]}


def test_merged_tokens_are_not_taken_for_the_first_slot():
    """Where a prompt begins with its image, that slot is a visual token."""
    model, found = tiny("llava"), []
    inputs = {
        k: v if k == "pixel_values" else v[:, 2:] for k, v in one_image(model).items()
    }
    assert inputs["input_ids"][0, 0] == model.config.image_token_id
    (told,) = traced(model, SparseVLM((9, 4), (1, 3), noise=0), inputs, [["image"]])
    slow = final(oracle.sparsevlm((9, 4), (1, 3)), found)
    oracle.greedy(model, inputs["input_ids"][0], inputs["pixel_values"], slow, 1)
    assert told == {"kept": [found[0]], "merged": [[]]}
    assert 0 not in found[0]  # or nothing would be tried here


def test_prompts_without_pictures_and_what_came_before_them():
    model, method = tiny("llava"), Chain(VisionZip(tokens=12), FastV(keep=5))
    inputs = ask(model, [0, 2, 1])
    told = traced(model, method, inputs, kinds_of(model, [0, 2, 1]))
    assert told[0] == {"kept": [], "merged": []}
    assert [len(row["kept"]) for row in told] == [0, 2, 1]
    text = {
        "input_ids": torch.tensor([[1, 5, 6]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
    }
    with torch.no_grad(), method.applied(model), trace_kept_tokens(model) as observed:
        model(**inputs)
        observed.clear()
        model(**text)
        assert observed.places(model, text) == {"image": [], "video": []}
        assert observed.left(0, []) == {"kept": [], "merged": []}


def test_decoding_steps_tell_nothing():
    model = tiny("llava")
    inputs = one_image(model)
    long, short = ({"max_new_tokens": n, "suppress_tokens": [98, 97]} for n in (6, 1))
    for method in (VisionZip(tokens=12), SparseVLM((9, 5), (1, 3))):
        told = [
            traced(model, method, {**inputs, **options}, [["image"]], model.generate)
            for options in (long, short)
        ]
        assert told[0] == told[1]


def test_nobody_is_told_outside_of_the_block():
    model, other = tiny("llava"), mini_gemini(side=SIDE)
    with pytest.raises(ZeroDivisionError), trace_kept_tokens(model) as told:
        assert observer(model) is told
        assert observer(other) is None
        with (
            pytest.raises(RuntimeError, match="traced already"),
            trace_kept_tokens(model),
        ):
            pass
        assert observer(model) is told
        raise ZeroDivisionError
    assert observer(model) is None
