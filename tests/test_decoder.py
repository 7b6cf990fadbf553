"""The decoder engine with FastV and SparseVLM: against an oracle, in batches, with every kind of generation."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from tiny import llava, prompts
from transformers import StaticCache

from zipeval.errors import BudgetError
from zipeval.methods.fastv import FastV
from zipeval.methods.sparsevlm import SparseVLM

LAYERS = 6
PATCHES = 100
QUESTIONS = [[5, 9, 11], [7, 8, 21, 30, 31, 40, 12], [50, 51, 52, 53, 60]]
METHODS = {
    "fastv": FastV(keep=9),
    "fastv-mean": FastV(keep=9, score="mean"),
    "sparsevlm": SparseVLM(counts=(30, 12, 5), after=(1, 2, 4), noise=0),
    "sparsevlm-2": SparseVLM(counts=(30, 12, 5), after=(1, 2, 4), version=2, heads=3),
}


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "gemma"])
def model(request):
    return llava(side=10, decoder=request.param, layers=LAYERS, gain=1.0)


@pytest.fixture(scope="module")
def llama():
    """In float64: a choice that hangs on rounding is nobody's error."""
    return llava(side=10, layers=LAYERS, gain=1.0).double()


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def generate(model, inputs, new=6, **options):
    """(tokens (B, new), logits (B, new, V))."""
    out = model.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[:, -new:], torch.stack(out.logits, 1)


def ask(model, images=(1, 1, 1)):
    inputs = prompts(model, QUESTIONS, images)
    return {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}


def one(inputs, row):
    """Row `row` of prompts with one image each, without its padding."""
    length = int(inputs["attention_mask"][row].sum())
    alone = {
        k: v[row : row + 1, -length:] for k, v in inputs.items() if k != "pixel_values"
    }
    return {**alone, "pixel_values": inputs["pixel_values"][row : row + 1]}


def assert_same(actual, expected):
    assert actual[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("engine", "slow"),
    [
        (FastV(keep=9, K=1), oracle.fastv(1, 9)),
        (FastV(keep=20, K=2), oracle.fastv(2, 20)),
        (FastV(ratio=0.9, K=4), oracle.fastv(4, 10)),
        (FastV(keep=0, K=3), oracle.fastv(3, 0)),
        (FastV(keep=9, K=2, score="mean"), oracle.fastv(2, 9, mean=True)),
        (
            SparseVLM((30, 12, 5), (1, 2, 4), noise=0),
            lambda: oracle.sparsevlm((30, 12, 5), (1, 2, 4)),
        ),
        (
            SparseVLM((10, 4), (0, 3), noise=0),
            lambda: oracle.sparsevlm((10, 4), (0, 3)),
        ),
        (
            SparseVLM((30, 12, 5), (1, 2, 4), version=2, heads=2),
            lambda: oracle.sparsevlm_plus((30, 12, 5), (1, 2, 4), 2, 12),
        ),
        (
            SparseVLM((120, 90), (1, 2), noise=0),
            lambda: oracle.sparsevlm((120, 90), (1, 2)),
        ),
        (
            SparseVLM((10, 4), (0, 3), version=2),
            lambda: oracle.sparsevlm_plus((10, 4), (0, 3), 4, 12),
        ),
    ],
    ids=lambda v: str(v) if not callable(v) else "",
)
def test_batches_agree_with_the_oracle(model, engine, slow):
    model = copy.deepcopy(model).double()
    inputs = ask(model)
    with engine.applied(model):
        tokens, logits = generate(model, inputs)
    for row in range(3):
        alone = one(inputs, row)
        fresh = slow() if isinstance(engine, SparseVLM) else slow
        expected = oracle.greedy(
            model, alone["input_ids"][0], alone["pixel_values"], fresh, 6
        )
        assert tokens[row].tolist() == expected[0]
        torch.testing.assert_close(
            logits[row], expected[1], atol=1e-5, rtol=0, check_dtype=False
        )


def test_prompts_with_none_one_and_two_images(llama, method):
    """Per-prompt counts; a prompt without images is answered as by the stock model."""
    inputs = ask(llama, [0, 1, 2])
    text = {
        "input_ids": torch.tensor([[1, *QUESTIONS[0]]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
    }
    stock = generate(llama, text)
    with method.applied(llama):
        tokens, logits = generate(llama, inputs)
    assert_same((tokens[:1], logits[:1]), stock)


def test_a_later_turn_on_the_reduced_cache(llama, method):
    """Two turns in two calls equal the same tokens read one at a time."""
    inputs = ask(llama)
    more = torch.tensor([[33, 34, 35], [36, 37, 38], [0, 39, 41]])
    more_mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1]])
    mask = torch.cat([inputs["attention_mask"], more_mask], 1)
    with method.applied(llama), torch.no_grad():
        first = llama(**inputs, use_cache=True)
        twin = copy.deepcopy(inputs)
        together = llama(
            input_ids=more, attention_mask=mask, past_key_values=first.past_key_values
        ).logits[:, -1]
        second = llama(**twin, use_cache=True).past_key_values
        width = inputs["input_ids"].shape[1]
        for step in range(3):
            logits = llama(
                input_ids=more[:, step : step + 1],
                attention_mask=mask[:, : width + step + 1],
                past_key_values=second,
            ).logits
    torch.testing.assert_close(together[:2], logits[:2, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_beam_search_in_a_batch_equals_single(llama, method, options):
    inputs = ask(llama)
    each = options.get("num_return_sequences", 1)
    with method.applied(llama):
        together = llama.generate(
            **inputs, max_new_tokens=5, do_sample=False, **options
        )[:, -5:]
        for row in range(3):
            alone = llama.generate(
                **one(inputs, row), max_new_tokens=5, do_sample=False, **options
            )[:, -5:]
            assert together[row * each : (row + 1) * each].tolist() == alone.tolist()


def test_sampling_draws_from_the_reduced_model(llama, method):
    inputs = one(ask(llama), 0)
    with method.applied(llama):
        greedy, _ = generate(llama, inputs)
        sampled = llama.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=1)[
            :, -6:
        ]
    assert sampled.tolist() == greedy.tolist()


def test_eager_attention_equals_sdpa(llama, method):
    inputs = one(ask(llama), 1)
    with method.applied(llama):
        sdpa = generate(llama, inputs)
        llama.set_attn_implementation("eager")
        try:
            eager = generate(llama, inputs)
        finally:
            llama.set_attn_implementation("sdpa")
    assert_same(eager, sdpa)


def test_noise_depends_on_the_prompt_alone(llama):
    """Exact ties in density are decided by noise: in any order and any company in the same way."""
    noisy = SparseVLM(counts=(30, 12, 5), after=(1, 2, 4), noise=10.0)
    inputs = ask(llama)
    with noisy.applied(llama):
        tokens, logits = generate(llama, inputs)
        again = generate(llama, inputs)
        assert torch.equal(logits, again[1])
        for row in range(3):
            assert_same(
                (tokens[row : row + 1], logits[row : row + 1]),
                generate(llama, one(inputs, row)),
            )
    with SparseVLM(counts=(30, 12, 5), after=(1, 2, 4), noise=10.0, seed=1).applied(
        llama
    ):
        assert not torch.equal(generate(llama, inputs)[1], logits)


def test_nothing_of_a_prompt_that_failed_is_kept(llama, monkeypatch):
    def exhausted(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with METHODS["fastv"].applied(llama):
        generate(llama, ask(llama))
        calls = next(hook.__self__ for hook in llama._forward_hooks.values())
        monkeypatch.setattr(FastV, "reduce", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            generate(llama, ask(llama))
        assert (
            calls.prompts,
            calls.ids,
            calls.new,
            calls.arguments_from,
            calls.wrong_counts,
        ) == (
            None,
            None,
            None,
            {},
            [],
        )


class TestRefusals:
    def test_more_layers_than_there_are(self, llama):
        with (
            pytest.raises(ValueError, match="layers 1 to 5"),
            FastV(keep=9, K=6).applied(llama),
        ):
            pass

    def test_two_methods_at_once(self, llama):
        with (
            pytest.raises(RuntimeError, match="already"),
            FastV(keep=9).applied(llama),
            FastV(keep=3).applied(llama),
        ):
            pass

    def test_labels(self, llama):
        inputs = ask(llama)
        with pytest.raises(ValueError, match="labels"), FastV(keep=9).applied(llama):
            llama(**inputs, labels=inputs["input_ids"])

    def test_static_cache(self, llama):
        inputs = ask(llama)
        cache = StaticCache(config=llama.config.text_config, max_cache_len=99)
        with pytest.raises(ValueError, match="static"), FastV(keep=9).applied(llama):
            llama(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="static"), FastV(keep=9).applied(llama):
            llama.generate(**inputs, max_new_tokens=2, cache_implementation="static")

    @pytest.mark.parametrize(
        "size", [16, 105]
    )  # the image in several chunks, or all of it in the first
    def test_a_prompt_in_chunks(self, llama, size):
        inputs = ask(llama)
        with (
            pytest.raises(ValueError, match="prefill_chunk_size"),
            FastV(keep=9).applied(llama),
        ):
            llama.generate(**inputs, max_new_tokens=2, prefill_chunk_size=size)

    def test_a_decoder_that_scores_would_be_wrong_of(self, llama):
        model = llava(decoder="qwen3", layers=3)
        with (
            pytest.raises(ValueError, match="model_type=qwen3"),
            FastV(keep=9).applied(model),
        ):
            pass

    def test_a_prompt_that_ends_in_its_image(self, llama):
        inputs = {
            k: v[:, :-7] if k != "pixel_values" else v for k, v in ask(llama).items()
        }
        with (
            pytest.raises(ValueError, match="ends in an image"),
            METHODS["sparsevlm"].applied(llama),
        ):
            llama(**one(inputs, 1))

    def test_padding_on_the_right(self, llama):
        inputs = ask(llama)
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        with pytest.raises(ValueError, match="left"), FastV(keep=9).applied(llama):
            llama(**inputs)

    def test_a_method_that_leaves_more_than_it_says(self, llama):
        class Generous(FastV):
            def schedule(self, visual, depth):
                return [visual] * self.K + [visual - 1] * (depth - self.K)

        with (
            pytest.raises(BudgetError, match="Generous"),
            Generous(ratio=0.0).applied(llama),
            torch.no_grad(),
        ):
            llama(**one(ask(llama), 1))

    def test_a_foreign_cache(self, llama):
        inputs = ask(llama)
        with torch.no_grad():
            cache = llama(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="outside"), FastV(keep=9).applied(llama):
            llama(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)

    def test_a_cropped_cache(self, llama):
        inputs = ask(llama)
        with FastV(keep=9).applied(llama), torch.no_grad():
            cache = llama(**inputs, use_cache=True).past_key_values
            cache.crop(-2)
            with pytest.raises(ValueError, match="cropped"):
                llama(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)

    def test_a_sliding_window(self):
        model = llava(decoder="mistral", layers=3)
        model.config.text_config.sliding_window = 8
        with pytest.raises(ValueError, match="sliding"), FastV(keep=9).applied(model):
            pass
