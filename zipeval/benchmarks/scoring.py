"""Compute what the papers compute and lmms-eval does not.

These are scores of samples, numbers from them, and functions that replace a task's own.

Every function `*_sample` takes a sample as lmms-eval logs it and returns the `score` of its answer, 0 or 1, of a
conversation the share of its later rounds that is right; `kind`, where the kinds of questions are scored apart;
`group`, of questions that are scored together. Every `derive` function takes the task's metrics and our samples and
returns metrics to add or correct. Where an image could not be decoded a sample has an `error` and the score 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from statistics import fmean
from typing import Any

GQA_IMAGES = "testdev_balanced_images"
# MMBench has one of these where there is no hint or option.
MISSING = ("nan", "None", "")
# LLaVA's evaluation of POPE takes any other answer for a yes.
LLAVA_NO = {"No", "not", "no"}


def llava_yes_no(answer: str) -> str:
    """Apply LLaVA's rule for POPE: `no` if the first sentence has the word No, no or not, else `yes`, whatever it is."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "yes" if LLAVA_NO.isdisjoint(words) else "no"


def pope_sample(logged: dict) -> dict:
    """Score an answer under LLaVA's rule."""
    right = llava_yes_no(logged["filtered_resps"][0]) == logged["target"]
    return {"score": float(right), "scores": {}, "kind": logged["doc"]["category"]}


def pope(metrics: dict[str, float], samples: list[dict]) -> dict[str, float]:
    """Return the mean F1 of the three kinds of questions, from 0 to 1: under LLaVA's rule, and under lmms-eval's.

    lmms-eval's own pope_f1_score pools the three; it takes nothing but `yes` and `no` for an answer.
    """
    return {
        "pope_f1_llava": _pope_f1(samples, _llava_prediction),
        "pope_f1_exact": _pope_f1(samples, _exact_prediction),
    }


def _pope_f1(samples: list[dict], predict: Callable[[dict], str]) -> float:
    """Return the mean F1 of the kinds of questions, with predictions made by a rule."""
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    kinds = defaultdict(list)
    for sample in samples:
        # The fields that lmms-eval's function reads.
        pair = {"prediction": predict(sample), "ground_truth": sample["target"]}
        kinds[sample["kind"]].append(pair)
    return fmean(map(pope_aggregate_f1_score, kinds.values()))


def _llava_prediction(sample: dict) -> str:
    """Return the yes or no that LLaVA's rule made of an answer: the score tells whether it is the target."""
    opposite = {"yes": "no", "no": "yes"}
    return sample["target"] if sample["score"] else opposite[sample["target"]]


def _exact_prediction(sample: dict) -> str:
    """Return an answer in small letters, which lmms-eval compares with `yes` and `no`."""
    # A sample without an answer is wrong under both rules.
    if "error" in sample:
        return _llava_prediction(sample)
    return sample["prediction"].strip().lower()


def mme_sample(logged: dict) -> dict:
    """Score an answer as MME does; the two questions about an image are a group."""
    # lmms-eval logs one of the two, by the category of the question.
    is_perception = "mme_perception_score" in logged
    half = "perception" if is_perception else "cognition"
    result = logged[f"mme_{half}_score"]
    return {
        "score": result["score"],
        "scores": {},
        "kind": result["category"],
        "group": result["question_id"],
    }


def mme(metrics: dict[str, float], samples: list[dict]) -> dict[str, float]:
    """Return perception (up to 2000) + cognition (up to 800); a limit may leave one of them without questions."""
    perception = metrics.get("mme_perception_score", 0.0)
    cognition = metrics.get("mme_cognition_score", 0.0)
    return {"mme_total": perception + cognition}


def mmmu_sample(logged: dict) -> dict:
    """Score an answer by MMMU's own rule."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    _, result = evaluate_mmmu([logged["mmmu_acc"]])
    return {"score": result["acc"], "scores": {}}


def mmmu(metrics: dict[str, float], samples: list[dict]) -> dict[str, float]:
    """Return the accuracy from 0 to 1 where failed samples are wrong.

    MMMU's own rule guesses an option for an empty answer.
    """
    return {"mmmu_acc": fmean(s["score"] for s in samples)}


def seed_sample(logged: dict) -> dict:
    """Score an answer that is to be the letter of an option."""
    prediction = logged["seed_all"]["pred"].strip().lower()
    target = logged["seed_all"]["answer"].strip().lower()
    return {
        "score": float(prediction == target),
        "scores": {},
        "kind": logged["doc"]["data_type"],
    }


def turns_sample(logged: dict) -> dict:
    """Score a conversation: the share of its later rounds that is right on the first one's visual tokens.

    `scores` has that of the `first` round, and that of the later ones with a `fresh` selection; `later` is their number.
    """
    rounds = logged["accuracy_later"]
    # All rounds on the first selection, then the later ones again with a fresh one.
    answers = logged["filtered_resps"][0]
    later = len(rounds["fresh"])
    shares = {"first": rounds["cached"][0], "fresh": fmean(rounds["fresh"])}
    return {
        "prediction": "; ".join(answers[: later + 1]),
        "fresh": "; ".join(answers[later + 1 :]),
        "score": fmean(rounds["cached"][1:]),
        "scores": shares,
        "later": later,
    }


def gqa_functions(dataset: str) -> dict[str, Any]:
    """Return functions that look GQA's images up when they are needed.

    lmms-eval encodes each as PNG for every question before the first one is asked.
    """

    @cache
    def images():
        import datasets

        loaded = datasets.load_dataset(dataset, name=GQA_IMAGES, split="testdev")
        return loaded, {name: row for row, name in enumerate(loaded["id"])}

    def doc_to_visual(doc):
        loaded, rows = images()
        return [loaded[rows[doc["imageId"]]]["image"].convert("RGB")]

    return {"process_docs": None, "doc_to_visual": doc_to_visual}


def seed_functions() -> dict[str, Any]:
    """Return functions that show one image for every question, of a video its middle frame.

    LLaVA-1.5 was trained for no more.
    """

    def doc_to_visual(doc):
        frames = doc["image"]
        return [frames[len(frames) // 2].convert("RGB")]

    return {"doc_to_visual": doc_to_visual}


def judged_functions() -> dict[str, Any]:
    """Return functions that score nothing before the judge is asked: lmms-eval's tasks would ask one of their own."""

    def process_results(doc, results):
        # A metric that lmms-eval can take a mean of; tables do not show it.
        return {"answered": float(bool(results[0].strip()))}

    return {"process_results": process_results}


def mmbench_functions() -> dict[str, Any]:
    """Return functions for LLaVA's prompt: hint, question and options on lines of their own.

    lmms-eval introduces the options by a sentence.
    """

    def doc_to_text(doc, lmms_eval_specific_kwargs):
        lines = [doc["hint"], doc["question"]]
        for letter in "ABCD":
            if str(doc[letter]) not in MISSING:
                lines.append(f"{letter}. {doc[letter]}")
        shown = "\n".join(line for line in lines if str(line) not in MISSING)
        return shown + lmms_eval_specific_kwargs["post_prompt"]

    return {"doc_to_text": doc_to_text, **judged_functions()}
