"""The settings of `zipeval run` for help and completion, as zipeval/config/schema.py documents them. No Hydra."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from zipeval.cli.settings import SWITCH, Setting
from zipeval.config.compose import GROUPS
from zipeval.config.directories import config_files
from zipeval.utils.docstrings import attributes

ADDED_GROUPS = {
    "table": "a table of the paper, as a sweep: one of `zipeval list tables`",
    "experiment": "an experiment, as a sweep: one of `zipeval list experiments`",
    "launcher": "where the jobs of a sweep run: one of `zipeval list launchers`",
}
SUITE = "benchmarks of which each sample is asked, one of `zipeval list suites`"
# omegaconf's sign for a value that has to be given.
REQUIRED = "???"
# A line of a method's file that is an option of the method: `K: 2  # layer behind which
# tokens are dropped`. A value such as `${tokens}` follows from a setting of the run.
METHOD_OPTION = re.compile(
    r"(?!name:|_target_:)(?P<name>\w+): (?P<value>[^$\s]\S*?)(?:\s+# (?P<meaning>.*))?"
)


@cache
def run_settings() -> tuple[Setting, ...]:
    """Return every setting of a run, those of nodes by their whole name: `model.dtype`."""
    from zipeval.config.schema import RunConfig

    settings = _documented(RunConfig, "")
    # The schema has no suite: its file sets `tasks`. The help shows it behind the other
    # groups that are chosen by name.
    suite = Setting(
        "suite",
        SUITE,
        "NAME",
        default_text=_chosen_by_default()["suite"],
        choices=names("suite"),
    )
    place = [setting.name for setting in settings].index("method") + 1
    settings.insert(place, suite)
    return tuple(settings)


def _documented(config: type, prefix: str) -> list[Setting]:
    """Return the settings of one of the configuration's classes.

    Args:
        prefix: what stands before their names, such as `model.`.
    """
    explained, chosen = attributes(config), _chosen_by_default()
    settings = []
    for field in fields(config):
        name = prefix + field.name
        node = field.default_factory if is_dataclass(field.default_factory) else None
        if node is None or name in GROUPS:
            choices = _choices(name, str(field.type))
            explanation = explained[field.name]
            # A group has many names, of which the help says where they are listed.
            value = explanation.value or ("" if choices else "VALUE")
            default = chosen.get(name, _typed(field.default))
            is_sweepable = name in GROUPS or name == "tokens"
            settings.append(
                Setting(
                    name,
                    explanation.meaning,
                    value,
                    default_text=default,
                    choices=choices,
                    several=is_sweepable,
                )
            )
        if node is not None:
            settings += _documented(node, f"{field.name}.")
    return settings


def _choices(name: str, annotation: str) -> Iterable[str] | Callable[[], Iterable[str]]:
    """Return the values that a setting takes, as far as they can be listed."""
    from zipeval.config.schema import CHOICES

    if name in GROUPS:
        return names(name)
    if name in CHOICES:
        return tuple("null" if choice is None else choice for choice in CHOICES[name])
    if name == "tasks":
        return task_names
    return SWITCH if annotation == "bool" else ()


def _typed(default: Any) -> str:
    """Return a default as it would be typed; empty where there is none to speak of."""
    if isinstance(default, bool):
        return str(default).lower()
    has_default = isinstance(default, str | int | float) and default != REQUIRED
    return str(default) if has_default else ""


@cache
def _chosen_by_default() -> dict[str, str]:
    """Return which configuration of each group `configs/run.yaml` takes where none is named."""
    import yaml

    import zipeval.configs

    text = Path(zipeval.configs.__path__[0], "run.yaml").read_text(encoding="utf-8")
    chosen = {}
    for entry in yaml.safe_load(text)["defaults"]:
        if isinstance(entry, dict):
            chosen |= entry
    return chosen


def names(group: str) -> Callable[[], list[str]]:
    """Return what lists the names of a group when it is asked, installed packages' too."""
    return partial(_names, group)


def _names(group: str) -> list[str]:
    return [file.name for file in config_files(group)]


def task_names() -> list[str]:
    """Return the tasks that zipeval knows by the papers' protocols."""
    from zipeval.benchmarks import BENCHMARKS

    return sorted(BENCHMARKS)


def shown(passed_on: tuple[str, ...]) -> list[Setting]:
    """Return the settings that a command hands on; of `model.` one line stands for all."""
    settings = [setting for setting in run_settings() if setting.name in passed_on]
    for prefix in passed_on:
        if prefix.endswith("."):
            meaning = f"settings of the {prefix.rstrip('.')}, see `zipeval run --help`"
            settings.append(Setting(f"{prefix}NAME", meaning, "VALUE"))
    return settings


def completed(passed_on: tuple[str, ...]) -> list[Setting]:
    """Return the settings that a command hands on, each by its whole name."""
    # `model.` stands for every setting within it.
    prefixes = tuple(prefix for prefix in passed_on if prefix.endswith("."))
    completed_settings = []
    for setting in run_settings():
        if setting.name in passed_on or setting.name.startswith(prefixes):
            completed_settings.append(setting)
    return completed_settings


def is_of_run(name: str) -> bool:
    """Return whether a name is a setting of `zipeval run`, or within one."""
    top = name.lstrip("+~").partition("@")[0].partition(".")[0]
    known = {setting.name.partition(".")[0] for setting in run_settings()}
    return top in {*known, *GROUPS}


def method_settings(name: str, config_dir: str | None = None) -> list[Setting]:
    """Return the options of a method, as the lines of its file and their comments have them."""
    settings = []
    for file in config_files("method", config_dir):
        if file.name == name:
            settings += _file_settings(file.path)
    return settings


def _file_settings(path: Path) -> Iterator[Setting]:
    """Yield the options in a method's file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        option = METHOD_OPTION.fullmatch(line)
        if option is not None:
            # Not every option has a comment.
            parts = option.groupdict("")
            yield Setting(f"method.{parts['name']}", parts["meaning"], "VALUE")
