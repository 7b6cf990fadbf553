"""Evaluate from Python what `zipeval run -m` evaluates from a command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import product, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zipeval.config.schema import ModelConfig, RunConfig, with_tasks
from zipeval.errors import UsageError, did_you_mean
from zipeval.inference.validation import check
from zipeval.results.identity import run_identity

if TYPE_CHECKING:
    from zipeval.models import Checkpoint
    from zipeval.reporting.results import Results


def evaluate(
    model: Any,
    methods: str | Sequence[str],
    tokens: int | Sequence[int | None] | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    results: str | Path = "results/runs",
    *,
    processor: Any = None,
    name: str | None = None,
    config_dir: str | Path | None = None,
    **settings: Any,
) -> Results:
    """Evaluate methods at budgets, and the upper bound where its records are missing.

        runs = zipeval.evaluate("llava15", ["vanilla", "visionzip"], tokens=[192, 64], tasks=["pope"], limit=200)

    All runs are checked before the first is evaluated. What was evaluated before is read from its records.

    Args:
        model: one of `zipeval list models`; or a Hugging Face model that is loaded, of a supported family.
        methods: some of `zipeval list methods`.
        tokens: visual tokens that an image is left with; methods without a budget, such as vanilla, ignore it.
        tasks: some of `zipeval list tasks`; None takes the suite that fits the model.
        limit: samples of each task; None takes all.
        results: directory of the records.
        processor: of a model that is loaded.
        name: of a model that is loaded, in tables; without one, the last part of the name that it was loaded by.
        config_dir: directory of further configurations, such as methods of your own.
        settings: all else that `zipeval run --help` shows: `seed=1`, `**{"method.K": 3, "runner.workers": 0}`.

    Raises:
        UsageError: for what cannot be evaluated, before anything is.
        RunError: for what went wrong. Every answer is on disk, and the same call continues.
    """
    from zipeval.evaluation.runner import check_feasible, evaluate_run
    from zipeval.evaluation.upper_bound import with_upper_bounds
    from zipeval.reporting.results import Results

    of_model, others = _split_settings(settings)
    # The same configurations as those of the command line, so that records are the same.
    overrides = [*_overrides(tasks, limit, results, others)]
    described, checkpoint = _model(model, processor, name, of_model)
    if checkpoint is None:
        # A model that is named takes its settings from the command line.
        overrides.append(f"model={model}")
        overrides += starmap(_override, of_model.items())
    takes_suite = tasks is None and "suite" not in settings
    composed = []
    # As `zipeval run -m method=... tokens=...` sweeps.
    for method, budget in product(_listed(methods), _listed(tokens)):
        run = [*overrides, f"method={method}", _override("tokens", budget)]
        config = _composed(run, described, takes_suite, config_dir)
        composed.append((run, config))
    runs = {}
    for _, config in with_upper_bounds(composed):
        config = check(config)
        # Budgets of a method without one are the same run.
        runs.setdefault(run_identity(config), config)
    # What is missing is told of the whole run, and not of its upper bound alone.
    for _, config in composed:
        check_feasible(config, checkpoint)
    paths = []
    for config in runs.values():
        paths += evaluate_run(config, checkpoint)
    return Results(str(results), paths)


def _split_settings(
    settings: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the model, and all others."""
    of_model, others = {}, {}
    for name, value in settings.items():
        part = of_model if name.startswith("model.") else others
        part[name] = value
    return of_model, others


def _listed(values: Any) -> list[Any]:
    """Return several values, or the only one, as a list."""
    # A text is a sequence, too, of letters.
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values]
    if not values:
        raise UsageError(
            "methods, tokens or tasks: there is nothing in a list. Name at least one value."
        )
    return [*values]


def _model(
    model: Any, processor: Any, name: str | None, settings: dict[str, Any]
) -> tuple[ModelConfig | None, Checkpoint | None]:
    """Return what a run has to know of a model that is loaded; nothing of one that is named.

    Args:
        settings: of the model, by their names on the command line.

    Raises:
        UsageError: for what makes no sense of such a model.
    """
    if isinstance(model, str):
        _check_named(model, processor, name)
        return None, None
    from zipeval.models import _in_memory

    config, checkpoint = _in_memory.describe(model, processor, name)
    for setting, value in settings.items():
        option = setting.removeprefix("model.")
        _check_setting(setting, option, value)
        config = replace(config, **{option: value})
    if config.prompt == "hf" and not processor.chat_template:
        raise UsageError(
            'model.prompt=hf: the processor has no chat template. Add **{"model.prompt": "vicuna_v1"}, or the template '
            "that the model was trained with."
        )
    return config, checkpoint


def _check_named(model: str, processor: Any, name: str | None) -> None:
    """Refuse what a model that is named brings itself."""
    for argument, value in (("processor", processor), ("name", name)):
        if value is not None:
            raise UsageError(
                f"{argument}: model={model} is a name, and brings its own. Leave {argument} out."
            )


def _check_setting(setting: str, option: str, value: Any) -> None:
    """Refuse a setting of a model that is loaded, unless it says how prompts are made."""
    known = [field.name for field in fields(ModelConfig)]
    if option not in known:
        raise UsageError(
            f"{setting}={value}: no such setting of model.{did_you_mean(option, known)}"
        )
    if option not in ("prompt", "image_aspect"):
        raise UsageError(
            f"{setting}={value}: the model is loaded already. Leave it out, or give a name."
        )


def _overrides(
    tasks: str | Sequence[str] | None,
    limit: int | None,
    results: str | Path,
    settings: dict[str, Any],
) -> Iterator[str]:
    """Yield settings that all runs share, as `zipeval run` takes them."""
    # Two values of one setting: it is not clear which counts.
    for setting in ("method", "tokens"):
        if setting in settings:
            raise UsageError(
                f"{setting}={settings[setting]}: it is given as an argument already."
            )
    if tasks is not None:
        yield _override("tasks", _listed(tasks))
    yield _override("limit", limit)
    yield _override("results", str(results))
    for setting, value in settings.items():
        yield _override(setting, value)


def _override(name: str, value: Any) -> str:
    """Return a setting as Hydra reads it."""
    return f"{name}={_hydra_value(value)}"


def _hydra_value(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_hydra_value, value))}]"
    text = str(value)
    # A name is left as it is: in quotes it would not choose a configuration.
    plain = text.replace("_", "").replace("-", "").replace(".", "").isalnum()
    return text if plain else QuotedString(text, Quote.single).with_quotes()


def _composed(
    overrides: list[str],
    model: ModelConfig | None,
    takes_suite: bool,
    config_dir: str | Path | None,
) -> RunConfig:
    """Return the configuration of a run.

    Args:
        model: in place of one that the overrides name.
        takes_suite: whether the tasks are the suite that fits the model.
    """
    from zipeval.config.compose import compose

    config = compose(overrides, None if config_dir is None else str(config_dir))
    if model is None:
        return config
    # The tasks that were composed are the suite of the configuration's own model.
    tasks = None if takes_suite else config.tasks
    return with_tasks(replace(config, model=model, tasks=tasks))
