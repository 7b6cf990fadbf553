"""The choices of a multiple-choice question, as the columns of data sets hold them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from string import ascii_lowercase, ascii_uppercase
from typing import Any

# Columns that hold all choices, of ScienceQA, MMMU and others.
LISTS = ("choices", "options")
# One column for each choice: MMBench's A to D (to F elsewhere), SEED-Bench's choice_a to choice_d.
LETTERS = (
    list(ascii_uppercase[:8]),
    [f"choice_{letter}" for letter in ascii_lowercase[:8]],
)
# What a data set writes where a question has fewer choices than others.
ABSENT = ("", "nan", "None")
NOT_LITERAL = (ValueError, SyntaxError, MemoryError, RecursionError)


def answer_choices(document: Any) -> list[str]:
    """Return the choices of a document, in their order; an empty list for a question without any."""
    if not isinstance(document, Mapping):
        return []
    columns = [_listed(document.get(name)) for name in LISTS]
    columns += [_lettered(document, names) for names in LETTERS]
    return next(filter(None, columns), [])


def _lettered(document: Mapping, names: list[str]) -> list[str]:
    """Return the choices that a document has in one column each."""
    values = [str(document.get(name, "")) for name in names]
    choices = [value for value in values if value not in ABSENT]
    # A single column of such a name may be anything.
    return choices if len(choices) > 1 else []


def _listed(value: Any) -> list[str]:
    """Return a column's choices: of a list, of a list written as text (MMMU), or of ARC's {"text": [...]}."""
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        # `suppress` leaves the text as it is, which is no list of choices.
        with suppress(*NOT_LITERAL):
            value = ast.literal_eval(value)
    return list(map(str, value)) if isinstance(value, (list, tuple)) else []
