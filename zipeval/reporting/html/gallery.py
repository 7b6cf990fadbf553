"""A few samples with what every run kept of them and answered. Imports no torch."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from zipeval.reporting.tables import Record, Row, Table

SHOWN = 8  # samples of a benchmark


@dataclass(frozen=True)
class Card:
    """A run's share in a sample.

    Attributes:
        verdict: right, wrong, a score between them, or why there is none.
        traced: whether its kept positions are known.
        kept, merged: how many positions of the sample's pictures.
        dropped, outlined: SVG paths over the picture, in units of a token.
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
    """A sample: its picture as a data URI, `side` tokens wide and high, and the runs by their budgets."""

    task: str
    doc_id: str
    target: str
    picture: str
    side: int
    budgets: list[list[Card]]


def pictures(record: Record) -> dict[str, Path]:
    """Document -> the picture that was kept beside the record."""
    return {
        path.stem: path
        for path in Path(record["path"]).with_suffix(".images").glob("*.jpg")
    }


def gallery(table: Table, samples: dict[str, dict[str, dict]]) -> list[Shown]:
    """The first samples of every benchmark that have a picture.

    Args:
        samples: path of a record -> document -> sample, of the documents that have one.
    """
    found = []
    for column in table.columns:
        runs = [
            (row, row.cells[column].record) for row in table.rows if column in row.cells
        ]
        files = {
            doc: path
            for _, record in reversed(runs)
            for doc, path in pictures(record).items()
        }
        _, bound = runs[0]
        side = math.isqrt(
            bound["visual_tokens"]["patches"]
        )  # CLS is one more in some models, without a place
        shown = [doc for doc in samples[bound["path"]] if doc in files][:SHOWN]
        for doc in shown:
            of = [
                (row, samples[record["path"]][doc])
                for row, record in runs
                if doc in samples[record["path"]]
            ]
            budgets = [
                [
                    _card(row, sample, side, row.cells[column].higher_is_better)
                    for row, sample in group
                ]
                for _, group in groupby(of, key=lambda pair: pair[0].tokens)
            ]
            target = str(samples[bound["path"]][doc]["target"])
            found.append(
                Shown(bound["task"], doc, target, data_uri(files[doc]), side, budgets)
            )
    return found


def data_uri(path: Path) -> str:
    """A JPEG file within a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def verdict(sample: dict, higher_is_better: bool = True) -> str:
    """Say in a word or two what an answer is worth."""
    if "error" in sample:
        return "not read"
    if sample["score"] is None:
        return "no verdict"
    words = (
        {0: "wrong", 1: "right"} if higher_is_better else {}
    )  # of an error, a number says more
    return words.get(sample["score"], f"score {sample['score']:.3g}")


def covering(positions: Iterable[int], side: int) -> str:
    """SVG path of the squares at these positions of a grid, neighbours of a row in one piece."""
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
    """SVG path of a square within each of these positions of a grid."""
    return "".join(
        f"M{p % side + 0.1:.1f} {p // side + 0.1:.1f}h.8v.8h-.8z"
        for p in sorted(positions)
    )


def _card(row: Row, sample: dict, side: int, higher_is_better: bool) -> Card:
    answered = row, str(sample["prediction"]), verdict(sample, higher_is_better)
    if not sample.get("kept"):
        return Card(*answered)
    cells = range(
        side * side
    )  # of the first picture's first crop, which is the one that is shown
    kept, merged = (
        [p for p in sample[name][0] if p in cells] for name in ("kept", "merged")
    )
    return Card(
        *answered,
        traced=True,
        kept=sum(map(len, sample["kept"])),
        merged=sum(map(len, sample["merged"])),
        dropped=covering(set(cells) - {*kept, *merged}, side),
        outlined=outlining(merged, side),
    )
