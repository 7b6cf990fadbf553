"""docs/adding-a-method.md, followed to the letter by someone outside of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from zipeval import records

DOC = Path(__file__).parent.parent / "docs" / "adding-a-method.md"


@pytest.fixture
def outside(tmp_path):
    """The document's files, where it says they are."""
    for name, content in re.findall(r"`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```\w+\n(.*?)```", DOC.read_text(), re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def follow(command, cwd):
    environment, _, arguments = command.partition(" zipeval ")
    return subprocess.run(
        [sys.executable, "-m", "zipeval", *arguments.split(), "limit=6", "bound=none"],
        cwd=cwd,
        env={**os.environ, **dict([environment.split("=")])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_both_methods_run_and_are_measured(outside):
    commands = re.findall(r"^PYTHONPATH=.*$", DOC.read_text(), re.MULTILINE)
    for command in commands:
        done = follow(command, outside)
        assert done.returncode == 0, done.stderr
    norms, pyramid = (r["visual_tokens"] for r in records.read_all(str(outside / "results/runs")))
    assert norms["entering"] == [16.0] * 6
    assert pyramid["mean"] == fmean(pyramid["entering"]) == pytest.approx(100, abs=1)
    assert pyramid["entering"] == sorted(pyramid["entering"], reverse=True)
    assert pyramid["entering"][0] == 144


def test_a_plain_class_will_do(outside):
    """Neither hashable nor with a repr of its own; the same command twice is one run."""
    source = (outside / "norms.py").read_text()
    (outside / "norms.py").write_text(source.replace("@dataclass(frozen=True)", "@dataclass(repr=False)"))
    command = "PYTHONPATH=. zipeval run --config-dir configs method=norms tokens=16"
    assert follow(command, outside).returncode == 0
    again = follow(command, outside)
    assert "finished before, kept" in again.stdout
    assert len(list(outside.glob("results/runs/*"))) == 1


def test_a_method_whose_settings_miss_its_budget_is_not_run(outside):
    source = (outside / "pyramid.py").read_text()
    wrong = (
        "    @classmethod\n    def for_budget(cls, *given, **options):\n        return cls((50, 40, 9), (1, 2, 3))\n\n"
    )
    (outside / "pyramid.py").write_text(source.replace("    def reduce", wrong + "    def reduce"))
    done = follow("PYTHONPATH=. zipeval run --config-dir configs method=pyramid tokens=100 budget=mean", outside)
    assert done.returncode == 1
    assert "tokens=100 budget=mean come to 66.0" in done.stderr


def test_a_method_that_leaves_other_than_it_says_fails_its_run(outside):
    source = (outside / "norms.py").read_text()
    (outside / "norms.py").write_text(source.replace("topk(self.tokens)", "topk(self.tokens + 1)"))
    done = follow("PYTHONPATH=. zipeval run --config-dir configs method=norms tokens=16", outside)
    assert done.returncode == 1
    assert "Norms leaves 17 visual tokens of an image, and 16 as it says itself" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(outside.glob("results/**/*.json"))
