"""Questions about one picture share what is computed of it, and their answers are as without that."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zipeval.cli import compose
from zipeval.engine import reuse as sharing
from zipeval.engine.images import tower
from zipeval.evaluation.runner import run
from zipeval.inference.answering import answering
from zipeval.inference.feed import feed
from zipeval.inference.session import Session
from zipeval.methods._stages import stages
from zipeval.methods.chain import Chain
from zipeval.methods.fastv import FastV
from zipeval.methods.uniform import Uniform
from zipeval.results import records

MODELS = {
    "tiny_llava": 48,
    "tiny_gemini": 48,
    "tiny_next": 240,
    "tiny_video": 390,
}  # a third of the visual tokens
METHODS = (
    "vanilla",
    "visionzip",
    "random",
    "pool",
    "none",
    "fastv",
    "sparsevlm",
    "chain",
)
TEXT, PICTURED = 5, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
OPTIONS = {"max_new_tokens": 6, "until": ["\n"]}
SIZES = [(150, 130), (200, 100), (90, 300)]
WORDS = "what shape is left of the red one and how many blue circles are there in this picture today"


@pytest.fixture(autouse=True)
def nothing_seen():
    sharing.forget()


@pytest.fixture(params=MODELS)
def model(request):
    """Its name. In float64: a choice that hangs on rounding is nobody's error."""
    loaded, _ = Session(compose([f"model={request.param}"])).load()
    loaded.double()
    yield request.param
    loaded.float()


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(
        0, 255, (*SIZES[number % 3][::-1], 3), dtype=np.uint8
    )
    return Image.fromarray(pixels)


def asked(number: int) -> list[dict]:
    """Question `number`: about picture number % 3; every fourth about two pictures, and TEXT about none."""
    shown = (
        [] if number == TEXT else [number % 3, 0] if number % 4 == 3 else [number % 3]
    )
    text = {"type": "text", "text": " ".join(WORDS.split()[: 3 + number])}
    return [
        {
            "role": "user",
            "content": [*({"type": "image", "url": picture(n)} for n in shown), text],
        }
    ]


def answered(
    model: str, method: str, reuse: str, numbers=PICTURED, size=10, room=2**30
):
    """The answers to these questions, `size` at a time, and how often the encoder saw a picture."""
    settings = [
        f"model={model}",
        f"method={method}",
        f"runner.reuse={reuse}",
        "runner.workers=0",
        "budget=mean",
    ]
    settings.append(f"runner.cache_gib={room / 2**30}")
    if method not in ("vanilla", "none"):
        settings.append(f"tokens={MODELS[model] // (2 if method == 'chain' else 1)}")
    if method == "chain":
        settings.append(f"method.first.tokens={MODELS[model]}")
    session = Session(compose(settings))
    seen, answers = Counter(), {}
    questions = [*feed(session, asked, [*numbers], keyed=True)]
    loaded, _ = session.load()
    hook = tower(loaded).register_forward_hook(lambda *_: seen.update(calls=1))
    inside = tower(loaded).embeddings.register_forward_pre_hook(
        lambda _, args: seen.update(crops=len(args[0]))
    )
    try:
        with answering(session) as model_:
            for start in range(0, len(questions), size):
                batch = questions[start : start + size]
                answers |= zip(
                    [q.number for q in batch],
                    model_.answer(batch, OPTIONS),
                    strict=True,
                )
    finally:
        hook.remove()
        inside.remove()
    return answers, seen


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_prompts_that_share_nothing(model, method):
    """Seven questions about three pictures, two of them about two."""
    apart, without = answered(model, method, "none", PICTURED[:7])
    for reuse in ("features", "prefix"):
        shared, seen = answered(model, method, reuse, PICTURED[:7])
        assert shared == apart
        assert seen["crops"] < without["crops"] / 2
        sharing.forget()


@pytest.mark.parametrize("method", ["vanilla", "fastv"])
def test_a_question_about_no_picture_shares_no_prefix(method):
    numbers = [*PICTURED, TEXT]
    apart, _ = answered("tiny_llava", method, "none", numbers)
    for reuse in ("features", "prefix"):
        assert answered("tiny_llava", method, reuse, numbers)[0] == apart


def test_what_questions_share_is_computed_once():
    """Ten questions about three pictures, two of them about two."""
    _, apart = answered("tiny_llava", "visionzip", "none")
    _, features = answered("tiny_llava", "visionzip", "features")
    assert (apart["crops"], features["crops"]) == (12, 3)
    _, again = answered("tiny_llava", "pool", "features")  # another method of the sweep
    assert again["crops"] == 0


def test_a_prefix_is_read_once():
    lengths = []
    model, _ = Session(compose([])).load()
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            tuple(kwargs["inputs_embeds"].shape[:2])
        ),
        with_kwargs=True,
    )
    try:
        answered("tiny_llava", "vanilla", "prefix", numbers=[0, 1, 2, 6, 9])
    finally:
        hook.remove()
    (rows, length), (questions, behind) = lengths[:2]
    assert (rows, questions) == (3, 5)
    assert length > 144 > behind


def test_room_is_kept_within():
    answered("tiny_llava", "visionzip", "features")
    (seen,) = sharing._caches.values()
    one = seen.bytes // 3
    sharing.forget()
    answered("tiny_llava", "visionzip", "features", room=1.5 * one)
    (seen,) = sharing._caches.values()
    assert (len(seen.crops), seen.bytes) == (1, one)
    held = next(iter(seen.crops.values()))
    assert one == sum(
        x.untyped_storage().nbytes()
        for x in (held.hidden, held.queries, held.keys, held.pixels)
    )
    assert (
        held.selected.untyped_storage().data_ptr()
        == held.hidden.untyped_storage().data_ptr()
    )


def run_of(root, *settings):
    (path,) = run(
        compose(
            [f"results={root}", "limit=80", "method=visionzip", "tokens=16", *settings]
        )
    )
    record = records.read(path)
    return record, [
        records.reproducible_fields(sample)
        for sample in records.read_samples(path.parent, record)
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("plain"), "runner.workers=0")


@pytest.mark.parametrize(
    "settings",
    ["batch_size=1", "runner.reuse=features", "runner.reuse=prefix runner.workers=2"],
)
def test_a_run_answers_alike_however_fast(settings, plain, tmp_path):
    record, samples = run_of(tmp_path, *settings.split())
    assert samples == plain[1]
    assert (record["run_id"], record["metrics"]) == (
        plain[0]["run_id"],
        plain[0]["metrics"],
    )
    assert record["reuse"] == (settings.split()[0].partition("reuse=")[2] or "none")
    pictures = [
        {p.name: p.read_bytes() for p in Path(r["path"]).parent.glob("*/*.jpg")}
        for r in (record, plain[0])
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 8


def test_methods_that_look_at_the_question_share_no_prefix(tmp_path):
    (path,) = run(
        compose(
            [
                f"results={tmp_path}",
                "limit=4",
                "method=fastv",
                "tokens=48",
                "runner.reuse=prefix",
            ]
        )
    )
    assert records.read(path)["reuse"] == "features"


def test_a_method_is_no_chain_for_a_name_of_its_own():
    """What is shared depends on where a method acts, and that on its class."""

    @dataclass(frozen=True)
    class Leading(Uniform):
        first: int = 3

    method = Leading(tokens=4)
    assert stages(method) == (method, None)
    chain = Chain(Uniform(tokens=8), FastV(K=1, keep=4))
    assert stages(chain) == (chain.first, chain.second)
