"""Imports point downwards only: between the layers of the house, and without a circle between files."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import zipeval

ROOT = Path(zipeval.__file__).parent
# The lowest first. Packages of one layer do not know each other.
LAYERS = (
    ("errors", "moved"),
    ("utils", "config"),
    ("media",),
    ("engine",),
    ("checkpoints",),
    ("methods", "models", "benchmarks"),
    ("results",),
    ("inference", "reporting"),
    ("evaluation", "efficiency", "tuning", "analysis", "regression", "contract"),
    ("api", "scoring", "sweeps"),
    ("cli",),
    ("__main__", "plugin"),
)
PAGES = "zipeval.reporting.html"
HEIGHT = {package: height for height, layer in enumerate(LAYERS) for package in layer}


@cache
def modules() -> dict[str, Path]:
    """Return every module below the package by its name."""
    named = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        named[".".join(part for part in parts if part != "__init__")] = path
    return named


def imported(name: str, text: str) -> set[str]:
    """Return the modules of the package that a module imports, also within functions; not those for type checkers."""
    tree, found = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules() else node.module)
    return (found & modules().keys()) - {name, "zipeval"}


def package(name: str) -> str:
    """Return the package, or the module beside the packages, that a module belongs to."""
    return name.split(".")[1]


def wrong_arrows(name: str, text: str) -> list[str]:
    """Return the imports of a module that do not point downwards."""
    if name == "zipeval":  # imports what it names when it is asked for it
        return []
    return [
        f"{name} imports {other}"
        for other in sorted(imported(name, text))
        if not is_downwards(name, other)
    ]


def is_downwards(name: str, other: str) -> bool:
    """Return whether one module may import another one."""
    if package(name) != package(other):
        return HEIGHT[package(other)] < HEIGHT[package(name)]
    # Pages are made of tables, and no table of a page.
    return other.startswith(PAGES) <= name.startswith(PAGES)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other in a circle, and those between two circles; none without one."""
    left = {name: set(others) for name, others in graph.items()}
    while True:
        wanted = {other for others in left.values() for other in others}
        # What imports nothing that is left, or is imported by nothing that is left, is in no circle.
        ends = [
            name
            for name, others in left.items()
            if not others & left.keys() or name not in wanted
        ]
        if not ends:
            return sorted(left)
        for name in ends:
            del left[name]


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_module_uses_what_is_for_tests(name):
    """Patches of foreign libraries are in utils/foreign_patches.py, and what is ours is an argument."""
    tree = ast.parse(modules()[name].read_text())
    libraries = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            libraries |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            libraries.add(node.module.partition(".")[0])
    assert "unittest" not in libraries


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_downwards(name):
    assert wrong_arrows(name, modules()[name].read_text()) == []


def test_no_files_import_each_other():
    graph = {
        name: imported(name, path.read_text())
        for name, path in modules().items()
        if name != "zipeval"
    }
    assert circle(graph) == []


def test_an_arrow_that_is_turned_round_is_noticed():
    assert wrong_arrows(
        "zipeval.engine.vision", "from zipeval.methods import visionzip"
    ) == ["zipeval.engine.vision imports zipeval.methods.visionzip"]
    within = "def load():\n    import zipeval.evaluation.runner\n"
    assert wrong_arrows("zipeval.reporting.tables", within) == [
        "zipeval.reporting.tables imports zipeval.evaluation.runner"
    ]
    assert wrong_arrows("zipeval.methods.fastv", "from zipeval import models") == [
        "zipeval.methods.fastv imports zipeval.models"
    ]
    assert wrong_arrows(
        "zipeval.reporting.tables", "from zipeval.reporting.html import report"
    ) == ["zipeval.reporting.tables imports zipeval.reporting.html.report"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_every_package_has_a_layer_and_room():
    """At most ten modules stand beside the packages, and no folder holds more than twenty."""
    beside = [path for path in ROOT.glob("*.py")]
    assert len(beside) <= 10
    folders = {path.parent for path in modules().values()} - {ROOT}
    for folder in folders:
        assert len([*folder.glob("*.py")]) - 1 <= 20, folder
    assert {package(name) for name in modules() if name != "zipeval"} == {*HEIGHT}
