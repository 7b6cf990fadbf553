"""Seconds and memory of `zipeval view` on 13 runs of 9,000 samples each, with the positions that methods keep.

    python scripts/bench_view.py [DIR]

DIR keeps the records, some 160 MB, for another time; without it they are made anew. They are those of a table of the
papers: vanilla, and four methods at three budgets on POPE, whose answers differ from vanilla's in one of ten questions.
The server runs in a process of its own, and what is timed is asked for over HTTP, as its page does.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode
from urllib.request import urlopen

from zipeval.reporting import stats
from zipeval.results import records

SAMPLES, PATCHES, LAYERS, MERGED = 9_000, 576, 32, 10
METHODS = ("visionzip", "fastv", "sparsevlm", "random")
BUDGETS = (192, 128, 64)
KINDS = ("adversarial", "popular", "random")
OBJECTS = (
    "snowboard",
    "dining table",
    "person",
    "traffic light",
    "backpack",
    "chair",
    "dog",
    "spoon",
)
BAR_PAGE, BAR_FILTER, BAR_MEMORY = 2.0, 1.0, 1024  # seconds, seconds, MiB


def make(directory: Path) -> None:
    """Write the records."""
    rng = random.Random(0)
    bound = _samples(rng, None, None)
    _write(directory, "vanilla", None, bound)
    for method in METHODS:
        for tokens in BUDGETS:
            _write(directory, method, tokens, _samples(rng, tokens, bound))


def _samples(
    rng: random.Random, tokens: int | None, bound: list[dict] | None
) -> list[dict]:
    samples = []
    for doc_id in range(SAMPLES):
        target = ("yes", "no")[doc_id % 2]
        right = (
            rng.random() < 0.86
            if bound is None
            else bool(bound[doc_id]["score"]) != (rng.random() < 0.1)
        )
        said = target if right else {"yes": "no", "no": "yes"}[target]
        count = tokens or PATCHES
        sample = {
            "doc_id": doc_id,
            "question_hash": f"{doc_id:016x}",
            "question": f"Is there a {OBJECTS[doc_id % len(OBJECTS)]} in the image?\n"
            "Answer the question using a single word or phrase.",
            "pictures": [f"{doc_id // 18:016x}"],
            "target": target,
            "prediction": said.capitalize(),
            "crops": [1],
            "visual_tokens": [count] * LAYERS,
            "prompt_tokens": count + 60,
            "kv_entries": (count + 60) * LAYERS,
            "flops_formula": 10**9 * count,
            "flops_exact": 2 * 10**9 * count,
            "output_tokens": 2,
            "latency": 1.25,
            "batch": 16,
            "score": float(right),
            "scores": {},
            "kind": KINDS[doc_id * len(KINDS) // SAMPLES],
        }
        if tokens:
            places = rng.sample(range(PATCHES), tokens)
            sample |= {
                "kept": [sorted(places[MERGED:])],
                "merged": [sorted(places[:MERGED])],
            }
        # As a run writes it: scores stand behind what they came of.
        samples.append(
            sample | {name: sample.pop(name) for name in ("score", "scores", "kind")}
        )
    return samples


def _write(
    directory: Path, method: str, tokens: int | None, samples: list[dict]
) -> None:
    held = {
        "dtype": "float16",
        "attn_implementation": "sdpa",
        "quantization": "none",
        "device_map": None,
    }
    count = float(tokens or PATCHES)
    record = {
        "run_id": f"llava15-{method}-{tokens}",
        "task": "pope",
        "task_hash": "the-task",
        "data_hash": "the-data",
        "failed": 0,
        "unscored": 0,
        "status": "success",
        "metric": "pope_f1_llava",
        "higher_is_better": True,
        "from_samples": True,
        "score": stats.value("pope", samples),
        "metrics": {"pope_f1_llava": stats.value("pope", samples) / 100},
        "visual_tokens": {
            "requested": tokens,
            "mean": count,
            "final": count,
            "patches": PATCHES,
        },
        "prefill": {"flops_exact": 10**9 * count},
        "config": {
            "model": {
                **{
                    "name": "llava15",
                    "family": "llava",
                    "path": None,
                    "revision": None,
                    "device": "auto",
                },
                **{"prompt": "vicuna_v1", "image_aspect": "pad"},
                **held,
            },
            "method": {
                "name": method,
                "_target_": "x",
                **({"tokens": tokens} if tokens else {}),
            },
            **{
                "tokens": tokens,
                "budget": "paper",
                "packing": "published",
                "limit": None,
                "batch_size": 16,
                "seed": 0,
            },
            "data": {"root": None},
        },
        "resolved": {
            "fingerprint": "the-weights",
            "device": "cuda",
            **held,
            "method": method,
        },
        "versions": {"zipeval": "0.1.0"},
        "git": None,
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T01:00:00+00:00",
        "seconds": 3600.0,
    }
    records.write(directory / record["run_id"], record, samples)


class View:
    """A server, and how long it takes."""

    def __init__(self, directory: Path):
        command = [sys.executable, "-m", "zipeval", "view", f"results={directory}"]
        self.start = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.started = time.perf_counter() - self.start
        self.url = re.match(r"http://\S+", line)[0]

    def ask(self, path: str, **parameters: str) -> tuple[float, bytes]:
        """Return how long an answer takes, and the answer."""
        start = time.perf_counter()
        with urlopen(f"{self.url}{path}?{urlencode(parameters)}") as response:
            body = response.read()
        return time.perf_counter() - start, body

    def memory(self) -> float:
        """Return the most memory that it held so far, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def measure(view: View) -> Iterator[tuple[str, float, float | None, str]]:
    """Yield what was asked for, how long it took, its bar, and what came."""
    yield "the command prints its address", view.started, None, view.url
    for path in ("", "api/sections", "api/rows"):
        _, body = view.ask(path)
    first = time.perf_counter() - view.start
    yield (
        "the first page of questions, since the command",
        first,
        BAR_PAGE,
        f"{json.loads(body)['total']} questions",
    )
    filters = {
        "lost by visionzip 64": {"outcome": "lost", "run": "visionzip 64"},
        "gained by any run": {"outcome": "gained", "run": "*"},
        "most runs fail": {"sort": "most-fail"},
        "a kind, a method and a budget": {
            "kind": "popular",
            "method": "fastv",
            "budget": "128",
        },
        "search for snowboard": {"text": "snowboard"},
        "search for what is nowhere": {"text": "zebra crossing"},
        "page 100": {"page": "100"},
    }
    for name, query in filters.items():
        seconds, body = view.ask("api/rows", **query)
        yield name, seconds, BAR_FILTER, f"{json.loads(body)['total']} questions"
    seconds, body = view.ask(
        "api/sample", task="pope", document="8999", sort="most-fail"
    )
    yield "a question with its kept tokens", seconds, BAR_FILTER, f"{len(body)} bytes"
    memory = view.memory()
    yield "memory (MiB)", memory, BAR_MEMORY, "the most so far"
    seconds, body = view.ask("report")
    yield "the whole report", seconds, None, f"{len(body)} bytes"
    yield "memory (MiB) with it", view.memory(), BAR_MEMORY, "the most"


def main(directory: Path) -> None:
    """Make what is not there, and print a line for each measurement."""
    if not any(directory.glob("*/*.json")):
        make(directory)
    view = View(directory)
    try:
        for name, value, bar, what in measure(view):
            verdict = (
                ""
                if bar is None
                else f"  bar {bar:g}" + ("" if value < bar else ": MISSED")
            )
            print(f"{value:8.2f}  {name}: {what}{verdict}", flush=True)
    finally:
        view.process.terminate()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as made:
            main(Path(made))
