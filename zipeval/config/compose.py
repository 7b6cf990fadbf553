"""Hydra composes configurations: overrides become a RunConfig, and what it refuses a sentence."""

from __future__ import annotations

from zipeval.config.directories import check_config_dir, check_unique, config_files
from zipeval.errors import UsageError, did_you_mean

GROUPS = {
    "model": "models",
    "method": "methods",
    "suite": "suites",
    "table": "tables",
    "experiment": "experiments",
    "launcher": "launchers",
}
LAUNCHERS = {
    "submitit_slurm": "slurm",
    "submitit_local": "slurm",
    "ray": "ray",
}  # Hydra's: the extra that brings it
SWEEPS = ("table", "experiment")  # whose files say what is swept
ADDED = (*SWEEPS, "launcher")  # to a configuration that has none


def config_dir_override(directory: str | None) -> list[str]:
    """Return --config-dir as an override that Hydra's compose takes."""
    if directory is None:
        return []
    from hydra.core.override_parser.types import Quote, QuotedString

    # Hydra takes the path as it is written, and knows no %20.
    place = QuotedString(f"file://{check_config_dir(directory)}", Quote.single)
    return [f"hydra.searchpath=[{place.with_quotes()}]"]


def compose(overrides: list[str], config_dir: str | None = None):
    """Return the RunConfig that overrides make, without a command line.

    Args:
        config_dir: directory of further configurations, as --config-dir names it.

    Raises:
        UsageError: as `zipeval run` would.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from zipeval.config.schema import with_tasks

    register_schema()
    check_names(overrides, config_dir)
    _check_single(overrides)
    elsewhere = config_dir_override(config_dir)
    try:
        with initialize_config_module("zipeval.configs", version_base="1.3"):
            return with_tasks(
                OmegaConf.to_object(hydra_compose("run", [*elsewhere, *overrides]))
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides, config_dir) from error


def check_names(overrides: list[str], config_dir: str | None = None) -> None:
    """Refuse the name of a configuration that two directories bring, such as a second method=visionzip.

    Raises:
        UsageError: names both.
    """
    for override in overrides:
        name, assigned, value = override.lstrip("+~").partition("=")
        group = name.partition("@")[0]
        if assigned and group in GROUPS:
            for choice in value.split(","):
                check_unique(group, choice, config_dir)


def _check_single(overrides: list[str]) -> None:
    """Raise UsageError for several values of a group: only a sweep takes them."""
    for override in overrides:
        name, _, value = override.partition("=")
        if name in GROUPS and "," in value:
            raise UsageError(f"{override}: expected one {name}. Run this for each.")


def explain(
    error: Exception, arguments: list[str], config_dir: str | None = None
) -> UsageError:
    """Return Hydra's refusal of some overrides as a sentence that names the argument, its value and the next command.

    Args:
        config_dir: directory of further configurations, as --config-dir names it.
    """
    from dataclasses import fields

    from zipeval.config.schema import (
        DataConfig,
        JudgeConfig,
        ModelConfig,
        RunConfig,
        RunnerConfig,
    )

    nodes = {
        "model": ModelConfig,
        "judge": JudgeConfig,
        "data": DataConfig,
        "runner": RunnerConfig,
    }
    settings = [f.name for f in fields(RunConfig)]
    elsewhere = any("hydra.searchpath=" in argument for argument in arguments)
    for argument in arguments:
        name, assigned, value = argument.lstrip("+~").partition("=")
        if not assigned or name.startswith(("-", "hydra", "sweep.")):
            continue
        group = name.partition("@")[0]  # method@method.first=visionzip
        top, _, option = name.partition(".")
        if group in GROUPS:
            known = [file.name for file in config_files(group, config_dir)]
            for choice in value.split(","):
                if choice not in known and not elsewhere:
                    return UsageError(
                        f"{name}={choice}: no such {group}.{did_you_mean(choice, known)}"
                    )
            if group in ADDED and not argument.startswith("+"):
                return UsageError(f"{argument}: write +{argument}.")
        elif top not in [*settings, *GROUPS]:
            return UsageError(
                f"{argument}: no such setting.{did_you_mean(top, [*settings, 'suite'])}"
            )
        elif (
            top in nodes
            and option
            and option not in (known := [f.name for f in fields(nodes[top])])
        ):
            shown = (
                name if top == "judge" else argument
            )  # whose value may be a key, which belongs into the environment
            return UsageError(
                f"{shown}: no such setting of {top}.{did_you_mean(option, known)}"
            )
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return _told(cause, arguments)


def _told(cause: BaseException, arguments: list[str]) -> UsageError:
    """Return what an override was refused for, of which nothing more is known than what Hydra says."""
    reason = str(cause).splitlines()[0]
    for launcher, extra in LAUNCHERS.items():
        if f"'hydra/launcher/{launcher}'" in reason:
            return UsageError(
                f"hydra/launcher={launcher}: it is not installed. pip install 'zipeval[{extra}]'"
            )
    key = getattr(cause, "full_key", None)
    culprit = next(
        (a for a in arguments if key and a.lstrip("+").startswith(f"{key}=")), None
    )
    return UsageError(
        f"{culprit + ': ' if culprit else ''}{reason}. `zipeval run --help` shows every setting."
    )


def register_schema() -> None:
    """Tell Hydra of the schema of a run, and of the configurations that installed packages bring."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from zipeval.config.schema import RunConfig
    from zipeval.config.search_path import InstalledConfigurations

    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    Plugins.instance().register(InstalledConfigurations)
