"""Agreement with the official LLaVA, VisionZip, FastV and SparseVLM code on a tiny random model.

    python -m pytest tests/test_goldens.py --goldens DIR

DIR holds `hf_model/` (a checkpoint), `images.safetensors`, `prompts.json` and one file a method with keys
`SETTING/imgI/WHAT` (what an image alone decides) and `SETTING/imgI_P/WHAT` (with prompt P). Whatever is found there is
checked, and a kind of value that no check knows is a failure; without --goldens there is nothing to check.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import Watched
from torch.nn.functional import pad
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from zipeval.engine.images import stock_tokens
from zipeval.engine.vision import reduced_inputs
from zipeval.methods.fastv import FastV
from zipeval.methods.sparsevlm import PUBLISHED, SparseVLM, raters
from zipeval.methods.vanilla import Vanilla
from zipeval.methods.visionzip import VisionZip

FEATURES, PREFILL, STEPS = 5e-5, 3e-4, 5e-4
MERGED = 2e-4
FILES = {
    "test_vanilla": "vanilla.safetensors",
    "test_visionzip": "visionzip.safetensors",
    "test_fastv": "fastv.safetensors",
    "test_sparsevlm": "sparsevlm.safetensors",
    "test_next": "next.safetensors",
}
BATCHED = ("vanilla", "visionzip", "fastv", "sparsevlm")


@cache
def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def cases(path: Path) -> dict[tuple[str, int, str | None], dict[str, torch.Tensor]]:
    """(setting, image, prompt or None) -> what the official code computed."""
    found: dict = {}
    for key, value in read(path).items():
        setting, image, prompt, what = re.fullmatch(
            r"([\w./]+?)/(?:img)?(\d+|g\w+?)(?:_(\w+))?/([\w/]+)", key
        ).groups()
        found.setdefault((setting, image, prompt), {})[what] = value
    return found


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--goldens")
    folder = Path(folder).resolve() if folder else None
    if "kind" in metafunc.fixturenames:
        params = [
            pytest.param(folder, *batch, id=f"{batch[0]}-{batch[1]}")
            for batch in batches(folder)
        ]
        return metafunc.parametrize("folder, kind, setting, answers", params)
    found = cases(folder / FILES[metafunc.function.__name__]) if folder else {}
    params = [
        pytest.param(folder, *case, golden, id="-".join(map(str, case)))
        for case, golden in found.items()
    ]
    metafunc.parametrize("folder, setting, number, prompt, golden", params)


def batches(folder: Path | None):
    """(method, setting, {(image, prompt): what was answered}) wherever a setting answered several prompts."""
    for kind in BATCHED if folder else ():
        by_setting: dict = {}
        for (setting, number, prompt), golden in cases(
            folder / FILES[f"test_{kind}"]
        ).items():
            if "tokens" in golden and "nocache" not in setting:
                by_setting.setdefault(setting, {})[number, prompt] = golden
        yield from (
            (kind, setting, answers)
            for setting, answers in by_setting.items()
            if len(answers) > 1
        )


@cache
def golden_model(folder: Path):
    return LlavaForConditionalGeneration.from_pretrained(
        folder / "hf_model", dtype=torch.float32
    ).eval()


def make_inputs(folder: Path, model, number: str, prompt: str | None) -> dict:
    """Prompt, image and question for one sample; images beyond the stored ones are their mirrored copies."""
    return {
        **make_prompt(folder, model, prompt, 576),
        "pixel_values": crop(folder, int(number))[None],
    }


def crop(folder: Path, number: int) -> torch.Tensor:
    stored = read(folder / "images.safetensors")["images_int8"].float() / 64
    return (
        stored[number]
        if number < len(stored)
        else stored[number - len(stored)].flip(-1)
    )


def make_prompt(folder: Path, model, prompt: str | None, visual: int) -> dict:
    parts = json.loads((folder / "prompts.json").read_text()).get(
        prompt, {"system": [], "question": []}
    )
    ids = torch.tensor(
        [
            [
                *parts["system"],
                *[model.config.image_token_id] * visual,
                *parts["question"],
            ]
        ]
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def answer(model, method, inputs, golden, **options):
    """What `golden` may hold of an answer: 12 greedy tokens, their logits, the last logits of the prompt."""
    steps = len(golden.get("tokens", [0]))
    with method.applied(model):
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        with torch.no_grad():
            prompt_logits = model(**inputs).logits[0]
    logits = torch.cat(out.logits)
    for what, expected in golden.items():
        if what == "tokens":
            assert (
                out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
                == expected.tolist()
            )
        elif what == "logits":
            close(logits[0], expected[0], PREFILL)
            close(logits, expected, STEPS)
        elif what == "logits_all":
            close(prompt_logits[-len(expected) :], expected, PREFILL)
        else:
            pytest.fail(f"nothing here checks {what!r}")


def test_vanilla(folder, setting, number, prompt, golden):
    model = golden_model(folder)
    inputs = make_inputs(folder, model, number, prompt)
    if prompt:
        return answer(model, Vanilla(), inputs, golden)
    assert set(golden) == {"features"}
    with torch.no_grad():
        features = model.model.get_image_features(
            inputs["pixel_values"], return_dict=True
        ).pooler_output[0]
    close(features, golden["features"], FEATURES)


def visionzip_of(setting: str) -> VisionZip:
    """`visionzip_54_10`; attention alone is stored without a split."""
    dominant, contextual = (
        map(int, setting.split("_")[1:]) if "_" in setting else (54, 10)
    )
    return VisionZip(dominant=dominant, contextual=contextual)


def test_visionzip(folder, setting, number, prompt, golden):
    model = golden_model(folder)
    inputs = make_inputs(folder, model, number, prompt)
    method = Watched(visionzip_of(setting))
    dominant = method.method.dominant
    if prompt:
        return answer(model, method, inputs, golden)
    with method.applied(model), torch.no_grad():
        model(**inputs)
        score = method.crops.attention()[0].sum(0)
        hidden = method.reduced.features[0]
        features = model.model.multi_modal_projector(hidden)
    for what, expected in golden.items():
        if what == "cls_attention_sum":
            close(score, expected, FEATURES)
        elif what == "all_indices":  # CLS, then patches by descending score
            assert method.reduced.kept[0].tolist() == sorted(expected.tolist())
            assert [
                0,
                *(score.topk(dominant - 1).indices + 1).tolist(),
            ] == expected.tolist()
        elif what in ("hidden", "features"):
            actual = {"hidden": hidden, "features": features}[what]
            close(actual[:dominant], expected[:dominant], FEATURES)
            close(actual[dominant:], expected[dominant:], MERGED)
        else:
            pytest.fail(f"nothing here checks {what!r}")


@dataclass(frozen=True)
class WatchedFastV(FastV):
    """Remembers the scores and choices of every call that reads a prompt."""

    seen: list = field(default_factory=list)

    def reduce(self, layer, prompts):
        kept = super().reduce(layer, prompts)
        visual = prompts.visual[0]
        self.seen.append(
            (
                prompts.attention(prompts.last_rows()).mean(1)[0, 0, visual],
                kept.visual[0, visual],
            )
        )
        return kept


def fastv_options(setting: str) -> dict[str, int]:
    """`fastv_cache_k2_keep64`; attention alone is stored without a number to keep."""
    found = {
        k.upper() if k == "k" else k: int(v)
        for k, v in re.findall(r"(k|keep)(\d+)", setting)
    }
    return {"keep": 64, **found}


def test_fastv(folder, setting, number, prompt, golden):
    model = golden_model(folder)
    inputs = make_inputs(folder, model, number, prompt)
    method = WatchedFastV(**fastv_options(setting))
    of_answer = {k: v for k, v in golden.items() if k in ("tokens", "logits")}
    answer(model, method, inputs, of_answer, use_cache="nocache" not in setting)
    for what in golden.keys() - of_answer:
        expected = golden[what]
        if what == "keep_patch":
            assert method.seen[0][1].nonzero()[:, 0].tolist() == expected.tolist()
        elif what == "keep_patch_per_step":
            assert [
                kept.nonzero()[:, 0].tolist()
                for _, kept in method.seen[: len(expected)]
            ] == expected.tolist()
        elif what == "last_token_attention":
            close(method.seen[0][0], expected, FEATURES)
        else:
            pytest.fail(f"nothing here checks {what!r}")


@dataclass(frozen=True)
class WatchedSparseVLM(SparseVLM):
    """Remembers every stage; takes the density noise of the official run where it was stored.

    Attributes:
        goldens: one for each prompt of the batch.
    """

    goldens: tuple = ()
    stages: list = field(default_factory=list)
    drawn: list = field(default_factory=list)

    def reduce(self, layer, prompts):
        self.stages.append(stage := {})
        first = int(prompts.initial.visual[0].nonzero()[-1]) + 1
        rates = raters(prompts)[0]
        stage["raters"] = prompts.source[0, -len(rates) :][rates] - first
        visual = prompts.visual[0]
        kept = super().reduce(layer, prompts)
        stage["kept"] = kept.visual[0, visual].nonzero()[:, 0]
        stage["merged"] = kept.merged[0]
        return kept

    def score(self, prompts):
        score = super().score(prompts)
        self.stages[-1]["score"] = score[0, prompts.visual[0]]
        return score

    def _draw(self, count, generator):
        stage, row = divmod(len(self.drawn), len(self.goldens))
        self.drawn.append(count)
        return self.goldens[row].get(f"stage{stage % 3}/noise", torch.zeros(count))


def sparsevlm_of(setting: str, goldens: tuple) -> WatchedSparseVLM:
    budget = int(re.search(r"_(\d+)_", setting).group(1))
    return WatchedSparseVLM(counts=PUBLISHED[1.5][budget], noise=1.0, goldens=goldens)


def test_sparsevlm(folder, setting, number, prompt, golden):
    model = golden_model(folder)
    inputs = make_inputs(folder, model, number, prompt)
    method = sparsevlm_of(setting, (golden,))
    of_answer = {k: v for k, v in golden.items() if k in ("tokens", "logits")}
    answer(model, method, inputs, of_answer)
    for what in golden.keys() - of_answer:
        stage, _, part = what.partition("/")
        actual, expected = (
            method.stages[int(stage.removeprefix("stage"))].get(part),
            golden[what],
        )
        if part in ("kept", "raters"):
            assert actual.tolist() == expected.tolist(), what
        elif part in ("merged", "score"):
            close(actual, expected, MERGED if part == "merged" else FEATURES)
        else:
            assert part == "noise"


def test_in_a_batch(folder, kind, setting, answers):
    """Prompts of different lengths, padded on the left, get the answers that the official code gives one by one."""
    model, goldens = golden_model(folder), tuple(answers.values())
    if kind == "visionzip":
        method = visionzip_of(setting)
    elif kind == "fastv":
        method = FastV(**fastv_options(setting))
    else:
        method = sparsevlm_of(setting, goldens) if kind == "sparsevlm" else Vanilla()
    singles = [make_inputs(folder, model, *case) for case in answers]
    width = max(s["input_ids"].shape[1] for s in singles)

    def padded(name):
        return torch.cat([pad(s[name], (width - s[name].shape[1], 0)) for s in singles])

    inputs = {
        "input_ids": padded("input_ids"),
        "attention_mask": padded("attention_mask"),
    }
    inputs["pixel_values"] = torch.cat([s["pixel_values"] for s in singles])
    options = {
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with method.applied(model):
        out = model.generate(
            **inputs, max_new_tokens=len(goldens[0]["tokens"]), **options
        )
    for row, golden in enumerate(goldens):
        assert out.sequences[row, width:].tolist() == golden["tokens"].tolist()
        close(torch.stack(out.logits, 1)[row], golden["logits"], STEPS)


@cache
def next_model(folder: Path):
    """The same weights as a LLaVA-NeXT, and its row end."""
    config = LlavaNextConfig.from_dict(
        json.loads((folder / "hf_next_config.json").read_text())
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    model.load_state_dict(
        golden_model(folder).state_dict()
        | load_file(folder / "image_newline.safetensors")
    )
    return model


def test_next(folder, setting, number, prompt, golden):
    """`number` is a grid: g2x2, or g2w1h for two tiles beside each other."""
    model = next_model(folder)
    height, width, tiles = {"g2x2": (672, 672, 4), "g2w1h": (336, 672, 2)}[number]
    size = torch.tensor([[height, width]])
    pixels = torch.stack([crop(folder, i) for i in range(1 + tiles)])[None]
    inputs = make_prompt(folder, model, prompt, stock_tokens(model, size[0]))
    inputs |= {"pixel_values": pixels, "image_sizes": size}
    method = (
        Watched(visionzip_of(setting.removeprefix("next_")))
        if "visionzip" in setting
        else Vanilla()
    )
    answer(model, method, inputs, {k: golden[k] for k in ("tokens", "logits")})
    for what in golden.keys() - {"tokens", "logits"}:
        if what == "all_indices":
            assert method.reduced.kept.tolist() == golden[what].sort(1).values.tolist()
        elif what == "sequence_features":
            with torch.no_grad():
                reduced = reduced_inputs(model, inputs, method)
            close(
                reduced["mm_encoder_outputs"]["image"].pooler_output[0],
                golden[what],
                MERGED,
            )
        else:
            pytest.fail(f"nothing here checks {what!r}")
