"""What the papers compute and lmms-eval does not: numbers from its samples, and functions that replace a task's own.

Every `derive` function takes the task's metrics, lmms-eval's samples and the ids of failed ones, whose image could not
be decoded and whose answer is empty, and returns metrics to add or correct. Failed samples count as wrong.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

GQA_IMAGES = "testdev_balanced_images"


def llava_yes_no(answer: str) -> str:
    """LLaVA's rule for POPE: `no` if the first sentence has the word No, no or not, else `yes`, whatever it is."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope(metrics: dict[str, float], samples: list[dict], failed: set[int]) -> dict[str, float]:
    """Mean F1 of the three kinds of questions, from 0 to 1: under LLaVA's rule, and under lmms-eval's.

    lmms-eval's own pope_f1_score pools the three; it takes nothing but `yes` and `no` for an answer.
    """
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    rules = {"pope_f1_llava": lambda s: llava_yes_no(s["filtered_resps"][0]), "pope_f1_exact": _exact_prediction}
    derived = {}
    for name, rule in rules.items():
        kinds: dict[str, list[dict]] = {}
        for sample in samples:
            truth = sample["pope_f1_score"]["ground_truth"]
            wrong = "no" if truth == "yes" else "yes"  # LLaVA's rule takes an empty answer for a yes
            prediction = wrong if sample["doc_id"] in failed else rule(sample)
            kinds.setdefault(sample["doc"]["category"], []).append({"prediction": prediction, "ground_truth": truth})
        derived[name] = fmean(pope_aggregate_f1_score(kind) for kind in kinds.values())
    return derived


def _exact_prediction(sample: dict) -> str:
    return sample["pope_f1_score"]["prediction"]


def mme(metrics: dict[str, float], samples: list[dict], failed: set[int]) -> dict[str, float]:
    """Perception (up to 2000) + cognition (up to 800); a limit may leave one of them without questions."""
    return {"mme_total": sum(metrics.get(f"mme_{half}_score", 0.0) for half in ("perception", "cognition"))}


def mmmu(metrics: dict[str, float], samples: list[dict], failed: set[int]) -> dict[str, float]:
    """Accuracy from 0 to 1 where failed samples are wrong: MMMU's own rule guesses an option for an empty answer."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    answered = [sample["mmmu_acc"] for sample in samples if sample["doc_id"] not in failed]
    _, result = evaluate_mmmu(answered)
    return {"mmmu_acc": result["acc"] * len(answered) / len(samples)}


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
