"""Task functions of conversations: all questions that a data set has about one picture, a round each.

Rounds are lmms-eval's: `doc_to_text` is asked for each of them, and says when there is none left. zipeval answers every
later round twice, so that a document's answers are those of its rounds on one cache, and behind them those of its later
rounds with the picture read anew (zipeval/conversing.py).
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache

from zipeval.scoring import gqa_functions, llava_yes_no


def shapes_process_docs(dataset):
    return _conversations(dataset, dataset["image_id"])


def gqa_process_docs(dataset):
    return _conversations(dataset, dataset["imageId"])


def pope_process_docs(dataset):
    """The adversarial questions: each kind asks about the same pictures, in part the same."""
    kinds = dataset["category"]
    dataset = dataset.select([row for row, kind in enumerate(kinds) if kind == "adversarial"])
    return _conversations(dataset, dataset["image_source"])


def _conversations(dataset, pictures: list[str]):
    """A row for each picture that at least two questions are about, with all of them in their order.

    Args:
        pictures: the name of every row's.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(pictures):
        rows.setdefault(name, []).append(row)
    found = [its for its in rows.values() if len(its) > 1]
    columns = {name: list(dataset[name]) for name in ("question", "answer")}
    made = dataset.select([first for first, *_ in found]).remove_columns([*columns])
    for name, column in columns.items():
        made = made.add_column(f"{name}s", [[column[row] for row in its] for its in found])
    return made


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


@cache
def _gqa_picture() -> Callable:
    return gqa_functions("lmms-lab-encoder/GQA")["doc_to_visual"]


def gqa_doc_to_visual(doc):
    return _gqa_picture()(doc)


def doc_to_text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    """The first question, or in lmms-eval's terms a later round: its pictures, its question, whether there is none, the
    answers so far, and what the task wants to know again.
    """
    ending, asked = (lmms_eval_specific_kwargs or {}).get("post_prompt", ""), doc["questions"]
    if round_idx is None:
        return asked[0] + ending
    if round_idx == len(asked):
        return None, None, True, previous_output, None
    return None, asked[round_idx] + ending, False, previous_output, None


def doc_to_target(doc):
    return "; ".join(doc["answers"])


def shapes_process_results(doc, results):
    """Exact match but for case, surrounding space and a final full stop, as in zipeval_shapes."""
    return _scored(doc, results, lambda said, truth: said.strip().rstrip(".").lower() == truth.lower())


def gqa_process_results(doc, results):
    """Exact match but for case and punctuation, as in lmms-eval's gqa."""
    bare = str.maketrans("", "", string.punctuation)
    return _scored(
        doc, results, lambda said, truth: said.strip().lower().translate(bare) == truth.lower().translate(bare)
    )


def pope_process_results(doc, results):
    """LLaVA's rule for yes and no."""
    return _scored(doc, results, lambda said, truth: llava_yes_no(said) == truth)


def _scored(doc, results, right: Callable[[str, str], bool]):
    """By round whether it was answered right: on the `cached` tokens of the first one, and of later rounds on `fresh`
    ones. A document that could not be read has no answers.
    """
    (said,), truth = results, doc["answers"]
    said = [*said, *[""] * (2 * len(truth) - 1 - len(said))]
    rounds = {
        "cached": [float(right(*pair)) for pair in zip(said[: len(truth)], truth, strict=True)],
        "fresh": [float(right(*pair)) for pair in zip(said[len(truth) :], truth[1:], strict=True)],
    }
    return dict.fromkeys(("accuracy_later", "accuracy_first", "accuracy_later_fresh", "change_later"), rounds)


def first(items):
    return sum(rounds["cached"][0] for rounds in items) / len(items)


def later(items):
    """Of all later rounds, whatever conversation they are in."""
    return sum(sum(rounds["cached"][1:]) for rounds in items) / _later(items)


def later_fresh(items):
    return sum(sum(rounds["fresh"]) for rounds in items) / _later(items)


def change(items):
    return later(items) - later_fresh(items)


def _later(items) -> int:
    return sum(len(rounds["fresh"]) for rounds in items)
