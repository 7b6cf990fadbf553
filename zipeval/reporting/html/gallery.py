"""Show a few samples with what every run kept of them and answered. Imports no torch."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from zipeval.reporting.tables import Record, Row, Table

# Samples of a benchmark that are shown.
SHOWN = 8


@dataclass(frozen=True)
class Card:
    """Hold a run's share in a sample.

    Attributes:
        row: the run's row of the table.
        prediction: its answer.
        verdict: right, wrong, a score between them, or why there is none.
        traced: whether its kept positions are known.
        kept: number of kept positions of the sample's pictures.
        merged: number of merged ones.
        dropped: SVG path over the dropped positions of the picture, in units of a token.
        outlined: SVG path around the merged ones.
    """

    row: Row
    prediction: str
    verdict: str
    traced: bool = False
    kept: int = 0
    merged: int = 0
    dropped: str = ""
    outlined: str = ""


@dataclass(frozen=True)
class Shown:
    """Hold a sample: its picture as a data URI, `side` tokens wide and high, and the runs by their budgets."""

    task: str
    doc_id: str
    target: str
    picture: str
    side: int
    budgets: list[list[Card]]


def pictures(record: Record) -> dict[str, Path]:
    """Return the pictures that lie beside a record, by document."""
    folder = Path(record["path"]).with_suffix(".images")
    return {path.stem: path for path in folder.glob("*.jpg")}


def gallery(table: Table, samples: dict[str, dict[str, dict]]) -> list[Shown]:
    """Return the first samples of every benchmark that have a picture.

    Args:
        table: the table.
        samples: samples that have a picture, by the path of their record, then by document.
    """
    shown = []
    for column in table.columns:
        shown += _of_benchmark(table, column, samples)
    return shown


def _of_benchmark(
    table: Table, column: str, samples: dict[str, dict[str, dict]]
) -> Iterator[Shown]:
    """Yield the first samples of a benchmark that have a picture."""
    rows = [row for row in table.rows if column in row.cells]
    bound = rows[0].cells[column].record
    # Of several runs' pictures of a document, the first run's is shown.
    files: dict[str, Path] = {}
    for row in reversed(rows):
        files |= pictures(row.cells[column].record)
    # The patches of a square picture; CLS, which some models count, has no place in it.
    side = math.isqrt(bound["visual_tokens"]["patches"])
    bound_samples = samples[bound["path"]]
    documents = [document for document in bound_samples if document in files]
    for document in documents[:SHOWN]:
        budgets = []
        for _, group in groupby(rows, key=lambda row: row.tokens):
            cards = []
            for row in group:
                cell = row.cells[column]
                sample = samples[cell.record["path"]].get(document)
                if sample is not None:
                    cards.append(_card(row, sample, side, cell.higher_is_better))
            if cards:
                budgets.append(cards)
        target = str(bound_samples[document]["target"])
        picture = data_uri(files[document])
        yield Shown(bound["task"], document, target, picture, side, budgets)


def data_uri(path: Path) -> str:
    """Return a JPEG file as a URI that stands within a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def verdict(sample: dict, higher_is_better: bool = True) -> str:
    """Say in a word or two what an answer is worth."""
    if "error" in sample:
        return "not read"
    if sample["score"] is None:
        return "no verdict"
    # Of an error, where lower is better, a number says more than a word.
    words = {0: "wrong", 1: "right"} if higher_is_better else {}
    return words.get(sample["score"], f"score {sample['score']:.3g}")


def covering(positions: Iterable[int], side: int) -> str:
    """Return the SVG path of the squares at these positions of a grid, neighbours of a row in one piece."""
    pieces = []
    for row, of_row in groupby(
        sorted(positions), key=lambda position: position // side
    ):
        # Neighbours are as far from their columns as from their places in the row.
        for _, run in groupby(enumerate(of_row), key=lambda pair: pair[1] - pair[0]):
            columns = [position % side for _, position in run]
            pieces.append(f"M{columns[0]} {row}h{len(columns)}v1h-{len(columns)}z")
    return "".join(pieces)


def outlining(positions: Iterable[int], side: int) -> str:
    """Return the SVG path of a square within each of these positions of a grid."""
    return "".join(
        f"M{p % side + 0.1:.1f} {p // side + 0.1:.1f}h.8v.8h-.8z"
        for p in sorted(positions)
    )


def _card(row: Row, sample: dict, side: int, higher_is_better: bool) -> Card:
    """Return what a run made of a sample, with the fate of each visual token where it is known."""
    card = Card(row, str(sample["prediction"]), verdict(sample, higher_is_better))
    if not sample.get("kept"):
        return card
    # The first crop of the first picture is shown.
    cells = set(range(side * side))
    kept_cells = cells.intersection(sample["kept"][0])
    merged_cells = cells.intersection(sample["merged"][0])
    return replace(
        card,
        traced=True,
        kept=sum(map(len, sample["kept"])),
        merged=sum(map(len, sample["merged"])),
        dropped=covering(cells - kept_cells - merged_cells, side),
        outlined=outlining(merged_cells, side),
    )
