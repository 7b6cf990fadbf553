"""What a judge model is asked about an answer, and what its reply means: one protocol for each kind of judged task.

Prompts and rules are those of lmms-eval's own task code where it has them; what it does around them is not: with no
judge it makes numbers up, and a reply that is no verdict becomes a guess or a zero.
"""

from __future__ import annotations

import ast
import json
import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from functools import cache
from statistics import fmean
from typing import ClassVar
from unittest.mock import patch

from zipeval.benchmarks import lmms_names
from zipeval.benchmarks.scoring import MISSING
from zipeval.benchmarks.videoqa import SETS

Message = dict[str, str]


class Protocol(ABC):
    """How the answers of a task are judged.

    A sample has `target`, `prediction` and what `kept` chose. A verdict is its `score`, and `scores` with the rest of
    what the judge said.

    Attributes:
        version: part of the task's hash; to be raised with every change that changes a number.
        metric: of `metrics`, the one that tables show.
        probe: the sample that a judge is asked about before a run.
    """

    version = 1
    metric: str
    probe: ClassVar[dict]

    @abstractmethod
    def kept(self, doc: dict) -> dict:
        """What the judge or the metrics need of a document."""

    def known(self, sample: dict) -> dict | None:
        """The verdict on a sample about which nobody has to be asked, such as one whose image cannot be decoded."""
        return {"score": 0.0, "scores": {}} if "error" in sample else None

    @abstractmethod
    def messages(self, sample: dict) -> list[Message]:
        """What the judge is asked."""

    @abstractmethod
    def verdict(self, reply: str, sample: dict) -> dict:
        """Raises ValueError, with what is wrong, for a reply that is no verdict."""

    @abstractmethod
    def metrics(self, samples: list[dict]) -> dict[str, float]:
        """Of samples with a verdict, at least one."""


class VideoQA(Protocol):
    """Video-ChatGPT's and Video-LLaVA's: a yes or no and a grade of 0 to 5. The prompt says in other words what
    theirs says.
    """

    metric = "accuracy"
    probe: ClassVar = {
        "question": "What animal is it?",
        "target": "dog",
        "prediction": "It is a dog.",
    }
    SYSTEM = (
        "You evaluate question-answer pairs about videos. Compare the predicted answer with the correct answer and "
        "decide whether they agree in meaning. Synonyms and paraphrases agree; what counts is whether the prediction "
        "is correct, given the correct answer."
    )
    USER = (
        "Evaluate this question-answer pair about a video.\n\n"
        "Question: {question}\nCorrect Answer: {target}\nPredicted Answer: {prediction}\n\n"
        "Give a yes or no and a score: an integer from 0 to 5, where 5 is the best agreement in meaning. Reply with a "
        "Python dictionary string and nothing else. Its keys are 'pred', whose value is the string 'yes' or 'no', and "
        "'score', whose value is an integer and not a string. An example of a reply: {{'pred': 'yes', 'score': 4}}"
    )

    def kept(self, doc):
        return {"question": doc["question"]}

    def known(self, sample):
        return {"score": 0.0, "scores": {"grade": 0.0}} if "error" in sample else None

    def messages(self, sample):
        return [
            {"role": "system", "content": self.SYSTEM},
            _user(self.USER.format_map(sample)),
        ]

    def verdict(self, reply, sample):
        """Text around it, such as a code fence, is forgiven."""
        try:
            found = ast.literal_eval(re.findall(r"\{[^{}]*\}", reply)[-1])
            said, grade = (
                found["pred"].strip().lower(),
                int(found["score"]),
            )  # int() as the papers' code: 4.8 is 4
        except (
            LookupError,
            TypeError,
            AttributeError,
            ValueError,
            ArithmeticError,
            SyntaxError,
        ):
            said, grade = "", -1
        if said not in ("yes", "no") or not 0 <= grade <= 5:
            raise ValueError("is no verdict such as {'pred': 'yes', 'score': 4}")
        return {"score": float(said == "yes"), "scores": {"grade": float(grade)}}

    def metrics(self, samples):
        """`accuracy` is yes of yes and no in percent, `score` the mean grade."""
        return {
            "accuracy": 100 * fmean(s["score"] for s in samples),
            "score": fmean(s["scores"]["grade"] for s in samples),
        }


class MMBench(Protocol):
    """An answer that names or quotes one option needs no judge; of any other a judge says which option it means. A
    question counts if it is answered right in every rotation of its options (CircularEval; arXiv 2307.06281).
    """

    metric = "gpt_eval_score"
    probe: ClassVar = {
        "question": "What animal is it?",
        "options": {"A": "a dog", "B": "a cat"},
        "target": "A",
        "prediction": "some puppy",
    }
    ROTATION = 1_000_000  # of one question differ by multiples of it in their index

    def kept(self, doc):
        # What is missing is the string nan there, which lmms-eval then finds in answers such as banana.
        options = {
            letter: str(doc[letter])
            for letter in "ABCD"
            if str(doc[letter]) not in MISSING
        }
        return {
            "question": doc["question"],
            "options": options,
            "group": int(doc["index"]) % self.ROTATION,
        }

    def known(self, sample):
        option = self._option(sample["prediction"], sample)
        return super().known(sample) or (
            self._verdict(option, sample) if option else None
        )

    def messages(self, sample):
        evaluator = _mmbench()
        options = evaluator.build_option_str(list(sample["options"].values()))
        return [
            _user(
                evaluator.build_prompt(
                    sample["question"], options, sample["prediction"]
                )
            )
        ]

    def verdict(self, reply, sample):
        option = self._option(reply, sample)
        if not option:
            raise ValueError(
                f"names none of {', '.join(sample['options'])}, and not E for none of them"
            )
        return self._verdict(option, sample)

    def metrics(self, samples):
        groups = defaultdict(list)
        for sample in samples:
            groups[sample["group"]].append(sample["score"])
        return {"gpt_eval_score": 100 * fmean(map(min, groups.values()))}

    def _verdict(self, option: str, sample: dict) -> dict:
        return {
            "score": float(option == sample["target"]),
            "scores": {"option": option},
        }

    def _option(self, text: str, sample: dict) -> str | None:
        """The one that a text names; E is the judge's word for none."""
        return _mmbench().can_infer(text, dict(sample["options"])) or None


class MMVet(Protocol):
    """A grade of 0 to 1 for every answer; a few examples of grades are in the prompt (arXiv 2308.02490)."""

    metric = "gpt_eval_score"
    probe: ClassVar = {
        "question": "What is x in the equation?",
        "target": "-1 <AND> -5",
        "prediction": "x = -1",
    }
    CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

    def kept(self, doc):
        return {
            "question": doc["question"],
            "capabilities": doc["capability"].split(","),
        }

    def messages(self, sample):
        target = sample["target"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return [
            _user(
                f"{_mmvet_prompt()}\n{sample['question']} | {target} | {sample['prediction']} |"
            )
        ]

    def verdict(self, reply, sample):
        try:
            grade = float(reply.split()[0])
        except ValueError:
            grade = -1.0
        if not 0 <= grade <= 1:
            raise ValueError("is no grade from 0.0 to 1.0")
        return {"score": grade, "scores": {}}

    def metrics(self, samples):
        """The mean of all, and of the questions that need a capability."""
        found = {"gpt_eval_score": 100 * fmean(s["score"] for s in samples)}
        for name in self.CAPABILITIES:
            if grades := [s["score"] for s in samples if name in s["capabilities"]]:
                found[name] = 100 * fmean(grades)
        return found


class LLaVABench(Protocol):
    """The judge grades GPT-4's answer and the model's, from 1 to 10, side by side; the number is the ratio of their
    sums (LLaVA, arXiv 2304.08485, section 5.1). Without an image it grades an empty answer.
    """

    metric = "gpt_eval_llava_all"
    probe: ClassVar = {
        "question": "What animal is it?",
        "context": "A dog on a lawn.",
        "kind": "conv",
        "target": "It is a dog.",
        "prediction": "It is a dog on a lawn.",
    }

    def kept(self, doc):
        captions = doc["caption"]
        context = captions if isinstance(captions, str) else "\n".join(captions)
        return {
            "question": doc["question"],
            "context": context,
            "kind": doc["category"],
        }

    def known(self, sample):
        return None

    def messages(self, sample):
        rule = _llava_bench_rules()[f"llava_bench_{sample['kind']}"]
        role = rule["role"]
        said = [f"[Context]\n{sample['context']}", f"[Question]\n{sample['question']}"]
        for number, answer in enumerate((sample["target"], sample["prediction"]), 1):
            said += [f"[{role} {number}]\n{answer}", f"[End of {role} {number}]"]
        return [_user("\n\n".join([*said, f"[System]\n{rule['prompt']}"]) + "\n\n")]

    def verdict(self, reply, sample):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", reply.strip().split("\n")[0])
        grades = [float(number) for number in numbers]
        if len(grades) != 2 or not all(1 <= grade <= 10 for grade in grades):
            raise ValueError("does not begin with a line of two grades from 1 to 10")
        return {"score": grades[1], "scores": {"reference": grades[0]}}

    def metrics(self, samples):
        """The ratio in percent, of all and of each kind of question."""
        kinds = {"all": samples}
        for sample in samples:
            kinds.setdefault(sample["kind"], []).append(sample)
        return {
            f"gpt_eval_llava_{kind}": 100
            * sum(s["score"] for s in of)
            / sum(s["scores"]["reference"] for s in of)
            for kind, of in kinds.items()
        }


PROTOCOLS: dict[str, Protocol] = {
    "mmbench_en_dev": MMBench(),
    "mmvet": MMVet(),
    "llava_in_the_wild": LLaVABench(),
    **dict.fromkeys(SETS, VideoQA()),
}


def pending(task: str, sample: dict, doc: dict) -> dict:
    """A sample before a judge is asked about it; with its verdict where nobody has to be."""
    protocol = PROTOCOLS[task]
    sample = {**sample, "score": None, "scores": {}, **protocol.kept(doc)}
    return {**sample, **(protocol.known(sample) or {"unscored": "not asked yet"})}


def summary(task: str, samples: list[dict]) -> dict:
    """The part of a record that follows from what is judged by now; no number where nothing was."""
    protocol = PROTOCOLS[task]
    scored = [sample for sample in samples if "unscored" not in sample]
    unscored = len(samples) - len(scored)
    judged = any("error" not in sample for sample in scored)
    metrics = protocol.metrics(scored) if judged else {}
    return {
        "status": "incomplete" if unscored else "success",
        "unscored": unscored,
        "metric": protocol.metric,
        "score": metrics.get(protocol.metric),
        "metrics": metrics,
    }


def no_key():
    """A context for importing lmms-eval's judges, which insist on a key: it does not get the user's."""
    return patch.dict(os.environ, OPENAI_API_KEY="none")


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


@cache
def _mmbench():
    """lmms-eval's rules and prompt; nothing in here asks a judge of its own."""
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    return MMBench_Evaluator()


@cache
def _mmvet_prompt() -> str:
    with no_key():
        from lmms_eval.tasks.mmvet.utils import MM_VET_PROMPT
    return MM_VET_PROMPT


@cache
def _llava_bench_rules() -> dict:
    file = lmms_names.tasks_folder() / "llava-in-the-wild" / "rule.json"
    return json.loads(file.read_text(encoding="utf-8"))
