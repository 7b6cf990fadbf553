"""The question set that ships: what it covers, that it follows from its seed, and that training never saw it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import shapes
import train_tiny

import zipeval.tasks

FILE = Path(zipeval.tasks.__path__[0], "shapes", "test.parquet")


@pytest.fixture(scope="module")
def shipped():
    return datasets.Dataset.from_parquet(str(FILE)).to_pandas().drop(columns="image")


@pytest.fixture(scope="module")
def images():
    """image_id -> (SIZE, SIZE, 3) pixels."""
    rows = datasets.Dataset.from_parquet(str(FILE)).select_columns(
        ["image_id", "image"]
    )
    return {r["image_id"]: np.asarray(r["image"].convert("RGB")) for r in rows}


def test_what_it_covers(shipped):
    assert len(shipped) >= 1000
    assert shipped["image_id"].nunique() >= 200
    assert shipped["question_id"].is_unique
    assert not shipped.duplicated(["image_id", "question"]).any()
    assert shipped.groupby("image_id").size().min() >= 3
    types = shipped["type"].value_counts()
    assert set(types.index) == set(shapes.TYPES)
    assert types.min() >= 100


def test_yes_and_no_are_balanced_as_in_pope(shipped):
    answers = Counter(shipped[shipped["type"] == "exist"]["answer"])
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_it_follows_from_its_seed(shipped, images, tmp_path):
    """Pixels may differ in rounding where another Pillow draws them, questions and answers may not."""
    train_tiny.write_test_set(tmp_path / "again.parquet", 20, 5)
    for row in datasets.Dataset.from_parquet(str(tmp_path / "again.parquet")):
        old = shipped[shipped["question_id"] == row["question_id"]].iloc[0]
        assert {k: row[k] for k in old.index} == dict(old)
        difference = (
            np.asarray(row["image"].convert("RGB")).astype(int)
            - images[row["image_id"]]
        )
        assert np.abs(difference).mean() < 2


def test_answers_are_true_of_the_scene():
    """Read back from the list of things by rules that share no code with the questions."""
    for i in range(300):
        _, scene = shapes.make_scene(9, i, "test")
        for kind, question, answer in shapes.questions(
            scene, np.random.default_rng(i), 12
        ):
            words = question.rstrip("?").split()
            said = [
                t
                for t in scene.things
                if all(
                    w in (t.color, t.shape)
                    for w in words
                    if w in {*shapes.COLORS, *shapes.SHAPES}
                )
            ]
            if kind == "exist":
                assert (answer == "yes") == bool(said)
            elif kind == "count":
                assert int(answer) == len(said)
            elif kind == "text":
                assert answer == scene.signs[0].text
            else:
                (thing,) = said
                place = f"{'top' if thing.y < 48 else 'bottom'} {'left' if thing.x < 48 else 'right'}"
                assert (
                    answer
                    == {"color": thing.color, "shape": thing.shape, "position": place}[
                        kind
                    ]
                )


def glyphs(pixels, scene):
    """The pixels of every character in a scene."""
    for sign in scene.signs:
        for k in range(2):
            left, top, right, bottom = (round(v) for v in sign.glyph_box(k))
            yield pixels[top:bottom, left:right].tobytes()


def test_training_never_sees_a_test_image_a_test_text_or_a_test_glyph():
    assert not set(shapes.TEXTS["train"]) & set(shapes.TEXTS["test"])
    assert sum(map(len, shapes.TEXTS.values())) == len(shapes.CHARS) ** 2
    seen, seen_glyphs, seen_texts = set(), set(), set()
    for split, count in (("train", 1200), ("crowded", 600)):
        data = train_tiny.render(split, count)
        seen |= {p.tobytes() for p in data.pixels}
        seen_glyphs |= {
            g
            for p, s in zip(data.pixels, data.scenes, strict=True)
            for g in glyphs(p, s)
        }
        seen_texts |= {s.text for scene in data.scenes for s in scene.signs}
    assert seen_texts <= set(shapes.TEXTS["train"])
    assert len(seen) == 1800  # no training image repeats either
    for i in range(300):
        image, scene = shapes.make_scene(train_tiny.SEEDS["test"], i, "test")
        assert {s.text for s in scene.signs} <= set(shapes.TEXTS["test"])
        assert np.asarray(image).tobytes() not in seen
        assert not set(glyphs(np.asarray(image), scene)) & seen_glyphs


def test_seeds_of_the_splits_differ():
    assert len(set(train_tiny.SEEDS.values())) == len(train_tiny.SEEDS)
