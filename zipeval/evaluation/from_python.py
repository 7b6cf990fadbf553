"""Evaluate from Python what `zipeval run -m` evaluates from a command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
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

    model_settings = {
        key: value for key, value in settings.items() if key.startswith("model.")
    }
    others = {
        key: value for key, value in settings.items() if key not in model_settings
    }
    overrides = [*_overrides(tasks, limit, results, others)]
    described, checkpoint = _model(model, processor, name, model_settings)
    if checkpoint is None:
        overrides += [
            f"model={model}",
            *(_override(*setting) for setting in model_settings.items()),
        ]
    composed = []
    for method, budget in product(_listed(methods), _listed(tokens)):
        run = [*overrides, f"method={method}", _override("tokens", budget)]
        composed.append(
            (
                run,
                _composed(
                    run,
                    described,
                    tasks is None and "suite" not in settings,
                    config_dir,
                ),
            )
        )
    runs = {}
    for _, config in with_upper_bounds(composed):
        config = check(config)
        runs.setdefault(run_identity(config), config)
    for (
        _,
        config,
    ) in (
        composed
    ):  # what is missing is told of the whole run, and not of its upper bound alone
        check_feasible(config, checkpoint)
    paths = []
    for config in runs.values():
        paths += evaluate_run(config, checkpoint)
    return Results(str(results), paths)


def _listed(values: Any) -> list[Any]:
    """Return several values, or the only one, as a list."""
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
        for argument, value in (("processor", processor), ("name", name)):
            if value is not None:
                raise UsageError(
                    f"{argument}: model={model} is a name, and brings its own. Leave {argument} out."
                )
        return None, None
    from zipeval.models import _in_memory

    config, checkpoint = _in_memory.describe(model, processor, name)
    known = [field.name for field in fields(ModelConfig)]
    for setting, value in settings.items():
        option = setting.removeprefix("model.")
        if option not in known:
            raise UsageError(
                f"{setting}={value}: no such setting of model.{did_you_mean(option, known)}"
            )
        if option not in ("prompt", "image_aspect"):
            raise UsageError(
                f"{setting}={value}: the model is loaded already. Leave it out, or give a name."
            )
        config = replace(config, **{option: value})
    if config.prompt == "hf" and not processor.chat_template:
        raise UsageError(
            'model.prompt=hf: the processor has no chat template. Add **{"model.prompt": "vicuna_v1"}, or the template '
            "that the model was trained with."
        )
    return config, checkpoint


def _overrides(
    tasks: str | Sequence[str] | None,
    limit: int | None,
    results: str | Path,
    settings: dict[str, Any],
) -> Iterator[str]:
    """Yield settings that all runs share, as `zipeval run` takes them."""
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
    fitting: bool,
    config_dir: str | Path | None,
) -> RunConfig:
    """Return the configuration of a run.

    Args:
        model: in place of one that the overrides name.
        fitting: whether the tasks are the suite that fits the model.
    """
    from zipeval.config.compose import compose

    config = compose(overrides, None if config_dir is None else str(config_dir))
    if model is None:
        return config
    return with_tasks(
        replace(config, model=model, tasks=None if fitting else config.tasks)
    )
