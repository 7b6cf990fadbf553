"""The choices of a multiple-choice question, as the columns of data sets hold them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from string import ascii_lowercase, ascii_uppercase
from typing import Any

LISTS = ("choices", "options")  # of ScienceQA, MMMU and others
# One column for each choice: MMBench's A to D (to F elsewhere), SEED-Bench's choice_a to choice_d.
LETTERS = (
    list(ascii_uppercase[:8]),
    [f"choice_{letter}" for letter in ascii_lowercase[:8]],
)
ABSENT = (
    "",
    "nan",
    "None",
)  # what a data set writes where a question has fewer choices than others


def answer_choices(document: Any) -> list[str]:
    """Return the choices of a document, in their order; an empty list for a question without any."""
    if not isinstance(document, Mapping):
        return []
    for name in LISTS:
        choices = _listed(document.get(name))
        if choices:
            return choices
    for names in LETTERS:
        values = [str(document.get(name, "")) for name in names]
        choices = [value for value in values if value not in ABSENT]
        # A single column of such a name may be anything.
        if len(choices) > 1:
            return choices
    return []


def _listed(value: Any) -> list[str]:
    """Return a column's choices: of a list, of a list written as text (MMMU), or of ARC's {"text": [...]}."""
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return []
    if not isinstance(value, (list, tuple)):
        return []
    return [str(choice) for choice in value]
