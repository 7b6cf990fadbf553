"""The command line: the only file that knows argv or Hydra. Whatever is heavy is imported behind a command."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from zipeval import __version__, ranks
from zipeval.errors import RunError, Stopped, UsageError, did_you_mean

HELP = f"""zipeval {__version__}: honest measurement of visual-token reduction

  zipeval run model=MODEL method=METHOD tokens=N   evaluate; -m sweeps, e.g. zipeval run -m tokens=48,32,16
  zipeval plan OVERRIDES                           what `zipeval run -m OVERRIDES` comes to: runs, samples,
                                                   tokens and, as far as measured, hours; +table=paper_table1
  zipeval status [SWEEP] [results=DIR]             how far runs and sweeps are, and how long they will still take
  zipeval table [results=DIR] [task=TASK]          scores and % of the upper bound; with task=, all its metrics
                [statistics=true] [format=latex]   with intervals; also csv, html, json
                [table=paper/table1 [source=paper]]  in the paper's layout, beside its numbers; or those alone
  zipeval bench model=MODEL method=METHOD,METHOD tokens=N [batch=1,8] [init=random]
                [new_tokens=N] [prompt_tokens=N] [repeats=N] [results=DIR]
                                                   speed and memory beside vanilla's; no data, with init=random no
                                                   weights either
  zipeval tune model=MODEL method=visionzip tokens=N data=FILE.json images=DIR [out=DIR] [fraction=0.1]
               [epochs=1] [lr=1e-3] [batch_size=16] [accumulate=N]
                                                   train the projector for so few tokens (VisionZip‡)
  zipeval show RUN_ID [results=DIR]                scores and provenance of a run; its first letters do
  zipeval report [results=DIR] [out=FILE.html]     all of it on one page, with plots and the tokens that are kept
                 [plots=DIR]                       and the plots as PDF and SVG files
  zipeval view [results=DIR] [port=N] [host=NAME]  the same page live: every question, picture and answer; also while
                                                   a sweep runs
  zipeval analyze redundancy [model=MODEL] [images=DIR] [limit=N] out=DIR
                                                   how concentrated the attention that visual tokens receive is, layer
                                                   by layer, as CSV and plots
  zipeval visualize IMAGE QUESTION [model=MODEL] [method=METHOD,METHOD] [tokens=N] [projector=FILE]
                                     [out=FILE.svg|pdf|png]
                                                   which tokens of an image methods keep, and what is then answered
  zipeval baseline [results=DIR] [out=FILE]        what records hold, as a small file to commit
  zipeval check --against FILE [--max-drop 1.0] [--allow-other-code] [--junit FILE] [--format text|github] [results=DIR]
                                                   records beside that file: 0 as good, 1 regression, 2 cannot compare;
                                                   of 20 samples one may have another answer, from 200 up one in 100
  zipeval convert mini_gemini SRC DST              an official checkpoint into the Hugging Face layout
  zipeval data check suite=SUITE [data.root=DIR]   which data sets are there, and how to get the others
  zipeval list models|methods|tasks|suites|tables|experiments|launchers
                                                   what there is to choose from
  zipeval doctor                                   what will work on this machine and what will not

zipeval run --help shows every setting.
"""
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
OF_SWEEPS = ("launcher=", "hydra/launcher=", "hydra.launcher.", "sweep.")
IDLE_IN_BENCH = ("suite", "tasks", "limit", "batch_size", "judge", "data", "logger")
TUNED_BY = {"fraction": float, "lr": float, "epochs": int, "batch_size": int, "accumulate": int}
TAKEN = "`zipeval --help` shows what `zipeval tune` takes."
IDLE_IN_TUNE = ("suite", "tasks", "limit", "judge", "results", "projector")
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Console entry point. Exit codes: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C or a scheduler."""
    try:
        code = _execute()
    except KeyboardInterrupt:  # perhaps a second one, while it was told of the first
        code = INTERRUPTED
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more has nothing left to stop but the exit
    if code:
        sys.exit(code)


def _execute() -> int:
    """Run the command that was asked for; returns the exit code."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(f"{command}: no such command.{did_you_mean(command, COMMANDS)}")
        COMMANDS[command](arguments)
        ranks.leave()
    except (UsageError, RunError) as error:
        if ranks.first():
            print(f"zipeval: {error}", file=sys.stderr, flush=True)
        ranks.leave()
        codes = {Stopped: INTERRUPTED, UsageError: USAGE_ERROR, RunError: FAILED}
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    except BrokenPipeError:  # `zipeval table | head`
        _hush()
    return 0


@ranks.agreed()
def run(arguments: list[str]) -> None:
    """`zipeval run`: Hydra composes the configuration, or those of a sweep and launches its jobs."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _register_schema()
    _hide_bars()
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

    _register_schema()
    given = get_args_parser().parse_args(arguments)
    overrides = [*_elsewhere(given.config_dir), *given.overrides]
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

    for choice in launching:
        if choice.endswith(("launcher=slurm", "launcher=submitit_slurm")) and not shutil.which("srun"):
            raise UsageError(
                f"{choice}: this machine has no srun. Run this where Slurm is, or try its jobs here: +launcher=local."
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


def _elsewhere(directory: str | None) -> list[str]:
    """Hydra's --config-dir as an override."""
    if directory is None:
        return []
    if not Path(directory).is_dir():
        raise UsageError(f"--config-dir {directory}: no such directory.")
    return [f"hydra.searchpath=[{Path(directory).absolute().as_uri()}]"]


def plan(arguments: list[str]) -> None:
    """`zipeval plan`: of what `zipeval run -m` would do."""
    from dataclasses import replace

    from zipeval.plan import STAND_INS, show

    missing = [name for name in STAND_INS if not any(a.lstrip("+").startswith(f"{name}=") for a in arguments)]
    sweep, _ = expand([*(f"{name}={STAND_INS[name]}" for name in missing), *arguments])
    show(replace(sweep, command=_command(arguments)), missing)


def status(arguments: list[str]) -> None:
    """`zipeval status [SWEEP]`."""
    from zipeval.status import status as show

    names = [a for a in arguments if "=" not in a]
    given = settings("status", [a for a in arguments if "=" in a], ("results",))
    if len(names) > 1:
        raise UsageError(f"status {' '.join(names)}: name one sweep, or none to list all.")
    show(names[0] if names else None, given.get("results", "results/runs"))


def bench(arguments: list[str]) -> None:
    """`zipeval bench`: composes the configuration of every method at every budget, vanilla's before them."""
    from dataclasses import fields

    from zipeval.bench import Settings, read, render
    from zipeval.bench import bench as measure

    if ranks.here().count > 1:
        raise UsageError(f"{ranks.here().count} processes: they would disturb each other. Run this without torchrun.")

    own, overrides = {"method": "vanilla", "tokens": "null"}, []
    for argument in arguments:
        name, assigned, value = argument.partition("=")
        if not assigned or name.startswith("-"):
            raise UsageError(f"{argument}: expected NAME=VALUE. `zipeval --help` shows what `zipeval bench` takes.")
        if name.partition(".")[0] in IDLE_IN_BENCH or (name.startswith("runner.") and name != "runner.compile"):
            raise UsageError(f"{argument}: `zipeval bench` has no use for it, its inputs are synthetic. Leave it out.")
        if name in (*own, *(field.name for field in fields(Settings))):
            own[name] = value
        else:
            overrides.append(argument)
    methods = dict.fromkeys(["vanilla", *own.pop("method").split(",")])
    budgets = own.pop("tokens").split(",")
    settings = Settings(**{name: _parsed(name, value) for name, value in own.items()})
    configs = []
    for method in methods:
        # final: for some methods on some models, nothing was published. method.x= is not of vanilla.
        its = ["budget=final", *(o for o in overrides if method != "vanilla" or not o.startswith("method"))]
        configs += [compose([*its, f"method={method}", f"tokens={tokens}"]) for tokens in budgets]
    _hide_bars()
    path = measure(configs, settings)
    print(f"{render(read(path))}\n\n{path}")


def _parsed(name: str, value: str) -> str | int | tuple[int, ...]:
    """A setting of `zipeval bench`.

    Raises:
        UsageError: for a number that is none.
    """
    if name in ("init", "results"):
        return value
    try:
        numbers = tuple(dict.fromkeys(map(int, value.split(","))))
        return numbers if name == "batch" else int(value)
    except ValueError:
        raise UsageError(f"{name}={value}: expected a whole number, such as {name}=8.") from None


def tune(arguments: list[str]) -> None:
    """`zipeval tune`: its own settings, and overrides of `zipeval run` for model and method."""
    from dataclasses import fields

    from zipeval.tune import Settings
    from zipeval.tune import tune as train

    own, overrides = {}, []
    for argument in arguments:
        name, assigned, value = argument.partition("=")
        if not assigned or name.startswith("-"):
            raise UsageError(f"{argument}: expected NAME=VALUE. {TAKEN}")
        idle = name.startswith(("data.", "runner.")) and name != "runner.workers"
        if name.partition(".")[0] in IDLE_IN_TUNE or idle:
            raise UsageError(f"{argument}: `zipeval tune` has no use for it, it answers no questions. Leave it out.")
        if name in (field.name for field in fields(Settings)):
            own[name] = _number(name, value) if name in TUNED_BY else value
        else:
            overrides.append(argument)
    settings = Settings(**own)
    named = any(override.startswith("method=") for override in overrides)
    config = compose([*["method=visionzip"] * (not named), *overrides])
    _hide_bars()
    path = train(config, settings)
    if ranks.first():
        same = [o for o in overrides if not o.startswith(("method=", "logger=", "runner.", "seed="))]
        command = shlex.join(["zipeval", "run", "method=visionzip_tuned", *same, f"projector={path}"])
        print(f"{path} is tuned: `{command}` uses it.")


def _number(name: str, value: str) -> float | int:
    """A setting of `zipeval tune`.

    Raises:
        UsageError: for a number that is none.
    """
    try:
        return TUNED_BY[name](value)
    except ValueError:
        what = "a whole number" if TUNED_BY[name] is int else "a number"
        raise UsageError(f"{name}={value}: expected {what}. {TAKEN}") from None


def table(arguments: list[str]) -> None:
    """`zipeval table`."""
    from zipeval import paper
    from zipeval.render import render
    from zipeval.tables import tables

    given = settings("table", arguments, ("results", "task", "table", "source", "format", "statistics"))
    results, source, layout = given.get("results"), given.get("source", "records"), given.get("table")
    statistics = choice(given, "statistics", ("false", "true")) == "true"
    if choice({"source": source}, "source", ("records", "paper")) == "paper" and not layout:
        raise UsageError("source=paper: say which of its tables, such as table=paper/table1.")
    name = (layout or "").removeprefix("paper/")
    idle = ["task"] * bool(layout) + ["results"] * (source == "paper")
    idle += ["statistics"] * (source == "paper" or name in paper.SPEED)
    for setting in given.keys() & set(idle):
        raise UsageError(f"{setting}={given[setting]}: table={layout} source={source} has no use for it. Leave it out.")
    if layout:
        found = [paper.published(name)] if source == "paper" else paper.measured(name, results, statistics)
    else:
        found = tables(results or paper.RESULTS, given.get("task"), statistics=statistics)
    print(render(found, given.get("format", "markdown")))


def settings(command: str, arguments: list[str], known: tuple[str, ...]) -> dict[str, str]:
    """The NAME=VALUE of a command that Hydra has no part in.

    Raises:
        UsageError: for a name that it does not know.
    """
    given = dict(a.partition("=")[::2] for a in arguments)
    for name in given.keys() - set(known):
        raise UsageError(f"{name}: no such setting of `zipeval {command}`.{did_you_mean(name, known)}")
    return given


def choice(given: dict[str, str], name: str, known: tuple[str, ...]) -> str:
    """A setting, the first of the known values by default.

    Raises:
        UsageError: for another value.
    """
    value = given.get(name, known[0])
    if value not in known:
        raise UsageError(f"{name}={value}: expected one of {', '.join(known)}.")
    return value


def show(arguments: list[str]) -> None:
    """`zipeval show RUN_ID`."""
    from zipeval.show import show as print_run

    names = [a for a in arguments if "=" not in a]
    given = settings("show", [a for a in arguments if "=" in a], ("results",))
    if len(names) != 1:
        raise UsageError(
            f"{' '.join(['show', *names])}: name one run, `zipeval show RUN_ID`, or the beginning of its name."
        )
    print_run(names[0], given.get("results", "results/runs"))


def report(arguments: list[str]) -> None:
    """`zipeval report`."""
    from zipeval.report import report as make

    given = settings("report", arguments, ("results", "out", "plots"))
    out, plots = given.get("out", "report.html"), given.get("plots")
    written = make(
        given.get("results", "results/runs"), Path(out).expanduser(), Path(plots).expanduser() if plots else None
    )
    print("\n".join(map(str, written)))


def view(arguments: list[str]) -> None:
    """`zipeval view`."""
    from zipeval.reporting.server import LOCAL_HOSTS, serve

    given = settings("view", arguments, ("results", "port", "host"))
    port = given.get("port", "0")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"port={port}: expected a number up to 65535, such as port=8000; without it a free one is taken."
        )
    serve(given.get("results", "results/runs"), given.get("host", LOCAL_HOSTS[0]), int(port))


def analyze(arguments: list[str]) -> None:
    """`zipeval analyze redundancy`."""
    model = [a for a in arguments[1:] if a.startswith(("model=", "model."))]
    for argument in arguments[1:]:
        if argument.partition("=")[0].partition(".")[0] in ("method", "tokens", "budget"):
            raise UsageError(
                f"{argument}: `zipeval analyze` has no use for it, it looks at the model as it is. Leave it out."
            )
    own = [a for a in arguments[1:] if a not in model]
    given = settings("analyze redundancy", own, ("images", "limit", "out", "model"))
    if arguments[:1] != ["redundancy"] or not given.get("out"):
        raise UsageError(
            f"{' '.join(['analyze', *arguments])}: say what of and where to, "
            "`zipeval analyze redundancy model=tiny_llava out=DIR`."
        )
    from zipeval.redundancy import analyze as measure

    _hide_bars()
    config = compose(model)
    images, limit = given.get("images"), given.get("limit")
    written = measure(
        config,
        Path(images).expanduser() if images else None,
        None if limit is None else _count("limit", limit),
        Path(given["out"]).expanduser(),
    )
    print("\n".join(map(str, written)))


def visualize(arguments: list[str]) -> None:
    """`zipeval visualize IMAGE QUESTION`."""
    own = ("method", "tokens", "out")
    known = (*own, "model", "budget", "packing", "seed", "projector")
    image, question, *rest = [*arguments, "", ""]
    if not question or any(a.partition("=")[0] in known for a in (image, question)):
        raise UsageError(
            f"{' '.join(['visualize', *arguments])}: name an image and a question, "
            "`zipeval visualize photo.jpg 'What is this?'`."
        )
    of_model, of_method = ([a for a in rest if a.startswith(f"{group}.")] for group in ("model", "method"))
    given = settings("visualize", [a for a in rest if a and a not in (*of_model, *of_method)], known)
    if "," in given.get("tokens", ""):
        raise UsageError(f"tokens={given['tokens']}: a picture is of one budget. Run it for each.")
    named = [*dict.fromkeys(given.get("method", "").split(","))]
    if of_method and (len(named) > 1 or not named[0]):
        raise UsageError(f"{of_method[0]}: of which method? Name a single one, such as method=chain.")
    budget = _count("tokens", given["tokens"]) if given.get("tokens") else None
    from zipeval import models
    from zipeval.visualize import METHODS, picture

    _hide_bars()
    shared = ["budget=final", *(f"{k}={v}" for k, v in given.items() if k not in own), *of_model]
    tokens = budget or max(1, models.find(compose(shared).model).visual_tokens // 9)
    configs = [
        compose([*shared, f"method={method}", f"tokens={tokens}", *of_method])
        for method in (named if "method" in given else METHODS)
    ]
    print(picture(configs, Path(image).expanduser(), question, Path(given.get("out", "visualize.svg")).expanduser()))


def _count(name: str, value: str) -> int:
    """A setting that is a number of things.

    Raises:
        UsageError: for one that is none.
    """
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"{name}={value}: expected a whole number from 1 up, such as {name}=16.")
    return int(value)


def baseline(arguments: list[str]) -> None:
    """`zipeval baseline`."""
    from zipeval.baseline import write

    given = settings("baseline", arguments, ("results", "out"))
    if given.get("out") == "":
        raise UsageError("out=: name the file to write, such as out=results/baselines/shapes.json.")
    out = Path(given.get("out", "results/baselines/shapes.json")).expanduser()
    results = given.get("results", "results/runs")
    count = write(results, out)
    command = shlex.join(["zipeval", "check", "--against", str(out), f"results={results}"])
    print(f"{out} holds {count} record{'s' if count > 1 else ''}: commit it. `{command}` compares.")


def check(arguments: list[str]) -> None:
    """`zipeval check`: exit code 1 for a regression, 2 for what cannot be compared."""
    from zipeval import gate

    known = ("against", "max_drop", "allow_other_code", "junit", "format", "results")
    given = settings("check", _without_dashes(arguments), known)
    for name, value in given.items():
        if not value:
            raise UsageError(f"--{name.replace('_', '-')}: needs a value. `zipeval --help` shows what there is.")
    if "against" not in given:
        raise UsageError("check: name a baseline, `zipeval check --against results/baselines/shapes.json`.")
    github = choice(given, "format", ("text", "github")) == "github"
    against, drop = Path(given["against"]).expanduser(), _percent(given.get("max_drop", "1.0"))
    results = given.get("results", "results/runs")
    allow = choice(given, "allow_other_code", ("false", "true")) == "true"
    verdicts = gate.check(against, results, drop, allow)
    try:
        print(gate.text(verdicts))
        if github:
            print(gate.annotations(verdicts))
        sys.stdout.flush()
    except BrokenPipeError:  # `zipeval check | head`: the exit code is what counts
        _hush()
    if "junit" in given:
        gate.write_junit(verdicts, Path(given["junit"]).expanduser())
    gate.conclude(verdicts, against, results)


def _hush() -> None:
    """Let what is still printed go nowhere, as nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


FLAGS = ("allow_other_code",)  # of `zipeval check`: they need no value


def _without_dashes(arguments: list[str]) -> list[str]:
    """Return `--max-drop 1.0` and `--max-drop=1.0` as the setting `max_drop=1.0`, a flag alone as `true`."""
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            name, assigned, value = argument.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if not assigned:
                value = "true" if name in FLAGS else next(rest, "")
            argument = f"{name}={value}"
        found.append(argument)
    return found


def _percent(value: str) -> float:
    """What max_drop= says.

    Raises:
        UsageError: for a number that is none.
    """
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise UsageError(f"max_drop={value}: expected percent of a score, from 0 to 100, such as --max-drop 1.0.")
    return number


def convert(arguments: list[str]) -> None:
    """`zipeval convert mini_gemini SRC DST`."""
    places = [a for a in arguments if "=" not in a]
    towers = dict(a.partition("=")[::2] for a in arguments if "=" in a)
    if len(places) != 3 or places[0] != "mini_gemini":
        raise UsageError(
            f"convert {' '.join(arguments)}: say what, from and to where: `zipeval convert mini_gemini SRC DST "
            "[vision_tower=DIR] [vision_tower_aux=DIR]`."
        )
    known = ("vision_tower", "vision_tower_aux")
    for name in towers.keys() - set(known):
        raise UsageError(f"{name}: no such setting of `zipeval convert`.{did_you_mean(name, known)}")
    source, target, *directories = (Path(p).expanduser() for p in (*places[1:], *towers.values()))
    for directory in (source, *directories):
        if not directory.is_dir():
            raise UsageError(f"{directory}: no such directory.")
    from zipeval.convert import mini_gemini

    model = mini_gemini(source, target, **dict(zip(towers, directories, strict=True)))
    print(f"{target} is made: zipeval run model={model} model.path={target}")


def list_choices(arguments: list[str]) -> None:
    """`zipeval list WHAT`."""
    what = arguments[0] if len(arguments) == 1 else ""
    if what == "tasks":
        from zipeval.benchmarks import BENCHMARKS, OURS, task_files

        rows = [(name, b.column, f"{b.metric} x {b.scale}", *_data(b), _note(b)) for name, b in BENCHMARKS.items()]
        others = sum(kind == "task" for kind, _ in task_files().values()) - len(rows)
        footer = (
            f"Of lmms-eval's own {others} those work by their names that generate answers to images and need no judge "
            f"of their own; a table then shows their first metric as it is. Ours are defined in {OURS}."
        )
    elif what in GROUPS.values():
        group = next(g for g, plural in GROUPS.items() if plural == what)
        columns = (_source, _about) if group == "model" else (_about,)
        rows = [(path.stem, *(column(path) for column in columns)) for path in _choices(group)]
        footer = f"Use with {'+' * (group in ADDED)}{group}=NAME."
    else:
        raise UsageError(f"list {' '.join(arguments)}: say what.{did_you_mean(what, [*GROUPS.values(), 'tasks'])}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    print("\n".join(lines) + f"\n\n{footer}")


def data(arguments: list[str]) -> None:
    """`zipeval data check`: exit code 1 where something is not there."""
    from zipeval.benchmarks import task_folder
    from zipeval.data import report

    if arguments[:1] != ["check"]:
        raise UsageError(f"data {' '.join(arguments)}: say `zipeval data check suite=paper_image [data.root=DIR]`.")
    config = compose(arguments[1:])
    for task in config.tasks:
        task_folder(task)
    lines, complete = report(config.tasks, config.data.root)
    print(lines or f"tasks=[{', '.join(config.tasks)}]: all of their data is beside them.")
    if not complete:
        sys.exit(FAILED)


def doctor(arguments: list[str]) -> None:
    """`zipeval doctor`: exit code 1 where runs do not work, or cannot be trusted."""
    from zipeval.doctor import examine

    _hide_bars()
    lines, healthy = examine()
    print(lines)
    if not healthy:
        sys.exit(FAILED)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": run,
    "plan": plan,
    "status": status,
    "bench": bench,
    "tune": tune,
    "table": table,
    "show": show,
    "report": report,
    "view": view,
    "analyze": analyze,
    "visualize": visualize,
    "baseline": baseline,
    "check": check,
    "convert": convert,
    "list": list_choices,
    "data": data,
    "doctor": doctor,
}


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

    _register_schema()
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
            known = [path.stem for path in _choices(group)]
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


def _hide_bars() -> None:
    """Libraries' own would interleave with ours. Those of downloads stay: they may take an hour."""
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")


def _register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    from zipeval.config import RunConfig

    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def _data(benchmark) -> tuple[str, str]:
    """Data set and split of the samples; empty where they are beside the task."""
    if not benchmark.sources:
        return "", ""
    source = benchmark.sources[0]
    return source.dataset, source.split


def _note(benchmark) -> str:
    return benchmark.about + (f"; theirs is scored by a {benchmark.needs}" if benchmark.needs else "")


def _choices(group: str) -> list[Path]:
    import zipeval.configs

    return sorted(Path(zipeval.configs.__path__[0], group).glob("*.yaml"))


def _source(path: Path) -> str:
    """Where a model's weights come from: `ORGANISATION/NAME@REVISION` on the hub, `embedded`, or what makes them."""
    from omegaconf import OmegaConf

    model = OmegaConf.load(path)
    if "embedded" in model:
        return "embedded"
    if "hub" not in model:
        return "zipeval convert"
    return f"{model.hub}@{model.revision[:8]}" if "revision" in model else model.hub


def _about(path: Path) -> str:
    """The last comment line above the settings of a config file; the one before it is its command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    return comments[-1]
