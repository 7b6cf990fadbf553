"""Honest measurement of visual-token reduction.

    with zipeval.VisionZip(tokens=64).applied(model):
        model.generate(**inputs)

What is named here is imported when it is first used: a command that needs no torch does not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from zipeval import moved

if TYPE_CHECKING:
    from zipeval.api import load as load
    from zipeval.api import method as method
    from zipeval.evaluation.from_python import evaluate as evaluate
    from zipeval.methods.chain import Chain as Chain
    from zipeval.methods.fastv import FastV as FastV
    from zipeval.methods.none import Blind as Blind
    from zipeval.methods.pool import Pool as Pool
    from zipeval.methods.random import Random as Random
    from zipeval.methods.sparsevlm import SparseVLM as SparseVLM
    from zipeval.methods.uniform import Uniform as Uniform
    from zipeval.methods.vanilla import Vanilla as Vanilla
    from zipeval.methods.visionzip import VisionZip as VisionZip
    from zipeval.methods.visionzip_tuned import VisionZipTuned as VisionZipTuned
    from zipeval.reporting.results import Results as Results
    from zipeval.reporting.results import read_results as read_results

__version__ = "0.1.0"

moved.install()

_WHERE = {
    "Blind": "methods.none",
    "Chain": "methods.chain",
    "FastV": "methods.fastv",
    "Pool": "methods.pool",
    "Random": "methods.random",
    "SparseVLM": "methods.sparsevlm",
    "Uniform": "methods.uniform",
    "Vanilla": "methods.vanilla",
    "VisionZip": "methods.visionzip",
    "VisionZipTuned": "methods.visionzip_tuned",
    "Results": "reporting.results",
    "evaluate": "evaluation.from_python",
    "load": "api",
    "method": "api",
    "read_results": "reporting.results",
}


def __getattr__(name: str):
    if name in moved.MOVED:
        return import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
