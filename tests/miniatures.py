"""Miniatures of the benchmarks' data sets: the hub's columns and layout, a few rows, generated images.

    python tests/miniatures.py DIR

makes DIR/lmms-lab-encoder/{GQA,MME,...}, for data.root=DIR.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

TEXT, NUMBER, TRUTH, IMAGE = Value("string"), Value("int64"), Value("bool"), Image()
TEXTS = List(TEXT)
HUB = "lmms-lab-encoder"


def picture(number: int) -> Pictures.Image:
    """Noise; one of another number is another image."""
    return Pictures.fromarray(
        np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    )


def put(
    root: Path,
    name: str,
    split: str,
    columns: dict,
    rows: list[tuple],
    config: str = "default",
) -> None:
    """Add a split to a data set, and name it in the head of its README as the hub's do.

    Args:
        columns: name -> type; `rows` hold values in their order.
    """
    folder = root / HUB / name
    parquet = (
        f"{'data' if config == 'default' else config}/{split}-00000-of-00001.parquet"
    )
    (folder / parquet).parent.mkdir(parents=True, exist_ok=True)
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    Dataset.from_list(records, features=Features(columns)).to_parquet(folder / parquet)
    readme = folder / "README.md"
    configs = (
        yaml.safe_load(readme.read_text().split("---")[1])["configs"]
        if readme.exists()
        else []
    )
    files = {"split": split, "path": parquet.replace("-00000-of-00001.parquet", "-*")}
    configs.append({"config_name": config, "data_files": [files]})
    readme.write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")


def gqa(root: Path) -> None:
    columns = dict(
        id=TEXT,
        imageId=TEXT,
        question=TEXT,
        answer=TEXT,
        fullAnswer=TEXT,
        isBalanced=TRUTH,
        semanticStr=TEXT,
    )
    answers = ("red", "yes", "table", "left")
    rows = [
        (str(i), f"n{i % 2}", "What is it?", a, f"It is {a}.", True, "query")
        for i, a in enumerate(answers)
    ]
    put(root, "GQA", "testdev", columns, rows, "testdev_balanced_instructions")
    # In another order than the questions: they are found by their id.
    images = [(f"n{i}", picture(i)) for i in (2, 1, 0)]
    put(
        root,
        "GQA",
        "testdev",
        dict(id=TEXT, image=IMAGE),
        images,
        "testdev_balanced_images",
    )


def mme(root: Path) -> None:
    """Two images of one perception category, one of another, one of a cognition category: each a Yes and a No."""
    columns = dict(
        question_id=TEXT, image=IMAGE, question=TEXT, answer=TEXT, category=TEXT
    )
    ids = ("existence/1.png", "existence/2.png", "color/1.png", "code_reasoning/1.png")
    ask = "Is it so? Please answer yes or no."
    rows = [
        (name, picture(i), ask, a, name.split("/")[0])
        for i, name in enumerate(ids)
        for a in ("Yes", "No")
    ]
    put(root, "MME", "test", columns, rows)


def pope(root: Path) -> None:
    """Two yes and two no in each of the three categories, by their names a yes and a no about an image."""
    columns = dict(
        id=TEXT,
        question_id=TEXT,
        question=TEXT,
        answer=TEXT,
        image_source=TEXT,
        image=IMAGE,
        category=TEXT,
    )
    kinds = ("adversarial", "popular", "random")
    rows = [(kind, answer) for kind in kinds for answer in ("yes", "no") * 2]
    rows = [
        (
            str(i),
            str(i),
            "Is there a dog?",
            a,
            f"COCO_val2014_{i % 4 // 2}",
            picture(i),
            kind,
        )
        for i, (kind, a) in enumerate(rows)
    ]
    put(root, "POPE", "test", columns, rows)


def scienceqa(root: Path) -> None:
    kept = dict(image=IMAGE, question=TEXT, choices=TEXTS, answer=NUMBER, hint=TEXT)
    others = (
        "task",
        "grade",
        "subject",
        "topic",
        "category",
        "skill",
        "lecture",
        "solution",
    )
    hints = ("", "It is cold.", "", "")
    rows = [
        (picture(i), "Which?", ["x", "y", "z"], i % 3, hint, *others)
        for i, hint in enumerate(hints)
    ]
    put(
        root,
        "ScienceQA",
        "test",
        kept | dict.fromkeys(others, TEXT),
        rows,
        "ScienceQA-IMG",
    )


def vqav2(root: Path) -> None:
    """Of ten people eight say net and two goal, of the last image all ten say 2."""
    answer = dict(answer=TEXT, answer_confidence=TEXT, answer_id=NUMBER)
    columns = dict(
        question_type=TEXT,
        multiple_choice_answer=TEXT,
        answers=List(answer),
        image_id=NUMBER,
    )
    columns |= dict(answer_type=TEXT, question_id=NUMBER, question=TEXT, image=IMAGE)
    rows = []
    for i, said in enumerate((["net"] * 8 + ["goal"] * 2,) * 3 + (["2"] * 10,)):
        answers = [
            dict(zip(answer, (s, "yes", n), strict=True)) for n, s in enumerate(said, 1)
        ]
        rows.append(
            ("what", said[0], answers, i, "other", i * 1000, "What is it?", picture(i))
        )
    put(root, "VQAv2", "validation", columns, rows)


def textvqa(root: Path) -> None:
    """Of ten people seven say nokia, two say no, one phone."""
    columns = dict(
        image_id=TEXT,
        question_id=NUMBER,
        question=TEXT,
        question_tokens=TEXTS,
        image=IMAGE,
    )
    columns |= dict(
        image_width=NUMBER,
        image_height=NUMBER,
        flickr_original_url=TEXT,
        flickr_300k_url=TEXT,
    )
    columns |= dict(answers=TEXTS, image_classes=TEXTS, set_name=TEXT, ocr_tokens=TEXTS)
    said = ["nokia"] * 7 + ["no"] * 2 + ["phone"]
    rest = (32, 24, "", "", said, ["phone"], "val", ["NOKIA", "5G"])
    rows = [
        (str(i), i, "what brand is it?", ["what"], picture(i), *rest) for i in range(4)
    ]
    put(root, "textvqa", "validation", columns, rows)


def mmmu(root: Path) -> None:
    """Three questions with options, one of them about two images, and one without."""
    images = {f"image_{n}": IMAGE for n in range(1, 8)}
    columns = dict(id=TEXT, question=TEXT, options=TEXT, explanation=TEXT) | images
    columns |= dict(
        img_type=TEXT,
        answer=TEXT,
        topic_difficulty=TEXT,
        question_type=TEXT,
        subfield=TEXT,
    )
    asked = [
        (
            "validation_Art_1",
            "Look at <image 1>. Which?",
            "['oak', 'elm', 'ash', 'fir']",
            "A",
            "multiple-choice",
        ),
        (
            "validation_Art_2",
            "<image 1> and <image 2>?",
            "['oak', 'elm', 'ash', 'fir']",
            "C",
            "multiple-choice",
        ),
        ("validation_Math_1", "Which? <image 1>", "['1', '2']", "B", "multiple-choice"),
        ("validation_Math_2", "How many? <image 1>", "[]", "12", "open"),
    ]
    rows = []
    for i, (name, question, options, answer, kind) in enumerate(asked):
        count = question.count("<image")
        shown = [picture(10 * i + n) if n < count else None for n in range(7)]
        rows.append(
            (
                name,
                question,
                options,
                "",
                *shown,
                "['Plots']",
                answer,
                "Easy",
                kind,
                "field",
            )
        )
    put(root, "MMMU", "validation", columns, rows)


def seed(root: Path) -> None:
    """Two questions about an image, two about two frames of a video."""
    names = (
        "answer",
        "choice_a",
        "choice_b",
        "choice_c",
        "choice_d",
        "data_id",
        "data_type",
        "question",
        "question_id",
    )
    columns = dict.fromkeys(names, TEXT) | dict(
        question_type_id=NUMBER, image=List(IMAGE), segment=TEXTS
    )
    rows = []
    for i, answer in enumerate("ABCD"):
        video = i % 2
        shown = [picture(10 * i + n) for n in range(1 + video)]
        kind, segment = ("video", ["1", "2"]) if video else ("image", [])
        rows.append(
            (
                answer,
                "a",
                "b",
                "c",
                "d",
                str(i),
                kind,
                "Which?",
                str(i),
                1,
                shown,
                segment,
            )
        )
    put(root, "SEED-Bench", "test", columns, rows)


def vizwiz(root: Path) -> None:
    """Of ten people six say soda, two can, two unanswerable."""
    columns = dict(
        question_id=TEXT, image=IMAGE, question=TEXT, answers=TEXTS, category=TEXT
    )
    said = ["soda"] * 6 + ["can"] * 2 + ["unanswerable"] * 2
    rows = [
        (f"VizWiz_val_{i}.jpg", picture(i), "What is this?", said, "other")
        for i in range(4)
    ]
    put(root, "VizWiz-VQA", "val", columns, rows)


def mmbench(root: Path) -> None:
    """Three questions: of four options, in two rotations; of two options, in two rotations; with a hint, in one."""
    options = dict.fromkeys("ABCD", TEXT)
    columns = dict(
        index=NUMBER,
        question=TEXT,
        hint=TEXT,
        answer=TEXT,
        **options,
        category=TEXT,
        image=IMAGE,
    )
    columns |= dict(source=TEXT, comment=TEXT, split=TEXT) | {"L2-category": TEXT}
    trees, fruit = ("oak", "elm", "ash", "fir"), ("banana", "cherry", "nan", "nan")
    asked = [
        (7, "nan", "A", trees),
        (8, "nan", "A", fruit),
        (9, "It is tall.", "C", trees),
        (1_000_007, "nan", "D", (*trees[1:], trees[0])),
        (1_000_008, "nan", "B", ("cherry", "banana", "nan", "nan")),
    ]
    rest = ("src", "nan", "dev", "perception")
    rows = [
        (i, "Which?", hint, answer, *letters, "c", picture(i % 97), *rest)
        for i, hint, answer, letters in asked
    ]
    put(root, "MMBench", "dev", columns, rows, "en")


def mmvet(root: Path) -> None:
    columns = dict(
        question_id=TEXT,
        image=IMAGE,
        question=TEXT,
        answer=TEXT,
        image_source=TEXT,
        capability=TEXT,
    )
    asked = [
        ("What is x?", "-1<AND>-5", "ocr,math"),
        ("What colour is it?", "red<OR>crimson", "rec"),
        ("What is funny?", "A dog in a hat.", "rec,know,gen"),
        ("Where is it?", "left", "rec,spat"),
    ]
    rows = [
        (f"v1_{i}", picture(i), question, answer, "", c)
        for i, (question, answer, c) in enumerate(asked)
    ]
    put(root, "MMVet", "test", columns, rows)


def llava_bench(root: Path) -> None:
    """Two questions of a conversation, one for a description, one that takes reasoning."""
    columns = dict(
        question_id=TEXT,
        question=TEXT,
        image=IMAGE,
        category=TEXT,
        image_id=TEXT,
        gpt_answer=TEXT,
    )
    columns |= dict(caption=TEXT)
    kinds = ("conv", "conv", "detail", "complex")
    rows = [
        (str(i), f"What is {i}?", picture(i), k, f"{i}", f"It is {i}.", "A lawn.")
        for i, k in enumerate(kinds)
    ]
    put(root, "llava-bench-in-the-wild", "train", columns, rows)


def make(root: Path) -> Path:
    """All of them below a directory."""
    images = (
        gqa,
        mmbench,
        mme,
        pope,
        scienceqa,
        vqav2,
        textvqa,
        mmmu,
        seed,
        mmvet,
        llava_bench,
        vizwiz,
    )
    for miniature in images:
        miniature(root)
    return root


if __name__ == "__main__":
    make(Path(sys.argv[1]))
