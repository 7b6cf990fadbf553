"""A picture of what methods keep: the same tokens and answers as in a run, drawn where they are."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image
from pyarrow import parquet

from zipeval.analysis import visualize
from zipeval.analysis.redundancy import EMBEDDED
from zipeval.cli import compose, main
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.results import records

SETTINGS = [
    [f"method={method}", "tokens=16", "budget=final"] for method in visualize.METHODS
]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(image file, question) of the embedded task's first sample."""
    row = (
        parquet.read_table(EMBEDDED, columns=["image", "question"])
        .slice(0, 1)
        .to_pylist()[0]
    )
    path = tmp_path_factory.mktemp("images") / "first=1.png"
    path.write_bytes(row["image"]["bytes"])
    return path, row["question"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """(exit code, output, errors) of `zipeval visualize`."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["zipeval", "visualize", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("model", ["tiny_llava", "tiny_next"])
def test_a_panel_is_what_a_run_records(model, first, tmp_path):
    configs = [
        compose([f"model={model}", "limit=1", f"results={tmp_path}", *its])
        for its in SETTINGS
    ]
    panels, _ = visualize._panels([Session(config) for config in configs], *first)
    for config, panel in zip(configs, panels, strict=True):
        (path,) = run(config)
        (sample,) = records.read_samples(path.parent, records.read(path))
        assert panel.answer == sample["prediction"]
        assert panel.tokens == sample["visual_tokens"][-1]
        assert (panel.crops, panel.side) == (sample["crops"][0], 12)
        everything = [[*range(144)]]  # nothing is removed, and nothing recorded
        assert panel.kept == {p for p in sample.get("kept", everything)[0] if p < 144}
        assert panel.merged == {p for p in sample.get("merged", [[]])[0] if p < 144}
    assert panels[1].merged


def panel(name, kept, merged, crops=1):
    return visualize.Panel(
        name, f"answer {name}", len(kept), 16, crops, 4, kept, merged
    )


def test_tokens_are_drawn_where_they_are():
    """On a picture of 8 x 8 pixels, a token is 2 x 2 of them."""
    Image.new("RGB", (8, 8), (200, 40, 40)).save(seen := BytesIO(), "JPEG")
    panels = [panel("all", {*range(16)}, set()), panel("one", {1, 6}, {11}, crops=3)]
    figure = visualize.draw(panels, seen.getvalue(), "What is $5 of it?")
    original, whole, one = figure.axes
    assert figure.get_suptitle() == "What is $5 of it?"
    assert len(original.images) == 1
    for axes, clear in ((whole, {*range(16)}), (one, {1, 6, 11})):
        pale = np.asarray(axes.images[1].get_array())[..., 3]
        assert {*np.flatnonzero(pale == 0).tolist()} == clear
        assert tuple(axes.images[1].get_extent()) == (-0.5, 7.5, 7.5, -0.5)
    (box,) = (patch for patch in one.patches if isinstance(patch, Rectangle))
    assert [*box.get_xy(), box.get_width()] == pytest.approx(
        [3 * 2 - 0.3, 2 * 2 - 0.3, 1.6]
    )
    assert (one.get_title(), one.get_xlabel()) == ("one\n2 of 16 tokens", "answer one")


def test_files(first, command, tmp_path):
    """By default of one method before the decoder and two inside it; the same bytes again."""
    image, question = first
    code, said, _ = command(image, question)
    assert (code, said) == (0, "visualize.svg\n")
    made = (tmp_path / "visualize.svg").read_bytes()
    command(image, question, "tokens=16", "method=vanilla,visionzip,fastv,sparsevlm")
    assert made == (tmp_path / "visualize.svg").read_bytes()
    for form in ("pdf", "png"):
        assert command(image, question, "method=visionzip", f"out=found.{form}")[
            :2
        ] == (0, f"found.{form}\n")
    assert Image.open(tmp_path / "found.png").convert("RGBA").getpixel((0, 0)) == (
        255,
        255,
        255,
        255,
    )
    assert (
        command(image, question, "method=chain", "method.first.tokens=48", "tokens=16")[
            0
        ]
        == 0
    )
    assert (tmp_path / "found.pdf").read_bytes().startswith(b"%PDF")


IMAGE = "{image}"
REFUSED = [
    ([], "name an image and a question", "photo.jpg"),
    ([IMAGE], "name an image and a question", "photo.jpg"),
    ([IMAGE, "method=visionzip"], "name an image and a question", "photo.jpg"),
    (["nowhere.png", "What?"], "nowhere.png: no such file", "photo.jpg"),
    ([Path(__file__), "What?"], "cannot be decoded", "another image"),
    ([IMAGE, "What?", "tokens=48,16"], "tokens=48,16", "Run it for each"),
    (
        [IMAGE, "What?", "tokens=abc"],
        "tokens=abc: expected a whole number",
        "tokens=16",
    ),
    ([IMAGE, "What?", "method=chain"], "first.tokens=None", "method.first.tokens="),
    (
        [IMAGE, "What?", "method=chain,fastv", "method.first.tokens=48"],
        "of which method",
        "method=chain",
    ),
    ([IMAGE, "What?", "method.K=1"], "method.K=1: of which method", "method=chain"),
    (
        [IMAGE, "What?", "method=vanilla,visionzip_tuned", "tokens=16"],
        "projector=",
        "zipeval tune",
    ),
    (
        [IMAGE, "What?", "out=/proc/v.png"],
        "out=/proc/v.png: cannot write there",
        "another place",
    ),
    ([IMAGE, "What?", "tokens=9999"], "tokens=9999: tiny_llava has 144", "tokens=16"),
    ([IMAGE, "What?", "method=visonzip"], "method=visonzip", "Did you mean visionzip?"),
    (
        [IMAGE, "What?", "methods=fastv"],
        "methods: no such setting",
        "Did you mean method?",
    ),
    (
        [IMAGE, "What?", "model.dtpe=float16"],
        "model.dtpe=float16",
        "Did you mean dtype?",
    ),
    (
        [IMAGE, "What?", "method=visionzip_tuned", "projector=x"],
        "projector=x: no such file",
        "`zipeval tune",
    ),
    ([IMAGE, "What?", "out=x.gif"], "out=x.gif", ".svg, .pdf or .png"),
    ([IMAGE, "What?", "out=nowhere/x.svg"], "out=nowhere/x.svg", "another place"),
]


@pytest.mark.parametrize("arguments, named, advice", REFUSED, ids=str)
def test_refusals_come_before_the_model_is_loaded(
    arguments, named, advice, first, command, monkeypatch, tmp_path
):
    monkeypatch.setattr(Session, "load", lambda self: 1 / 0)
    code, out, said = command(*(first[0] if a == IMAGE else a for a in arguments))
    assert (code, out, len(said.splitlines())) == (2, "", 1)
    assert named in said
    assert advice in said
    assert not [*tmp_path.iterdir()]


def test_a_question_that_is_part_of_the_prompt_is_refused(first, command):
    code, _, said = command(first[0], "What <image> is it?")
    assert code == 2
    assert "<image>" in said
