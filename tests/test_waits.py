"""Nothing waits for the device while a prompt is read: not the encoder up to the projector, and not the decoder.

The device here holds no numbers: torch's fake tensors raise where one is asked for, or a shape that hangs on one. What
the host reads before anything is launched is given to it.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tiny import prompts, single
from tiny_methods import FAMILIES, LAYERS, METHODS, SIDE, make
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from zipeval.checkpoints import projector
from zipeval.engine import decoder, guard
from zipeval.engine.decoder import DecoderMethod
from zipeval.engine.images import PIXELS, pictures, tower
from zipeval.engine.ragged import compact_index, on_device
from zipeval.engine.vision import VisionMethod, encode_crops, reduce_and_pack
from zipeval.methods.fastv import FastV
from zipeval.methods.random import Random
from zipeval.methods.sparsevlm import SparseVLM

DEVICE = torch.device("cuda", 0)
QUESTIONS, IMAGES = (
    [[5, 9, 11], [7, 8, 21, 30, 31, 40, 12], [50, 51], [60, 61, 62]],
    [1, 2, 1, 0],
)
ALONE, RAGGED = [1], [0, 1, 2, 3]
WAITS = (DataDependentOutputException, DynamicOutputShapeException, AssertionError)
IN_DECODER = {
    "fastv-mean": FastV(ratio=0.5, score="mean"),
    "sparsevlm-2": SparseVLM(counts=(20, 9), after=(1, 3), version=2, of=36),
    "sparsevlm-all-of-some": SparseVLM(counts=(None, 9), after=(1, 3), of=36),
}


class Waits(TorchDispatchMode):
    """While `on`, raises for what fake tensors let pass: copies that are waited for, and masks as indices."""

    on = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        copied = (
            function is torch.ops.aten._to_copy.default and out.device != args[0].device
        )
        if self.on and copied and out.numel():  # transformers begins a cache with none
            assert out.device == DEVICE and kwargs.get("non_blocking"), (
                f"copied from {args[0].device} to {out.device}"
            )
        if self.on and function in (
            torch.ops.aten.index_put_.default,
            torch.ops.aten.index_put.default,
        ):
            assert all(i is None or i.dtype is not torch.bool for i in args[1]), (
                "a mask as an index"
            )
        return out

    def between(self, first, last) -> None:
        """From behind the pre-hooks of a module until another one is done."""
        first.register_forward_pre_hook(lambda *given: setattr(self, "on", True))
        last.register_forward_hook(lambda *given: setattr(self, "on", False))


@pytest.fixture
def waits():
    """What watches the device; while it is there, tensors hold no numbers."""
    with FakeTensorMode(), torch.no_grad(), Waits() as waits:
        yield waits


def build(family):
    return FAMILIES[family](side=SIDE, layers=LAYERS)


@cache
def real(family):
    return build(family)


def on_it(inputs: dict) -> dict:
    return {
        name: torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
        for name, x in inputs.items()
    }


def moved(model):
    """A model, to it; only the mode of its tensors can do that."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update(
                on_it(
                    {
                        name: tensor
                        for name, tensor in tensors.items()
                        if tensor is not None
                    }
                )
            )
    return model


def ask(family, rows):
    inputs = prompts(real(family), QUESTIONS, IMAGES)
    return single(real(family), inputs, IMAGES, rows[0]) if len(rows) == 1 else inputs


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 1],
        lambda x: x.masked_fill_(x > 1, 0).nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.__setitem__(x[:, 0] > 1, x[:1]),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1], device=DEVICE),
        lambda x: compact_index(x > 1),
    ],
)
def test_a_wait_is_noticed(waits, wait):
    x = torch.empty(2, 3, device=DEVICE)
    waits.on = True
    with pytest.raises(WAITS):
        wait(x)
    assert on_device([1, 2], DEVICE).device == DEVICE


@pytest.mark.parametrize(
    ("family", "rows"), [("llava", ALONE), *((family, RAGGED) for family in FAMILIES)]
)
@pytest.mark.parametrize("name", METHODS)
def test_before_the_decoder(request, monkeypatch, name, family, rows):
    method = make(name, real(family))
    method = getattr(method, "first", method)
    if not isinstance(method, VisionMethod):
        pytest.skip("a method of another stage")
    inputs = ask(family, rows)
    images = {kind: pictures(real(family), inputs, kind) for kind in PIXELS}
    monkeypatch.setattr(
        Random,
        "_choose",
        lambda self, image, patches: torch.arange(self.tokens, device=image.device),
    )
    model = build(family)
    sizes = inputs.pop("image_sizes").tolist() if "image_sizes" in inputs else None
    waits = request.getfixturevalue("waits")
    model, inputs = moved(model), on_it(inputs)
    tuned = dict(model.model.multi_modal_projector.named_parameters())
    monkeypatch.setattr(
        projector, "weights", lambda *given: tuned
    )  # which are read from a file once
    for kind, its in images.items():
        if its:
            tower(model, kind).embeddings.register_forward_pre_hook(
                lambda *given: setattr(waits, "on", True)
            )
            crops = encode_crops(
                model, {**inputs, "image_sizes": sizes}, kind, reads_pixels=False
            )
            left = reduce_and_pack(model, crops, its, sizes, method)
            waits.on = False
            assert [len(picture.features) for picture in left] == [
                method.num_tokens(image) for image in its
            ]


@pytest.mark.parametrize("rows", [ALONE, RAGGED], ids=["alone", "ragged"])
@pytest.mark.parametrize("name", [*METHODS, *IN_DECODER])
def test_in_the_decoder(request, monkeypatch, name, rows):
    method = IN_DECODER.get(name) or make(name, real("llava"))
    method = getattr(method, "second", method)
    if not isinstance(method, DecoderMethod):
        pytest.skip("a method of another stage")
    inputs = ask("llava", rows)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    read = decoder._inspect_prompts(
        prompt["input_ids"], prompt["attention_mask"].bool(), real("llava").config
    )
    monkeypatch.setattr(decoder, "_inspect_prompts", lambda *given: read)
    monkeypatch.setattr(
        decoder.PrefillHooks, "leave", lambda *given: None
    )  # the waits behind it all
    monkeypatch.setattr(guard, "check_scores", lambda *given: None)
    asked = []  # masks that transformers looks for padding in, which waits for them
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *given: False)
    monkeypatch.setattr(masking_utils, "fast_all", asked.append)
    model = build("llava")
    waits = request.getfixturevalue("waits")
    model = moved(model)
    text = model.model.language_model
    with method.applied(model):
        waits.between(text, text)
        text.layers[0].register_forward_pre_hook(
            lambda *given: asked.clear()
        )  # the stock model looks, once a call
        out = model(**on_it(prompt), use_cache=True)
        lengths = [out.past_key_values.get_seq_length(layer) for layer in range(LAYERS)]
        expected = [
            max(
                len(r.ids) - r.visual + method.schedule(r.visual, LAYERS)[k]
                for r in read
            )
            for k in range(LAYERS)
        ]
        assert (
            lengths
            == [inputs["input_ids"].shape[1]] * method.layers(LAYERS)[0]
            + expected[method.layers(LAYERS)[0] :]
        )
        assert asked == []
        waits.on = True  # a decoding step reads nothing at all
        mask = torch.ones(len(read), prompt["input_ids"].shape[1] + 1, device=DEVICE)
        model(
            input_ids=torch.zeros(len(read), 1, dtype=torch.long, device=DEVICE),
            attention_mask=mask.long(),
            past_key_values=out.past_key_values,
        )
        assert asked == []
