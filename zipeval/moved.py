"""Modules and names by their places of before, for a release: importing one there warns, and says where it is now."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Below `zipeval`: the module of before, and where its names are now.
MOVED = {
    "answering": ("inference.answering",),
    "attention_plots": ("analysis.attention_plots",),
    "baseline": ("regression.baseline", "regression.entries"),
    "batch_size": ("inference.batch_size",),
    "bench": (
        "efficiency.bench",
        "results.speed_records",
    ),
    "budget": ("engine.budget", "config.schema"),
    "chat_model": ("evaluation.chat_model",),
    "composition": ("config.compose",),
    "concentration": ("analysis.concentration",),
    "config": (
        "config.schema",
        "results.identity",
        "inference.validation",
        "utils.urls",
    ),
    "config_directories": ("config.directories",),
    "console": ("utils.console",),
    "conversing": ("inference.conversing",),
    "convert": ("models._convert",),
    "data": ("benchmarks.data",),
    "doctor": ("evaluation.doctor",),
    "evaluation.data_identity": ("benchmarks.data_identity",),
    "evaluation.lmms_names": ("benchmarks.lmms_names",),
    "evaluation.pictures": ("reporting.html.pictures",),
    "evaluation.stack": ("benchmarks.stack",),
    "feed": ("inference.feed",),
    "gallery": ("reporting.html.gallery",),
    "gate": ("regression.gate", "regression.comparison", "regression.verdicts"),
    "hub": (
        "checkpoints.hub",
        "utils.hub_access",
    ),
    "identity": ("results.identity",),
    "journal": ("results.journal",),
    "judge": ("benchmarks.judge",),
    "lazy": ("utils.lazy",),
    "lock": ("results.lock",),
    "logger": ("reporting.logger",),
    "overlap": ("reporting.html.overlap",),
    "paper": ("reporting.paper",),
    "placement": ("checkpoints.placement",),
    "plan": ("sweeps.plan",),
    "plots": ("reporting.plots",),
    "progress": ("utils.progress",),
    "projector": ("checkpoints.projector",),
    "prompts": ("checkpoints.prompts",),
    "protocols": ("benchmarks.protocols",),
    "ranks": ("utils.ranks",),
    "records": (
        "results.records",
        "utils.content_hash",
    ),
    "redundancy": ("analysis.redundancy",),
    "render": ("reporting.render",),
    "report": ("reporting.html.report",),
    "reporting.browser": ("reporting.html.browser",),
    "reporting.live": ("reporting.html.live",),
    "reporting.page": ("reporting.html.page",),
    "reporting.sample_columns": ("reporting.html.sample_columns",),
    "reporting.server": ("reporting.html.server",),
    "resuming": ("evaluation.resuming",),
    "runner": (
        "evaluation.runner",
        "evaluation.task_record",
        "evaluation.judging",
        "inference.session",
    ),
    "samples": ("results.samples",),
    "session": ("inference.session",),
    "show": ("reporting.show",),
    "speed_records": ("results.speed_records",),
    "stats": ("reporting.stats",),
    "status": ("sweeps.status",),
    "stopping": ("utils.stopping",),
    "sweep": (
        "sweeps.sweep",
        "sweeps.job",
        "sweeps.state",
        "evaluation.runner",
    ),
    "tables": ("reporting.tables",),
    "timing": ("efficiency.timing",),
    "training": ("tuning.training",),
    "tune": ("tuning.tune",),
    "tune_settings": ("tuning.settings",),
    "utils.hydra_search_path": ("config.search_path",),
    "validation": ("inference.validation",),
    "videoqa": ("benchmarks.videoqa",),
    "visualize": ("analysis.visualize",),
}


# Below `zipeval.engine`: by module, names of before and what they are called now.
RENAMED = {
    "budget": {
        "Picture": "VisualInput",
    },
    "compiled": {
        "compiled": "compile_blocks",
    },
    "decoder": {
        "Kept": "Selection",
        "Prompts": "PromptBatch",
        "Given": "InitialPrompts",
        "Read": "PromptInfo",
        "keep_best": "topk_mask",
    },
    "images": {
        "joined": "join_pictures",
        "packing": "packing_order",
    },
    "ledger": {
        "ledger": "record_prefill",
    },
    "received": {
        "received": "attention_received",
        "of_every_layer": "record_attention",
    },
    "reuse": {
        "encoded": "encode_and_reduce",
        "prefixed": "prefill_prefixes",
    },
    "staged": {
        "Staged": "ScheduledDecoderMethod",
    },
    "trace": {
        "trace": "trace_kept_tokens",
    },
    "vision": {
        "Everything": "KeepAll",
        "Divided": "SplitAcrossCrops",
        "RowEnds": "WithImageNewlines",
        "see": "encode_crops",
        "reduced": "reduce_and_pack",
        "shrunk": "shrink_placeholders",
        "outputs": "encoder_outputs",
        "scored": "scored_layer",
    },
}


def renamed(module: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which looks up names that the module had before."""
    names = RENAMED[module.removeprefix("zipeval.engine.")]

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{module}.{name} is called {names[name]} now"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(import_module(module), names[name])

    return look_up


def attribute(module: str, name: str) -> Any:
    """Return what a module of before called by a name.

    Raises:
        AttributeError: if it had no such name.
    """
    for place in MOVED.get(module.removeprefix("zipeval."), ()):
        module_now = import_module(f"zipeval.{place}")
        if hasattr(module_now, name):
            text = f"{module}.{name} has moved: import it from zipeval.{place}"
            warnings.warn(text, DeprecationWarning, stacklevel=3)
            return getattr(module_now, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class MovedModule(ModuleType):
    """A module of before, which looks its names up where they are now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return attribute(self.__name__, name)


class MovedModules(MetaPathFinder, Loader):
    """Finds modules of before, where nothing else has their names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target=None
    ) -> ModuleSpec | None:
        """Return the specification of a module of before; None for any other."""
        package, _, name = fullname.partition(".")
        is_moved = package == "zipeval" and name in MOVED
        return ModuleSpec(fullname, self) if is_moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module whose names are looked up when they are asked for."""
        return MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: such a module has no code."""


def install() -> None:
    """Let Python find modules of before; behind all else, so that a module that is there comes first."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
