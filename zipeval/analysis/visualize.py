"""One picture: an image as a model sees it, and by method the tokens that it keeps and the answer that it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from zipeval import media
from zipeval.config.schema import RunConfig
from zipeval.errors import MediaError, UsageError
from zipeval.inference.session import Session
from zipeval.reporting.method_styles import COLOURS
from zipeval.reporting.plots import STYLE, UNDATED, save
from zipeval.results import records

METHODS = ("vanilla", "visionzip", "fastv", "sparsevlm")
NEW_TOKENS = 64
COLUMNS, SIDE = 5, 1.7  # panels in a row, and inches of one
LETTERS = 28  # that fit below a panel
LINE = 0.15  # inches of a line of them
KEY = "clear: kept; pale: removed; outlined: merged, where that has a place; counts are of the decoder's last layer"
# A budget is of the largest image: of a smaller one they do not leave the same number.
CROPS = (
    "; the first of {} crops, the whole image; methods before the decoder leave the same number of tokens of any "
    "image, those inside it a share of all that enter"
)


@dataclass(frozen=True)
class Panel:
    """A method's.

    Attributes:
        left: visual tokens that entered the decoder's last layer.
        of: visual tokens without reduction.
        crops: that the encoder saw; the positions are those in the first.
        side: patches in a row of it.
        kept, merged: positions, patches in reading order.
    """

    name: str
    answer: str
    left: int
    of: int
    crops: int
    side: int
    kept: set[int]
    merged: set[int]


def picture(configs: list[RunConfig], image: Path, question: str, out: Path) -> Path:
    """Ask one question about one image under every configuration, and draw what was kept; returns `out`.

    Args:
        configs: of one model under several methods.
        out: its suffix says what it becomes: svg, pdf or png.

    Raises:
        UsageError: for an image, a setting or a place that is none, before the model is loaded.
    """
    if out.suffix not in UNDATED:
        raise UsageError(f"out={out}: its name has to end in .svg, .pdf or .png.")
    if not out.parent.is_dir():
        raise UsageError(
            f"out={out}: no directory {out.parent}. Make it, or choose another place."
        )
    if not image.is_file():
        raise UsageError(
            f"{image}: no such file. Name an image, `zipeval visualize photo.jpg 'What is this?'`."
        )
    try:
        media.rgb(str(image), "crop", (0, 0, 0))
    except MediaError as error:
        raise UsageError(f"{image}: {error}. Name another image.") from error
    sessions = [Session(config) for config in configs]
    for session in sessions:
        _ = session.projector  # refused before the model is loaded
    try:
        records.try_out(out.parent)
    except OSError as error:
        raise UsageError(
            f"out={out}: cannot write there ({error.strerror}). Choose another place."
        ) from error
    panels, seen = _panels(sessions, image, question)
    save(draw(panels, seen, question), out)
    return out


def _panels(
    sessions: list[Session], image: Path, question: str
) -> tuple[list[Panel], bytes]:
    """(the panels, a JPEG file of the first crop)."""
    from zipeval.engine.images import pixels
    from zipeval.inference.answering import answering
    from zipeval.inference.feed import feed

    parts = [{"type": "image", "url": str(image)}, {"type": "text", "text": question}]
    (asked,) = feed(
        sessions[0],
        lambda number: [{"role": "user", "content": parts}],
        [0],
        keyed=False,
    )
    if asked.error:
        raise UsageError(
            f"{question!r} about {image}: {asked.error}. Ask something else."
        )
    panels = []
    for session in sessions:
        with answering(session) as model:
            (answer,) = model.answer([asked], {"max_new_tokens": NEW_TOKENS})
        (its,) = answer.pictures
        side = math.isqrt(
            its.patches
        )  # CLS is one more in some models, without a place
        patches = {*range(side**2)}
        found = {
            name: patches & {*positions[0]} for name, positions in answer.left.items()
        }
        kept, merged = found.get("kept", patches), found.get("merged", set())
        name, left = session.config.method["name"], answer.visual[-1]
        panels.append(
            Panel(name, answer.text, left, its.tokens, its.crops, side, kept, merged)
        )
    return panels, sessions[0].jpeg(pixels(asked.inputs, "image")[0])


def draw(panels: list[Panel], seen: bytes, question: str) -> Figure:
    """The figure.

    Args:
        seen: a JPEG file of the image as the model sees it.
    """
    columns, rows = (
        min(COLUMNS, len(panels) + 1),
        math.ceil((len(panels) + 1) / COLUMNS),
    )
    image = np.asarray(Image.open(BytesIO(seen)))
    height, width = image.shape[:2]
    with matplotlib.rc_context(STYLE):
        crops = CROPS.format(panels[0].crops) if panels[0].crops > 1 else ""
        key = fill(KEY + crops, LETTERS * columns)
        lines = max(len(fill(panel.answer, LETTERS).splitlines()) for panel in panels)
        below = LINE * (lines * rows + len(key.splitlines()))
        figure = Figure(
            (SIDE * columns, (SIDE + 0.5) * rows + 0.4 + below), layout="constrained"
        )
        figure.suptitle(fill(question, LETTERS * columns))
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(
            cells, [None, *panels, *[None] * len(cells)], strict=False
        ):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if panel is None and axes is not cells[0]:
                axes.set_visible(False)
                continue
            axes.imshow(image)
            if panel:
                _mark(axes, panel, width, height)
            else:
                axes.set_title("as the model sees it\n")
        figure.supxlabel(key, fontsize=7)
    return figure


def _mark(axes, panel: Panel, width: int, height: int) -> None:
    """What is kept, merged and answered."""
    pale = np.ones((panel.side, panel.side, 4))
    pale[..., 3] = 0.85
    pale[..., 3].flat[[*(panel.kept | panel.merged)]] = 0
    axes.imshow(
        pale, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest"
    )
    x, y = width / panel.side, height / panel.side
    for position in sorted(panel.merged):
        corner = (
            (position % panel.side + 0.1) * x - 0.5,
            (position // panel.side + 0.1) * y - 0.5,
        )
        axes.add_patch(
            Rectangle(
                corner, 0.8 * x, 0.8 * y, fill=False, edgecolor=COLOURS[1], linewidth=1
            )
        )
    axes.set_title(f"{panel.name}\n{panel.left} of {panel.of} tokens")
    axes.set_xlabel(fill(panel.answer or "(no answer)", LETTERS))
