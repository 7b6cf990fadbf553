"""Commands about what there is: `zipeval list`, `data`, `convert` and `doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

from zipeval.cli.arguments import Command
from zipeval.cli.output import hide_bars
from zipeval.cli.settings import CONFIG_DIR, Operand, Setting, path
from zipeval.config.compose import ADDED, GROUPS, compose
from zipeval.config.directories import OWN, ConfigFile, config_files
from zipeval.errors import UsageError

FAILED = 1

CONVERT = Command(
    "convert",
    "mini_gemini SRC DST [vision_tower=DIR] [vision_tower_aux=DIR]",
    "Bring an official checkpoint into the Hugging Face layout.",
    operands=(
        Operand(
            "mini_gemini", "the family of the checkpoint", choices=("mini_gemini",)
        ),
        Operand("SRC", "directory of the official checkpoint"),
        Operand("DST", "directory to make"),
    ),
    misused=(
        "say what, from and to where: `zipeval convert mini_gemini SRC DST [vision_tower=DIR] [vision_tower_aux=DIR]`."
    ),
    settings=(
        Setting(
            "vision_tower",
            "directory of CLIP, where the checkpoint has none of its own",
            "DIR",
            path,
        ),
        Setting(
            "vision_tower_aux",
            "directory of ConvNeXt, where the checkpoint has none of its own",
            "DIR",
            path,
        ),
    ),
)


def convert(arguments: list[str]) -> None:
    """Run `zipeval convert mini_gemini SRC DST`."""
    options = CONVERT.parse(arguments)
    source, target = (Path(place).expanduser() for place in options.operands[1:])
    # A tower that is not named is in the checkpoint itself.
    towers = {}
    for name in ("vision_tower", "vision_tower_aux"):
        directory = getattr(options, name)
        if directory is not None:
            towers[name] = directory
    for directory in (source, *towers.values()):
        if not directory.is_dir():
            raise UsageError(f"{directory}: no such directory.")
    from zipeval.models._convert import mini_gemini

    model = mini_gemini(source, target, **towers)
    print(f"{target} is made: zipeval run model={model} model.path={target}")


LIST = Command(
    "list",
    "WHAT [--config-dir DIR]",
    f"Show what there is to choose from: WHAT is {', '.join(GROUPS.values())} or tasks.",
    "Methods and models that installed packages bring are among them, and with --config-dir those of a directory.",
    operands=(Operand("WHAT", "one of", choices=(*GROUPS.values(), "tasks")),),
    misused="say what.",
    settings=(CONFIG_DIR,),
)


def list_choices(arguments: list[str]) -> None:
    """Run `zipeval list WHAT`."""
    options = LIST.parse(arguments)
    (what,) = options.operands
    if what == "tasks":
        rows, footer = _task_rows()
    else:
        group = next(group for group, plural in GROUPS.items() if plural == what)
        rows = _config_rows(group, options.config_dir)
        footer = f"Use with {'+' if group in ADDED else ''}{group}=NAME."
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    print("\n".join(lines) + f"\n\n{footer}")


def _task_rows() -> tuple[list[tuple[str, ...]], str]:
    """Return a line for each benchmark, and what is said below."""
    from zipeval.benchmarks import BENCHMARKS, OURS, task_files

    rows = [
        (name, b.column, f"{b.metric} x {b.scale}", *_data(b), _note(b))
        for name, b in BENCHMARKS.items()
    ]
    others = sum(kind == "task" for kind, _ in task_files().values()) - len(rows)
    footer = (
        f"Of lmms-eval's own {others} those work by their names that generate answers to images and need no judge "
        f"of their own; a table then shows their first metric as it is. Ours are defined in {OURS}."
    )
    return rows, footer


def _config_rows(group: str, config_dir: str | None) -> list[tuple[str, ...]]:
    """Return a line for each configuration of a group."""
    files = config_files(group, config_dir)
    has_others = any(file.source != OWN for file in files)
    rows = []
    for file in files:
        row = [file.name]
        if has_others:
            row.append(file.source)
        if group == "model":
            row.append(_weights(file.path))
        rows.append((*row, _about(file)))
    return rows


def _data(benchmark) -> tuple[str, str]:
    """Return data set and split of the samples; empty where they are beside the task."""
    if not benchmark.sources:
        return "", ""
    source = benchmark.sources[0]
    return source.dataset, source.split


def _note(benchmark) -> str:
    return benchmark.about + (
        f"; theirs is scored by a {benchmark.needs}" if benchmark.needs else ""
    )


def _weights(path: Path) -> str:
    """Return where weights come from: `ORGANISATION/NAME@REVISION` on the hub, `embedded`, or what makes them."""
    from omegaconf import OmegaConf

    model = OmegaConf.load(path)
    if "embedded" in model:
        return "embedded"
    if "hub" not in model:
        return "zipeval convert"
    return f"{model.hub}@{model.revision[:8]}" if "revision" in model else model.hub


def _about(file: ConfigFile) -> str:
    """Return the last comment line above the settings of a config file; the one before it is its command."""
    lines = file.path.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    return comments[-1] if comments else ""


DATA = Command(
    "data",
    "check suite=SUITE [data.root=DIR]",
    "Say which data sets are on this machine, and how to get the others.",
    "Exit code 1 where something is not there.",
    operands=(Operand("check", "what is done", choices=("check",)),),
    misused="say `zipeval data check suite=paper_image [data.root=DIR]`.",
    settings=(CONFIG_DIR,),
    passed_on=("suite", "tasks", "data.", "model", "model.", "limit"),
)


def data(arguments: list[str]) -> None:
    """Run `zipeval data check`: exit code 1 where something is not there."""
    options = DATA.parse(arguments)
    from zipeval.benchmarks import task_folder
    from zipeval.benchmarks.data import report

    config = compose(options.overrides, options.config_dir)
    for task in config.tasks:
        task_folder(task)
    lines, complete = report(config.tasks, config.data.root)
    print(
        lines or f"tasks=[{', '.join(config.tasks)}]: all of their data is beside them."
    )
    if not complete:
        sys.exit(FAILED)


DOCTOR = Command(
    "doctor",
    "",
    "Say what will work on this machine and what will not.",
    "Exit code 1 where runs do not work, or cannot be trusted.",
)


def doctor(arguments: list[str]) -> None:
    """Run `zipeval doctor`: exit code 1 where runs do not work, or cannot be trusted."""
    DOCTOR.parse(arguments)
    from zipeval.evaluation.doctor import examine

    hide_bars()
    lines, healthy = examine()
    print(lines)
    if not healthy:
        sys.exit(FAILED)
