"""Hydra composes configurations: overrides become a RunConfig, and what it refuses a sentence."""

from __future__ import annotations

from dataclasses import dataclass, fields

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
# Hydra's launchers, and the extra of zipeval that brings each.
LAUNCHERS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}
# Groups whose files say what is swept.
SWEEPS = ("table", "experiment")
# Groups that a configuration has none of: Hydra adds them with a plus only.
ADDED = (*SWEEPS, "launcher")


@dataclass(frozen=True)
class Override:
    """An argument of the form NAME=VALUE.

    Attributes:
        argument: the argument as it was typed, also with a + before it.
        name: name of a setting or a group; of a part of a method also METHOD@PLACE.
        assigned: the equals sign, if there is one.
        value: text behind it.
    """

    argument: str
    name: str
    assigned: str
    value: str

    @classmethod
    def parse(cls, argument: str) -> Override:
        """Return the parts of an argument."""
        return cls(argument, *argument.lstrip("+~").partition("="))

    @property
    def group(self) -> str:
        """Return the group that it chooses from, if it does: method of method@method.first=visionzip."""
        return self.name.partition("@")[0]

    def is_of_zipeval(self) -> bool:
        """Return whether it sets something, and nothing of Hydra's or of a sweep."""
        foreign = ("-", "hydra", "sweep.")
        return bool(self.assigned) and not self.name.startswith(foreign)


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
            node = hydra_compose("run", [*elsewhere, *overrides])
            # To a RunConfig: OmegaConf checks types, and the nodes of methods become
            # dicts.
            return with_tasks(OmegaConf.to_object(node))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides, config_dir) from error


def check_names(overrides: list[str], config_dir: str | None = None) -> None:
    """Refuse the name of a configuration that two directories bring, such as a second method=visionzip.

    Raises:
        UsageError: names both.
    """
    for override in map(Override.parse, overrides):
        if override.assigned and override.group in GROUPS:
            # A sweep has several values.
            for choice in override.value.split(","):
                check_unique(override.group, choice, config_dir)


def _check_single(overrides: list[str]) -> None:
    """Raise UsageError for several values of a group: only a sweep takes them."""
    for override in overrides:
        group, _, value = override.partition("=")
        if group in GROUPS and "," in value:
            raise UsageError(f"{override}: expected one {group}. Run this for each.")


def explain(
    error: Exception, arguments: list[str], config_dir: str | None = None
) -> UsageError:
    """Return Hydra's refusal of some overrides as a sentence that names the argument, its value and the next command.

    Args:
        config_dir: directory of further configurations, as --config-dir names it.
    """
    # What else can be named there is not looked up.
    elsewhere = any("hydra.searchpath=" in argument for argument in arguments)
    for override in map(Override.parse, arguments):
        if not override.is_of_zipeval():
            continue
        if override.group in GROUPS:
            refusal = None if elsewhere else _explain_choice(override, config_dir)
            refusal = refusal or _explain_plus(override)
        else:
            refusal = _explain_setting(override)
        if refusal:
            return UsageError(refusal)
    # Hydra's errors say what failed, and their first cause says why.
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return _explain_cause(cause, arguments)


def _explain_choice(override: Override, config_dir: str | None) -> str | None:
    """Return what is wrong with the name of a configuration; None where nothing is."""
    known = {file.name for file in config_files(override.group, config_dir)}
    for choice in override.value.split(","):
        if choice not in known:
            hint = did_you_mean(choice, known)
            return f"{override.name}={choice}: no such {override.group}.{hint}"
    return None


def _explain_plus(override: Override) -> str | None:
    """Return what is wrong with a group that has to be added; None where it is, or has not to be."""
    if override.group in ADDED and not override.argument.startswith("+"):
        return f"{override.argument}: write +{override.argument}."
    return None


def _explain_setting(override: Override) -> str | None:
    """Return what is wrong with the name of a setting; None where nothing is."""
    from zipeval.config import schema

    top, _, option = override.name.partition(".")
    settings = _field_names(schema.RunConfig)
    if top not in settings and top not in GROUPS:
        hint = did_you_mean(top, [*settings, "suite"])
        return f"{override.argument}: no such setting.{hint}"
    nodes = {
        "model": schema.ModelConfig,
        "judge": schema.JudgeConfig,
        "data": schema.DataConfig,
        "runner": schema.RunnerConfig,
    }
    # A method's options are checked when it is built.
    if top not in nodes or not option:
        return None
    known = _field_names(nodes[top])
    if option in known:
        return None
    # The value may be the judge's key, which belongs into the environment.
    shown = override.name if top == "judge" else override.argument
    return f"{shown}: no such setting of {top}.{did_you_mean(option, known)}"


def _field_names(node: type) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in fields(node)]


def _explain_cause(cause: BaseException, arguments: list[str]) -> UsageError:
    """Return the refusal of an override of which nothing more is known than what Hydra says."""
    reason = str(cause).splitlines()[0]
    for launcher, extra in LAUNCHERS.items():
        if f"'hydra/launcher/{launcher}'" in reason:
            return UsageError(
                f"hydra/launcher={launcher}: it is not installed. pip install "
                f"'zipeval[{extra}]'"
            )
    # OmegaConf's errors know the setting, and not the argument.
    key = getattr(cause, "full_key", None)
    named = [a for a in arguments if key and a.lstrip("+").startswith(f"{key}=")]
    culprit = f"{named[0]}: " if named else ""
    return UsageError(f"{culprit}{reason}. `zipeval run --help` shows every setting.")


def register_schema() -> None:
    """Tell Hydra of the schema of a run, and of the configurations that installed packages bring."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from zipeval.config.schema import RunConfig
    from zipeval.config.search_path import InstalledConfigurations

    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    Plugins.instance().register(InstalledConfigurations)
