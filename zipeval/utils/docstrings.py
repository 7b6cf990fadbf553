"""Read what docstrings say of attributes, for `--help`: so that a setting is explained in one place."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields

HEADING = "Attributes:"
# `results (DIR): directory of the records.`; what is in parentheses stands for the
# value.
ENTRY = re.compile(r"(?P<name>\w+)(?: \((?P<value>.+?)\))?: (?P<meaning>.*)")


@dataclass(frozen=True)
class Attribute:
    """An attribute as its class's docstring describes it.

    Attributes:
        value: what stands for its value; empty where the docstring does not say.
        meaning: a phrase or sentence, without a full stop at its end.
    """

    value: str
    meaning: str


def attributes(documented: type) -> dict[str, Attribute]:
    """Return what the `Attributes:` of a dataclass's docstring say, by name."""
    docstring = inspect.getdoc(documented) or ""
    section = docstring.partition(f"\n{HEADING}\n")[2]
    # All there is under `python -OO`, which drops docstrings.
    entries = {field.name: Attribute("", "") for field in fields(documented)}
    name = ""
    for line in section.splitlines():
        entry = ENTRY.fullmatch(line.strip())
        is_continuation = line.startswith(" " * 8)
        if entry and not is_continuation:
            name = entry["name"]
            entries[name] = Attribute(entry["value"] or "", entry["meaning"])
        elif is_continuation:
            known = entries[name]
            entries[name] = Attribute(known.value, f"{known.meaning} {line.strip()}")
        else:
            # The next section.
            break
    return {
        name: Attribute(known.value, known.meaning.rstrip("."))
        for name, known in entries.items()
    }
