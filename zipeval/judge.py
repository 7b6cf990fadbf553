"""A judge model behind an OpenAI-compatible address, and what a task's number is once it has spoken.

The protocol is that of Video-ChatGPT's and Video-LLaVA's evaluation: for every answer a yes or no and a score of
0 to 5. The prompt says in other words what theirs says.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from urllib.parse import urlsplit

import openai

from zipeval.config import JudgeConfig, public_url
from zipeval.errors import UsageError

KEY = "OPENAI_API_KEY"
TIMEOUT = 60.0  # seconds for one reply
RETRIES = 2  # of a request, with the client's own pauses
THREADS = 8
GIVE_UP = 10  # failures in a row, after which the rest is left for another run

# What changes here changes numbers: raise the version in tasks/videoqa/_default_template.yaml, which records hash.
SYSTEM = (
    "You evaluate question-answer pairs about videos. Compare the predicted answer with the correct answer and decide "
    "whether they agree in meaning. Synonyms and paraphrases agree; what counts is whether the prediction is correct, "
    "given the correct answer."
)
USER = (
    "Evaluate this question-answer pair about a video.\n\n"
    "Question: {question}\nCorrect Answer: {answer}\nPredicted Answer: {prediction}\n\n"
    "Give a yes or no and a score: an integer from 0 to 5, where 5 is the best agreement in meaning. Reply with a "
    "Python dictionary string and nothing else. Its keys are 'pred', whose value is the string 'yes' or 'no', and "
    "'score', whose value is an integer and not a string. An example of a reply: {{'pred': 'yes', 'score': 4}}"
)


class JudgeError(Exception):
    """No verdict on one answer; its sample stays unscored, and the run goes on."""


class Judge:
    """The model that `judge.url` and `judge.model` name.

    Args:
        config: both set. The key is read from the environment, and never part of a message.
    """

    def __init__(self, config: JudgeConfig):
        self.named = f"judge.model={config.model} at judge.url={public_url(config.url)}"
        self._model = config.model
        key = os.environ.get(KEY, "").strip()
        self._secrets = [secret for secret in (key, urlsplit(config.url).password) if secret]
        self._client = openai.OpenAI(
            api_key=key or "none",  # the client insists on one, local servers do not
            base_url=config.url,
            timeout=TIMEOUT,
            max_retries=RETRIES,
        )
        self._failures = 0  # in a row

    def check(self) -> None:
        """Ask one question.

        Raises:
            UsageError: if that gives no verdict.
        """
        try:
            self.verdict("What animal is it?", "dog", "It is a dog.")
        except JudgeError as error:
            raise UsageError(
                f"{self.named}: {error}. Set judge.url= to an OpenAI-compatible server (its address ends in /v1), "
                f"judge.model= to a model that it serves, and its key, if it needs one, in the environment as {KEY}."
            ) from error

    def verdict(self, question: str, answer: str, prediction: str) -> dict[str, float]:
        """`accuracy`, 100 for yes and 0 for no, and `score`, from 0 to 5.

        Raises:
            JudgeError: if there is none.
        """
        user = USER.format(question=question, answer=answer, prediction=prediction)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        try:
            reply = self._client.chat.completions.create(model=self._model, messages=messages, temperature=0)
            return _parse(_text(reply))
        except openai.APITimeoutError as error:
            raise JudgeError(f"no reply within {self._client.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise JudgeError(self._said(f"not reachable ({error.__cause__ or error})")) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            # Servers repeat a part of the key in what they say.
            refused = "the key is refused" if self._secrets else f"a key is needed, {KEY} is not set"
            raise JudgeError(f"{refused} (HTTP {error.status_code})") from error
        except (openai.OpenAIError, ValueError) as error:
            raise JudgeError(self._said(str(error))) from error

    def score(self, samples: list[dict], advance: Callable[[int], None]) -> None:
        """Ask about each of the samples that are unscored; each is left with `scores`, or with the reason for none."""
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self._score, samples):
                advance(1)

    def _score(self, sample: dict) -> None:
        if self._failures >= GIVE_UP:
            sample["unscored"] = f"not asked: the judge failed {GIVE_UP} times in a row"
            return
        try:
            sample["scores"] = self.verdict(sample["question"], sample["target"], sample["prediction"])
        except JudgeError as error:
            self._failures += 1
            sample["unscored"] = str(error)
        else:
            self._failures = 0
            del sample["unscored"]

    def _said(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:200]


def _text(reply) -> str:
    try:
        return reply.choices[0].message.content or ""
    except (AttributeError, IndexError, TypeError):  # the client does not validate what servers send
        return ""


def _parse(text: str) -> dict[str, float]:
    """Raises ValueError for what is no verdict. Text around it, such as a code fence, is forgiven."""
    if not text.strip():
        raise ValueError("its reply is empty")
    try:
        verdict = ast.literal_eval(re.findall(r"\{[^{}]*\}", text)[-1])
        said, score = verdict["pred"].strip().lower(), int(verdict["score"])  # int() as the papers' code does: 4.8 is 4
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, SyntaxError):
        said, score = "", -1
    if said not in ("yes", "no") or not 0 <= score <= 5:
        raise ValueError(f"its reply is no verdict such as {{'pred': 'yes', 'score': 4}}: {text.strip()!r}")
    return {"accuracy": 100.0 * (said == "yes"), "score": float(score)}


def pending(sample: dict, question: str) -> dict:
    """A sample before it is judged. Without a readable video it is wrong, and nobody has to be asked."""
    if "error" in sample:
        return {**sample, "question": question, "scores": {"accuracy": 0.0, "score": 0.0}}
    return {**sample, "question": question, "scores": {}, "unscored": "not asked yet"}


def summary(samples: list[dict]) -> dict:
    """The part of a record that follows from what is judged by now; no number where nothing was."""
    scored = [sample["scores"] for sample in samples if "unscored" not in sample]
    unscored = len(samples) - len(scored)
    judged = any(not {"unscored", "error"} & sample.keys() for sample in samples)
    metrics = {name: fmean(scores[name] for scores in scored) for name in ("accuracy", "score")} if judged else {}
    return {
        "status": "incomplete" if unscored else "success",
        "unscored": unscored,
        "metric": "accuracy",
        "score": metrics.get("accuracy"),
        "metrics": metrics,
    }
