"""Agreement with the official LLaVA and VisionZip code on a tiny random model.

    python -m pytest tests/test_goldens.py --goldens DIR

DIR holds `hf_model/` (a checkpoint), `images.safetensors`, `prompts.json` and one file a method with keys
`SETTING/imgI/WHAT` (what an image alone decides) and `SETTING/imgI_P/WHAT` (with prompt P). Whatever is found there is
checked, and a kind of value that no check knows is a failure; without --goldens there is nothing to check.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from zipeval.engine.vision import VisionMethod
from zipeval.methods.vanilla import Vanilla
from zipeval.methods.visionzip import VisionZip

FEATURES, PREFILL, STEPS = 5e-5, 3e-4, 5e-4
MERGED = 2e-4
FILES = {"test_vanilla": "vanilla.safetensors", "test_visionzip": "visionzip.safetensors"}


@cache
def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def cases(path: Path) -> dict[tuple[str, int, str | None], dict[str, torch.Tensor]]:
    """(setting, image, prompt or None) -> what the official code computed."""
    found: dict = {}
    for key, value in read(path).items():
        setting, number, prompt, what = re.fullmatch(r"(\w[\w.]*)/img(\d+)(?:_(\w+))?/(\w+)", key).groups()
        found.setdefault((setting, int(number), prompt), {})[what] = value
    return found


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--goldens")
    params = []
    if folder:
        folder = Path(folder).resolve()
        found = cases(folder / FILES[metafunc.function.__name__])
        params = [pytest.param(folder, *case, golden, id="-".join(map(str, case))) for case, golden in found.items()]
    metafunc.parametrize("folder, setting, number, prompt, golden", params)


@cache
def golden_model(folder: Path):
    return LlavaForConditionalGeneration.from_pretrained(folder / "hf_model", dtype=torch.float32).eval()


def make_inputs(folder: Path, model, number: int, prompt: str | None) -> dict:
    """Prompt, image and question for one sample; images beyond the stored ones are their mirrored copies."""
    stored = read(folder / "images.safetensors")["images_int8"].float() / 64
    pixels = stored[number] if number < len(stored) else stored[number - len(stored)].flip(-1)
    parts = json.loads((folder / "prompts.json").read_text()).get(prompt, {"system": [], "question": []})
    row = [*parts["system"], *[model.config.image_token_id] * 576, *parts["question"]]
    ids = torch.tensor([row])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[None]}


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def answer(model, method, inputs, golden):
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
        )
        with torch.no_grad():
            prompt_logits = model(**inputs).logits[0]
    logits = torch.cat(out.logits)
    for what, expected in golden.items():
        if what == "tokens":
            assert out.sequences[0, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()
        elif what == "logits":
            close(logits[0], expected[0], PREFILL)
            close(logits, expected, STEPS)
        elif what == "logits_all":
            close(prompt_logits[-len(expected) :], expected, PREFILL)
        else:
            pytest.fail(f"nothing here checks {what!r}")


class Watched(VisionMethod):
    """A method that remembers what went in and out."""

    def __init__(self, method):
        self.method = method

    def reduce(self, crops):
        self.crops, self.reduced = crops, self.method.reduce(crops)
        return self.reduced


def test_vanilla(folder, setting, number, prompt, golden):
    model = golden_model(folder)
    inputs = make_inputs(folder, model, number, prompt)
    if prompt:
        return answer(model, Vanilla(), inputs, golden)
    assert set(golden) == {"features"}
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    close(features, golden["features"], FEATURES)


def test_visionzip(folder, setting, number, prompt, golden):
    model = golden_model(folder)
    inputs = make_inputs(folder, model, number, prompt)
    dominant, contextual = map(int, setting.split("_")[1:]) if "_" in setting else (54, 10)
    method = Watched(VisionZip(dominant=dominant, contextual=contextual))
    if prompt:
        return answer(model, method, inputs, golden)
    with method.applied(model), torch.no_grad():
        model(**inputs)
        score = method.crops.cls_attention()[0].sum(0)
        hidden = method.reduced.features[0]
        features = model.model.multi_modal_projector(hidden)
    for what, expected in golden.items():
        if what == "cls_attention_sum":
            close(score, expected, FEATURES)
        elif what == "all_indices":  # CLS, then patches by descending score
            assert method.reduced.kept[0].tolist() == sorted(expected.tolist())
            assert [0, *(score.topk(dominant - 1).indices + 1).tolist()] == expected.tolist()
        elif what in ("hidden", "features"):
            actual = {"hidden": hidden, "features": features}[what]
            close(actual[:dominant], expected[:dominant], FEATURES)
            close(actual[dominant:], expected[dominant:], MERGED)
        else:
            pytest.fail(f"nothing here checks {what!r}")
