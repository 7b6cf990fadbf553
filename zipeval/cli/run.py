"""`zipeval run` and `zipeval plan`: Hydra composes the configuration, and launches the jobs of a sweep."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import product

from zipeval.cli.arguments import Command, asks_for_help
from zipeval.cli.output import hide_bars
from zipeval.cli.run_settings import ADDED_GROUPS, method_settings, names, run_settings
from zipeval.cli.settings import Section, Setting
from zipeval.config.compose import (
    SWEEPS,
    check_names,
    config_dir_override,
    explain,
    register_schema,
)
from zipeval.errors import RunError, UsageError, did_you_mean
from zipeval.utils import ranks

OF_SWEEPS = ("launcher=", "hydra/launcher=", "hydra.launcher.", "sweep.")
OPTIONS = (
    Setting(
        "multirun",
        "a sweep: run every combination of values",
        flag=True,
        option=True,
        short="-m",
    ),
    Setting(
        "config_dir",
        "directory of further configurations, with method/NAME.yaml in it",
        "DIR",
        option=True,
    ),
    Setting(
        "cfg", "print the configuration and stop", "job", choices=("job",), option=True
    ),
)
# Nodes of the configuration, with the headings of their settings in the help.
NODES = {
    "model": "how the model is loaded",
    "runner": "how answers are made fast; what they are does not depend on it",
    "judge": "the model that scores answers which have to be read: MMB, MM-Vet, LLaVA-B and the video tasks",
    "data": "where data are read from",
}


def groupings() -> tuple[str, ...]:
    """Return what the runs of one job of a sweep may share."""
    from zipeval.sweeps.sweep import GROUPINGS

    return GROUPINGS


def sweep_settings() -> tuple[Setting, ...]:
    """Return the settings of sweeps only."""
    added = [
        Setting(f"+{group}", meaning, "NAME", choices=names(group))
        for group, meaning in ADDED_GROUPS.items()
    ]
    group_by = Setting(
        "sweep.group_by",
        "what the runs of one job share",
        default="model",
        choices=groupings,
    )
    return (*added, group_by)


def _sections(arguments: list[str]) -> list[Section]:
    """Return the settings of a run by their nodes.

    Args:
        arguments: the options of a method that is named among them are shown, too.
    """
    settings = run_settings()
    sections = [
        Section(
            "settings, as NAME=VALUE", tuple(s for s in settings if "." not in s.name)
        )
    ]
    for node, meaning in NODES.items():
        within = tuple(
            setting for setting in settings if setting.name.startswith(f"{node}.")
        )
        sections.append(Section(f"{node}: {meaning}", within))
    sections.append(Section("settings of sweeps, with -m", sweep_settings()))
    named = [
        argument.partition("=")[2]
        for argument in arguments
        if argument.startswith("method=")
    ]
    for method in named[-1].split(",") if named else ():
        options = method_settings(method, config_dir_of(arguments))
        sections.append(Section(f"options of method={method}", tuple(options)))
    return [section for section in sections if section.settings]


def config_dir_of(arguments: list[str]) -> str | None:
    """Return what --config-dir names, without Hydra."""
    for number, argument in enumerate(arguments):
        name, assigned, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return value if assigned else next(iter(arguments[number + 1 :]), None)
    return None


RUN = Command(
    "run",
    "model=MODEL method=METHOD tokens=N [-m] [NAME=VALUE ...]",
    "Evaluate a method and, where it is missing, the upper bound, and print the percentages; -m makes it a sweep.",
    "`zipeval list models|methods|tasks|suites|tables|experiments|launchers` shows what there is to choose from. With "
    "method=NAME before it, --help also explains the options of that method, which are set by method.OPTION=VALUE.",
    settings=OPTIONS,
    heading="options",
    more_sections=partial(_sections, []),
    examples=(
        (
            "zipeval run model=llava15 method=visionzip tokens=64 tasks=[pope]",
            "one run",
        ),
        (
            "zipeval run -m model=llava15 method=vanilla,visionzip,fastv tokens=192,128,64",
            "every combination",
        ),
        ("zipeval run method=fastv --help", "the options of a method, too"),
    ),
)
PLAN = replace(
    RUN,
    name="plan",
    usage="model=MODEL,... method=METHOD,... tokens=N,... [NAME=VALUE ...]",
    summary="Say what `zipeval run -m` with the same settings comes to: runs, samples, tokens and hours.",
    about="Nothing is started. Hours are known as far as records tell how long samples take.",
    settings=OPTIONS[1:2],
    examples=(("zipeval plan +table=paper_table1", "the paper's Table 1"),),
)


@ranks.raise_on_all_ranks()
def run(arguments: list[str]) -> None:
    """Run `zipeval run`: Hydra composes the configuration, or those of a sweep and launches its jobs."""
    if asks_for_help(arguments):
        print(replace(RUN, more_sections=partial(_sections, arguments)).help(), end="")
        return
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    hide_bars()
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # exceptions reach us instead of Hydra's printer
    )
    options, arguments = _hydra_arguments(RUN, arguments)
    sys.argv = ["zipeval run", *arguments]
    check_names(options.overrides, options.config_dir)
    shown = options.hydra_help or options.cfg or options.info
    if not shown and (options.multirun or any(map(_makes_a_sweep, options.overrides))):
        return _launch(*expand(arguments))
    if not shown:
        _check_single_run(options.overrides, arguments)

    refused: list[UsageError | RunError] = []

    def job(config) -> None:
        from zipeval.config.schema import with_tasks

        config = with_tasks(OmegaConf.to_object(config))
        try:
            _check_projector(config)
            _evaluate(config)
        except (UsageError, RunError) as error:  # Hydra would tell of it too
            refused.append(error)

    try:
        hydra.main(
            version_base="1.3", config_path="pkg://zipeval.configs", config_name="run"
        )(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, arguments, options.config_dir) from error
    if refused:
        raise refused[0]


def _hydra_arguments(command: Command, arguments: list[str]):
    """Return what Hydra's parser reads, and the arguments with their options first, as it wants them.

    The parser is the one by which `hydra.main` reads the same arguments again: Hydra has no public name for it.

    Raises:
        UsageError: for an option that there is not.
    """
    from hydra._internal.utils import get_args_parser

    options, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    for option in unknown:
        if option.startswith("-"):
            hint = did_you_mean(
                option, [setting.dashed for setting in command.own_settings]
            )
            raise UsageError(
                f"{option}: no such option of `zipeval {command.name}`.{hint}"
            )
    if options.shell_completion:
        raise UsageError(
            "--shell-completion: this is not Hydra's here. `zipeval completion bash` prints a script."
        )
    others = [word for word in arguments if word not in options.overrides]
    return options, others + options.overrides


def _check_single_run(overrides: list[str], arguments: list[str]) -> None:
    """Refuse what only a sweep takes.

    Raises:
        UsageError: for the setting of a launcher, and for one with several values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for override in overrides:
        if override.lstrip("+~").startswith(OF_SWEEPS):
            raise UsageError(
                f"{override}: this is how a sweep is launched, and without -m this is none. Add -m."
            )
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:  # explained where the configuration is composed
        return
    for override in parsed:
        if override.is_sweep_override():
            _refuse_several(override.input_line, arguments)


def _refuse_several(override: str, arguments: list[str]) -> None:
    """Raise UsageError for an override with several values in a single run."""
    name, _, values = override.partition("=")
    if name == "tasks":
        raise UsageError(
            f"{override}: write tasks=[{values}] for one run on all of them, or add -m for a run on each."
        )
    raise UsageError(
        f"{override}: several values are a sweep. Add -m: `{_command(arguments)}`."
    )


def _evaluate(config) -> None:
    """Evaluate a run and its upper bound, and print their table.

    Raises:
        UsageError, RunError: as the runs do. A run that cannot be is refused before its upper bound is evaluated.
    """
    from zipeval.evaluation import runner
    from zipeval.evaluation.upper_bound import describe, upper_bound

    bound, evaluated = upper_bound(config), []
    if bound:
        runner.check_feasible(config)
        if ranks.first():
            print(describe(config), file=sys.stderr)
        evaluated = runner.evaluate_run(bound)
    evaluated += runner.evaluate_run(config)
    if config.bound == "auto":
        _print_tables(config.results, evaluated)


def _print_tables(results: str, evaluated: list[str]) -> None:
    """Print the percentages of what a command evaluated, in the first process, and what to do next.

    Args:
        evaluated: paths of the records.
    """
    from zipeval.reporting.tables import tables
    from zipeval.reporting.terminal import print_tables

    if not evaluated:  # ranks other than the first
        return
    elsewhere = [] if results == "results/runs" else [f"results={results}"]
    built = tables(results, paths=evaluated)
    print()
    print_tables(built)
    intervals = shlex.join(["zipeval", "table", *elsewhere, "statistics=true"])
    report = shlex.join(["zipeval", "report", *elsewhere])
    print(f"\nNext: `{intervals}` adds 95% intervals; `{report}` shows more.")


def _check_projector(config) -> None:
    """Raise UsageError for a projector that a run has no use for.

    In a sweep it may have none: vanilla stands beside the methods that have one.
    """
    from zipeval.inference.validation import check

    if config.projector and check(config).projector is None:
        raise UsageError(
            f"projector={config.projector}: method={config.method['name']} has none. Leave it out, or set "
            "method=visionzip_tuned."
        )


def _makes_a_sweep(override: str) -> bool:
    """Return whether an override makes a command a sweep without -m: a table, an experiment, or Hydra's own setting."""
    files = tuple(f"+{group}=" for group in SWEEPS)
    return override.startswith(files) or override == "hydra.mode=MULTIRUN"


def expand(arguments: list[str]):
    """Return the sweep of `zipeval run -m` and Hydra's overrides that launch it; nothing is started.

    Raises:
        UsageError: for a name that does not exist, and as zipeval.sweeps.sweep.plan.
    """
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from zipeval.evaluation.upper_bound import with_upper_bounds
    from zipeval.sweeps.sweep import plan as plan_sweep

    register_schema()
    options, _ = _hydra_arguments(RUN, arguments)
    check_names(options.overrides, options.config_dir)
    launching, sweep_overrides, swept = [], [], []
    for override in [*config_dir_override(options.config_dir), *options.overrides]:
        if override.lstrip("+~").startswith(("hydra", "launcher=")):
            launching.append(override)
        elif override.startswith("sweep."):
            sweep_overrides.append(override)
        else:
            swept.append(override)
    group_by = _group_by(sweep_overrides)
    try:
        with initialize_config_module("zipeval.configs", version_base="1.3"):
            label, composed = _compose_runs(swept, launching)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, arguments, options.config_dir) from error
    runs = with_upper_bounds(composed)
    return plan_sweep(label, _command(arguments), runs, group_by), launching


def _compose_runs(swept: list[str], launching: list[str]):
    """Return the label of a sweep, and the overrides and the configuration of each of its runs.

    Args:
        swept: overrides of the runs, some with several values.
        launching: overrides of Hydra and its launcher.
    """
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from zipeval.config.schema import with_tasks

    search = [o for o in launching if o.startswith("hydra.searchpath=")]
    hydra = GlobalHydra.instance().hydra
    # A launcher that does not exist is refused now, not after the runs were planned.
    compose("sweep", launching)
    whole = hydra.compose_config(
        "run", search + swept, RunMode.MULTIRUN, with_log_configuration=False
    )
    # A table or an experiment says in its file over what to sweep.
    params = whole.hydra.sweeper.params or {}
    overrides = [f"{name}={values}" for name, values in params.items()] + swept
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    parsed = parser.parse_overrides(overrides)
    _check_swept(parsed)
    composed = []
    for run_overrides in _combinations(parsed):
        config = OmegaConf.to_object(compose("run", search + run_overrides))
        composed.append((run_overrides, with_tasks(config)))
    labels = [o.value() for o in parsed if o.key_or_group in SWEEPS]
    return labels[0] if labels else None, composed


def _combinations(overrides: list) -> list[list[str]]:
    """Return the overrides of every run: all combinations of values, those of the last override change fastest."""
    # A later override of the same name replaces an earlier one: a command may choose
    # other values than a table's file does.
    choices: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_sweep_override():
            values = override.sweep_string_iterator()
        else:
            values = [override.get_value_element_as_str()]
        name = override.get_key_element()
        choices[name] = [f"{name}={value}" for value in values]
    return [list(combination) for combination in product(*choices.values())]


def _group_by(overrides: list[str]) -> str:
    """Return what the runs of one job share, of the overrides that start with `sweep.`."""
    setting = sweep_settings()[-1]
    value = setting.default
    for override in overrides:
        name, _, text = override.partition("=")
        if name != setting.name:
            raise UsageError(
                f"{name}: no such setting of `zipeval run -m`.{did_you_mean(name, [setting.name])}"
            )
        value = setting.parse(text)
    return value


def _check_swept(overrides: list) -> None:
    """Raise UsageError where there is nothing to sweep over, or more than one file that says over what."""
    files = [override for override in overrides if override.key_or_group in SWEEPS]
    if len(files) > 1 or any(override.is_sweep_override() for override in files):
        lines = " ".join(override.input_line for override in files)
        raise UsageError(
            f"{lines}: one table or experiment is one sweep. Run each by itself."
        )
    for override in overrides:
        if not override.is_sweep_override():
            continue
        if not override.is_discrete_sweep():
            raise UsageError(
                f"{override.input_line}: an interval has no list of values. Name each value."
            )
        if not list(override.sweep_iterator()):
            raise UsageError(
                f"{override.input_line}: there is nothing in it. Name at least one value."
            )


def _command(arguments: list[str]) -> str:
    """Return the command that runs the sweep, for a shell."""
    others = [
        argument for argument in arguments if argument not in ("-m", "--multirun")
    ]
    return shlex.join(["zipeval", "run", "-m", *others])


def _launch(sweep, launching: list[str]) -> None:
    """Run a sweep's jobs, wherever Hydra's launcher does, and tell what became of them."""
    import hydra
    from hydra.core.override_parser.types import Quote, QuotedString

    from zipeval.sweeps.job import Job
    from zipeval.sweeps.sweep import begin, end, evaluated, lost

    _check_launcher(launching)
    if ranks.first():
        begin(sweep)
        count = f"{len(sweep.cells)} runs in {len(sweep.groups)} jobs"
        print(
            f"sweep {sweep.name}: {count}. `{sweep.status_command}` shows how far they are.",
            file=sys.stderr,
        )
    sys.argv = ["zipeval run", "-m", *launching]
    names = {"hydra.sweep.dir": str(sweep.directory), "hydra.job.name": sweep.name}
    for name, value in names.items():
        # A directory may hold what Hydra's grammar would read as its own.
        quoted = QuotedString(value, Quote.single).with_quotes()
        sys.argv.append(f"{name}={quoted}")
    sys.argv.append(f"group={','.join(map(str, sweep.groups))}")
    main = hydra.main(
        version_base="1.3", config_path="pkg://zipeval.configs", config_name="sweep"
    )
    try:
        main(Job(sweep))()
    except _launcher_errors() as error:
        raise lost(sweep, str(error).strip().splitlines()[0]) from error
    if ranks.first():
        end(sweep)
        if all(run.config.bound == "auto" for run in sweep.cells):
            _print_tables(sweep.results, evaluated(sweep))


def _check_launcher(launching: list[str]) -> None:
    """Raise UsageError for jobs of Slurm on a machine without it."""
    for override in launching:
        slurm = override.endswith(("launcher=slurm", "launcher=submitit_slurm"))
        if slurm and not shutil.which("srun"):
            raise UsageError(
                f"{override}: this machine has no srun. Run this where Slurm is, or try its jobs here: +launcher=local."
            )


def _launcher_errors() -> tuple[type[Exception], ...]:
    """Return what the launchers that are in use raise where a job cannot be started, or ends without a word."""
    known = {
        "submitit.core.utils": (
            "FailedJobError",
            "FailedSubmissionError",
            "UncompletedJobError",
        ),
        "ray.exceptions": ("RayError",),
    }
    errors = []
    # A launcher that is in use has been imported.
    for module in known.keys() & sys.modules.keys():
        errors += [getattr(sys.modules[module], name) for name in known[module]]
    return tuple(errors)


def plan(arguments: list[str]) -> None:
    """Run `zipeval plan`: print what `zipeval run -m` would do."""
    if asks_for_help(arguments):
        print(replace(PLAN, more_sections=partial(_sections, arguments)).help(), end="")
        return
    from zipeval.sweeps.plan import STAND_INS, show

    set_here = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    missing = [name for name in STAND_INS if name not in set_here]
    stand_ins = [f"{name}={STAND_INS[name]}" for name in missing]
    sweep, _ = expand(stand_ins + arguments)
    show(replace(sweep, command=_command(arguments)), missing)
