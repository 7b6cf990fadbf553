"""Draw an image as a model sees it, and by method the tokens that it keeps and the answer that it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from zipeval.inference.answering import Answer

METHODS = ("vanilla", "visionzip", "fastv", "sparsevlm")
NEW_TOKENS = 64
# Panels in a row, and inches of one.
COLUMNS, SIDE = 5, 1.7
# Letters that fit below a panel, and inches of a line of them.
LETTERS, LINE = 28, 0.15
KEY = "clear: kept; pale: removed; outlined: merged, where that has a place; counts are of the decoder's last layer"
# A budget is of the largest image: of a smaller one they do not leave the same number.
CROPS = (
    "; the first of {} crops, the whole image; methods before the decoder leave the same number of tokens of any "
    "image, those inside it a share of all that enter"
)


@dataclass(frozen=True)
class Panel:
    """The panel of a method.

    Attributes:
        tokens: visual tokens that entered the decoder's last layer.
        all_tokens: visual tokens without reduction.
        crops: that the encoder saw; the positions are those in the first.
        side: patches in a row of it.
        kept, merged: positions, patches in reading order.
    """

    name: str
    answer: str
    tokens: int
    all_tokens: int
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
        # One that does not fit is refused before the model is loaded.
        _ = session.projector
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
    """Answer the question under every method; returns the panels, and a JPEG file of the first crop."""
    from zipeval.engine.images import pixels
    from zipeval.inference.answering import answering
    from zipeval.inference.feed import feed

    parts = [{"type": "image", "url": str(image)}, {"type": "text", "text": question}]
    # Prepared once: all sessions have the same processor.
    messages = [{"role": "user", "content": parts}]
    (prompt,) = feed(sessions[0], lambda number: messages, [0], keyed=False)
    if prompt.error:
        raise UsageError(
            f"{question!r} about {image}: {prompt.error}. Ask something else."
        )
    # One after another, as they share one model.
    panels = []
    for session in sessions:
        with answering(session) as model:
            (answer,) = model.answer([prompt], {"max_new_tokens": NEW_TOKENS})
        panels.append(_panel(session.config.method["name"], answer))
    return panels, sessions[0].jpeg(pixels(prompt.inputs, "image")[0])


def _panel(method: str, answer: Answer) -> Panel:
    """Return the panel of a method's answer about one picture."""
    (picture,) = answer.pictures
    # CLS is one more patch in some models, without a place.
    side = math.isqrt(picture.patches)
    patches = set(range(side**2))
    positions = {
        name: patches & set(rows[0]) for name, rows in answer.positions.items()
    }
    return Panel(
        name=method,
        answer=answer.text,
        tokens=answer.visual[-1],
        all_tokens=picture.tokens,
        crops=picture.crops,
        side=side,
        # A method that removes nothing tells no positions.
        kept=positions.get("kept", patches),
        merged=positions.get("merged", set()),
    )


def draw(panels: list[Panel], seen: bytes, question: str) -> Figure:
    """Draw the figure.

    Args:
        seen: a JPEG file of the image as the model sees it.
    """
    columns = min(COLUMNS, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / COLUMNS)
    # [height, width, 3]
    image = np.asarray(Image.open(BytesIO(seen)))
    height, width = image.shape[:2]
    with matplotlib.rc_context(STYLE):
        crops = CROPS.format(panels[0].crops) if panels[0].crops > 1 else ""
        key = fill(KEY + crops, LETTERS * columns)
        answers = [fill(panel.answer, LETTERS).splitlines() for panel in panels]
        # Text below a panel takes its height, and constrained layout shrinks pictures for it.
        below = LINE * (max(map(len, answers)) * rows + len(key.splitlines()))
        size = SIDE * columns, (SIDE + 0.5) * rows + 0.4 + below
        figure = Figure(size, layout="constrained")
        figure.suptitle(fill(question, LETTERS * columns))
        first, *cells = figure.subplots(rows, columns, squeeze=False).flat
        for axes in (first, *cells):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        first.imshow(image)
        first.set_title("as the model sees it\n")
        for axes, panel in zip(cells, panels, strict=False):
            axes.imshow(image)
            _mark(axes, panel, width, height)
        for axes in cells[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(key, fontsize=7)
    return figure


def _mark(axes, panel: Panel, width: int, height: int) -> None:
    """Mark the patches that are kept and merged, and write the answer below."""
    # White over all patches but those that are clear: [side, side, RGBA].
    pale = np.ones((panel.side, panel.side, 4))
    pale[..., 3] = 0.85
    pale[..., 3].flat[[*(panel.kept | panel.merged)]] = 0
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(pale, extent=extent, interpolation="nearest")
    x, y = width / panel.side, height / panel.side
    outline = {"fill": False, "edgecolor": COLOURS[1], "linewidth": 1}
    for position in sorted(panel.merged):
        row, column = divmod(position, panel.side)
        corner = (column + 0.1) * x - 0.5, (row + 0.1) * y - 0.5
        axes.add_patch(Rectangle(corner, 0.8 * x, 0.8 * y, **outline))
    axes.set_title(f"{panel.name}\n{panel.tokens} of {panel.all_tokens} tokens")
    axes.set_xlabel(fill(panel.answer or "(no answer)", LETTERS))
