"""What answers at once imports nothing that takes seconds. How long it takes: scripts/bench_commands.py."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from zipeval.cli.main import COMMANDS

HEAVY = (
    "torch",
    "transformers",
    "lmms_eval",
    "datasets",
    "pandas",
    "scipy",
    "matplotlib",
)
SCRIPT = (
    "import sys, zipeval.cli\n"
    "try:\n    zipeval.cli.main()\n"
    "except SystemExit as end:\n    assert end.code in (0, 2), end.code\n"
    f"print([name for name in {(*HEAVY, 'hydra')} if name in sys.modules], file=sys.stderr)"
)


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "list models",
        "list methods",
        "list tasks",
        "list suites",
        "no-such-command",
        "status",
        "run limit=0",
        "run method=visionzip tokens=9999",
        "run model.image_aspect=anyres",
        "run model=llava15 model.path=nowhere method=visionzip tokens=64",
        "run tasks=[pope]",
        "run tasks=[pope] data.root=.",
        "run tasks=[mmvet]",
        "check --against nowhere.json",
        "analyze redundancy",
        "visualize photo.jpg",
        "run tasks=[zipeval_msvd_qa] judge.url=http://localhost:1/v1 judge.model=any",
    ],
)
def test_nothing_heavy_is_imported(command, tmp_path):
    run(command, tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_hydra_either(command, tmp_path):
    """So that it is there at once: scripts/bench_commands.py measures it."""
    run(f"{command} --help", tmp_path, *HEAVY, "hydra")


def run(command, tmp_path, *heavy):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    arguments = [sys.executable, "-c", SCRIPT, *command.split()]
    done = subprocess.run(
        arguments,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    imported = ast.literal_eval(done.stderr.splitlines()[-1])
    assert not {*imported} & {*(heavy or HEAVY)}, done.stderr
    assert bool(done.stdout) == (
        command.split()[0] in ("--help", "--version", "list") or "--help" in command
    )
