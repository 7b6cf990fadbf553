"""`zipeval tune`."""

from __future__ import annotations

import shlex
from dataclasses import fields

from zipeval.cli.arguments import Command
from zipeval.cli.output import hide_bars
from zipeval.cli.settings import CONFIG_DIR, Setting
from zipeval.config.compose import compose
from zipeval.errors import UsageError
from zipeval.tuning.settings import Settings
from zipeval.utils import ranks
from zipeval.utils.docstrings import attributes

NUMBERS = {
    "fraction": float,
    "lr": float,
    "epochs": int,
    "batch_size": int,
    "accumulate": int,
}


def tune_settings() -> tuple[Setting, ...]:
    """Return what `zipeval tune` takes, as zipeval.tuning.tune.Settings documents it."""
    explained = attributes(Settings)
    settings = []
    for field in fields(Settings):
        explanation = explained[field.name]
        settings.append(
            Setting(
                field.name, explanation.meaning, explanation.value, _read, field.default
            )
        )
    return (*settings, CONFIG_DIR)


def _read(name: str, value: str) -> float | int | str:
    """Return a setting of zipeval.tuning.tune.Settings.

    Raises:
        UsageError: for a number that is none.
    """
    number_type = NUMBERS.get(name, str)
    try:
        return number_type(value)
    except ValueError:
        what = "a whole number" if number_type is int else "a number"
        raise UsageError(f"{name}={value}: expected {what}. {TUNE.explains}") from None


TUNE = Command(
    "tune",
    "model=MODEL tokens=N data=FILE.json images=DIR [NAME=VALUE ...]",
    "Train the projector for the few tokens that VisionZip leaves (VisionZip‡).",
    "docs/tuning.md says where each setting is from. `zipeval run method=visionzip_tuned` then uses the result.",
    misused="expected NAME=VALUE. `zipeval tune --help` shows what it takes.",
    settings=tune_settings,
    passed_on=(
        "model",
        "model.",
        "method",
        "method.",
        "tokens",
        "budget",
        "packing",
        "seed",
        "logger",
        "runner.workers",
    ),
    defaults=(("method", "visionzip"),),
    idle="it answers no questions",
    examples=(
        (
            "zipeval tune model=llava15 tokens=64 data=llava_v1_5_mix665k.json images=LLaVA/data",
            "",
        ),
    ),
)


def tune(arguments: list[str]) -> None:
    """Run `zipeval tune`: its own settings, and overrides of `zipeval run` for model and method."""
    options = TUNE.parse(arguments)
    from zipeval.tuning.tune import tune as train

    settings = Settings(
        **{field.name: getattr(options, field.name) for field in fields(Settings)}
    )
    overrides = options.overrides
    names_a_method = any(override.startswith("method=") for override in overrides)
    config = compose(
        overrides if names_a_method else ["method=visionzip", *overrides],
        options.config_dir,
    )
    hide_bars()
    path = train(config, settings)
    if ranks.first():
        same = [
            o
            for o in overrides
            if not o.startswith(("method=", "logger=", "runner.", "seed="))
        ]
        command = shlex.join(
            ["zipeval", "run", "method=visionzip_tuned", *same, f"projector={path}"]
        )
        print(f"{path} is tuned: `{command}` uses it.")
