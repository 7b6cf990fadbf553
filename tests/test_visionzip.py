"""VisionZip and the vision stage against an independent transcription and against the stock model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import IMAGE, Watched, llava, mini_gemini, pixels_name, prompts, video_llava

from zipeval.engine.vision import reduced_inputs
from zipeval.methods.random import Random
from zipeval.methods.vanilla import Vanilla
from zipeval.methods.visionzip import VisionZip


@pytest.fixture(scope="module")
def model():
    return llava()


def transcription(
    model, pixels, dominant, contextual, tower="vision_tower", selected=None
):
    """Algorithms 1 and 2 for one image, token by token in float64, on what the stock model itself returns.

    Args:
        selected: patches that the projector gets where they are not those of the encoder.

    Returns positions kept in the encoder's sequence and the features before the projector.
    """
    tower = getattr(model.model, tower)
    with torch.no_grad():
        states = tower(pixels[None], output_hidden_states=True).hidden_states
        tower.set_attn_implementation(
            "eager"
        )  # only eager attention returns its weights, with a float32 softmax
        attentions = tower(pixels[None], output_attentions=True).attentions
        tower.set_attn_implementation("sdpa")
    layer = len(attentions) - 2
    attention = attentions[layer][0].double().numpy()  # (H, S, S)
    hidden = states[-2][0].double().numpy()
    if selected is not None:
        hidden = np.array(
            [*hidden[: len(hidden) - len(selected)], *selected.double().numpy()]
        )
    block = tower.encoder.layers[layer]
    with torch.no_grad():
        keys = (
            block.self_attn.k_proj(block.layer_norm1(states[layer]))[0].double().numpy()
        )
    keys = keys.reshape(len(keys), attention.shape[0], -1).mean(1)

    if hasattr(tower.embeddings, "class_embedding"):
        total = {
            p: sum(head[0, p] for head in attention) for p in range(1, len(hidden))
        }
        kept = sorted([0, *sorted(total, key=total.get, reverse=True)[: dominant - 1]])
    else:
        total = {
            p: sum(np.mean(head[:, p]) for head in attention)
            for p in range(len(hidden))
        }
        kept = sorted(sorted(total, key=total.get, reverse=True)[:dominant])
    rest = [p for p in range(len(hidden)) if p not in kept]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[i * step] for i in range(contextual)]
    joined = {t: [] for t in targets}
    for p in rest:
        if p not in joined and targets:
            cosine = [
                keys[p] @ keys[t] / np.linalg.norm(keys[p]) / np.linalg.norm(keys[t])
                for t in targets
            ]
            joined[targets[int(np.argmax(cosine))]].append(p)
    merged = [
        hidden[t] + (np.mean([hidden[p] for p in joined[t]], 0) if joined[t] else 0)
        for t in targets
    ]
    return kept, np.array([*hidden[kept], *merged])


@pytest.fixture(scope="module")
def exact_model():
    """In float64, so that a difference is a different algorithm and not rounding."""
    return llava().double()


@pytest.fixture(scope="module")
def siglip():
    """An encoder without CLS; 100 patches are more rows than are held at a time."""
    return llava(side=10, encoder="siglip_vision_model").double()


@pytest.mark.parametrize("seed", range(30))
def test_equals_transcription_without_cls(siglip, seed):
    test_equals_transcription(siglip, seed)


def test_without_cls_keeping_everything_is_the_stock_model(siglip):
    inputs = prompts(siglip, [[5, 6], [7]], [1, 2])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        stock = siglip(**inputs).logits
        with VisionZip(tokens=100).applied(siglip):
            assert torch.equal(siglip(**inputs).logits, stock)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [100, 200]


@pytest.mark.parametrize("seed", range(120))
def test_equals_transcription(exact_model, seed):
    rng = np.random.default_rng(seed)
    dominant = int(rng.integers(1, 35))
    contextual = int(rng.integers(0, 36 - dominant))
    inputs = prompts(exact_model, [[5, 6]], [1], seed)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    method = Watched(VisionZip(dominant=dominant, contextual=contextual))
    with torch.no_grad(), method.applied(exact_model):
        exact_model(**inputs)
    kept, features = transcription(
        exact_model, inputs["pixel_values"][0], dominant, contextual
    )
    assert method.reduced.kept[0].tolist() == kept
    np.testing.assert_allclose(method.reduced.features[0].numpy(), features, atol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_frames_of_videos_equal_transcription(seed):
    """With the CLS token of every frame, by the encoder for videos; an image in the same prompt by the other one."""
    model = video_llava(side=4).double()
    inputs = as_double(prompts(model, [[5]], [2], seed))
    dominant, contextual = 2 + seed % 7, seed % 4
    with torch.no_grad():
        made = reduced_inputs(
            model, inputs, VisionZip(dominant=dominant, contextual=contextual)
        )["mm_encoder_outputs"]
        for kind, pixels in (
            ("video", inputs["pixel_values_videos"][0]),
            ("image", inputs[pixels_name(model, "image")]),
        ):
            crops = [
                transcription(model, crop, dominant, contextual, f"{kind}_tower")[1]
                for crop in pixels
            ]
            expected = model.model.multi_modal_projector(
                torch.tensor(np.concatenate(crops))
            )
            torch.testing.assert_close(
                made[kind].pooler_output[0], expected, atol=1e-9, rtol=0
            )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("grid", [1, 2])
def test_mined_tokens_equal_transcription(grid, seed):
    """Mini-Gemini: chosen by what CLIP attends to, merged as they are after mining; whole and tiles by themselves."""
    model = mini_gemini(side=4, grid=grid).double()
    inputs = as_double(prompts(model, [[5]], [2], seed))
    dominant, contextual = 2 + seed % 7, seed % 4
    mined = []
    with torch.no_grad():
        hook = model.model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: mined.append(args[0])
        )
        model(**inputs)
        hook.remove()
        seen = model.model.low_resolution(inputs["pixel_values"])
        made = reduced_inputs(
            model, inputs, VisionZip(dominant=dominant, contextual=contextual)
        )["mm_encoder_outputs"]
        crops = [
            transcription(model, crop, dominant, contextual, selected=tokens)[1]
            for crop, tokens in zip(seen, mined[0], strict=True)
        ]
        expected = model.model.multi_modal_projector(
            torch.tensor(np.concatenate(crops))
        )
        torch.testing.assert_close(
            torch.cat(list(made["image"].pooler_output)), expected, atol=1e-6, rtol=0
        )


def as_double(inputs):
    return {
        name: tensor.double() if name.startswith("pixel") else tensor
        for name, tensor in inputs.items()
    }


@pytest.mark.parametrize(
    "tokens, split",
    [
        (192, (162, 30)),
        (128, (108, 20)),
        (64, (54, 10)),
        (32, (27, 5)),
        (17, (14, 3)),
        (1, (1, 0)),
        (3, (3, 0)),
    ],
)
def test_published_splits(tokens, split):
    assert VisionZip(tokens=tokens).split() == split


@pytest.mark.parametrize(
    "options, named",
    [
        ({"tokens": 64, "dominant": 54, "contextual": 11}, "tokens=64"),
        ({"tokens": 4, "dominant": 5}, "contextual=-1"),
        ({"dominant": 0, "contextual": 4}, "dominant=0"),
        ({"dominant": 8}, "tokens"),
    ],
)
def test_refuses_impossible_splits(options, named):
    with pytest.raises(ValueError, match=named):
        VisionZip(**options)


def answers(model, method, inputs, steps=6):
    """Greedy tokens and their logits."""
    with method.applied(model):
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


METHODS = [VisionZip(tokens=16), VisionZip(dominant=9, contextual=0), Random(tokens=7)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_batch_of_eight_equals_eight_singles(model, method):
    questions = [[5 + i] * (1 + i % 4) for i in range(8)]
    images = [1, 2, 1, 1, 3, 1, 2, 1]
    batch = prompts(model, questions, images)
    tokens, logits = answers(model, method, batch)
    at = 0
    for row, (question, count) in enumerate(zip(questions, images, strict=True)):
        single = prompts(model, [question], [count])
        single["pixel_values"] = batch["pixel_values"][at : at + count]
        at += count
        one_tokens, one_logits = answers(model, method, single)
        assert torch.equal(tokens[row], one_tokens[0])
        torch.testing.assert_close(logits[row], one_logits[0], atol=1e-4, rtol=0)


def test_generate_returns_the_prompt_it_was_given(model):
    inputs = prompts(model, [[5, 6], [7]], [1, 1])
    with VisionZip(tokens=10).applied(model):
        plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        positional = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            max_new_tokens=3,
            do_sample=False,
        )
        beams = model.generate(
            **inputs,
            max_new_tokens=3,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
        )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(plain, positional)
    assert torch.equal(plain[:, :length], inputs["input_ids"])
    assert torch.equal(beams[:, :length], inputs["input_ids"].repeat_interleave(2, 0))
    assert plain.shape[1] == beams.shape[1] == length + 3


def test_attention_kernel_stays(model):
    """Reduction must not turn SDPA off: the scored row is computed beside it."""
    inputs = prompts(model, [[5]], [1])
    with torch.no_grad(), torch.profiler.profile() as stock:
        model(**inputs)
    with (
        torch.no_grad(),
        VisionZip(tokens=10).applied(model),
        torch.profiler.profile() as reduced,
    ):
        model(**inputs)

    def calls(profile):
        return sum(
            e.count
            for e in profile.key_averages()
            if e.key == "aten::scaled_dot_product_attention"
        )

    assert calls(reduced) == calls(stock) == 4 + 3


@pytest.mark.parametrize(
    "change, named",
    [
        ({"attention_mask": None}, "attention_mask=None"),
        ({"labels": torch.zeros(2, 3)}, r"labels: \(2, 3\)"),
        (
            {"pixel_values": torch.zeros(3, 3, 84, 84)},
            "72 placeholders, the images or videos 108",
        ),
    ],
)
def test_refuses_inputs_it_would_get_wrong(model, change, named):
    inputs = {**prompts(model, [[5, 6], [7]], [1, 1]), **change}
    with VisionZip(tokens=10).applied(model), pytest.raises(ValueError, match=named):
        model(**inputs)


def test_two_vision_methods_at_once_are_refused(model):
    first, second = VisionZip(tokens=10).applied(model), Random(tokens=3).applied(model)
    with first, pytest.raises(RuntimeError, match="already applied"), second:
        pass


def test_text_alone_passes_through(model):
    inputs = {
        "input_ids": torch.tensor([[1, 5, 6]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
    }
    assert IMAGE not in inputs["input_ids"]
    assert torch.equal(
        answers(model, VisionZip(tokens=10), inputs)[1],
        answers(model, Vanilla(), inputs)[1],
    )


def test_random_depends_on_the_image_and_the_seed_alone(model):
    inputs = prompts(model, [[5], [6]], [1, 1])
    methods = [
        Watched(Random(tokens=9)),
        Watched(Random(tokens=9)),
        Watched(Random(tokens=9, seed=1)),
    ]
    flipped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    for method, given in zip(methods, (inputs, flipped, inputs), strict=True):
        with torch.no_grad(), method.applied(model):
            model(**given)
    first, second, reseeded = (m.reduced.kept for m in methods)
    assert torch.equal(first, second.flip(0))
    assert not torch.equal(first, reseeded)
    assert not torch.equal(first[0], first[1])
