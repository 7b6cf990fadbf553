"""Turns a task's generation_kwargs into arguments of transformers' `generate`.

lmms-eval leaves it to each model which settings it heeds, and its own heed about five. Here every setting is passed on,
or has no effect for a reason that the record states, or is refused before anything is answered.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from zipeval.errors import UsageError

# For tasks that set none, as lmms-eval's own models have it.
DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Numbers:
    """Describes the numbers that a setting may have.

    Attributes:
        description: as a message has it.
        low, high: the least and the largest of them.
        whole: whether they are integers.
    """

    description: str
    low: float
    high: float = sys.float_info.max
    whole: bool = False

    def __contains__(self, number: float) -> bool:
        if self.whole and not number.is_integer():
            return False
        return self.low <= number <= self.high


COUNT = Numbers("an integer from 1 on", 1, whole=True)
COUNT_OR_NONE = Numbers("an integer from 0 on", 0, whole=True)
SHARE = Numbers("a number from 0 to 1", 0, 1)

# Several names of one setting: those of transformers, of lm-eval and of vLLM. Where a task gives two, both hold.
MAX_LENGTH = ("max_new_tokens", "max_gen_toks", "max_tokens")
MIN_LENGTH = ("min_new_tokens", "min_tokens")
STOPS = ("until", "stop_sequences", "stop", "stop_strings")
# Heeded only where answers are sampled. top_k is 0 for all tokens.
SAMPLING = {
    "temperature": Numbers("a number from 0 on", 0),
    "top_p": SHARE,
    "top_k": COUNT_OR_NONE,
    "min_p": SHARE,
    "typical_p": Numbers("a number above 0, up to 1", math.ulp(0), 1),
}
# Heeded only where there are several beams.
BEAMS = {"length_penalty": Numbers("a number", -sys.float_info.max)}
# These look at the prompt, and so at the padding in front of it where prompts of several lengths share a batch.
PENALTIES = {
    "repetition_penalty": Numbers("a number above 0", math.ulp(0)),
    "no_repeat_ngram_size": COUNT_OR_NONE,
}
NUMBERS = {
    **dict.fromkeys(MAX_LENGTH, COUNT),
    **dict.fromkeys(MIN_LENGTH, COUNT_OR_NONE),
    "num_beams": COUNT,
    "seed": COUNT_OR_NONE,
    **SAMPLING,
    **BEAMS,
    **PENALTIES,
}
FLAGS = ("do_sample", "early_stopping")
# Settings of other models that are decided on elsewhere here, with the reason.
SET_ASIDE = {
    "image_aspect_ratio": "model.image_aspect= of the run says how images are prepared"
}
KNOWN = (*NUMBERS, *FLAGS, *STOPS, *SET_ASIDE)
HISTORY = "history"  # of a conversation: see zipeval/inference/conversing.py

NOT_SAMPLED = dict.fromkeys((*SAMPLING, "seed"), "answers are not sampled")
NO_BEAMS = dict.fromkeys((*BEAMS, "early_stopping"), "num_beams is 1")
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
    """Says how the answers of a task are generated.

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
    def is_sampled(self) -> bool:
        """Return whether answers are drawn at random."""
        return self.arguments["do_sample"]

    @property
    def is_one_by_one(self) -> bool:
        """Return whether an answer would depend on the prompts that share its batch."""
        penalty = self.arguments.get("repetition_penalty", 1)
        size = self.arguments.get("no_repeat_ngram_size", 0)
        return self.is_sampled or penalty != 1 or size > 0

    def record(self) -> dict[str, Any]:
        """Return what a record states of it, for JSON."""
        return {
            **self.arguments,
            "seed": self.seed,
            "until": self.stops,
            "without_effect": self.without_effect,
        }

    def notes(self) -> list[str]:
        """Describe the settings whose author may take them for effective."""
        notes = []
        for name, entry in self.without_effect.items():
            value, reason = entry["value"], entry["reason"]
            if value not in NEUTRAL.get(name, ()):
                notes.append(f"{name}={value} has no effect, as {reason}")
        return notes


def resolve(
    settings: Mapping[str, Any], task: str | None = None, conversation: bool = False
) -> Generation:
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
    checked = _Checked(settings, task, conversation)
    numbers, flags = checked.numbers, checked.flags
    temperature = numbers.get("temperature")
    # transformers refuses to sample at temperature 0, which is greedy by its meaning.
    is_sampled = flags.get("do_sample", bool(temperature)) and temperature != 0
    beams = numbers.get("num_beams", 1)

    arguments = {
        **checked.lengths(),
        "num_beams": beams,
        "do_sample": is_sampled,
        **_among(PENALTIES, numbers),
    }
    # None keeps transformers from taking the checkpoint's own.
    arguments |= dict.fromkeys(("temperature", "top_p", "top_k"))
    # Why a setting that the task gives changes no answer, for the record.
    reasons = dict(SET_ASIDE)
    if is_sampled:
        arguments |= {"temperature": 1.0, **_among(SAMPLING, numbers)}
    else:
        reasons |= NOT_SAMPLED
    if beams > 1:
        arguments |= _among((*BEAMS, "early_stopping"), {**numbers, **flags})
    else:
        reasons |= NO_BEAMS
    seed = numbers.get("seed", 0) if is_sampled else 0
    return Generation(arguments, checked.stops(), seed, checked.without_effect(reasons))


class _Checked:
    """Holds the settings of a task, all of which are known and can be.

    Attributes:
        settings: those that the task gives.
        numbers: those of them that are numbers.
        flags: those that are true or false.

    Args:
        settings, task, conversation: as of `resolve`.

    Raises:
        UsageError: for a setting that is not, named with its task and its value.
    """

    def __init__(
        self, settings: Mapping[str, Any], task: str | None, conversation: bool
    ):
        self.task = task
        self.settings = {
            name: value for name, value in settings.items() if value is not None
        }
        # lmms-eval's models ignore what they do not know, and so answer otherwise than the task means.
        known = (*KNOWN, HISTORY) if conversation else KNOWN
        for name in self.settings:
            if name not in known:
                names = ", ".join(known)
                self.refuse(
                    name, f"zipeval passes on no such setting. It knows {names}"
                )
        self.numbers = {
            name: self._number(name) for name in _among(NUMBERS, self.settings)
        }
        self.flags = {name: self._flag(name) for name in _among(FLAGS, self.settings)}

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise the UsageError of a setting."""
        where = f"tasks=[{self.task}]: " if self.task else ""
        raise UsageError(
            f"{where}generation_kwargs has {name}={self.settings[name]!r}: {reason}. Nothing was answered. Change it "
            "in the task's YAML file and run this again."
        )

    def _number(self, name: str) -> float:
        value, allowed = self.settings[name], NUMBERS[name]
        try:
            # YAML may have it as a text: 1e-5 is one there.
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        # True is 1.0 for `float`, and no number that anybody meant.
        if number not in allowed or isinstance(value, bool):
            self.refuse(name, f"it has to be {allowed.description}")
        return int(number) if allowed.whole else number

    def _flag(self, name: str) -> bool:
        if not isinstance(self.settings[name], bool):
            self.refuse(name, "it has to be true or false")
        return self.settings[name]

    def lengths(self) -> dict[str, float]:
        """Return how many tokens an answer has, at most and at least, as arguments of `generate`."""
        # Where a task gives two names of one setting, both hold: the strictest counts.
        maxima = _among(MAX_LENGTH, self.numbers)
        most = min(maxima.values(), default=DEFAULT_NEW_TOKENS)
        minima = _among(MIN_LENGTH, self.numbers)
        for name, number in minima.items():
            if number > most:
                self.refuse(name, f"an answer has at most {most} tokens")
        least = max(minima.values(), default=0)
        lengths = {"max_new_tokens": most}
        if least:
            lengths["min_new_tokens"] = least
        return lengths

    def stops(self) -> list[str]:
        """Return the texts that end an answer, under whatever name."""
        stops: list[str] = []
        for name, value in _among(STOPS, self.settings).items():
            # A text by itself is one stop, and no list of letters.
            texts = [value] if isinstance(value, str) else value
            types = set(map(type, texts)) if isinstance(texts, list) else {None}
            if not types <= {str}:
                self.refuse(name, "it has to be a text or a list of texts")
            stops += texts
        # Each once, in the order of the task. An empty text is none: nothing splits by it.
        return list(filter(None, dict.fromkeys(stops)))

    def without_effect(self, reasons: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return the settings that change no answer, with their value and why."""
        entries = {}
        for name, value in _among(reasons, self.settings).items():
            entries[name] = {"value": value, "reason": reasons[name]}
        return entries


def _among(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings that have one of these names."""
    return {name: settings[name] for name in names if name in settings}


def generation_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return lmms-eval's generation_kwargs as `generate` takes them."""
    return resolve(settings, conversation=True).arguments


def recorded(settings: Mapping[str, Any], repeats: int = 1) -> dict[str, Any]:
    """Return what a record states of how its answers were generated.

    Args:
        settings: the task's generation_kwargs.
        repeats: how often each question was asked.
    """
    generation = resolve(settings, conversation=True)
    return {**generation.record(), **_among([HISTORY], settings), "repeats": repeats}
