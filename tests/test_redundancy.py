"""Concentration of attention: the measures, what they are computed of, and the command."""

from __future__ import annotations

import csv
import math
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tiny import llava, mini_gemini, prompts

from zipeval.analysis import attention_plots
from zipeval.analysis.concentration import entropy, gini, top
from zipeval.cli import main
from zipeval.engine.received import record_attention
from zipeval.engine.vision import encode_crops
from zipeval.inference.session import Session

MEASURES = (gini, top, entropy)
SHARES = arrays(np.float64, st.integers(2, 40), elements=st.floats(1e-6, 1.0))


@pytest.mark.parametrize("n", [2, 9, 10, 144, 576])
def test_measures_of_the_two_extremes(n):
    uniform, one = np.full(n, 0.3), np.eye(n)[n // 2]
    assert [float(of(uniform)) for of in MEASURES] == pytest.approx(
        [0, math.ceil(n / 10) / n, 1]
    )
    assert [float(of(one)) for of in MEASURES] == pytest.approx([1 - 1 / n, 1, 0])


@given(SHARES, st.randoms())
def test_measures_are_bounded_and_know_no_order_nor_scale(x, random):
    n = len(x)
    low, high = (0, 1 / n, 0), (1 - 1 / n, 1, 1)
    shuffled = x[random.sample(range(n), n)]
    for of, least, most in zip(MEASURES, low, high, strict=True):
        assert least - 1e-9 <= of(x) <= most + 1e-9
        assert of(shuffled) == pytest.approx(of(x), abs=1e-9)
        assert of(7 * x) == pytest.approx(of(x), abs=1e-9)
        np.testing.assert_allclose(of(np.stack([x, shuffled])), [of(x)] * 2, atol=1e-9)


@given(SHARES)
def test_measures_by_their_definitions(x):
    n, total = len(x), sum(x)
    differences = sum(abs(a - b) for a in x for b in x)
    assert gini(x) == pytest.approx(differences / (2 * n * total), abs=1e-9)
    assert top(x, 0.3) == pytest.approx(
        sum(sorted(x)[-math.ceil(3 * n / 10) :]) / total
    )
    assert entropy(x) == pytest.approx(
        -sum(v / total * math.log(v / total, n) for v in x), abs=1e-9
    )


@given(SHARES, st.data())
def test_a_transfer_to_who_has_more_concentrates(x, data):
    poor, rich = np.argsort(x)[[0, -1]]
    given_away = x[poor] * data.draw(st.floats(0.01, 0.99))
    changed = x.copy()
    changed[poor] -= given_away
    changed[rich] += given_away
    assert gini(changed) >= gini(x) - 1e-9
    assert top(changed) >= top(x) - 1e-9
    assert entropy(changed) <= entropy(x) + 1e-9


@pytest.mark.parametrize(
    "make",
    [
        llava,
        lambda: llava(
            side=10, encoder="siglip_vision_model"
        ),  # 100 rows, more than are held at a time
        lambda: mini_gemini(side=4, grid=2),
    ],
    ids=["clip", "siglip", "mini_gemini_hd"],
)
def test_attention_of_every_layer_is_transformers_own(make):
    """Against whole attention maps of eager attention, summed number by number."""
    model = make()
    inputs, given = prompts(model, [[5], [6]], [1, 2]), []
    tower = model.model.vision_tower
    hook = tower.embeddings.register_forward_pre_hook(
        lambda module, args: given.append(args[0])
    )
    with torch.no_grad():
        encode_crops(
            model, inputs, "image", reads_pixels=False
        )  # transformers leaves hooks of its own at a first call
        before = [len(module._forward_hooks) for module in model.modules()]
        given.clear()
        with record_attention(model) as received:
            encode_crops(model, inputs, "image", reads_pixels=False)
        assert [len(module._forward_hooks) for module in model.modules()] == before
        hook.remove()
        tower.set_attn_implementation("eager")
        maps = tower(given[0], output_attentions=True).attentions
    assert len(received) == len(maps) == len(tower.encoder.layers)
    with_cls = hasattr(tower.embeddings, "class_embedding")
    for of_layer, layer in zip(received, maps, strict=True):
        crops, heads, tokens, _ = layer.shape
        rows = [0] if with_cls else range(tokens)
        for crop in range(crops):
            for patch in range(int(with_cls), tokens, 5):
                weights = [
                    layer[crop, head, row, patch].item()
                    for head in range(heads)
                    for row in rows
                ]
                found = of_layer[crop, patch - with_cls].item()
                assert found == pytest.approx(
                    math.fsum(weights) / len(weights), rel=1e-4, abs=1e-7
                )


@pytest.fixture
def analyze(tmp_path, monkeypatch, capsys):
    """(exit code, output, errors) of `zipeval analyze`."""

    def command(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["zipeval", "analyze", *arguments])
        try:
            main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return command


def test_what_is_written(analyze, tmp_path):
    """All of it, from the numbers that are kept; a second time the same bytes."""
    assert analyze("redundancy", "limit=3", "out=found")[0] == 0
    code, said, _ = analyze("redundancy", "limit=3", "out=again")
    kinds = [
        f"tiny_llava-{name}.{form}"
        for name in ("histogram", "layers", "overlays")
        for form in ("pdf", "svg")
    ]
    assert (code, said.split()) == (
        0,
        [
            f"again/{name}"
            for name in (
                "layers.csv",
                "images.csv",
                "attention.npy",
                "about.json",
                *kinds,
            )
        ],
    )
    for path in (tmp_path / "found").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path
    attention = np.load(tmp_path / "found" / "attention.npy")
    assert attention.shape == (3, 6, 144)
    assert (attention >= 0).all()
    assert (attention.sum(-1) <= 1 + 1e-5).all()  # CLS looks at itself too
    with (tmp_path / "found" / "layers.csv").open() as stream:
        lines = [*csv.DictReader(stream)]
    assert [line["layer"] for line in lines] == [*"123456"]
    for layer, line in enumerate(lines):
        for name, of in (("gini", gini), ("top10", top), ("entropy", entropy)):
            values = of(attention[:, layer].astype(float))
            assert float(line[f"{name}_mean"]) == pytest.approx(values.mean(), abs=1e-6)
            assert float(line[f"{name}_sd"]) == pytest.approx(values.std(), abs=1e-6)
    with (tmp_path / "found" / "images.csv").open() as stream:
        assert len([*csv.DictReader(stream)]) == 3 * 6
    svg = (tmp_path / "found" / "tiny_llava-histogram.svg").read_text()
    assert "mathdefault" not in svg


def test_images_of_a_directory(analyze, tmp_path):
    """In the order of their names and of any shape, of a model in tiles; what is no image file is passed over."""
    (tmp_path / "pictures").mkdir()
    for name, size in (("b.png", (64, 40)), ("a.jpg", (30, 90))):
        Image.new("RGB", size, (200, 40, 90)).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    (tmp_path / "pictures" / "paper.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "pictures" / "folder.png").mkdir()
    assert (
        analyze("redundancy", "model=tiny_next", "images=pictures", "out=found")[0] == 0
    )
    assert np.load(tmp_path / "found" / "attention.npy").shape == (2, 6, 144)
    with (tmp_path / "found" / "images.csv").open() as stream:
        assert [line["image"] for line in csv.DictReader(stream)] == ["a.jpg"] * 6 + [
            "b.png"
        ] * 6


@pytest.mark.parametrize(
    "arguments, named, advice",
    [
        ([], "analyze: say what", "zipeval analyze redundancy"),
        (
            ["redundance", "out=x"],
            "analyze redundance out=x: say what",
            "zipeval analyze redundancy",
        ),
        (["redundancy"], "where to", "out=DIR"),
        (
            ["redundancy", "out=x", "image=y"],
            "image: no such setting",
            "Did you mean images?",
        ),
        (
            ["redundancy", "out=x", "images=nowhere"],
            "images=nowhere: no such directory",
            "Leave it out",
        ),
        (
            ["redundancy", "out=x", "images=."],
            "images=.: no image files",
            "another directory",
        ),
        (["redundancy", "out=x", "limit=none"], "limit=none", "limit=16"),
        (
            ["redundancy", "out=x", "model=tiny_lava"],
            "model=tiny_lava",
            "Did you mean tiny_llava?",
        ),
        (
            ["redundancy", "out=/dev/null/x", "limit=1"],
            "out=/dev/null/x",
            "another place",
        ),
        (
            ["redundancy", "out=/proc", "limit=1"],
            "out=/proc: cannot write there",
            "another place",
        ),
        (
            ["redundancy", "out=x", "imag=y"],
            "imag: no such setting",
            "Available: images, limit, model, out",
        ),
        (
            ["redundancy", "out=x", "method=fastv"],
            "method=fastv: `zipeval analyze` has no use for it",
            "Leave it out",
        ),
    ],
    ids=str,
)
def test_refusals(analyze, arguments, named, advice, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "load", lambda self: 1 / 0)
    code, out, said = analyze(*arguments)
    assert (code, out, len(said.splitlines())) == (2, "", 1)
    assert named in said
    assert advice in said
    assert not [*tmp_path.iterdir()]


def test_an_image_that_cannot_be_decoded_is_named(analyze, tmp_path):
    Image.effect_noise((64, 64), 50).save(file := BytesIO(), "PNG")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "torn.png").write_bytes(file.getvalue()[:999])
    code, _, said = analyze("redundancy", "images=pictures", "out=found")
    assert code == 2
    assert "images=pictures: torn.png cannot be decoded" in said
    assert not [*(tmp_path / "found").iterdir()]


def test_a_file_that_is_no_image_is_named_before_the_model_is_loaded(
    analyze, tmp_path, monkeypatch
):
    monkeypatch.setattr(Session, "load", lambda self: 1 / 0)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "b.png").write_text("no image")
    code, _, said = analyze("redundancy", "images=pictures", "out=found")
    assert code == 2
    assert "images=pictures: b.png cannot be decoded" in said
    assert not (tmp_path / "found").exists()


def test_intervals_of_curves_are_seen_whole():
    """Of six images one is unlike the others, and the standard deviation reaches beyond the scale."""
    measured = {
        "gini": np.array([[0.02] * 3, [0.02] * 2 + [0.9]]),
        "entropy": np.array([[1.0] * 3, [1.0] * 2 + [0.3]]),
    }
    measured = {
        name: np.concatenate([of[:1]] * 5 + [of[1:]]) for name, of in measured.items()
    }
    (axes,) = attention_plots.curves(measured, 1).axes
    low, high = axes.get_ylim()
    for values in measured.values():
        assert low < (values.mean(0) - values.std(0)).min()
        assert high > (values.mean(0) + values.std(0)).max()
    assert (
        max((values.mean(0) + values.std(0)).max() for values in measured.values())
        > 1.02
    )
