"""What holds for every method on every model family; whoever adds one is found by listing its folder."""

from __future__ import annotations

import hashlib
import tempfile
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save
from tiny import FRAMES, IMAGE, VIDEO, llava, llava_next, mini_gemini, pictures_of, prompts, single, video_llava

import zipeval.configs
import zipeval.methods
import zipeval.models
from zipeval.budget import Shape
from zipeval.cli import compose
from zipeval.engine import decoder
from zipeval.engine.ledger import ledger
from zipeval.engine.vision import VisionMethod
from zipeval.methods import build

SIDE, LAYERS = 6, 6
QUESTIONS, IMAGES = [[5, 9, 11], [7, 8, 21, 30, 31, 40, 12], [50, 51]], [1, 2, 1]


def found(package):
    return sorted(path.stem for path in Path(package.__path__[0]).glob("[a-z]*.py"))


METHODS = found(zipeval.methods)
DRAWN = tempfile.TemporaryDirectory()  # of projectors
FAMILIES = {
    "llava": llava,
    "llava_next": llava_next,
    "mini_gemini": mini_gemini,
    "mini_gemini_hd": partial(mini_gemini, grid=2),
    "video_llava": video_llava,
}
SHAPES = {
    "llava": Shape(36, 36, LAYERS),
    "mini_gemini": Shape(36, 36, LAYERS),
    "mini_gemini_hd": Shape(180, 180, LAYERS, grids=((5, 0),)),
    "llava_next": Shape(180, 180, LAYERS, grids=((3, 0), (4, 0), (5, 0))),
    "video_llava": Shape(FRAMES * 37, FRAMES * 37, LAYERS, grids=((1, 0), (FRAMES, 0))),
}


def shape_of(model):
    hd = getattr(model.config, "image_grid", 1) > 1
    return SHAPES[model.config.model_type + ("_hd" if hd else "")]


def takes_a_budget(name):
    return "tokens" in OmegaConf.load(Path(zipeval.configs.__path__[0], "method", f"{name}.yaml"))


def make(name, model, tokens=None, budget="mean"):
    """A method that leaves a third, unless it is told otherwise."""
    shape = shape_of(model)
    tokens = tokens or third(model)
    more = [f"method.first.tokens={(shape.image + tokens) // 2}"] if name == "chain" else []
    if name == "visionzip_tuned":
        more = [f"projector={drawn(model, 0.0 if tokens == shape.image else 0.1)}"]
    config = compose([f"method={name}", f"tokens={tokens}", f"budget={budget}", *more])
    return build(config.method, budget, shape)


def drawn(model, noise):
    """A file with the model's projector, and so much noise on it: what is tuned is of the same size."""
    weights = {name: t.float() for name, t in model.model.multi_modal_projector.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {name: t + noise * torch.randn(t.shape, generator=generator) for name, t in weights.items()}
    content = save(weights)
    path = Path(DRAWN.name, f"{hashlib.sha256(content).hexdigest()}.safetensors")
    path.write_bytes(content)
    return path


def third(model):
    """In a number that is a grid, as pooling needs it."""
    return shape_of(model).image // 36 * 12


@cache
def tiny(family, dtype=torch.double):
    """In float64 a choice that hangs on rounding is nobody's error."""
    return FAMILIES[family](side=SIDE, layers=LAYERS, gain=1.0).to(dtype)


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def ask(model, images):
    return pixels_as(torch.double, prompts(model, QUESTIONS, images))


def pixels_as(dtype, batch):
    return {name: tensor.to(dtype) if name.startswith("pixel") else tensor for name, tensor in batch.items()}


@pytest.fixture
def inputs(model):
    return ask(model, IMAGES)


def answer(model, inputs, new=3, **options):
    """Greedy tokens (B, new) and their logits (B, new, V); a random model could answer with a placeholder."""
    options |= {"max_new_tokens": new, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences[:, -new:], torch.stack(out.logits, 1)


def assert_close(actual, expected):
    assert actual[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=0)


def snapshot(model):
    """Everything a method could leave behind: attributes and hooks of every module, parameters, buffers."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return (
        {n: sorted((k, id(v)) for k, v in vars(m).items() if k not in hooks) for n, m in model.named_modules()},
        {n: [len(vars(m)[h]) for h in hooks] for n, m in model.named_modules()},
        {n: (id(t), t._version) for n, t in model.state_dict(keep_vars=True).items()},
        vars(type(model)).copy(),
    )


def test_every_family_is_tried():
    assert found(zipeval.models) == sorted(name for name in FAMILIES if name != "mini_gemini_hd")


def test_every_method_has_its_configuration(name):
    assert compose([f"method={name}", "tokens=9", *["method.first.tokens=9"][: name == "chain"]]).method["name"] == name


@pytest.mark.parametrize("name", [n for n in METHODS if takes_a_budget(n) or n == "vanilla"])
def test_keeping_everything_is_the_stock_model(name):
    """Exactly, in float32."""
    for family, build_model in FAMILIES.items():
        model = build_model(side=SIDE, layers=LAYERS)
        inputs = prompts(model, QUESTIONS, IMAGES)
        stock = answer(model, inputs)
        with make(name, model, SHAPES[family].image).applied(model):
            tokens, logits = answer(model, inputs)
        assert torch.equal(tokens, stock[0])
        assert (logits - stock[1]).abs().max() == 0.0


@pytest.mark.parametrize("budget", ["mean", "final"])
def test_the_budget_is_met(model, inputs, name, budget):
    method = make(name, model, budget=budget)
    with torch.no_grad(), method.applied(model), ledger(model) as prefills:
        model(**inputs)
    (prefill,) = prefills
    tokens = third(model)
    for row, its in enumerate(pictures_of(model, inputs, IMAGES)):
        entering = prefill.visual(row)
        assert entering == method.entering(its, LAYERS)
        if takes_a_budget(name) and (len(shape_of(model).grids) == 1 or isinstance(method, VisionMethod)):
            reached = fmean(entering) if budget == "mean" else entering[-1]
            assert reached == pytest.approx(sum(min(tokens, picture.tokens) for picture in its), abs=len(its))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """As on a GPU: it runs, leaves as many tokens, and gives numbers."""
    for family in FAMILIES:
        model = tiny(family, dtype)
        inputs = pixels_as(dtype, prompts(model, QUESTIONS, IMAGES))
        with make(name, model).applied(model), ledger(model) as prefills:
            _, logits = answer(model, inputs)
        assert logits.isfinite().all()
        assert prefills[0].visual(0) == make(name, model).entering(pictures_of(model, inputs, IMAGES)[0], LAYERS)


def workers(method, model):
    """The objects that do the work: of both parts of a chain, and of the crops of an image."""
    for part in (getattr(method, "first", method), getattr(method, "second", None)):
        if isinstance(part, VisionMethod):
            yield part.of_crops(shape_of(model).picture)[0]
        elif isinstance(part, decoder.DecoderMethod):
            yield part


def keep(monkeypatch, owner, name, results):
    """Let `results` collect what a function returns."""
    function = getattr(owner, name)

    def kept(*given):
        results.append(function(*given))
        return results[-1]

    monkeypatch.setattr(owner, name, kept)


def test_order_is_preserved(model, inputs, name, monkeypatch):
    """Of what is kept as it was, in the encoder's sequence and in the decoder's."""
    in_encoder, in_decoder = [], []
    method = make(name, model)
    for worker in workers(method, model):
        if isinstance(worker, VisionMethod):
            keep(monkeypatch, type(worker), "reduce", in_encoder)
    keep(monkeypatch, decoder, "_placed", in_decoder)
    with torch.no_grad(), method.applied(model):
        model(**inputs)
    assert in_encoder or in_decoder or name == "vanilla"
    for reduced in in_encoder:
        assert (reduced.kept.diff(dim=1) > 0).all()
    for index, valid, (*_, source) in in_decoder:
        for row in torch.where(valid, source.gather(1, index), -1):
            assert (row[row >= 0].diff() > 0).all()


def test_a_batch_equals_singles(model, inputs, name):
    with make(name, model).applied(model):
        tokens, logits = answer(model, inputs)
        for row in range(len(IMAGES)):
            one = single(model, inputs, IMAGES, row)
            assert_close((tokens[row : row + 1], logits[row : row + 1]), answer(model, one))


def test_cached_decoding_equals_recomputing(model, inputs, name):
    """Step by step on one cache, and for every step from the prompt anew.

    Inside the decoder, what a prompt keeps is chosen when it is read, so there the answer so far is read in a second
    call; before it, everything is read at once. tests/oracle.py recomputes without any cache.
    """
    at_once = not isinstance(getattr(make(name, model), "second", make(name, model)), decoder.DecoderMethod)
    with torch.no_grad(), make(name, model).applied(model):
        tokens, logits = answer(model, inputs)
        for step in range(1, tokens.shape[1]):
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, :step])], 1)
            if at_once:
                ids = torch.cat([inputs["input_ids"], tokens[:, :step]], 1)
                again = model(**{**inputs, "input_ids": ids, "attention_mask": mask})
            else:
                with ledger(model) as prefills:
                    read = model(**inputs, use_cache=True).past_key_values
                kept = [[0] * (read.get_seq_length() - n[0]) + [1] * (n[0] + step) for n in prefills[0].entered]
                again = model(input_ids=tokens[:, :step], attention_mask=torch.tensor(kept), past_key_values=read)
            torch.testing.assert_close(logits[:, step], again.logits[:, -1], atol=1e-5, rtol=0, check_dtype=False)


def test_nothing_is_left_on_the_model(model, inputs, name):
    stock = answer(model, inputs)
    before = snapshot(model)
    with make(name, model).applied(model):
        answer(model, inputs)
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), make(name, model).applied(model):
        model(**inputs)
        raise ZeroDivisionError
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(answer(model, inputs), stock, strict=True))


def test_a_method_that_fails_leaves_nothing_either(model, inputs, name, monkeypatch):
    method = make(name, model)
    for worker in workers(method, model):
        monkeypatch.setattr(type(worker), "reduce", lambda *given: 1 / 0)
    answer(model, inputs)  # transformers notes things on a model at its first call
    before = snapshot(model)
    if name != "vanilla":
        with pytest.raises(ZeroDivisionError), method.applied(model):
            answer(model, inputs)
    assert snapshot(model) == before


def test_methods_used_one_after_another_do_not_meet(model, inputs, name):
    stock = answer(model, inputs)
    with make(name, model).applied(model):
        alone = answer(model, inputs)
    for other in ("visionzip", "sparsevlm"):
        with make(other, model).applied(model):
            answer(model, inputs)
        with make(name, model).applied(model):
            again = answer(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(answer(model, inputs), stock, strict=True))
