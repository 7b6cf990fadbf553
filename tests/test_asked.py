"""Samples hold what was asked: the question, its choices, and which picture it was about."""

from __future__ import annotations

import json
import re
import shutil
import sys
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from zipeval.benchmarks import task_folder
from zipeval.cli import compose, main
from zipeval.evaluation.answer_choices import answer_choices
from zipeval.evaluation.runner import run
from zipeval.media import picture_hash
from zipeval.reporting.html import pictures
from zipeval.reporting.html.pictures import read_picture
from zipeval.results import records

SETTINGS = ["limit=6", "tasks=[zipeval_shapes]"]


def samples_of(*overrides):
    (path,) = run(compose([*SETTINGS, *overrides]))
    return path, records.read_samples(path.parent, records.read(path))


@pytest.mark.parametrize(
    ("document", "choices"),
    [
        ({"choices": ["a cat", "a dog"]}, ["a cat", "a dog"]),
        ({"options": "['3.5', \"it's\", '<image 1>']"}, ["3.5", "it's", "<image 1>"]),
        ({"options": "[]"}, []),
        ({"options": "see the picture"}, []),
        ({"choices": {"text": ["x", "y"], "label": ["A", "B"]}}, ["x", "y"]),
        ({"A": "red", "B": "blue", "C": "nan", "D": "nan"}, ["red", "blue"]),
        (
            {
                "choice_a": "One",
                "choice_b": "Two",
                "choice_c": "Three",
                "choice_d": "Four",
            },
            ["One", "Two", "Three", "Four"],
        ),
        ({"A": "a lone column"}, []),
        ({"question": "What is it?"}, []),
        ({"choices": None, "A": 1, "B": 2}, ["1", "2"]),
        ("no mapping", []),
    ],
)
def test_choices_of_every_layout(document, choices):
    assert answer_choices(document) == choices


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_whatever_a_column_holds_is_no_error(value):
    for name in ("choices", "options", "A"):
        assert all(isinstance(choice, str) for choice in answer_choices({name: value}))


def test_a_pixel_and_a_shape_make_another_picture():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    first = picture_hash(Image.fromarray(pixels))
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert picture_hash(Image.fromarray(pixels.copy())) == first == picture_hash(pixels)
    changed = pixels.copy()
    changed[3, 5, 2] += 1
    assert picture_hash(changed) != first
    assert picture_hash(pixels.reshape(6, 4, 3)) != first


def test_a_sample_has_the_text_of_its_question(tmp_path):
    _, samples = samples_of("method=vanilla", f"results={tmp_path}")
    (file,) = task_folder("zipeval_shapes").glob("*.parquet")
    rows = parquet.read_table(file).select(["question"]).to_pylist()
    assert [sample["question"] for sample in samples] == [
        row["question"] for row in rows[:6]
    ]
    assert all(len(sample["pictures"]) == 1 for sample in samples)
    assert all("choices" not in sample for sample in samples)


def test_how_pictures_are_read_does_not_change_which_they_are(tmp_path):
    _, plain = samples_of(
        "method=vanilla", "batch_size=2", "runner.workers=0", f"results={tmp_path}/a"
    )
    _, shared = samples_of(
        "method=visionzip",
        "tokens=16",
        "runner.reuse=prefix",
        "runner.workers=2",
        f"results={tmp_path}/b",
    )
    assert [sample["pictures"] for sample in plain] == [
        sample["pictures"] for sample in shared
    ]
    # Questions about one picture stand together: the first six are about two of them.
    assert len({sample["pictures"][0] for sample in plain}) < len(plain)


def test_a_question_without_a_picture_has_none(miniatures, tmp_path):
    _, samples = samples_of(
        "tasks=[scienceqa_img]",
        "limit=2",
        "method=vanilla",
        f"data.root={miniatures}",
        f"results={tmp_path}",
    )
    assert all(sample["choices"] for sample in samples)
    assert all(len(sample["pictures"]) == len(sample["crops"]) for sample in samples)


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """Runs `zipeval show` on the results of vanilla and VisionZip; returns what it prints."""
    for method in (["method=vanilla"], ["method=visionzip", "tokens=16"]):
        samples_of(*method, f"results={tmp_path}")
    monkeypatch.setattr(sys, "argv", ["zipeval"])

    def show(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(
            sys, "argv", ["zipeval", "show", *arguments, f"results={tmp_path}"]
        )
        main()
        return capsys.readouterr().out

    return show


def test_one_sample_is_shown_beside_the_upper_bound(shown, tmp_path):
    (path,) = tmp_path.glob("tiny_llava-visionzip*/zipeval_shapes.json")
    sample = records.read_samples(path.parent, records.read(path))[3]
    text = shown("tiny_llava-visionzip", "--sample", "3")
    assert text == shown("tiny_llava-visionzip", "sample=3", "task=zipeval_shapes")
    lines = dict(
        re.split(r" {2,}", line.strip(), maxsplit=1) for line in text.splitlines()[1:]
    )
    assert lines["question"] == sample["question"]
    assert lines["prediction"] == sample["prediction"]
    assert lines["vanilla's score"] in ("0.0", "1.0")
    assert lines["visual tokens"] == "16 in layers 0-5"
    assert lines["pictures"] == sample["pictures"][0]
    assert "vanilla's" not in shown("tiny_llava-vanilla", "sample=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_llava-vanilla", "sample=77"], "sample=77: .* from 0 to 5"),
        (["tiny_llava-vanilla", "sample=x"], "sample=x: expected a whole number"),
        (
            ["tiny_llava-vanilla", "task=zipeval_shapes"],
            "task=zipeval_shapes: it needs sample=",
        ),
        (
            ["tiny_llava-vanilla", "sample=1", "task=zipeval_shape"],
            "task=zipeval_shape: .* Did you mean zipeval_shapes",
        ),
    ],
)
def test_a_sample_that_is_not_there_is_refused(shown, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        shown(*arguments)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_sample_of_an_older_record_is_shown_as_far_as_it_tells(shown, tmp_path):
    (path,) = tmp_path.glob("tiny_llava-visionzip*/zipeval_shapes.json")
    record = json.loads(path.read_text())
    samples = records.read_samples(path.parent, record)
    for sample in samples:
        del sample["question"], sample["pictures"]
    path.unlink()
    record["schema"] = 5
    del record["samples"]
    records.write(path.parent, record, samples)
    assert json.loads(path.read_text())["schema"] == 5
    text = shown("tiny_llava-visionzip", "sample=3")
    assert "question" not in text
    assert "prediction" in text


# One whose images are in its rows, one with several images, and one whose images are a data set of their own.
@pytest.mark.parametrize("task", ["mme", "mmmu_val", "gqa"])
def test_pictures_are_read_again_from_their_data_set(task, miniatures, tmp_path):
    settings = [
        f"tasks=[{task}]",
        "limit=4",
        f"data.root={miniatures}",
        f"results={tmp_path}",
        "bound=none",
    ]
    (path,) = run(compose(settings))
    record = records.read(path)
    samples = records.read_samples(path.parent, record)
    shutil.rmtree(path.with_suffix(".images"))
    for sample in samples:
        for number in range(len(sample["pictures"])):
            picture = Image.open(BytesIO(read_picture(record, sample, number)))
            assert picture.format == "JPEG" and min(picture.size) > 10
        assert read_picture(record, sample, len(sample["pictures"])) is None
    # Another picture than the model was shown is nobody's, and samples of before have no hashes.
    assert read_picture(record, {**samples[0], "pictures": ["0" * 16]}) is None
    assert read_picture(record, {"doc_id": 0}) is None
    assert read_picture(record, {**samples[0], "doc_id": 10**6}) is None


def test_pictures_beyond_those_that_are_kept(tmp_path):
    """The first eight lie beside the record."""
    path, samples = samples_of("method=vanilla", "limit=10", f"results={tmp_path}")
    record = records.read(path)
    assert [
        sample["doc_id"] for sample in samples if read_picture(record, sample) is None
    ] == []
    moved = {
        **record,
        "config": {**record["config"], "data": {"root": "/nowhere"}},
        "task": "gqa",
    }
    assert read_picture(moved, samples[9]) is None  # its data set is not here


def test_a_data_set_that_comes_later_is_looked_for_again(tmp_path):
    """`zipeval view` shows a sweep that is under way, which may fetch its data while a page is open."""
    path, samples = samples_of("method=vanilla", "limit=9", f"results={tmp_path}")
    record = records.read(path)
    with pytest.MonkeyPatch.context() as patch:
        pictures._rows.cache_clear()
        patch.setattr(pictures.data, "is_here", lambda task, root: False)
        assert read_picture(record, samples[8]) is None
    assert read_picture(record, samples[8]) is not None
