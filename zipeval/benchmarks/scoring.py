"""What the papers compute and lmms-eval does not: scores of samples, numbers from them, and functions that replace a
task's own.

Every function `*_sample` takes a sample as lmms-eval logs it and returns the `score` of its answer, 0 or 1, of a
conversation the share of its later rounds that is right; `kind`, where the kinds of questions are scored apart;
`group`, of questions that are scored together. Every `derive` function takes the task's metrics and our samples and
returns metrics to add or correct. Where an image could not be decoded a sample has an `error` and the score 0.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

GQA_IMAGES = "testdev_balanced_images"
MISSING = ("nan", "None", "")  # what MMBench has where there is no hint or option


def llava_yes_no(answer: str) -> str:
    """LLaVA's rule for POPE: `no` if the first sentence has the word No, no or not, else `yes`, whatever it is."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_sample(logged: dict) -> dict:
    right = llava_yes_no(logged["filtered_resps"][0]) == logged["target"]
    return {"score": float(right), "scores": {}, "kind": logged["doc"]["category"]}


def pope(metrics: dict[str, float], samples: list[dict]) -> dict[str, float]:
    """Mean F1 of the three kinds of questions, from 0 to 1: under LLaVA's rule, and under lmms-eval's.

    lmms-eval's own pope_f1_score pools the three; it takes nothing but `yes` and `no` for an answer.
    """
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    def llava(sample: dict) -> str:
        return (
            sample["target"]
            if sample["score"]
            else {"yes": "no", "no": "yes"}[sample["target"]]
        )

    def exact(sample: dict) -> str:
        return (
            llava(sample) if "error" in sample else sample["prediction"].strip().lower()
        )

    derived = {}
    for name, rule in (("pope_f1_llava", llava), ("pope_f1_exact", exact)):
        kinds: dict[str, list[dict]] = {}
        for sample in samples:
            said = {"prediction": rule(sample), "ground_truth": sample["target"]}
            kinds.setdefault(sample["kind"], []).append(said)
        derived[name] = fmean(pope_aggregate_f1_score(kind) for kind in kinds.values())
    return derived


def mme_sample(logged: dict) -> dict:
    (found,) = (
        logged[f"mme_{half}_score"]
        for half in ("perception", "cognition")
        if f"mme_{half}_score" in logged
    )
    return {
        "score": found["score"],
        "scores": {},
        "kind": found["category"],
        "group": found["question_id"],
    }


def mme(metrics: dict[str, float], samples: list[dict]) -> dict[str, float]:
    """Perception (up to 2000) + cognition (up to 800); a limit may leave one of them without questions."""
    return {
        "mme_total": sum(
            metrics.get(f"mme_{half}_score", 0.0)
            for half in ("perception", "cognition")
        )
    }


def mmmu_sample(logged: dict) -> dict:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    _, result = evaluate_mmmu([logged["mmmu_acc"]])
    return {"score": result["acc"], "scores": {}}


def mmmu(metrics: dict[str, float], samples: list[dict]) -> dict[str, float]:
    """Accuracy from 0 to 1 where failed samples are wrong: MMMU's own rule guesses an option for an empty answer."""
    return {"mmmu_acc": fmean(s["score"] for s in samples)}


def seed_sample(logged: dict) -> dict:
    said, truth = (
        logged["seed_all"][name].strip().lower() for name in ("pred", "answer")
    )
    return {
        "score": float(said == truth),
        "scores": {},
        "kind": logged["doc"]["data_type"],
    }


def turns_sample(logged: dict) -> dict:
    """Of a conversation: the share of its later rounds that is right on the first one's visual tokens, that of the
    `first` round, and that of the later ones with a `fresh` selection; `later` is their number.
    """
    rounds, said = logged["accuracy_later"], logged["filtered_resps"][0]
    later = len(rounds["fresh"])
    shares = {"first": rounds["cached"][0], "fresh": fmean(rounds["fresh"])}
    return {
        "prediction": "; ".join(said[: later + 1]),
        "fresh": "; ".join(said[later + 1 :]),
        "score": fmean(rounds["cached"][1:]),
        "scores": shares,
        "later": later,
    }


def gqa_functions(dataset: str) -> dict[str, Any]:
    """GQA's images looked up when they are needed: lmms-eval encodes one as PNG for every question before the first."""

    @cache
    def images():
        import datasets

        found = datasets.load_dataset(dataset, name=GQA_IMAGES, split="testdev")
        return found, {name: row for row, name in enumerate(found["id"])}

    def doc_to_visual(doc):
        found, rows = images()
        return [found[rows[doc["imageId"]]]["image"].convert("RGB")]

    return {"process_docs": None, "doc_to_visual": doc_to_visual}


def seed_functions() -> dict[str, Any]:
    """One image for every question, of a video its middle frame: LLaVA-1.5 was trained for no more."""
    return {
        "doc_to_visual": lambda doc: [
            doc["image"][len(doc["image"]) // 2].convert("RGB")
        ]
    }


def judged_functions() -> dict[str, Any]:
    """Nothing is scored before the judge is asked: lmms-eval's tasks would ask one of their own."""
    return {
        "process_results": lambda doc, results: {
            "answered": float(bool(results[0].strip()))
        }
    }


def mmbench_functions() -> dict[str, Any]:
    """LLaVA's prompt: hint, question and options on lines of their own. lmms-eval introduces the options."""

    def doc_to_text(doc, lmms_eval_specific_kwargs):
        lines = [
            doc["hint"],
            doc["question"],
            *(f"{c}. {doc[c]}" for c in "ABCD" if str(doc[c]) not in MISSING),
        ]
        shown = "\n".join(line for line in lines if str(line) not in MISSING)
        return shown + lmms_eval_specific_kwargs["post_prompt"]

    return {"doc_to_text": doc_to_text, **judged_functions()}
