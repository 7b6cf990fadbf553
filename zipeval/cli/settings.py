"""Settings of commands: what they mean, which values they take, and how these are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipeval.errors import UsageError, did_you_mean

Choices = Iterable[str] | Callable[[], Iterable[str]]
# NAME=VALUE or --NAME=VALUE. A value may have several lines, such as a question.
ASSIGNED = re.compile(
    r"(?P<dashes>--)?(?P<name>[+~]{0,2}[A-Za-z_][\w.@/-]*)=(?P<value>.*)", re.DOTALL
)
# --NAME alone, behind which the value stands.
DASHED = re.compile(r"(?P<dashes>--)(?P<name>[A-Za-z_][\w.@/-]*)")
LABEL_WIDTH = 30  # columns of a help's left side, where the terminal has room


def text(name: str, value: str) -> str:
    """Return the value as it was typed."""
    return value


def path(name: str, value: str) -> Path:
    """Return the value as a path, `~` resolved."""
    if not value:
        raise UsageError(f"{name}=: needs a value, the name of a file or a directory.")
    return Path(value).expanduser()


def positive(name: str, value: str) -> int:
    """Return the value as a whole number from 1 up."""
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(
            f"{name}={value}: expected a whole number from 1 up, such as {name}=16."
        )
    return int(value)


def number(name: str, value: str) -> int:
    """Return the value as a whole number from 0 up: samples are counted from 0."""
    if not value.isdecimal():
        raise UsageError(
            f"{name}={value}: expected a whole number from 0 up, such as {name}=17."
        )
    return int(value)


def one_of(choices: Iterable[str]) -> Callable[[str, str], str]:
    """Return a reader that takes some values only."""

    def read(name: str, value: str) -> str:
        known = tuple(choices)
        if value not in known:
            raise UsageError(f"{name}={value}: expected one of {', '.join(known)}.")
        return value

    return read


def switch(name: str, value: str) -> bool:
    """Return whether the value is true."""
    return one_of(SWITCH)(name, value) == "true"


SWITCH = ("false", "true")


@dataclass(frozen=True)
class Setting:
    """One setting of a command.

    Attributes:
        name: as it is typed before the `=`; as an option its underscores may be dashes.
        meaning: a phrase for the help.
        value: what stands for the value in the help; where it is empty, the choices do.
        read: makes a value of what was typed, or raises UsageError; called with the name and the text.
        default: what a command gets where the setting is not options.
        default_text: what the help says of that; None: the default itself.
        choices: the values that completion offers; unless `read` says otherwise, no other is taken.
        several: whether values may be joined by commas.
        flag: whether `--NAME` alone means true.
        option: whether it is only ever written --NAME VALUE.
        short: another name of an option, such as -m.
    """

    name: str
    meaning: str
    value: str = ""
    read: Callable[[str, str], Any] | None = None
    default: Any = None
    default_text: str | None = None
    choices: Choices = ()
    several: bool = False
    flag: bool = False
    option: bool = False
    short: str = ""

    @property
    def allowed(self) -> tuple[str, ...]:
        """The values that completion offers."""
        return listed(self.choices)

    @property
    def dashed(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def label(self) -> str:
        """Return how the help writes it: `results=DIR`, `--config-dir DIR`."""
        value = self.value or "|".join(self.allowed) or "VALUE"
        if not self.option:
            return f"{self.name}={value}"
        names = ", ".join(filter(None, [self.short, self.dashed]))
        return names if self.flag else f"{names} {value}"

    @property
    def help(self) -> str:
        """Return what the help says behind the label."""
        if self.default_text is not None:
            default = self.default_text
        elif isinstance(self.default, bool):
            default = str(self.default).lower()
        else:
            default = "" if self.default is None else str(self.default)
        return f"{self.meaning} (default: {default})" if default else self.meaning

    def parse(self, value: str) -> Any:
        """Return the value that a command gets.

        Raises:
            UsageError: for a value that the setting does not take.
        """
        if self.read is not None:
            return self.read(self.name, value)
        return one_of(self.allowed)(self.name, value) if self.choices else value


@dataclass(frozen=True)
class Operand:
    """Declare what a command takes without a name, in its place.

    Attributes:
        name: what stands for it in the help.
        meaning: a phrase for the help.
        choices: all values there are; empty: any value will do.
        suggestions: values that completion offers, where any value will do.
        required: whether the command needs it.
    """

    name: str
    meaning: str
    choices: Choices = ()
    suggestions: Choices = ()
    required: bool = True

    @property
    def allowed(self) -> tuple[str, ...]:
        """All values there are; empty where any value will do."""
        return listed(self.choices)

    @property
    def offered(self) -> tuple[str, ...]:
        """The values that completion offers."""
        return self.allowed or listed(self.suggestions)

    def accepts(self, value: str) -> bool:
        """Return whether a value may stand in this place; where nothing does, it is empty."""
        if not value:
            return not self.required
        return not self.allowed or value in self.allowed

    def suggest(self, value: str) -> str:
        """Return the end of an error about a value; empty where there is no choice."""
        if len(self.allowed) < 2:
            return ""
        return did_you_mean(value, self.allowed)


@dataclass(frozen=True)
class Section:
    """Settings that stand below one heading of a help."""

    heading: str
    settings: tuple[Setting, ...]


def listed(choices: Choices) -> tuple[str, ...]:
    """Return choices that may be a function."""
    return tuple(choices() if callable(choices) else choices)


# Settings that several commands have.
RESULTS = Setting("results", "directory of the records", "DIR", default="results/runs")
CONFIG_DIR = Setting(
    "config_dir",
    "directory of further configurations, with method/NAME.yaml in it",
    "DIR",
    option=True,
)
