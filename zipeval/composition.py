"""Hydra composes configurations: overrides become a RunConfig, and what it refuses a sentence."""

from __future__ import annotations

from pathlib import Path

from zipeval.errors import UsageError, did_you_mean

GROUPS = {
    "model": "models",
    "method": "methods",
    "suite": "suites",
    "table": "tables",
    "experiment": "experiments",
    "launcher": "launchers",
}
LAUNCHERS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}  # Hydra's: the extra that brings it
SWEEPS = ("table", "experiment")  # whose files say what is swept
ADDED = (*SWEEPS, "launcher")  # to a configuration that has none


def config_dir_override(directory: str | None) -> list[str]:
    """Hydra's --config-dir as an override."""
    if directory is None:
        return []
    if not Path(directory).is_dir():
        raise UsageError(f"--config-dir {directory}: no such directory.")
    return [f"hydra.searchpath=[{Path(directory).absolute().as_uri()}]"]


def compose(overrides: list[str]):
    """A RunConfig from overrides, without a command line.

    Raises:
        UsageError: as `zipeval run` would.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    try:
        with initialize_config_module("zipeval.configs", version_base="1.3"):
            return OmegaConf.to_object(hydra_compose("run", overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error


def explain(error: Exception, arguments: list[str]) -> UsageError:
    """Hydra's refusal of some overrides in a sentence that names the argument, its value and the next command."""
    from dataclasses import fields

    from zipeval.config import DataConfig, JudgeConfig, ModelConfig, RunConfig, RunnerConfig

    nodes = {"model": ModelConfig, "judge": JudgeConfig, "data": DataConfig, "runner": RunnerConfig}
    settings = [f.name for f in fields(RunConfig)]
    elsewhere = any(a.startswith(("--config-dir", "-cd")) for a in arguments)
    for argument in arguments:
        name, assigned, value = argument.lstrip("+~").partition("=")
        if not assigned or name.startswith(("-", "hydra", "sweep.")):
            continue
        group = name.partition("@")[0]  # method@method.first=visionzip
        top, _, option = name.partition(".")
        if group in GROUPS:
            known = [path.stem for path in choices(group)]
            for choice in value.split(","):
                if choice not in known and not elsewhere:
                    return UsageError(f"{name}={choice}: no such {group}.{did_you_mean(choice, known)}")
            if group in ADDED and not argument.startswith("+"):
                return UsageError(f"{argument}: write +{argument}.")
        elif top not in [*settings, *GROUPS]:
            return UsageError(f"{argument}: no such setting.{did_you_mean(top, [*settings, 'suite'])}")
        elif top in nodes and option and option not in (known := [f.name for f in fields(nodes[top])]):
            shown = name if top == "judge" else argument  # whose value may be a key, which belongs into the environment
            return UsageError(f"{shown}: no such setting of {top}.{did_you_mean(option, known)}")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return _told(cause, arguments)


def _told(cause: BaseException, arguments: list[str]) -> UsageError:
    """What an override was refused for, of which nothing more is known than what Hydra says."""
    reason = str(cause).splitlines()[0]
    for launcher, extra in LAUNCHERS.items():
        if f"'hydra/launcher/{launcher}'" in reason:
            return UsageError(f"hydra/launcher={launcher}: it is not installed. pip install 'zipeval[{extra}]'")
    key = getattr(cause, "full_key", None)
    culprit = next((a for a in arguments if key and a.lstrip("+").startswith(f"{key}=")), None)
    return UsageError(f"{culprit + ': ' if culprit else ''}{reason}. `zipeval run --help` shows every setting.")


def register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    from zipeval.config import RunConfig

    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def choices(group: str) -> list[Path]:
    import zipeval.configs

    return sorted(Path(zipeval.configs.__path__[0], group).glob("*.yaml"))
