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

DEADLINE = 60  # seconds
DPI = 200  # of plots, which are 4.4 inches wide
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
    try:
        version(name)  # find_spec would take the folder for it that wandb writes
    except PackageNotFoundError:
        raise UsageError(
            f"logger={name}: {name} is not installed. `pip install 'zipeval[{name}]'` installs it."
        ) from None


def log(results: Path, paths: list[Path]) -> None:
    """Log the records of a run; where that fails, say so in a line and go on."""
    command = [
        sys.executable,
        "-m",
        "zipeval.reporting.logger",
        str(results),
        *map(str, paths),
    ]
    try:
        with TemporaryFile(
            "w+", encoding="utf-8", errors="replace"
        ) as out:  # a pipe wandb's service would hold open
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=DEADLINE,
            )
            out.seek(0)
            said = (out.read().strip().splitlines() or ["no reason given"])[-1]
        if done.returncode == 0:
            return print(f"logger=wandb: {said}")
    except subprocess.TimeoutExpired:
        said = f"not done after {DEADLINE} seconds"
    except OSError as error:
        said = str(error)
    print(
        f"zipeval: logger=wandb: {paths[0].parent.name} is not logged ({said}). Its records are written; the same "
        "command tries again, and with WANDB_MODE=offline into a folder.",
        file=sys.stderr,
    )


def send(results: str, found: list[dict]) -> str:
    """Log records that one command made to a run of wandb's; returns where it is.

    Its id is that of our run, so that what is logged again replaces what was.
    """
    import wandb

    run_id = identity(found)
    of_this_process = {
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "x_disable_stats": True,
    }
    settings = wandb.Settings(**of_this_process)
    run = wandb.init(
        id=run_id, name=run_id, resume="allow", config=_config(found), settings=settings
    )
    try:
        table, lacking = table_of(results, found), ""
    except UsageError as error:
        table, lacking = None, f", without percentages and table: {error}"
    run.log(_metrics(found, table) | in_wandb(table))
    run.finish()
    return (run.url or f"`wandb sync {run.settings.sync_dir}` uploads it") + lacking


def identity(found: list[dict]) -> str:
    """The id of the run: where a judge scored some of the records, the one that it is a part of."""
    judged = [record for record in found if "judge" in record["config"]]
    return (judged or found)[0]["run_id"]


def _config(found: list[dict]) -> dict:
    """The configuration as it was resolved, and by task what else the records say of their making."""
    config = {
        name: value for record in found for name, value in record["config"].items()
    }
    provenance = {
        record["task"]: {name: record.get(name) for name in PROVENANCE}
        for record in found
    }
    return {**config, "resolved": found[0]["resolved"], "tasks": provenance}


def table_of(results: str, found: list[dict]) -> Table:
    """The one with these records.

    Raises:
        UsageError: as long as a record of the same model has no upper bound.
    """
    ours = {record["path"] for record in found}

    def shared(table: Table) -> int:
        return len(
            ours
            & {cell.record["path"] for row in table.rows for cell in row.cells.values()}
        )

    return max(tables(results, model=found[0]["config"]["model"]["name"]), key=shared)


def _metrics(found: list[dict], table: Table | None) -> dict[str, float]:
    """`TASK/score`, on the papers' scale, `TASK/percent` of the upper bound, `TASK/METRIC` and what it cost."""
    cells = [cell for row in table.rows for cell in row.cells.values()] if table else []
    percentages = {cell.record["path"]: cell.percent for cell in cells}
    metrics = {}
    for record in found:
        visual = record["visual_tokens"]
        of_task = {
            f"metrics/{name}": value for name, value in record["metrics"].items()
        }
        of_task |= {
            "score": record["score"],
            "percent": percentages.get(record["path"]),
        }
        of_task |= {
            name: record.get(name, 0) for name in ("failed", "unscored", "overflowed")
        }
        of_task |= {"seconds": record["seconds"]}
        of_task |= {
            "visual_tokens/mean": visual["mean"],
            "visual_tokens/final": visual["final"],
        }
        of_task |= {
            f"prefill/{name}": value for name, value in record["prefill"].items()
        }
        metrics |= {
            f"{record['task']}/{name}": value
            for name, value in of_task.items()
            if value is not None
        }
    return metrics


def in_wandb(table: Table | None) -> dict:
    """The table, its plots, and the points of accuracy against tokens: rows with an average, or a lone percentage."""
    import wandb

    from zipeval.reporting.plots import plots

    if table is None:
        return {}
    drawn = plots(table, [None] * len(table.rows))
    counts = ["method", "tokens", "mean", "final", "flops"]
    headings = [
        *counts,
        *(heading for name in table.columns for heading in (name, f"{name} %")),
        "average %",
    ]
    averages = [
        row.cells[table.columns[0]].percent if len(table.columns) == 1 else row.average
        for row in table.rows
    ]
    lines = list(zip(table.rows, averages, strict=True))
    rows = [
        [*_counts(row), *_scores(row, table.columns), average] for row, average in lines
    ]
    points = [[*_counts(row), average] for row, average in lines if average is not None]
    return {
        "table": wandb.Table(columns=headings, data=rows),
        "accuracy_against_tokens": wandb.Table(
            columns=[*counts, "average %"], data=points
        ),
        **{
            f"plots/{plot.name}": wandb.Image(_picture(plot.figure), caption=plot.about)
            for plot in drawn
        },
    }


def _picture(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    return Image.open(content)


def _counts(row: Row) -> list:
    return [row.label, row.tokens, row.mean, row.final, row.flops]


def _scores(row: Row, columns: list[str]) -> list[float | None]:
    cells = [row.cells.get(name) for name in columns]
    return [
        number
        for cell in cells
        for number in ((cell.score, cell.percent) if cell else (None, None))
    ]


if __name__ == "__main__":
    try:
        print(send(sys.argv[1], [records.read(Path(path)) for path in sys.argv[2:]]))
        code = 0
    except Exception as error:  # of a library that we do not know: whatever it is, it becomes the warning
        print(f"{type(error).__name__}: {error}".splitlines()[0])
        code = 1
    sys.stdout.flush()
    os._exit(code)  # what wandb does at exit waits for its server, without an end
