"""Names of methods as papers print them."""

from __future__ import annotations

import re
from collections import Counter

from zipeval.reporting.tables import Table

PROPER_NAMES = {
    "vanilla": "Vanilla",
    "fastv": "FastV",
    "sparsevlm": "SparseVLM",
    "visionzip": "VisionZip",
    "visionzip_tuned": "VisionZip‡",
}
FOOTNOTES = {"visionzip_tuned": "‡ with the tuned projector."}
# A label is a method and what follows its name: options, `(published)` or `: difference`.
LABEL = re.compile(r"(?P<method>[^ :]+)(?P<rest>.*)", re.DOTALL)


def proper_labels(table: Table) -> dict[str, str]:
    """Return each label of a table with the method's proper name; options stay behind it."""
    names = _proper_names(table)
    return {
        row.label: names[_method(row.label)] + LABEL.match(row.label)["rest"]
        for row in table.rows
    }


def footnotes(table: Table) -> list[str]:
    """Return what explains a sign in the proper names of a table's methods."""
    methods = {_method(row.label) for row in table.rows}
    return [note for method, note in FOOTNOTES.items() if method in methods]


def _method(label: str) -> str:
    return LABEL.match(label)["method"]


def _proper_names(table: Table) -> dict[str, str]:
    """Return the proper name of each method: the known one, else its class, else the name as it is."""
    classes = _classes(table)
    methods_of_class = Counter(classes.values())
    names = {}
    for method in [_method(row.label) for row in table.rows]:
        name = classes.get(method, method)
        # Two methods of one class, such as chains of others, are told apart by their own names.
        if methods_of_class[name] > 1:
            name = method
        names[method] = PROPER_NAMES.get(method, name)
    return names


def _classes(table: Table) -> dict[str, str]:
    """Return the class of each method that has a record."""
    classes = {}
    for row in table.rows:
        for cell in row.cells.values():
            # Published numbers have no record, and those of `zipeval bench` another one.
            config = (cell.record or {}).get("config", {})
            target = config.get("method", {}).get("_target_")
            if target:
                classes[_method(row.label)] = target.rpartition(".")[2]
    return classes
