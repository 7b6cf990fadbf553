"""Seconds for the intervals of a row of a table: eleven benchmarks of 9,000 samples each, and their average.

    python scripts/bench_statistics.py

The samples have the kinds, groups and grades of each benchmark; 85% of the answers of the two runs are the same.
"""

from __future__ import annotations

import time

import numpy as np

from zipeval.reporting.stats import RESAMPLES, average, compare

SAMPLES = 9_000
GRADES = {  # what a sample's score can be, where that is not 0 or 1
    "vqav2_val": [0, 0.3, 0.6, 0.9, 1],
    "textvqa_val": [n / 10 for n in range(11)],
    "mmvet": [n / 10 for n in range(11)],
    "llava_in_the_wild": range(1, 11),
}
TASKS = (
    "gqa",
    "mmbench_en_dev",
    "mme",
    "pope",
    "scienceqa_img",
    "mmmu_val",
    "seedbench",
    *GRADES,
)


def runs(task: str, rng: np.random.Generator) -> tuple[list[dict], list[dict]]:
    """Two runs' samples."""
    grades = np.array(GRADES.get(task, [0, 1]), float)
    bound = rng.choice(grades, SAMPLES)
    ours = np.where(rng.random(SAMPLES) < 0.85, bound, rng.choice(grades, SAMPLES))
    references = rng.integers(6, 11, (2, SAMPLES))
    kinds = 14 if task == "mme" else 3
    return tuple(
        [
            {
                "doc_id": i,
                "question_hash": f"{i:x}",
                "target": "yes" if i % 2 else "no",
                "score": float(score),
                "scores": {"reference": float(reference)},
                "kind": f"kind {i // 2 % kinds}",
                "group": i // 2,
            }
            for i, (score, reference) in enumerate(zip(*of, strict=True))
        ]
        for of in zip((ours, bound), references, strict=True)
    )


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    pairs = [(task, *runs(task, rng)) for task in TASKS]
    total = 0.0
    for name, work in [
        *((task, (task, *pair)) for task, *pair in pairs),
        ("average", None),
    ]:
        start = time.perf_counter()
        found = compare(*work) if work else average(pairs)
        seconds = time.perf_counter() - start
        total += seconds
        print(
            f"{name:18} {found.percent:6.2f} [{found.low:6.2f}, {found.high:6.2f}]  {seconds:5.2f} s",
            flush=True,
        )
    print(
        f"{len(TASKS)} x {SAMPLES:,} samples x {RESAMPLES:,} draws, and their average: {total:.1f} s"
    )
