"""How commands read NAME=VALUE."""

from __future__ import annotations

from zipeval.errors import UsageError, did_you_mean


def settings(command: str, arguments: list[str], known: tuple[str, ...]) -> dict[str, str]:
    """The NAME=VALUE of a command that Hydra has no part in.

    Raises:
        UsageError: for a name that it does not know.
    """
    given = dict(a.partition("=")[::2] for a in arguments)
    for name in given.keys() - set(known):
        raise UsageError(f"{name}: no such setting of `zipeval {command}`.{did_you_mean(name, known)}")
    return given


def choice(given: dict[str, str], name: str, known: tuple[str, ...]) -> str:
    """A setting, the first of the known values by default.

    Raises:
        UsageError: for another value.
    """
    value = given.get(name, known[0])
    if value not in known:
        raise UsageError(f"{name}={value}: expected one of {', '.join(known)}.")
    return value


def count(name: str, value: str) -> int:
    """A setting that is a number of things.

    Raises:
        UsageError: for one that is none.
    """
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"{name}={value}: expected a whole number from 1 up, such as {name}=16.")
    return int(value)
