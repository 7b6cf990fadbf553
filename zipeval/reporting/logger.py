"""Weights & Biases: one of its runs for each of ours, made from the records when they are written.

    zipeval run logger=wandb ...

What goes there is read from files, in a process of its own that has a minute: wandb that raises, waits for a server
or does not end costs a warning and never a result. Its settings are its own: WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR,
WANDB_API_KEY (or `wandb login`), WANDB_MODE=offline. Imports no torch.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from PIL import Image

from zipeval.errors import UsageError
from zipeval.reporting.tables import Row, Table, tables
from zipeval.results import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Seconds.
DEADLINE = 60
# Resolution of plots, which are 4.4 inches wide.
DPI = 200
COUNTS = ["method", "tokens", "mean", "final", "flops"]
PROVENANCE = (
    "status",
    "metric",
    "task_hash",
    "data_hash",
    "model_revision",
    "machine",
    "versions",
    "git",
    "started",
    "ended",
)


def check(name: str | None) -> None:
    """Refuse a logger= that is not installed; None is no logger.

    Raises:
        UsageError: says how to install it.
    """
    if name is None:
        return
    # find_spec would take the folder for the package that wandb writes.
    try:
        version(name)
    except PackageNotFoundError:
        raise UsageError(
            f"logger={name}: {name} is not installed. `pip install 'zipeval[{name}]'` installs it."
        ) from None


def log(results: Path, paths: list[Path]) -> None:
    """Log the records of a run; where that fails, say so in a line and go on."""
    module = [sys.executable, "-m", "zipeval.reporting.logger"]
    try:
        succeeded, message = _run([*module, str(results), *map(str, paths)])
    except subprocess.TimeoutExpired:
        succeeded, message = False, f"not done after {DEADLINE} seconds"
    except OSError as error:
        succeeded, message = False, str(error)
    if succeeded:
        print(f"logger=wandb: {message}")
        return
    print(
        f"zipeval: logger=wandb: {paths[0].parent.name} is not logged ({message}). Its records are written; the same "
        "command tries again, and with WANDB_MODE=offline into a folder.",
        file=sys.stderr,
    )


def _run(command: list[str]) -> tuple[bool, str]:
    """Run a command, and return whether it succeeded and the last line that it printed."""
    # wandb's service would hold a pipe open after the command has ended.
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            timeout=DEADLINE,
        )
        out.seek(0)
        lines = out.read().strip().splitlines()
    return process.returncode == 0, lines[-1] if lines else "no reason given"


def send(results: str, logged: list[dict]) -> str:
    """Log records that one command made to a run of wandb's, and return where it is.

    Its id is that of our run, so that what is logged again replaces what was.
    """
    import wandb

    run_id = identity(logged)
    settings = wandb.Settings(
        console="off", disable_code=True, disable_git=True, x_disable_stats=True
    )
    run = wandb.init(
        id=run_id,
        name=run_id,
        resume="allow",
        config=_config(logged),
        settings=settings,
    )
    table, lacking = None, ""
    try:
        table = table_of(results, logged)
    except UsageError as error:
        lacking = f", without percentages and table: {error}"
    content = _metrics(logged, table)
    if table is not None:
        content |= in_wandb(table)
    run.log(content)
    run.finish()
    place = run.url or f"`wandb sync {run.settings.sync_dir}` uploads it"
    return place + lacking


def identity(logged: list[dict]) -> str:
    """Return the id of the run: where a judge scored some of the records, the one that it is a part of."""
    judged = [record for record in logged if "judge" in record["config"]]
    return (judged or logged)[0]["run_id"]


def _config(logged: list[dict]) -> dict:
    """Return the configuration as it was resolved, and by task what else the records say of their making."""
    config, tasks = {}, {}
    for record in logged:
        config |= record["config"]
        tasks[record["task"]] = {name: record.get(name) for name in PROVENANCE}
    return {**config, "resolved": logged[0]["resolved"], "tasks": tasks}


def _paths(table: Table) -> set[str]:
    """Return the paths of the records in a table."""
    paths = set()
    for row in table.rows:
        paths |= {cell.record["path"] for cell in row.cells.values()}
    return paths


def table_of(results: str, logged: list[dict]) -> Table:
    """Return the table with most of these records.

    Raises:
        UsageError: as long as a record of the same model has no upper bound.
    """
    wanted = {record["path"] for record in logged}
    candidates = tables(results, model=logged[0]["config"]["model"]["name"])
    return max(candidates, key=lambda table: len(wanted & _paths(table)))


def _metrics(logged: list[dict], table: Table | None) -> dict[str, float]:
    """Return `TASK/score`, on the papers' scale, `TASK/percent` of the upper bound, `TASK/METRIC` and what it cost."""
    percentages = {}
    for row in table.rows if table else ():
        for cell in row.cells.values():
            percentages[cell.record["path"]] = cell.percent
    metrics = {}
    for record in logged:
        visual_tokens = record["visual_tokens"]
        values = {
            "score": record["score"],
            "percent": percentages.get(record["path"]),
            "failed": record.get("failed", 0),
            "unscored": record.get("unscored", 0),
            "overflowed": record.get("overflowed", 0),
            "seconds": record["seconds"],
            "visual_tokens/mean": visual_tokens["mean"],
            "visual_tokens/final": visual_tokens["final"],
        }
        for group in ("metrics", "prefill"):
            for name, value in record[group].items():
                values[f"{group}/{name}"] = value
        for name, value in values.items():
            if value is not None:
                metrics[f"{record['task']}/{name}"] = value
    return metrics


def in_wandb(table: Table) -> dict:
    """Return the table, its plots, and the points of accuracy against tokens.

    Rows without an average, or a lone percentage, are no points.
    """
    import wandb

    from zipeval.reporting.plots import plots

    headings = [*COUNTS]
    for name in table.columns:
        headings += [name, f"{name} %"]
    rows, points = [], []
    for row in table.rows:
        counts = [row.label, row.tokens, row.mean, row.final, row.flops]
        average = row.average
        if len(table.columns) == 1:
            average = row.cells[table.columns[0]].percent
        rows.append([*counts, *_scores(row, table.columns), average])
        if average is not None:
            points.append([*counts, average])
    logged = {
        "table": wandb.Table(columns=[*headings, "average %"], data=rows),
        "accuracy_against_tokens": wandb.Table(
            columns=[*COUNTS, "average %"], data=points
        ),
    }
    for plot in plots(table, [None] * len(table.rows)):
        image = wandb.Image(_picture(plot.figure), caption=plot.about)
        logged[f"plots/{plot.name}"] = image
    return logged


def _picture(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    return Image.open(content)


def _scores(row: Row, columns: list[str]) -> list[float | None]:
    """Return the score and the percentage of each column, one after another."""
    numbers = []
    for name in columns:
        cell = row.cells.get(name)
        numbers += [cell.score, cell.percent] if cell else [None, None]
    return numbers


if __name__ == "__main__":
    try:
        print(send(sys.argv[1], [records.read(Path(path)) for path in sys.argv[2:]]))
        code = 0
    # Whatever a library raises that we do not know, it becomes the warning.
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
        code = 1
    sys.stdout.flush()
    # What wandb does at exit waits for its server, without an end.
    os._exit(code)
