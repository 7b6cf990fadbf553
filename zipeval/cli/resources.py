"""Commands about what there is: `zipeval list`, `data`, `convert` and `doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

from zipeval.cli.output import hide_bars
from zipeval.composition import ADDED, GROUPS, choices, compose
from zipeval.errors import UsageError, did_you_mean

FAILED = 1


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
        rows = [(path.stem, *(column(path) for column in columns)) for path in choices(group)]
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

    hide_bars()
    lines, healthy = examine()
    print(lines)
    if not healthy:
        sys.exit(FAILED)


def _data(benchmark) -> tuple[str, str]:
    """Data set and split of the samples; empty where they are beside the task."""
    if not benchmark.sources:
        return "", ""
    source = benchmark.sources[0]
    return source.dataset, source.split


def _note(benchmark) -> str:
    return benchmark.about + (f"; theirs is scored by a {benchmark.needs}" if benchmark.needs else "")


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
