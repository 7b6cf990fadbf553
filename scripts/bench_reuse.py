"""Samples per second of runner.reuse=prefix against runner.reuse=none batch_size=1, and whether the answers agree.

    python scripts/bench_reuse.py [PAIRS [OVERRIDE ...]]

POPE-shaped: 18 questions about every one of ten pictures of the embedded test set, in the order of a data set that does
not keep them together. The two take turns; a ratio is that of one turn. From decoding the pictures to the last
answer, everything but lmms-eval's own loop is in it.

    python scripts/bench_reuse.py sweep [OVERRIDE ...]

13 rows, as Table 1 has, by one `zipeval run -m` that shares, over the same rows as 13 commands with settings as they
are; each of those starts Python and loads the model.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

PICTURES = 10
SAMPLES = 18 * PICTURES
TASK = "zipeval_shapes"
ALONE, SHARING = ["runner.reuse=none", "batch_size=1"], ["runner.reuse=prefix"]
METHODS, BUDGETS = ("visionzip", "fastv", "sparsevlm", "random"), (48, 32, 16)
ROWS = [
    ["method=vanilla"],
    *([f"method={m}", f"tokens={t}"] for t in BUDGETS for m in METHODS),
]


def requests(documents, texts: list[str]) -> list:
    """Every question about every picture, one after another."""
    from lmms_eval.api.instance import Instance

    options = {"max_new_tokens": 16, "until": ["\n"], "do_sample": False}

    def asked(text):
        return lambda document: [
            {
                "role": "user",
                "content": [
                    {"type": "image", "url": document["image"]},
                    {"type": "text", "text": text},
                ],
            }
        ]

    return [
        Instance(
            "generate_until",
            arguments=(text, asked(text), options, number, TASK, "test"),
            idx=0,
            metadata={"task": TASK, "doc_id": number, "repeats": 1},
        )
        for number, text in enumerate(texts)
    ]


def answer(
    overrides: list[str], documents, texts: list[str]
) -> tuple[float, list[str]]:
    """Seconds, and the answers."""
    from zipeval.config.compose import compose
    from zipeval.evaluation.chat_model import ZipEval
    from zipeval.inference.session import Session

    model = ZipEval(Session(compose(overrides)))
    model.session.load()
    model.task_dict = {TASK: {"test": documents}}
    start = time.perf_counter()
    answers = model.generate_until(requests(documents, texts))
    return time.perf_counter() - start, [answer.text for answer in answers]


def pairs(count: int, overrides: list[str]) -> None:
    import datasets

    import zipeval.tasks
    from zipeval.engine import reuse

    file = Path(zipeval.tasks.__path__[0], "shapes", "test.parquet")
    rows = datasets.load_dataset("parquet", data_files={"test": str(file)})["test"]
    texts = [
        f"{text}\nAnswer the question using a single word or phrase."
        for text in rows["question"][:SAMPLES]
    ]
    its = rows.select([number % PICTURES for number in range(SAMPLES)]), texts
    for method in (["method=vanilla"], ["method=visionzip", "tokens=16"]):
        ratios = []
        for _ in range(count + 1):  # the first warms up
            reuse.forget()
            alone, expected = answer([*method, *ALONE, *overrides], *its)
            shared, found = answer([*method, *SHARING, *overrides], *its)
            if found != expected:
                sys.exit(
                    f"{method}: {sum(a != b for a, b in zip(found, expected, strict=True))} answers differ"
                )
            ratios.append(alone / shared)
        spread = " ".join(f"{ratio:.2f}" for ratio in sorted(ratios[1:]))
        print(
            f"{' '.join(method)}: {median(ratios[1:]):.2f}x the samples per second ({spread}), same answers",
            flush=True,
        )


def sweep(overrides: list[str]) -> None:
    def seconds(*commands: list[str]) -> float:
        start = time.perf_counter()
        with TemporaryDirectory() as results:
            for command in commands:
                its = [
                    sys.executable,
                    "-m",
                    "zipeval",
                    "run",
                    *command,
                    f"results={results}",
                    *overrides,
                ]
                subprocess.run(its, check=True, capture_output=True)
        return time.perf_counter() - start

    budgets = f"tokens={','.join(map(str, BUDGETS))}"
    together = seconds(["-m", f"method=vanilla,{','.join(METHODS)}", budgets, *SHARING])
    apart = seconds(*ROWS)
    print(
        f"one command {together:.0f} s, {len(ROWS)} commands {apart:.0f} s: {together / apart:.3f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["sweep"]:
        sweep(sys.argv[2:])
    else:
        pairs(int((sys.argv[1:] or ["5"])[0]), sys.argv[2:])
