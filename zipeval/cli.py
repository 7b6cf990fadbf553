"""The command line: the only file that knows argv or Hydra. Whatever is heavy is imported behind a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from zipeval import __version__, ranks
from zipeval.errors import RunError, Stopped, UsageError, did_you_mean

HELP = f"""zipeval {__version__}: honest measurement of visual-token reduction

  zipeval run model=MODEL method=METHOD tokens=N   evaluate; -m sweeps, e.g. zipeval run -m tokens=48,32,16
  zipeval table [results=DIR] [task=TASK]          scores and % of the upper bound; with task=, all its metrics
                [statistics=true] [format=latex]   with intervals; also csv, html, json
                [table=paper/table1 [source=paper]]  in the paper's layout, beside its numbers; or those alone
  zipeval bench model=MODEL method=METHOD,METHOD tokens=N [batch=1,8] [init=random]
                [new_tokens=N] [prompt_tokens=N] [repeats=N] [results=DIR]
                                                   speed and memory beside vanilla's; no data, with init=random no
                                                   weights either
  zipeval show RUN_ID [results=DIR]                scores and provenance of a run; its first letters do
  zipeval report [results=DIR] [out=FILE.html]     all of it on one page, with plots and the tokens that are kept
                 [plots=DIR]                       and the plots as PDF and SVG files
  zipeval baseline [results=DIR] [out=FILE]        what records hold, as a small file to commit
  zipeval check --against FILE [--max-drop 1.0] [--junit FILE] [--format text|github] [results=DIR]
                                                   records beside that file: 0 as good, 1 regression, 2 cannot compare
  zipeval convert mini_gemini SRC DST              an official checkpoint into the Hugging Face layout
  zipeval data check suite=SUITE [data.root=DIR]   which data sets are there, and how to get the others
  zipeval list models|methods|tasks|suites         what there is to choose from
  zipeval doctor                                   what will work on this machine and what will not

zipeval run --help shows every setting.
"""
GROUPS = {"model": "models", "method": "methods", "suite": "suites"}
IDLE_IN_BENCH = ("suite", "tasks", "limit", "batch_size", "judge", "data", "logger")
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Console entry point. Exit codes: 0 done, 1 failed, 2 refused, 130 stopped by Ctrl-C or a scheduler."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help", "help"):
        return print(HELP, end="")
    if command == "--version":
        return print(__version__)
    try:
        if command not in COMMANDS:
            raise UsageError(f"{command}: no such command.{did_you_mean(command, COMMANDS)}")
        COMMANDS[command](arguments)
        ranks.leave()
    except (UsageError, RunError) as error:
        if ranks.first():
            print(f"zipeval: {error}", file=sys.stderr, flush=True)
        ranks.leave()
        codes = {UsageError: USAGE_ERROR, Stopped: INTERRUPTED}
        sys.exit(codes.get(type(error), FAILED))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `zipeval table | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@ranks.agreed()
def run(arguments: list[str]) -> None:
    """`zipeval run`: Hydra composes the configuration of each job."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _register_schema()
    _hide_bars()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of Hydra's printer
    refused: list[UsageError | RunError] = []

    def job(config) -> None:
        if any(isinstance(error, Stopped) for error in refused):
            return
        from zipeval.records import incomplete, read
        from zipeval.runner import run as evaluate

        try:
            waiting = [str(path) for path in evaluate(OmegaConf.to_object(config)) if incomplete(read(path))]
            if waiting:
                raise RunError(
                    f"{', '.join(waiting)}: answers have no verdict. Run this again to ask the judge for those."
                )
        except (UsageError, RunError) as error:  # the other jobs of a sweep go on
            refused.append(type(error)(str(error)))  # without its traceback, which would keep the model

    sys.argv = ["zipeval run", *arguments]
    try:
        hydra.main(version_base="1.3", config_path="pkg://zipeval.configs", config_name="run")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, arguments) from error
    if refused:
        kind = next(k for k in (Stopped, RunError, UsageError) if any(isinstance(error, k) for error in refused))
        raise kind("\nzipeval: ".join(dict.fromkeys(map(str, refused))))


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


def baseline(arguments: list[str]) -> None:
    """`zipeval baseline`."""
    from zipeval.baseline import write

    given = settings("baseline", arguments, ("results", "out"))
    out = Path(given.get("out", "results/baselines/shapes.json")).expanduser()
    count = write(given.get("results", "results/runs"), out)
    print(f"{out} holds {count} record{'s' if count > 1 else ''}: commit it. `zipeval check --against {out}` compares.")


def check(arguments: list[str]) -> None:
    """`zipeval check`: exit code 1 for a regression, 2 for what cannot be compared."""
    from zipeval import gate

    given = settings("check", _without_dashes(arguments), ("against", "max_drop", "junit", "format", "results"))
    if not given.get("against"):
        raise UsageError("check: name a baseline, `zipeval check --against results/baselines/shapes.json`.")
    github = choice(given, "format", ("text", "github")) == "github"
    against, drop = Path(given["against"]).expanduser(), _percent(given.get("max_drop", "1.0"))
    verdicts = gate.check(against, given.get("results", "results/runs"), drop)
    print(gate.text(verdicts))
    if github:
        print(gate.annotations(verdicts))
    if "junit" in given:
        gate.write_junit(verdicts, Path(given["junit"]).expanduser())
    gate.conclude(verdicts, against)


def _without_dashes(arguments: list[str]) -> list[str]:
    """`--max-drop 1.0` and `--max-drop=1.0` as the setting `max_drop=1.0`."""
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            name, assigned, value = argument.removeprefix("--").partition("=")
            argument = f"{name.replace('-', '_')}={value if assigned else next(rest, '')}"
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
        footer = f"Use with {group}=NAME."
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
    """`zipeval doctor`."""
    from zipeval.doctor import examine

    print(examine())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": run,
    "bench": bench,
    "table": table,
    "show": show,
    "report": report,
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
        if not assigned or name.startswith(("-", "hydra")):
            continue
        group = name.partition("@")[0]  # method@method.first=visionzip
        top, _, option = name.partition(".")
        if group in GROUPS:
            known = [path.stem for path in _choices(group)]
            for choice in value.split(","):
                if choice not in known and not elsewhere:
                    return UsageError(f"{name}={choice}: no such {group}.{did_you_mean(choice, known)}")
        elif top not in [*settings, *GROUPS]:
            return UsageError(f"{argument}: no such setting.{did_you_mean(top, [*settings, 'suite'])}")
        elif top in nodes and option and option not in (known := [f.name for f in fields(nodes[top])]):
            shown = name if top == "judge" else argument  # whose value may be a key, which belongs into the environment
            return UsageError(f"{shown}: no such setting of {top}.{did_you_mean(option, known)}")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(cause).splitlines()[0]
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
