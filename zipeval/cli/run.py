"""`zipeval run` and `zipeval plan`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys

from zipeval import ranks
from zipeval.cli.arguments import choice, settings
from zipeval.cli.output import hide_bars
from zipeval.composition import SWEEPS, config_dir_override, explain, register_schema
from zipeval.errors import RunError, UsageError

OF_SWEEPS = ("launcher=", "hydra/launcher=", "hydra.launcher.", "sweep.")


@ranks.agreed()
def run(arguments: list[str]) -> None:
    """`zipeval run`: Hydra composes the configuration, or those of a sweep and launches its jobs."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    hide_bars()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of Hydra's printer
    sys.argv = ["zipeval run", *arguments]
    given = get_args_parser().parse_args(arguments)
    shown = given.help or given.hydra_help or given.cfg or given.info
    if not shown and (given.multirun or any(map(_makes_a_sweep, given.overrides))):
        return _launch(*expand(arguments))
    idle = [o for o in given.overrides if o.lstrip("+~").startswith(OF_SWEEPS)]
    if idle and not shown:
        raise UsageError(f"{idle[0]}: this is how a sweep is launched, and without -m this is none. Add -m.")

    refused: list[UsageError | RunError] = []

    def job(config) -> None:
        from zipeval.sweep import evaluate

        config = OmegaConf.to_object(config)
        try:
            _check_projector(config)
            evaluate(config)
        except (UsageError, RunError) as error:  # Hydra would tell of it too
            refused.append(error)

    try:
        hydra.main(version_base="1.3", config_path="pkg://zipeval.configs", config_name="run")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, arguments) from error
    if refused:
        raise refused[0]


def _check_projector(config) -> None:
    """Raises UsageError for one that a run has no use for; in a sweep, vanilla stands beside those that have."""
    from zipeval.config import check

    if config.projector and check(config).projector is None:
        raise UsageError(
            f"projector={config.projector}: method={config.method['name']} has none. Leave it out, or set "
            "method=visionzip_tuned."
        )


def _makes_a_sweep(override: str) -> bool:
    return override.startswith(tuple(f"+{group}=" for group in SWEEPS)) or override == "hydra.mode=MULTIRUN"


def expand(arguments: list[str]):
    """(the sweep of `zipeval run -m`, overrides of Hydra's that launch it), by Hydra's rules; nothing is started.

    Raises:
        UsageError: for a name that does not exist, and as zipeval.sweep.plan.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from zipeval.sweep import GROUPINGS
    from zipeval.sweep import plan as plan_sweep

    register_schema()
    given = get_args_parser().parse_args(arguments)
    overrides = [*config_dir_override(given.config_dir), *given.overrides]
    launching = [o for o in overrides if o.lstrip("+~").startswith(("hydra", "launcher="))]
    own = [o for o in overrides if o.startswith("sweep.")]
    group_by = choice(settings("run -m", own, ("sweep.group_by",)), "sweep.group_by", GROUPINGS)
    asked = [o for o in overrides if o not in own + launching]
    search = [o for o in launching if o.startswith("hydra.searchpath=")]
    try:
        with initialize_config_module("zipeval.configs", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            hydra_compose("sweep", launching)  # or a launcher that does not exist would be told later
            whole = hydra.compose_config("run", search + asked, RunMode.MULTIRUN, with_log_configuration=False)
            params = [f"{name}={values}" for name, values in (whole.hydra.sweeper.params or {}).items()]
            parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(params + asked)
            _check_swept(parsed)
            (runs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
            composed = [(its, OmegaConf.to_object(hydra_compose("run", search + its))) for its in runs]
            label = next((o.value() for o in parsed if o.key_or_group in SWEEPS), None)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, arguments) from error
    return plan_sweep(label, _command(arguments), composed, group_by), launching


def _check_swept(overrides: list) -> None:
    """Raises UsageError where there is nothing to sweep over, or more than one file that says over what."""
    named = [o.input_line for o in overrides if o.key_or_group in SWEEPS]
    if len(named) > 1 or any(o.key_or_group in SWEEPS and o.is_sweep_override() for o in overrides):
        raise UsageError(f"{' '.join(named)}: one table or experiment is one sweep. Run each by itself.")
    for its in overrides:
        if its.is_sweep_override() and not any(True for _ in its.sweep_iterator()):
            raise UsageError(f"{its.input_line}: there is nothing in it. Name at least one value.")


def _command(arguments: list[str]) -> str:
    """That runs the sweep, for a shell."""
    return shlex.join(["zipeval", "run", "-m", *(a for a in arguments if a not in ("-m", "--multirun"))])


def _launch(sweep, launching: list[str]) -> None:
    """Run a sweep's jobs, wherever Hydra's launcher does, and tell what became of them."""
    import hydra
    from hydra.core.override_parser.types import Quote, QuotedString

    from zipeval.sweep import Job, begin, end, lost

    for override in launching:
        if override.endswith(("launcher=slurm", "launcher=submitit_slurm")) and not shutil.which("srun"):
            raise UsageError(
                f"{override}: this machine has no srun. Run this where Slurm is, or try its jobs here: +launcher=local."
            )
    if ranks.first():
        begin(sweep)
        count = f"{len(sweep.cells)} runs in {len(sweep.groups)} jobs"
        print(f"sweep {sweep.name}: {count}. `{sweep.status_command}` shows how far they are.", file=sys.stderr)
    own = {"hydra.sweep.dir": str(sweep.directory), "hydra.job.name": sweep.name}
    own = [f"{name}={QuotedString(value, Quote.single).with_quotes()}" for name, value in own.items()]
    sys.argv = ["zipeval run", "-m", *launching, *own, f"group={','.join(map(str, sweep.groups))}"]
    try:
        hydra.main(version_base="1.3", config_path="pkg://zipeval.configs", config_name="sweep")(Job(sweep))()
    except _launchers_errors() as error:
        raise lost(sweep, str(error).strip().splitlines()[0]) from error
    if ranks.first():
        end(sweep)


def _launchers_errors() -> tuple[type[Exception], ...]:
    """What the launchers that are in use raise where a job cannot be started, or ends without a word."""
    known = {
        "submitit.core.utils": ("FailedJobError", "FailedSubmissionError", "UncompletedJobError"),
        "ray.exceptions": ("RayError",),
    }
    return tuple(getattr(sys.modules[m], name) for m, names in known.items() if m in sys.modules for name in names)


def plan(arguments: list[str]) -> None:
    """`zipeval plan`: of what `zipeval run -m` would do."""
    from dataclasses import replace

    from zipeval.plan import STAND_INS, show

    missing = [name for name in STAND_INS if not any(a.lstrip("+").startswith(f"{name}=") for a in arguments)]
    sweep, _ = expand([*(f"{name}={STAND_INS[name]}" for name in missing), *arguments])
    show(replace(sweep, command=_command(arguments)), missing)
