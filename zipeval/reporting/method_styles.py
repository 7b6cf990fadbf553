"""One colour and one marker for each method, in every plot: whatever other methods there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from zlib import crc32

from zipeval.config.schema import UPPER_BOUND

INK = "#1b1d21"
# Okabe and Ito's colours, which the colour-blind tell apart, and four of Paul Tol's beside them.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#332288", "#999933", "#44AA99"),
)
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, WINE, INDIGO, OLIVE, TEAL = COLOURS
MARKERS = "os^DvPXph<>d"  # all can be filled


@dataclass(frozen=True)
class MethodStyle:
    """Say what a method looks like.

    Attributes:
        hollow: whether its markers are not filled and its lines dashed: of a variant, with other options.
    """

    colour: str
    marker: str
    hollow: bool = False


STYLES = {
    UPPER_BOUND: MethodStyle(INK, "*"),
    "visionzip": MethodStyle(VERMILION, "o"),
    "fastv": MethodStyle(BLUE, "s"),
    "sparsevlm": MethodStyle(GREEN, "^"),
    "visionzip_tuned": MethodStyle(ORANGE, "D"),
    "chain": MethodStyle(PINK, "v"),
    "random": MethodStyle(SKY, "X"),
    "uniform": MethodStyle(OLIVE, "P"),
    "pool": MethodStyle(WINE, "p"),
    "none": MethodStyle(INDIGO, "h"),
    "without_top": MethodStyle(TEAL, "d"),
    "sparsevlm_without_top": MethodStyle(OLIVE, "<"),
    "sparsevlm_on_visionzip": MethodStyle(PINK, ">"),
}


def method_styles(labels: Iterable[str]) -> dict[str, MethodStyle]:
    """Return the style of each method and variant, by its label in tables (`fastv`, `fastv K=3`).

    The style depends on the label alone, unless two labels of one plot come to the same: then the later one in the
    alphabet takes the next style that is free.
    """
    styles: dict[str, MethodStyle] = {}
    for label in sorted(labels, key=lambda label: (label not in STYLES, label)):
        style = _style_of(label)
        taken = {*styles.values()}
        if style in taken:
            style = next(
                (other for other in _neighbours(style) if other not in taken), style
            )
        styles[label] = style
    return styles


def _style_of(label: str) -> MethodStyle:
    """Return a method's own style; of a variant the colour of its method and another marker."""
    name, _, options = label.partition(" ")
    style = STYLES.get(name) or MethodStyle(
        _pick(COLOURS, name), _pick(MARKERS, f"marker of {name}")
    )
    if not options:
        return style
    others = [marker for marker in MARKERS if marker != style.marker]
    return replace(style, marker=_pick(others, options), hollow=True)


def _pick(choices, text: str):
    """Return one of some choices, always the same one for a text."""
    return choices[crc32(text.encode()) % len(choices)]


def _neighbours(style: MethodStyle) -> Iterable[MethodStyle]:
    """Yield other styles, those of the same colour first."""
    start = COLOURS.index(style.colour) if style.colour in COLOURS else 0
    for colour, marker in product(COLOURS[start:] + COLOURS[:start], MARKERS):
        yield replace(style, colour=colour, marker=marker)
