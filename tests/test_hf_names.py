"""What happens where transformers calls a thing by another name, or calls its layers another way: an error, and never
another answer.
"""

from __future__ import annotations

import inspect
import types
from functools import cache

import pytest
import torch
from tiny import IMAGE, VIDEO, pictures_of, prompts, single
from tiny_methods import FAMILIES, METHODS, SIDE, answer, make

from zipeval.engine import hf_names
from zipeval.errors import IncompatibleError
from zipeval.methods.chain import Chain
from zipeval.methods.fastv import FastV
from zipeval.methods.random import Random
from zipeval.methods.sparsevlm import SparseVLM
from zipeval.methods.uniform import Uniform
from zipeval.methods.visionzip import VisionZip

QUESTIONS, IMAGES = [[5, 9, 11], [7, 8, 21, 30, 31]], [1, 1]
REDUCING = [name for name in METHODS if name != "vanilla"]
NONSENSE = "kv_store"


def tiny(family="llava"):
    """A model of its own, as its classes and hooks are changed."""
    return FAMILIES[family](side=SIDE, layers=6, gain=1.0)


def ask(model):
    return prompts(model, QUESTIONS, IMAGES)


def generate(model, inputs, new=3):
    return model.generate(
        **inputs, max_new_tokens=new, do_sample=False, suppress_tokens=[IMAGE, VIDEO]
    )


def rename(arguments: dict, old: str, new: str) -> dict:
    return {new if name == old else name: value for name, value in arguments.items()}


def renamed_forward(module, old: str, new: str) -> None:
    """Let the class of a module take an argument under another name, as the next transformers might."""
    stock = type(module).forward

    def forward(self, *args, **kwargs):
        return stock(self, *args, **rename(kwargs, new, old))

    parameters = inspect.signature(stock).parameters.values()
    forward.__signature__ = inspect.Signature(
        [p.replace(name=new) if p.name == old else p for p in parameters]
    )
    module.__class__ = types.new_class(
        type(module).__name__,
        (type(module),),
        exec_body=lambda ns: ns.update(forward=forward),
    )


def rename_in_layers(model, old: str, new: str) -> None:
    """Let the decoder call its layers with another name for an argument, which they still understand."""
    for layer in hf_names.decoder(model).layers:
        stock = layer.forward
        layer.forward = lambda *args, stock=stock, **kwargs: stock(
            *args, **rename(kwargs, new, old)
        )
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, rename(kwargs, old, new)),
            with_kwargs=True,
            prepend=True,
        )


def cache_name(model) -> str:
    return next(iter(hf_names.cache_argument(model, None)))


@pytest.mark.parametrize("name", REDUCING)
def test_a_cache_of_another_name_in_the_layers(name):
    model = tiny()
    inputs = ask(model)
    rename_in_layers(model, cache_name(model), NONSENSE)
    stock = generate(model, inputs)
    assert stock.shape[1] == inputs["input_ids"].shape[1] + 3
    with (
        make(name, model).applied(model),
        pytest.raises(IncompatibleError, match=f"without cache.*{NONSENSE}"),
    ):
        generate(model, inputs)
    assert torch.equal(generate(model, inputs), stock)


@pytest.mark.parametrize("argument", hf_names.LAYER_ARGUMENTS)
@pytest.mark.parametrize("name", ["visionzip", "fastv", "chain"])
def test_another_name_of_any_argument_in_the_layers(name, argument):
    model = tiny()
    rename_in_layers(model, argument, NONSENSE)
    with (
        make(name, model).applied(model),
        pytest.raises(IncompatibleError, match=f"without {argument}"),
    ):
        generate(model, ask(model))


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_another_name_in_the_whole_of_transformers(
    family, name, monkeypatch
):
    """Every argument and every field of outputs, from `generate` to the attention."""
    model = tiny(family)
    inputs = ask(model)
    monkeypatch.setattr(
        hf_names, "CACHE", (NONSENSE,)
    )  # so that its names today are unknown to us
    with make(name, model).applied(model), pytest.raises(IncompatibleError) as error:
        generate(model, inputs)
    for told in (
        hf_names.TESTED[0],
        hf_names.TESTED[1],
        "pip install",
        "zipeval doctor",
    ):
        assert told in str(error.value)


@pytest.mark.parametrize("argument", hf_names.MODEL_ARGUMENTS)
@pytest.mark.parametrize("name", ["visionzip", "fastv"])
def test_another_name_of_any_argument_of_the_model(name, argument):
    model = tiny()
    renamed_forward(model, argument, NONSENSE)
    with (
        make(name, model).applied(model),
        pytest.raises(IncompatibleError, match=f"has no argument {argument}"),
    ):
        model(**ask(model))


def test_pixels_of_another_name():
    """They would be somebody else's arguments to the vision stage, and the image's places text."""
    model = tiny()
    inputs = rename(ask(model), "pixel_values", "pixels")
    with (
        VisionZip(tokens=9).applied(model),
        pytest.raises(ValueError, match="none of pixel_values"),
    ):
        model(**inputs)


@pytest.mark.parametrize("method", [VisionZip(tokens=9), FastV(keep=9)], ids=repr)
def test_a_step_that_does_not_go_on_with_the_cache(method):
    """As a decoding loop does that hands the cache over under another name."""
    model = tiny()
    stock = model.prepare_inputs_for_generation

    def forgetful(*args, **kwargs):
        made = stock(*args, **kwargs)
        made[cache_name(model)] = None
        return made

    model.prepare_inputs_for_generation = forgetful
    with (
        method.applied(model),
        pytest.raises(IncompatibleError, match="does not go on with the cache"),
    ):
        generate(model, ask(model))


@pytest.mark.parametrize(
    "method", [VisionZip(tokens=9), FastV(keep=9), SparseVLM((9,), (0,))], ids=repr
)
class TestCallsThatAreNotSeen:
    def test_generate_that_never_calls_the_model(self, method, monkeypatch):
        model = tiny()
        inputs = ask(model)
        monkeypatch.setattr(
            type(model), "generate", lambda self, **given: given["input_ids"]
        )
        with (
            method.applied(model),
            pytest.raises(IncompatibleError, match="does not call the model"),
        ):
            model.generate(**inputs, max_new_tokens=2)

    def test_layers_that_are_not_called(self, method):
        """Their code is, past their hooks."""
        model = tiny()
        inputs = ask(model)

        class Direct(type(hf_names.decoder(model).layers[0])):
            def __init__(self, layer):
                torch.nn.Module.__init__(self)
                self.layer = layer
                self.self_attn = layer.self_attn

            def __call__(self, *args, **kwargs):
                return self.layer.forward(*args, **kwargs)

        with method.applied(model):
            layers = hf_names.decoder(model).layers
            stock = [*layers]
            for number, layer in enumerate(stock):
                layers[number] = Direct(layer)
            with pytest.raises(IncompatibleError, match=r"did not fire|does not call"):
                generate(model, inputs)
            for number, layer in enumerate(stock):
                layers[number] = layer

    def test_the_decoder_without_its_model(self, method):
        """It has no ids, so that nothing tells where images are; at first, and behind a call that told."""
        model = tiny()
        inputs = ask(model)
        with method.applied(model), torch.no_grad():
            for _ in range(2):
                with pytest.raises(ValueError, match="called without its model"):
                    model.model(**inputs)
                model(**inputs)

    def test_a_layer_that_gets_more_than_it_should(self, method):
        model = tiny()
        with method.applied(model), torch.no_grad():
            hook = (
                hf_names.decoder(model)
                .layers[-1]
                .register_forward_pre_hook(
                    lambda module, args: (
                        torch.cat([args[0], args[0][:, -1:]], 1),
                        *args[1:],
                    ),
                    prepend=False,
                )
            )
            # Hooks of the method come first: what it counts is what it left.
            try:
                with pytest.raises((IncompatibleError, RuntimeError)):
                    model(**ask(model))
            finally:
                hook.remove()


def test_attention_whose_projections_are_not_called():
    model = tiny()
    attention = hf_names.decoder(model).layers[1].self_attn

    class Fused(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def __call__(self, x):
            return self.linear.forward(x)

    with FastV(keep=9).applied(model), torch.no_grad():
        attention.k_proj, stock = Fused(attention.k_proj), attention.k_proj
        with pytest.raises(IncompatibleError, match="q_proj and k_proj"):
            model(**ask(model))
        attention.k_proj = stock


@cache
def model_of(family):
    return tiny(family)


class TestMoreThanThereIs:
    @pytest.mark.parametrize(
        "method",
        [
            VisionZip(tokens=9999),
            VisionZip(dominant=30, contextual=7),
            Random(tokens=37),
            Uniform(tokens=40),
        ],
    )
    def test_before_the_decoder(self, method):
        with (
            pytest.raises(ValueError, match="has 36 visual tokens in an image"),
            method.applied(model_of("llava")),
        ):
            pass

    @pytest.mark.parametrize(
        "method",
        [
            FastV(keep=37),
            SparseVLM((40, 39, 38), (0, 1, 2)),
            Chain(VisionZip(tokens=9), FastV(keep=10)),
        ],
    )
    def test_inside_the_decoder(self, method):
        with (
            pytest.raises(ValueError, match="nothing would be removed"),
            method.applied(model_of("llava")),
        ):
            pass

    def test_all_of_it_is_allowed(self):
        model = model_of("llava")
        with torch.no_grad():
            stock = model(**ask(model)).logits
            for method in (VisionZip(tokens=36), FastV(keep=36)):
                with method.applied(model):
                    assert torch.equal(model(**ask(model)).logits, stock)

    def test_a_crop_of_tiles(self):
        with (
            pytest.raises(ValueError, match="36 visual tokens in a crop"),
            VisionZip(tokens=37).applied(model_of("llava_next")),
        ):
            pass


class TestApplied:
    """What a block says of the prompts that were read last."""

    @pytest.mark.parametrize("name", REDUCING)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_what_entered_the_layers(self, family, name):
        model = model_of(family)
        inputs, method = (
            prompts(model, [[5, 9], [7, 8, 9], [5]], [1, 2, 0]),
            make(name, model_of(family)),
        )
        pictures = pictures_of(model, inputs, [1, 2, 0])
        with method.applied(model) as applied, torch.no_grad():
            assert applied.visual_tokens == []
            generate(model, inputs)
            assert applied.visual_tokens == [
                method.tokens_per_layer(row, 6) for row in pictures
            ]
            model(**single(model, inputs, [1, 2, 0], 0))
            assert applied.visual_tokens == [method.tokens_per_layer(pictures[0], 6)]
            text = single(model, inputs, [1, 2, 0], 2)
            model(**{name: text[name] for name in ("input_ids", "attention_mask")})
            assert applied.visual_tokens == [[0] * 6]


def test_answers_with_a_cache_under_either_name():
    """The name of before 5.24 is still taken from callers."""
    from transformers import DynamicCache

    model = model_of("llava")
    inputs = ask(model)
    for method in (VisionZip(tokens=9), FastV(keep=9)):
        with method.applied(model):
            expected = answer(model, inputs)
            for name in {cache_name(model), "past_key_values"}:
                mine = {name: DynamicCache(config=model.config)}
                assert torch.equal(answer(model, {**inputs, **mine})[1], expected[1])
