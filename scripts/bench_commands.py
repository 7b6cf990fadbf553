"""Seconds of commands that only tell or refuse something, in new processes, beside those of `python -c pass`.

    python scripts/bench_commands.py N
    HF_HUB_OFFLINE=1 python scripts/bench_commands.py 5

The commands take turns, so that all of them meet the same load. None of them may take longer than its bar.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

# Seconds that each may take.
BARS = {
    "--help": 0.5,
    "run --help": 0.5,
    "table --help": 0.5,
    "bench --help": 0.5,
    "tune --help": 0.5,
    "__complete": 0.5,
    "list models": 1.0,
    "list methods": 1.0,
    "list tasks": 1.0,
    "list suites": 1.0,
    "run method=visonzip tokens=16": 2.0,
    "run tokens=abc": 2.0,
    "run limit=0": 2.0,
    "run method=visionzip tokens=9999": 2.0,
    "run model.image_aspect=anyres": 2.0,
    "run tasks=[pope]": 2.0,
    "run tasks=[pope] data.root=.": 2.0,
    "run tasks=[mmvet]": 2.0,
    "run method=visionzip tokens=7": 2.0,
    "run method=fastv tokens=1 budget=mean": 2.0,
}


def seconds(command: list[str], here: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=here, capture_output=True, check=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    script = str(Path(sys.executable).with_name("zipeval"))
    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands |= {name: [script, *name.split()] for name in BARS}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    with TemporaryDirectory() as here:
        for _ in range(int(sys.argv[1])):
            for name, command in commands.items():
                taken[name].append(seconds(command, here))
    for name, its in taken.items():
        bar = BARS.get(name)
        verdict = (
            ""
            if bar is None
            else f"  bar {bar:.1f} s" + ("" if median(its) < bar else ": MISSED")
        )
        print(
            f"{median(its):6.2f} s (from {min(its):5.2f} to {max(its):5.2f})  {name}{verdict}"
        )
