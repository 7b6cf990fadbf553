"""Seconds from the start of a `zipeval run` to its first generated batch: its own progress bar says when that is there.

    python scripts/bench_startup.py N [OVERRIDE ...]
    python tests/miniatures.py /tmp/data
    python scripts/bench_startup.py 5 model=tiny_llava method=visionzip tokens=16 suite=paper_image data.root=/tmp/data

Every run is a new process with a results directory of its own, ended when the first batch is there. The first run may
read from a cold disk; it is printed like the others.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from statistics import median
from tempfile import TemporaryDirectory

ADVANCED = re.compile(
    rb"[1-9]\d*/\d+ \d+:\d\d:\d\d"
)  # samples done, of how many, time since the first
PLAIN = {
    "NO_COLOR": "1",
    "COLUMNS": "200",
}  # or colours come between these, or one of them does not fit


def first_batch(overrides: list[str]) -> float:
    """Seconds to it.

    Raises:
        SystemExit: if the command ends without one; shows what it said.
    """
    with TemporaryDirectory() as results:
        terminal, its = pty.openpty()  # only on a terminal every batch is told at once
        start = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "zipeval",
            "run",
            *overrides,
            f"results={results}",
        ]
        process = subprocess.Popen(
            command, stdin=its, stdout=its, stderr=its, env={**os.environ, **PLAIN}
        )
        os.close(its)
        said = b""
        try:
            while not ADVANCED.search(said):
                said += os.read(terminal, 4096)
            return time.monotonic() - start
        except OSError:  # its end of the terminal is closed
            sys.exit(
                f"no batch was generated: {' '.join(command)}\n{said.decode(errors='replace')}"
            )
        finally:
            process.kill()
            process.wait()
            os.close(terminal)


if __name__ == "__main__":
    seconds = []
    for _ in range(int(sys.argv[1])):
        seconds.append(first_batch(sys.argv[2:]))
        print(f"{seconds[-1]:.1f} s", flush=True)
    print(
        f"median {median(seconds):.1f} s, from {min(seconds):.1f} to {max(seconds):.1f}"
    )
