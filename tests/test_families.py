"""Every embedded model under every method, from a command line's configuration to a record."""

from __future__ import annotations

from pathlib import Path

import pytest

import zipeval.configs
from zipeval.cli import compose
from zipeval.evaluation.runner import run
from zipeval.inference.session import Session
from zipeval.results import records

TOKENS = 120  # a grid for pooling whether an image has 1, 3, 4, 5 or 8 crops
FEW = {
    "sparsevlm_on_visionzip": 16
}  # what the second one leaves has to be less than what the first one does
NEEDS_A_FILE = ("visionzip_tuned",)  # see tests/test_tune.py


def choices(group, pattern="*"):
    return sorted(
        path.stem
        for path in Path(zipeval.configs.__path__[0], group).glob(f"{pattern}.yaml")
    )


@pytest.mark.parametrize(
    "method", [name for name in choices("method") if name not in NEEDS_A_FILE]
)
@pytest.mark.parametrize("model", choices("model", "tiny_*"))
def test_runs(model, method, tmp_path):
    budget = [
        f"tokens={FEW.get(method, TOKENS)}",
        "budget=final",
        *["method.first.tokens=140"][: method == "chain"],
    ]
    config = compose(
        [
            f"model={model}",
            f"method={method}",
            f"results={tmp_path}",
            "limit=4",
            *budget,
        ]
    )
    (path,) = run(config)
    record = records.read(path)
    if record["config"]["tokens"] and not method.startswith(
        ("fastv", "sparsevlm", "chain")
    ):
        assert record["visual_tokens"]["mean"] == TOKENS
    assert record["visual_tokens"]["final"] <= Session(config).checkpoint.visual_tokens
    assert record["failed"] == 0
