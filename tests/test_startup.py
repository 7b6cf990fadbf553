"""What answers at once imports nothing that takes seconds. How long it takes: scripts/bench_commands.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "lmms_eval", "datasets", "pandas", "scipy", "matplotlib")
SCRIPT = (
    "import sys, zipeval.cli\n"
    "try:\n    zipeval.cli.main()\n"
    "except SystemExit as end:\n    assert end.code == 2, end.code\n"
    f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
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
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    arguments = [sys.executable, "-c", SCRIPT, *command.split()]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
    assert bool(done.stdout) == (command.split()[0] in ("--help", "--version", "list"))
