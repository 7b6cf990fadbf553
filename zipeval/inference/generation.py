"""How a task's generation_kwargs become arguments of transformers' `generate`.

lmms-eval leaves it to each model which settings it heeds, and its own heed about five. Here every setting is passed on,
or has no effect for a reason that the record states, or is refused before anything is answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zipeval.errors import UsageError

DEFAULT_NEW_TOKENS = 1024  # for tasks that set none, as lmms-eval's own models
# Several names of one setting: those of transformers, of lm-eval and of vLLM. Where a task gives two, both hold.
MAX_LENGTH = ("max_new_tokens", "max_gen_toks", "max_tokens")
MIN_LENGTH = ("min_new_tokens", "min_tokens")
STOPS = ("until", "stop_sequences", "stop", "stop_strings")

NOT_SAMPLED = "answers are not sampled"
NO_BEAMS = "num_beams is 1"
SET_ASIDE = {"image_aspect_ratio": "model.image_aspect= of the run says how images are prepared"}


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.

    Attributes:
        low, high: the least and the largest of them.
        whole: whether they are integers.
        without_low: whether `low` itself is none of them.
    """

    low: float
    high: float = math.inf
    whole: bool = False
    without_low: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.without_low else number >= self.low
        return above and number <= self.high and math.isfinite(number) and (not self.whole or number == int(number))

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        low = f"above {self.low:g}" if self.without_low else f"from {self.low:g}"
        return f"{kind} {low}" + (f" to {self.high:g}" if math.isfinite(self.high) else " on")


SAMPLING = {
    "temperature": Range(0),
    "top_p": Range(0, 1),
    "top_k": Range(0, whole=True),  # 0: all tokens
    "min_p": Range(0, 1),
    "typical_p": Range(0, 1, without_low=True),
}
BEAMS = {"length_penalty": Range(-math.inf)}
# These look at the prompt, and so at the padding in front of it where prompts of several lengths share a batch.
OF_PROMPT = {"repetition_penalty": Range(0, without_low=True), "no_repeat_ngram_size": Range(0, whole=True)}
NUMBERS = {
    **dict.fromkeys(MAX_LENGTH, Range(1, whole=True)),
    **dict.fromkeys(MIN_LENGTH, Range(0, whole=True)),
    "num_beams": Range(1, whole=True),
    "seed": Range(0, whole=True),
    **SAMPLING,
    **BEAMS,
    **OF_PROMPT,
}
FLAGS = ("do_sample", "early_stopping")
KNOWN = (*MAX_LENGTH, *MIN_LENGTH, *STOPS, "num_beams", *FLAGS, *SAMPLING, "seed", *OF_PROMPT, *BEAMS, *SET_ASIDE)
HISTORY = "history"  # of a conversation: see zipeval/conversing.py
# Values that leave every answer as it is: that they have no effect needs no mention.
NEUTRAL = {
    "temperature": (0, 1),
    "top_p": (0, 1),
    "top_k": (0, 1),
    "min_p": (0,),
    "typical_p": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "seed": (0,),
}


@dataclass(frozen=True)
class Generation:
    """How the answers of a task are generated.

    Attributes:
        arguments: those of transformers' `generate`.
        stops: texts that end an answer, and are no part of it.
        seed: that of the task, on top of the run's.
        without_effect: settings of the task that change no answer, each with its value and the reason.
    """

    arguments: dict[str, Any]
    stops: list[str]
    seed: int = 0
    without_effect: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn at random."""
        return self.arguments["do_sample"]

    @property
    def one_by_one(self) -> bool:
        """Whether an answer would depend on the prompts that share its batch."""
        penalised = (
            self.arguments.get("repetition_penalty", 1) != 1 or self.arguments.get("no_repeat_ngram_size", 0) > 0
        )
        return self.sampled or penalised

    def record(self) -> dict[str, Any]:
        """Return what a record states of it, for JSON."""
        seed = {"seed": self.seed} if self.seed else {}
        return {**self.arguments, **seed, "until": self.stops, "without_effect": self.without_effect}

    def notes(self) -> list[str]:
        """Describe the settings whose author may take them for effective."""
        return [
            f"{name}={entry['value']} has no effect, as {entry['reason']}"
            for name, entry in self.without_effect.items()
            if entry["value"] not in NEUTRAL.get(name, ())
        ]


def resolve(settings: Mapping[str, Any], task: str | None = None, conversation: bool = False) -> Generation:
    """Return how a task's answers are generated.

    Answers are sampled where `do_sample` is true and the temperature is not 0, or where the task gives a temperature
    above 0 and no `do_sample`, as lmms-eval's own models take it. All others are greedy.

    Args:
        settings: the task's generation_kwargs; None stands for a setting that the task does not give.
        task: its name, for messages.
        conversation: whether it asks in several rounds.

    Raises:
        UsageError: for a setting that is unknown or cannot be, named with its task and its value.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    refuse = _refusing(settings, task)
    numbers = _checked(settings, conversation, refuse)
    temperature = numbers.get("temperature")
    sampled = settings.get("do_sample", bool(temperature)) and temperature != 0
    beams = numbers.get("num_beams", 1)

    arguments = {**_lengths(numbers, refuse), "num_beams": beams, "do_sample": sampled}
    # None keeps transformers from taking the checkpoint's own.
    arguments |= dict.fromkeys(("temperature", "top_p", "top_k"))
    arguments |= _chosen(OF_PROMPT, numbers)
    effectless = dict(SET_ASIDE)
    if sampled:
        arguments |= {"temperature": 1.0, **_chosen(SAMPLING, numbers)}
    else:
        effectless |= dict.fromkeys((*SAMPLING, "seed"), NOT_SAMPLED)
    if beams > 1:
        arguments |= {**_chosen(BEAMS, numbers), **_chosen(["early_stopping"], settings)}
    else:
        effectless |= dict.fromkeys((*BEAMS, "early_stopping"), NO_BEAMS)

    without_effect = {
        name: {"value": settings[name], "reason": effectless[name]} for name in settings if name in effectless
    }
    seed = numbers.get("seed", 0) if sampled else 0
    return Generation(arguments, _stops(settings, refuse), seed, without_effect)


def generation_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return lmms-eval's generation_kwargs as `generate` takes them."""
    return resolve(settings, conversation=True).arguments


Refuse = Callable[[str, str], None]


def _refusing(settings: Mapping[str, Any], task: str | None) -> Refuse:
    """Return what raises the UsageError of a setting, for a reason."""
    where = f"tasks=[{task}]: " if task else ""

    def refuse(name: str, reason: str) -> None:
        raise UsageError(
            f"{where}generation_kwargs has {name}={settings[name]!r}: {reason}. Nothing was answered. Change it in the "
            "task's YAML file and run this again."
        )

    return refuse


def _checked(settings: Mapping[str, Any], conversation: bool, refuse: Refuse) -> dict[str, float]:
    """Return the numbers among settings, all of which are known and can be."""
    for name in settings:
        if name not in KNOWN and not (conversation and name == HISTORY):
            refuse(name, f"zipeval passes on no such setting. It knows {', '.join(KNOWN)}")
    for name in FLAGS:
        if not isinstance(settings.get(name, False), bool):
            refuse(name, "it has to be true or false")
    return {name: _number(settings[name], NUMBERS[name], name, refuse) for name in settings if name in NUMBERS}


def _chosen(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings that are given."""
    return {name: settings[name] for name in names if name in settings}


def _lengths(numbers: dict[str, float], refuse: Refuse) -> dict[str, float]:
    """Return how many tokens an answer has, at most and at least."""
    most = min(_chosen(MAX_LENGTH, numbers).values(), default=DEFAULT_NEW_TOKENS)
    least = _chosen(MIN_LENGTH, numbers)
    for name, number in least.items():
        if number > most:
            refuse(name, f"an answer has at most {most} tokens")
    return {"max_new_tokens": most} | ({"min_new_tokens": max(least.values())} if any(least.values()) else {})


def _number(value: Any, numbers: Range, name: str, refuse: Refuse) -> float:
    """Return a setting as a number; YAML may have it as a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number not in numbers:
        refuse(name, f"it has to be {numbers}")
    return int(number) if numbers.whole else number


def _stops(settings: Mapping[str, Any], refuse: Refuse) -> list[str]:
    """Return the texts that end an answer, under whatever name; a text by itself is one of them."""
    stops: list[str] = []
    for name in STOPS:
        value = settings.get(name, [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            refuse(name, "it has to be a text or a list of texts")
        stops += [text for text in texts if text and text not in stops]
    return stops


def recorded(settings: Mapping[str, Any], repeats: int = 1) -> dict[str, Any]:
    """Return what a record states of how its answers were generated.

    Args:
        settings: the task's generation_kwargs.
        repeats: how often each question was asked.
    """
    history = {HISTORY: settings[HISTORY]} if HISTORY in settings else {}
    return {**resolve(settings, conversation=True).record(), **history, "repeats": repeats}
