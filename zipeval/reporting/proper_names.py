"""Names of methods as papers print them."""

from __future__ import annotations

import re

from zipeval.tables import Table

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
    return {row.label: names[_method(row.label)] + LABEL.match(row.label)["rest"] for row in table.rows}


def footnotes(table: Table) -> list[str]:
    """Return what explains a sign in the proper names of a table's methods."""
    methods = {_method(row.label) for row in table.rows}
    return [note for method, note in FOOTNOTES.items() if method in methods]


def _method(label: str) -> str:
    return LABEL.match(label)["method"]


def _proper_names(table: Table) -> dict[str, str]:
    """Return the proper name of each method: the known one, else its class, else the name as it is."""
    names = {_method(row.label): _method(row.label) for row in table.rows}
    classes = {}
    for row in table.rows:
        for cell in row.cells.values():
            target = (cell.record or {}).get("config", {}).get("method", {}).get("_target_")
            if target:
                classes[_method(row.label)] = target.rpartition(".")[2]
    for method, name in classes.items():
        # Two methods of one class are told apart by their own names.
        if [*classes.values()].count(name) == 1:
            names[method] = name
    return names | {method: PROPER_NAMES[method] for method in names if method in PROPER_NAMES}
