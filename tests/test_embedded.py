"""The embedded checkpoint over the first questions of the whole set: it sees, and it tolerates reduction."""

from __future__ import annotations

import datasets
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from test_shapes import FILE

from zipeval.cli import compose
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.results import records

NINTH = 16  # of 144 patches
LIMIT = 600


@pytest.fixture(scope="module")
def questions():
    return datasets.Dataset.from_parquet(str(FILE)).select(range(LIMIT))


@pytest.fixture(scope="module")
def right(tmp_path_factory, questions):
    """One row per question: its type, its answer, and whether each method answers it right."""
    root = tmp_path_factory.mktemp("embedded")
    frame = pd.DataFrame({"type": questions["type"], "answer": questions["answer"]})
    for method in ("vanilla", "visionzip", "random"):
        settings = [
            f"method={method}",
            f"tokens={NINTH}",
            f"limit={LIMIT}",
            "runner.reuse=prefix",
        ]
        (path,) = run(compose([f"results={root}", *settings]))
        samples = records.read_samples(path.parent, records.read(path))
        frame[method] = [s["scores"]["accuracy"] for s in samples]
    return frame


def chance(frame):
    """Accuracy of always giving a type's most frequent answer."""
    return frame.groupby("type")["answer"].agg(
        lambda a: a.value_counts(normalize=True).iloc[0]
    )


def test_vanilla_answers_every_type_far_above_chance(right):
    assert right["vanilla"].mean() >= 0.85
    accuracy = right.groupby("type")["vanilla"].mean()
    assert ((accuracy - chance(right)) / (1 - chance(right)) > 0.75).all()


def test_answers_come_from_the_image(right, questions):
    """Asked about the next image but one, the model does about as well as someone who sees none."""
    session = Session(compose([]))
    model, _ = session.load()
    indices = range(0, LIMIT, 2)
    correct = 0
    for start in range(0, len(indices), 30):
        rows = [questions[i] for i in indices[start : start + 30]]
        others = [
            questions[(i + 10) % len(questions)]["image"]
            for i in indices[start : start + 30]
        ]
        parts = [
            [{"type": "image", "url": image}, {"type": "text", "text": row["question"]}]
            for row, image in zip(rows, others, strict=True)
        ]
        inputs = session.inputs(
            [[{"role": "user", "content": content}] for content in parts]
        )
        with torch.inference_mode():
            ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said = [text.strip() for text in session.decode(ids)]
        correct += sum(s == row["answer"] for s, row in zip(said, rows, strict=True))
    asked = right.iloc[list(indices)]
    assert correct / len(indices) < asked["type"].map(chance(right)).mean() + 0.1


def test_reduction_to_a_ninth_keeps_most_of_the_upper_bound(right):
    assert right["visionzip"].mean() / right["vanilla"].mean() >= 0.6


def test_visionzip_beats_as_many_random_patches(right):
    """Exact McNemar test over the questions that only one of the two answers right."""
    only_visionzip = int((right["visionzip"] > right["random"]).sum())
    only_random = int((right["random"] > right["visionzip"]).sum())
    assert (
        binomtest(
            only_visionzip, only_visionzip + only_random, alternative="greater"
        ).pvalue
        < 0.01
    )
