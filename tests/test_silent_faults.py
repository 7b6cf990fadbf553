"""Calls that were once answered wrongly without a word: each is right, or refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llava, prompts, single
from tiny_methods import METHODS, make
from transformers import AutoTokenizer, DynamicCache

from zipeval.cli import compose
from zipeval.engine.decoder import PromptBatch, Selection, topk_mask
from zipeval.engine.guard import Guard
from zipeval.engine.received import attention_received
from zipeval.errors import RunError
from zipeval.evaluation import chat_model, repeats
from zipeval.evaluation.runner import run
from zipeval.inference.answering import BatchGenerator
from zipeval.methods.fastv import FastV
from zipeval.methods.sparsevlm import SparseVLM
from zipeval.methods.visionzip import VisionZip
from zipeval.models import EMBEDDED
from zipeval.results import records

NEW = 4
REDUCING = [name for name in METHODS if name != "vanilla"]


@pytest.fixture(scope="module")
def model():
    return llava(side=6, layers=6, gain=1.0).double()


def ask(model, questions, images):
    inputs = prompts(model, questions, images)
    return {
        name: x.double() if name == "pixel_values" else x for name, x in inputs.items()
    }


@torch.no_grad()
def by_hand(model, inputs, tokens):
    """The logits (B, NEW, V) of a decoding loop that knows the prompts as they were given."""
    cache, mask = (
        DynamicCache(config=model.config.text_config),
        inputs["attention_mask"],
    )
    logits = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
    for step in range(NEW - 1):
        token = tokens[:, step : step + 1]
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits.append(
            model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[
                :, -1
            ]
        )
    return torch.stack(logits, 1)


@pytest.mark.parametrize(
    "words",
    [80, 40, 3],
    ids=["longer than all", "in between", "shorter than what is left"],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_decoding_loop_by_hand(model, name, words):
    """A row of text alone beside one with an image; where it is the longest, the batch keeps its width."""
    inputs = ask(model, [[5, 9, 11], list(range(2, 2 + words))], [1, 0])
    with make(name, model).applied(model):
        out = model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = by_hand(model, inputs, out.sequences[:, -NEW:])
    torch.testing.assert_close(
        logits, torch.stack(out.logits, 1), atol=1e-5, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("name", REDUCING)
def test_packed_prompts_are_refused(model, name):
    """Two prompts in one row, told apart by their positions alone."""
    inputs = ask(model, [[5, 9, 11], [7, 8, 21]], [1, 1])
    rows = [single(model, inputs, [1, 1], row) for row in range(2)]
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows], 1),
        "pixel_values": inputs["pixel_values"],
        "position_ids": torch.cat(
            [torch.arange(row["input_ids"].shape[1]) for row in rows]
        )[None],
    }
    with (
        make(name, model).applied(model),
        torch.no_grad(),
        pytest.raises(ValueError, match="position_ids"),
    ):
        model(**packed)


@pytest.mark.parametrize("prefix", [0, 1], ids=["all rows", "CLS"])
def test_scores_of_float16_are_finite(prefix):
    """Where products of queries and keys are larger than float16 can hold, as attention kernels bear it."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(2, 17, 64, generator=generator) * 300 for _ in range(2)
    )
    expected = attention_received(queries, keys, 2, prefix)
    assert (queries.abs() @ keys.abs().mT).max() > torch.finfo(torch.float16).max
    scores = attention_received(queries.half(), keys.half(), 2, prefix)
    assert scores.isfinite().all()
    torch.testing.assert_close(
        scores.sum(-1), scores.new_ones(2, 2) if not prefix else scores.sum(-1)
    )
    assert (scores.argmax(-1) == expected.argmax(-1)).float().mean() > 0.7


@pytest.mark.parametrize(
    "method", [FastV(keep=9), SparseVLM((9,), (0,))], ids=["fastv", "sparsevlm"]
)
def test_scores_in_the_decoder_are_finite_in_float16(method, monkeypatch):
    scores = []
    attention = PromptBatch.attention
    monkeypatch.setattr(
        PromptBatch,
        "attention",
        lambda *given: scores.append(attention(*given)) or scores[-1],
    )
    model = llava(side=6, layers=3, gain=1.0).half()
    inputs = prompts(model, [[5, 9, 11]], [1])
    inputs["pixel_values"] = inputs["pixel_values"].half()
    layer = model.model.language_model.layers[method.layers(3)[0] - 1].self_attn
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            projection.weight.mul_(200)
        assert model(**inputs).logits.isfinite().all()
        with method.applied(model):
            model(**inputs)
    assert scores
    assert all(score.isfinite().all() for score in scores)


def test_a_static_cache_behind_the_encoder(model):
    """It counts on the device, so that nobody asks it for what it holds."""
    inputs = ask(model, [[5, 9, 11], [7, 8, 21, 4]], [1, 1])
    options = {"max_new_tokens": NEW, "do_sample": False}
    with VisionZip(tokens=9).applied(model):
        expected = model.generate(**inputs, **options)
        static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(static, expected)


@pytest.mark.parametrize("order", [1, -1])
def test_draws_of_which_one_overflows(order):
    cost = {"prompt_tokens": 9, "output_tokens": 3, "latency": 1.0, "batch": 1}
    costs = [cost, {**cost, "output_tokens": 40, "overflow": 3}][::order]
    sample = repeats.merged(costs, ["a", "b"])
    assert sample["output_tokens"] == 43
    assert [answer["text"] for answer in sample["answers"]] == ["a", "b"]


class NoNumbers(FastV):
    """Rates every token with NaN."""

    def reduce(self, layer, given):
        score = torch.full_like(given.visual, float("nan"), dtype=torch.float32)
        return Selection(
            topk_mask(score, given, [self._count(count) for count in given.counts])
        )


def test_scores_that_are_no_numbers_stop(model):
    inputs = ask(model, [[5, 9, 11]], [1])
    with (
        NoNumbers(keep=9).applied(model),
        torch.no_grad(),
        pytest.raises(RunError, match="NaN"),
    ):
        model(**inputs)
    broken = llava(side=6, layers=6)
    with torch.no_grad():
        broken.model.vision_tower.encoder.layers[-2].self_attn.k_proj.weight[0, 0] = (
            float("nan")
        )
    inputs = prompts(broken, [[5, 9, 11]], [1])
    with (
        VisionZip(tokens=9).applied(broken),
        torch.no_grad(),
        pytest.raises(RunError, match=r"VisionZip.*NaN"),
    ):
        broken(**inputs)


def changed_checkpoint(folder, change):
    """A copy of the embedded checkpoint whose weights `change` has changed."""
    shutil.copytree(EMBEDDED / "tiny_llava", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def embedding_of_color(weights):
    """Breaks what one word of some questions is embedded as."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny_llava")
    weights["language_model.model.embed_tokens.weight"][
        tokenizer.encode("What color")[-1]
    ] = float("nan")


def evaluate(path, results, *overrides):
    """(record, samples)"""
    (record_path,) = run(
        compose([f"model.path={path}", f"results={results}", *overrides])
    )
    record = records.read(record_path)
    return record, records.read_samples(record_path.parent, record)


@pytest.mark.parametrize(
    "overrides",
    [["method=vanilla"], ["method=pool", "tokens=16", "runner.reuse=prefix"]],
)
def test_samples_without_numbers_for_logits_have_failed(tmp_path, overrides):
    """Their answers are empty, which to some tasks is an answer; the others stay as they are."""
    path = changed_checkpoint(tmp_path / "weights", embedding_of_color)
    record, samples = evaluate(path, tmp_path / "runs", "limit=24", *overrides)
    _, stock = evaluate(
        EMBEDDED / "tiny_llava", tmp_path / "stock", "limit=24", *overrides
    )
    failed = [sample for sample in samples if "error" in sample]
    assert 0 < len(failed) == record["failed"] < 24
    assert all(
        "not numbers" in sample["error"] and sample["score"] == 0 for sample in failed
    )
    same = {
        sample["doc_id"]: sample["prediction"]
        for sample in samples
        if "error" not in sample
    }
    assert same == {
        sample["doc_id"]: sample["prediction"]
        for sample in stock
        if sample["doc_id"] in same
    }


@pytest.mark.parametrize(
    ("limit", "told"), [(8, "the first 8 samples"), (200, "the first 32 samples")]
)
def test_a_run_of_nothing_but_broken_logits_ends(tmp_path, limit, told):
    def change(weights):
        weights["language_model.lm_head.weight"][5, 5] = float("nan")

    path = changed_checkpoint(tmp_path / "weights", change)
    with pytest.raises(RunError, match=f"{told}.*not numbers.*dtype"):
        evaluate(
            path, tmp_path / "runs", f"limit={limit}", "method=vanilla", "batch_size=8"
        )
    assert not [*(tmp_path / "runs").glob("*/*.json")]


@pytest.mark.parametrize(("positions", "overflowed"), [(2048, 0), (150, 24), (10, 24)])
def test_prompts_beyond_the_models_positions_are_counted(
    tmp_path, positions, overflowed
):
    path = changed_checkpoint(tmp_path / "weights", lambda weights: None)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = positions
    (path / "config.json").write_text(json.dumps(config))
    record, samples = evaluate(path, tmp_path / "runs", "limit=24", "method=vanilla")
    assert record["overflowed"] == overflowed
    for sample in samples:
        excess = sample["prompt_tokens"] - positions
        assert sample.get("overflow", 0) == max(0, excess)
    reduced, _ = evaluate(
        path, tmp_path / "runs", "limit=24", "method=visionzip", "tokens=16"
    )
    assert reduced["overflowed"] == (24 if positions == 10 else 0)


def test_later_rounds_beyond_the_models_positions_are_counted(tmp_path):
    """The first question fits; with the history of the others before it, the last one does not."""
    path = changed_checkpoint(tmp_path / "weights", lambda weights: None)
    turns = ["tasks=[zipeval_shapes_turns]", "limit=2", "method=vanilla"]
    plain, (first, _) = evaluate(path, tmp_path / "runs", *turns)
    assert plain["overflowed"] == 0
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = first["prompt_tokens"] + 2
    (path / "config.json").write_text(json.dumps(config))
    record, samples = evaluate(path, tmp_path / "runs", *turns)
    assert record["overflowed"] == 2
    assert min(sample["overflow"] for sample in samples) > 2


def test_a_call_that_raises_leaves_no_scores_behind(model):
    """By which the next call would be judged."""
    inputs, guard = (
        ask(model, [[5, 9, 11]], [1]),
        Guard(model, "VisionZip", inside=False),
    )

    def fail(*given):
        guard.check_later([torch.tensor(True)])
        raise KeyError("layer")

    with guard.watching(), torch.no_grad():
        hook = guard.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(**inputs)
        hook.remove()
        model(**inputs)


def test_a_sample_of_which_one_draw_failed_tells_of_the_others():
    cost = {"prompt_tokens": 9, "output_tokens": 3, "latency": 1.0, "batch": 1}
    sample = repeats.merged([cost, {"error": "not numbers", "batch": 1}], ["a", ""])
    assert sample["error"] == "not numbers"
    assert [answer["text"] for answer in sample["answers"]] == ["a", ""]
    assert sample["answers"][0]["output_tokens"] == 3


def test_a_run_that_goes_on_is_not_ended_by_samples_that_failed_before(
    tmp_path, monkeypatch
):
    path = changed_checkpoint(tmp_path / "weights", embedding_of_color)
    settings = ["limit=24", "method=vanilla", "batch_size=1"]
    answer, calls = BatchGenerator.answer, []

    def until_the_last_but_one(self, *given):
        calls.append(given)
        if len(calls) == 23:
            raise KeyError("stop")
        return answer(self, *given)

    monkeypatch.setattr(BatchGenerator, "answer", until_the_last_but_one)
    with pytest.raises(KeyError):
        evaluate(path, tmp_path / "runs", *settings)
    monkeypatch.setattr(BatchGenerator, "answer", answer)
    monkeypatch.setattr(
        chat_model, "ENOUGH", 1
    )  # of those that were asked, the failed ones come first now
    record, samples = evaluate(path, tmp_path / "runs", *settings)
    assert 0 < record["failed"] < len(samples) == 24
