"""Ask a judge model about an answer and read its reply: one protocol for each kind of judged task.

Prompts and rules are those of lmms-eval's own task code where it has them; what it does around them is not: with no
judge it makes numbers up, and a reply that is no verdict becomes a guess or a zero.
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import AbstractContextManager
from functools import cache
from statistics import fmean
from typing import ClassVar

from zipeval.benchmarks import lmms_names
from zipeval.benchmarks.scoring import MISSING
from zipeval.benchmarks.videoqa import SETS
from zipeval.utils import foreign_patches

Message = dict[str, str]
# A judge may reply with any text: no dictionary, one without a key, numbers in place of
# words.
BAD_REPLY = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    SyntaxError,
)


class JudgeProtocol(ABC):
    """A way to judge the answers of a task.

    A sample has `target`, `prediction` and what `select_fields` chose. A verdict is its `score`, and `scores` with the
    rest of what the judge said.

    Attributes:
        version: part of the task's hash; to be raised with every change that changes a number.
        metric: of `metrics`, the one that tables show.
        probe: the sample that a judge is asked about before a run.
    """

    version = 1
    metric: str
    probe: ClassVar[dict]

    @abstractmethod
    def select_fields(self, doc: dict) -> dict:
        """Return what the judge or the metrics need of a document."""

    def known(self, sample: dict) -> dict | None:
        """Return the verdict on a sample about which nobody has to be asked.

        So it is where the image cannot be decoded.
        """
        return {"score": 0.0, "scores": {}} if "error" in sample else None

    @abstractmethod
    def messages(self, sample: dict) -> list[Message]:
        """Return the messages to the judge."""

    @abstractmethod
    def verdict(self, reply: str, sample: dict) -> dict:
        """Return the verdict that a reply gives.

        Raises:
            ValueError: with what is wrong, for a reply that is no verdict.
        """

    @abstractmethod
    def metrics(self, samples: list[dict]) -> dict[str, float]:
        """Return the metrics of samples that have a verdict; there is at least one."""


class VideoQA(JudgeProtocol):
    """Video-ChatGPT's and Video-LLaVA's: a yes or no and a grade of 0 to 5.

    The prompt says in other words what theirs says.
    """

    metric = "accuracy"
    probe: ClassVar = {
        "question": "What animal is it?",
        "target": "dog",
        "prediction": "It is a dog.",
    }
    SYSTEM = (
        "You evaluate question-answer pairs about videos. Compare the predicted answer "
        "with the correct answer and "
        "decide whether they agree in meaning. Synonyms and paraphrases agree; what "
        "counts is whether the prediction "
        "is correct, given the correct answer."
    )
    USER = (
        "Evaluate this question-answer pair about a video.\n\n"
        "Question: {question}\nCorrect Answer: {target}\nPredicted Answer: "
        "{prediction}\n\n"
        "Give a yes or no and a score: an integer from 0 to 5, where 5 is the best "
        "agreement in meaning. Reply with a "
        "Python dictionary string and nothing else. Its keys are 'pred', whose value "
        "is the string 'yes' or 'no', and "
        "'score', whose value is an integer and not a string. An example of a reply: "
        "{{'pred': 'yes', 'score': 4}}"
    )

    def select_fields(self, doc):
        return {"question": doc["question"]}

    def known(self, sample):
        return {"score": 0.0, "scores": {"grade": 0.0}} if "error" in sample else None

    def messages(self, sample):
        return [
            {"role": "system", "content": self.SYSTEM},
            _user(self.USER.format_map(sample)),
        ]

    def verdict(self, reply, sample):
        # Text around the dictionary, such as a code fence, is forgiven.
        try:
            content = ast.literal_eval(re.findall(r"\{[^{}]*\}", reply)[-1])
            word = content["pred"].strip().lower()
            # As in the papers' code: 4.8 is 4.
            grade = int(content["score"])
        except BAD_REPLY:
            word, grade = "", -1
        if word not in ("yes", "no") or not 0 <= grade <= 5:
            raise ValueError("is no verdict such as {'pred': 'yes', 'score': 4}")
        return {"score": float(word == "yes"), "scores": {"grade": float(grade)}}

    def metrics(self, samples):
        """Return `accuracy`, yes of yes and no in percent, and `score`, the mean grade."""
        return {
            "accuracy": 100 * fmean(s["score"] for s in samples),
            "score": fmean(s["scores"]["grade"] for s in samples),
        }


class MMBench(JudgeProtocol):
    """An answer that names or quotes one option needs no judge; of any other a judge says which option it means.

    A question counts if it is answered right in every rotation of its options (CircularEval; arXiv 2307.06281).
    """

    metric = "gpt_eval_score"
    probe: ClassVar = {
        "question": "What animal is it?",
        "options": {"A": "a dog", "B": "a cat"},
        "target": "A",
        "prediction": "some puppy",
    }
    # The rotations of one question differ by multiples of it in their index.
    ROTATION = 1_000_000

    def select_fields(self, doc):
        options = {}
        for letter in "ABCD":
            text = str(doc[letter])
            # An option that is missing is the string nan, which lmms-eval then finds in
            # answers such as banana.
            if text not in MISSING:
                options[letter] = text
        return {
            "question": doc["question"],
            "options": options,
            "group": int(doc["index"]) % self.ROTATION,
        }

    def known(self, sample):
        if "error" in sample:
            return super().known(sample)
        option = self._option(sample["prediction"], sample)
        return self._verdict(option, sample) if option else None

    def messages(self, sample):
        evaluator = _mmbench()
        options = evaluator.build_option_str(list(sample["options"].values()))
        prompt = evaluator.build_prompt(
            sample["question"], options, sample["prediction"]
        )
        return [_user(prompt)]

    def verdict(self, reply, sample):
        option = self._option(reply, sample)
        if not option:
            letters = ", ".join(sample["options"])
            raise ValueError(f"names none of {letters}, and not E for none of them")
        return self._verdict(option, sample)

    def metrics(self, samples):
        groups = defaultdict(list)
        for sample in samples:
            groups[sample["group"]].append(sample["score"])
        # One wrong rotation makes the question wrong.
        return {"gpt_eval_score": 100 * fmean(map(min, groups.values()))}

    def _verdict(self, option: str, sample: dict) -> dict:
        """Return the verdict on an answer that means an option."""
        return {
            "score": float(option == sample["target"]),
            "scores": {"option": option},
        }

    def _option(self, text: str, sample: dict) -> str | None:
        """Return the option that a text names; E is the judge's word for none."""
        # A copy: lmms-eval's rule writes the options that it gets in small letters.
        return _mmbench().can_infer(text, dict(sample["options"])) or None


class MMVet(JudgeProtocol):
    """A grade of 0 to 1 for every answer; a few examples of grades are in the prompt (arXiv 2308.02490)."""

    metric = "gpt_eval_score"
    probe: ClassVar = {
        "question": "What is x in the equation?",
        "target": "-1 <AND> -5",
        "prediction": "x = -1",
    }
    CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

    def select_fields(self, doc):
        return {
            "question": doc["question"],
            "capabilities": doc["capability"].split(","),
        }

    def messages(self, sample):
        target = sample["target"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        # The next row of the table of examples, without its last column, the grade.
        row = f"{sample['question']} | {target} | {sample['prediction']} |"
        return [_user(f"{_mmvet_prompt()}\n{row}")]

    def verdict(self, reply, sample):
        try:
            grade = float(reply.split()[0])
        except ValueError:
            grade = -1.0
        if not 0 <= grade <= 1:
            raise ValueError("is no grade from 0.0 to 1.0")
        return {"score": grade, "scores": {}}

    def metrics(self, samples):
        """Return the mean of all, and of the questions that need a capability."""
        metrics = {"gpt_eval_score": 100 * fmean(s["score"] for s in samples)}
        # A question needs several capabilities, and a limit may leave one without
        # questions.
        grades = defaultdict(list)
        for sample in samples:
            for name in set(sample["capabilities"]):
                grades[name].append(sample["score"])
        for name in self.CAPABILITIES:
            if name in grades:
                metrics[name] = 100 * fmean(grades[name])
        return metrics


class LLaVABench(JudgeProtocol):
    """The judge grades GPT-4's answer and the model's, from 1 to 10, side by side.

    The number is the ratio of their sums (LLaVA, arXiv 2304.08485, section 5.1). Without an image it grades an empty
    answer.
    """

    metric = "gpt_eval_llava_all"
    probe: ClassVar = {
        "question": "What animal is it?",
        "context": "A dog on a lawn.",
        "kind": "conv",
        "target": "It is a dog.",
        "prediction": "It is a dog on a lawn.",
    }

    def select_fields(self, doc):
        captions = doc["caption"]
        context = captions if isinstance(captions, str) else "\n".join(captions)
        return {
            "question": doc["question"],
            "context": context,
            "kind": doc["category"],
        }

    def known(self, sample):
        # The ratio needs the grade of GPT-4's answer, also where the model has none.
        return None

    def messages(self, sample):
        rule = _llava_bench_rules()[f"llava_bench_{sample['kind']}"]
        role = rule["role"]
        parts = [
            f"[Context]\n{sample['context']}",
            f"[Question]\n{sample['question']}",
            f"[{role} 1]\n{sample['target']}",
            f"[End of {role} 1]",
            f"[{role} 2]\n{sample['prediction']}",
            f"[End of {role} 2]",
            f"[System]\n{rule['prompt']}",
        ]
        return [_user("\n\n".join(parts) + "\n\n")]

    def verdict(self, reply, sample):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", reply.strip().split("\n")[0])
        grades = list(map(float, numbers))
        if len(grades) != 2 or min(grades) < 1 or max(grades) > 10:
            raise ValueError("does not begin with a line of two grades from 1 to 10")
        # GPT-4's answer is the first one in the prompt.
        return {"score": grades[1], "scores": {"reference": grades[0]}}

    def metrics(self, samples):
        """Return the ratio in percent, of all and of each kind of question."""
        kinds = {"all": samples}
        for sample in samples:
            kinds.setdefault(sample["kind"], []).append(sample)
        metrics = {}
        for kind, members in kinds.items():
            grades = sum(s["score"] for s in members)
            references = sum(s["scores"]["reference"] for s in members)
            metrics[f"gpt_eval_llava_{kind}"] = 100 * grades / references
        return metrics


PROTOCOLS: dict[str, JudgeProtocol] = {
    "mmbench_en_dev": MMBench(),
    "mmvet": MMVet(),
    "llava_in_the_wild": LLaVABench(),
    **dict.fromkeys(SETS, VideoQA()),
}


def pending(task: str, sample: dict, doc: dict) -> dict:
    """Return a sample as it is before a judge is asked about it; with its verdict where nobody has to be."""
    protocol = PROTOCOLS[task]
    sample = {**sample, "score": None, "scores": {}, **protocol.select_fields(doc)}
    verdict = protocol.known(sample) or {"unscored": "not asked yet"}
    return {**sample, **verdict}


def summary(task: str, samples: list[dict]) -> dict:
    """Return the part of a record that follows from what is judged by now; no number where nothing was."""
    protocol = PROTOCOLS[task]
    scored = [sample for sample in samples if "unscored" not in sample]
    unscored = len(samples) - len(scored)
    # Zeros of images that cannot be decoded are no result of a judge.
    judged = any("error" not in sample for sample in scored)
    metrics = protocol.metrics(scored) if judged else {}
    return {
        "status": "incomplete" if unscored else "success",
        "unscored": unscored,
        "metric": protocol.metric,
        "score": metrics.get(protocol.metric),
        "metrics": metrics,
    }


def no_key() -> AbstractContextManager[None]:
    """Return a context for importing lmms-eval's judges, which insist on a key: it does not get the user's."""
    return foreign_patches.environment(OPENAI_API_KEY="none")


def _user(content: str) -> Message:
    """Return a message of the user's."""
    return {"role": "user", "content": content}


@cache
def _mmbench():
    """Return lmms-eval's rules and prompt; nothing in here asks a judge of its own."""
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    return MMBench_Evaluator()


@cache
def _mmvet_prompt() -> str:
    """Return MM-Vet's prompt, whose end is a table of examples."""
    with no_key():
        from lmms_eval.tasks.mmvet.utils import MM_VET_PROMPT
    return MM_VET_PROMPT


@cache
def _llava_bench_rules() -> dict:
    """Return the judge's role and instructions for each kind of question."""
    file = lmms_names.tasks_folder() / "llava-in-the-wild" / "rule.json"
    return json.loads(file.read_text(encoding="utf-8"))
