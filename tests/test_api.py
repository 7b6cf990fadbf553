"""zipeval from Python: the README's examples as they stand there, what is exported, what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_media import write_video
from tiny import llava
from transformers import LlamaConfig, LlamaForCausalLM

import zipeval
from zipeval.cli import compose
from zipeval.errors import UsageError
from zipeval.inference.session import Session

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(
    r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S
)


@pytest.fixture(scope="module")
def tiny():
    return zipeval.load("tiny_llava")[0]


def test_the_readmes_examples(tmp_path, monkeypatch, capsys):
    """One after another, each with what those before it left, as a reader would."""
    _, *examples = EXAMPLES
    assert len(examples) == 4  # an image, a batch of several, two turns, a video
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("photo", "other"):
        Image.fromarray(generator.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(
            f"{name}.jpg"
        )
    write_video(tmp_path / "video.mp4", range(0, 200, 10))
    names, reduced = {}, []
    for method in (zipeval.VisionZip, zipeval.SparseVLM):
        monkeypatch.setattr(method, "reduce", counted(method, reduced))
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
        asked = next(
            names[name]
            for name in ("conversation", "batch", "inputs")
            if f"{name} = " in example
        )
        asked = asked if torch.is_tensor(asked) else asked["input_ids"]
        assert names["output"].shape[1] > asked.shape[1]
        assert torch.equal(names["output"][:, : asked.shape[1]], asked)
    # The second turn reduces nothing, SparseVLM works in three layers, a video is eight frames at once.
    assert [name for name, _ in reduced] == [
        "VisionZip",
        *["SparseVLM"] * 3,
        "VisionZip",
        "VisionZip",
    ]
    assert [count for name, count in reduced if name == "VisionZip"] == [1, 1, 8]
    assert capsys.readouterr().out.startswith("['")


def test_the_readmes_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(
        compile(EXAMPLES[0].replace("limit=200", "limit=20"), "README.md", "exec"),
        names,
    )
    assert len(names["runs"].records) == 3
    assert (tmp_path / "tradeoff.pdf").is_file()


def counted(method, calls):
    reduce = method.reduce

    def counting(self, *given):
        calls.append((method.__name__, len(getattr(given[-1], "hidden", ()))))
        return reduce(self, *given)

    return counting


def test_names_are_classes_that_the_command_line_knows():
    for name in zipeval._WHERE:
        assert name in dir(zipeval)
        assert getattr(zipeval, name).__name__ == name
    text = Path(zipeval.__file__).read_text()
    for name, module in zipeval._WHERE.items():  # what type checkers see
        assert f"from zipeval.{module} import {name} as {name}\n" in text
    targets = {
        compose([f"method={m}", "tokens=48", *more]).method["_target_"]
        for m, more in every_method()
    }
    exported = {
        f"zipeval.{module}.{name}"
        for name, module in zipeval._WHERE.items()
        if "methods." in module
    }
    assert exported == targets
    with pytest.raises(AttributeError, match="no attribute 'Vision'"):
        _ = zipeval.Vision


def every_method():
    names = (
        "vanilla",
        "visionzip",
        "visionzip_tuned",
        "fastv",
        "sparsevlm",
        "random",
        "uniform",
        "pool",
        "none",
    )
    return [*((name, []) for name in names), ("chain", ["method.first.tokens=96"])]


def test_importing_a_method_imports_no_torch():
    script = "import sys, zipeval; zipeval.VisionZip(tokens=64), zipeval.FastV(keep=9); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("tiny_llava", 48), ("tiny_next", 240), ("tiny_video", 400), ("tiny_gemini", 48)],
)
@pytest.mark.parametrize("name", ["visionzip", "fastv", "sparsevlm"])
def test_a_budget_means_what_it_means_on_the_command_line(model, tokens, name):
    asked = [f"model={model}", f"method={name}", f"tokens={tokens}", "budget=mean"]
    session = Session(compose(asked))
    config = zipeval.load(model)[0].config
    assert repr(zipeval.method(name, config, tokens=tokens, budget="mean")) == repr(
        session.method
    )


def test_options_of_a_method(tiny):
    assert zipeval.method("fastv", tiny, keep=9, K=3) == zipeval.FastV(keep=9, K=3)
    assert zipeval.method("random", tiny, tokens=9, budget="final", seed=3).seed == 3
    chain = zipeval.method(
        "chain", tiny, tokens=9, budget="final", first={"tokens": 48}
    )
    assert chain.first == zipeval.VisionZip(tokens=48)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda m: zipeval.method("fastv", m, tokens=999),
            UsageError,
            "tokens=999: this model has 144",
        ),
        (lambda m: zipeval.method("fastv", m, tokens=0), UsageError, "tokens=0"),
        (
            lambda m: zipeval.method("fastv", m, tokens=16, budget="most"),
            UsageError,
            "budget=most",
        ),
        (
            lambda m: zipeval.method("fastvv", m, tokens=16),
            UsageError,
            "Did you mean fastv?",
        ),
        (lambda m: zipeval.method("fastv", m), UsageError, "tokens is not set"),
        (
            lambda m: zipeval.method("fastv", LlamaConfig(), tokens=16),
            UsageError,
            "llama is of no family",
        ),
        (lambda m: zipeval.load("tiny_lava"), UsageError, "Did you mean tiny_llava?"),
        (
            lambda m: zipeval.load("llava15", path="no where(1)"),
            UsageError,
            "model.path=no where(1)",
        ),
        (
            lambda m: zipeval.load("tiny_llava", dtype="floaty"),
            UsageError,
            "model.dtype=floaty",
        ),
        (
            lambda m: zipeval.load("tiny_llava", prompt="hf"),
            UsageError,
            "prompt=hf: no setting of load()",
        ),
        (
            lambda m: zipeval.method("visionzip_tuned", m, tokens=16),
            UsageError,
            "it has a file that is tuned",
        ),
        (
            lambda m: zipeval.VisionZip(tokens="64"),
            ValueError,
            "tokens='64': a whole number",
        ),
        (lambda m: zipeval.VisionZip(tokens=0), ValueError, "dominant=0"),
        (
            lambda m: zipeval.VisionZip(tokens=6).applied(m.model).__enter__(),
            ValueError,
            "LlavaModel: it has no gen",
        ),
        (
            lambda m: zipeval.FastV(keep=6).applied(m.model).__enter__(),
            ValueError,
            "LlavaModel: it has no gen",
        ),
    ],
)
def test_refusals(tiny, call, error, match):
    with pytest.raises(error, match=re.escape(match)):
        call(tiny)


@pytest.mark.parametrize(
    "method", [zipeval.VisionZip(tokens=6), zipeval.FastV(keep=6)], ids=repr
)
def test_a_model_without_pictures_is_refused(method):
    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    text = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size))
    with (
        pytest.raises(
            ValueError, match="LlamaForCausalLM: it has no multi_modal_projector"
        ),
        method.applied(text),
    ):
        pass


def test_a_model_that_transformers_made_needs_no_checkpoint():
    method = zipeval.method("visionzip", llava(), tokens=9, budget="final")
    assert method == zipeval.VisionZip(tokens=9)
