"""Plots of the attention that patches receive, in the style of those of tables. Imports no torch."""

from __future__ import annotations

import math
from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from zipeval.reporting.method_styles import COLOURS, INK, MARKERS
from zipeval.reporting.plots import FIGURE, LINE, STYLE, Plot

BINS = 60
# Layers of an overlay, at most.
COLUMNS = 6
# Inches of overlays in height, which the label of their colours takes.
LEAST = 2.0
# Opacity of a heat map over its picture.
OVER = 0.7
# Of logarithmic axes: STYLE has matplotlib's mathematics off.
PLAIN = StrMethodFormatter("{x:,g}")
# Layers between the marks of two measures, so that no interval hides another.
APART = 0.08
NAMES = {
    "gini": "Gini coefficient",
    "top10": "share of the top 10% of tokens",
    "entropy": "entropy / maximum (1: all equal)",
}


def plots(
    attention: np.ndarray,
    measured: dict[str, np.ndarray],
    pictures: list[bytes],
    read_at: int,
    sender: str,
) -> list[Plot]:
    """Return the histogram, the curves by layer, and the overlays.

    Args:
        attention: (images, layers, patches) that patches receive, of all that `sender` gives 1.
        measured: (images, layers) by the name of the measure.
        pictures: JPEG files of the first images.
        read_at: layer, counted from 0, whose output is the model's features.
        sender: whose attention it is.
    """
    about = f"attention that tokens receive from {sender}"
    with matplotlib.rc_context(STYLE):
        return [
            Plot(
                "histogram",
                f"Histogram of the {about}",
                histogram(attention[:, read_at], read_at, sender),
            ),
            Plot(
                "layers",
                f"Concentration of the {about}, by layer",
                curves(measured, read_at),
            ),
            Plot(
                "overlays",
                f"The {about}, over some images",
                overlays(attention, pictures, read_at),
            ),
        ]


def histogram(attention: np.ndarray, read_at: int, sender: str) -> Figure:
    """Draw how many tokens receive how much attention, logarithmically.

    Args:
        attention: (images, patches).
    """
    figure = Figure(FIGURE, layout="constrained")
    axes = figure.add_subplot()
    # On a linear axis all but the many tokens in the first bin would vanish.
    axes.hist(
        attention.ravel(), BINS, (0, float(attention.max())), color=COLOURS[0], log=True
    )
    mean = attention.mean()
    axes.axvline(mean, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    # Few tokens receive most of it, as Figure 2 of VisionZip shows.
    below = 100 * (attention < mean).mean()
    axes.annotate(
        f"mean; {below:.0f}% of the tokens are below",
        (mean, 1),
        (4, -1),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
    )
    axes.set(
        xlabel=f"attention received from {sender} (layer {read_at + 1}, mean over heads)",
        ylabel=f"visual tokens of {len(attention)} image{'s' * (len(attention) > 1)}",
        ylim=(0.7, None),
    )
    axes.yaxis.set_major_formatter(PLAIN)
    axes.margins(x=0)
    return figure


def curves(measured: dict[str, np.ndarray], read_at: int) -> Figure:
    """Draw the measures by layer: mean and standard deviation over the images."""
    figure = Figure(FIGURE, layout="constrained")
    axes = figure.add_subplot()
    # [images, layers]
    count, layers = next(iter(measured.values())).shape
    axes.axvline(
        read_at + 1, color=LINE, linewidth=4, label="features are read here", zorder=1
    )
    for i, ((name, values), colour, marker) in enumerate(
        zip(measured.items(), COLOURS, MARKERS, strict=False)
    ):
        # Beside each other, around the layer's number.
        x = np.arange(1, layers + 1) + APART * (i - 1)
        options = {
            "color": colour,
            "marker": marker,
            "markersize": 4,
            "linewidth": 1,
            "elinewidth": 0.8,
        }
        axes.errorbar(
            x,
            values.mean(0),
            values.std(0),
            label=NAMES[name],
            capsize=1.5,
            zorder=2,
            **options,
        )
    axes.set(
        xlabel="layer of the vision encoder",
        ylabel=f"measure (0 to 1), mean and\nstandard deviation of {count} image{'s' * (count > 1)}",
    )
    # Skewed ones have intervals beyond 0 and 1, which are to be seen whole.
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), max(1.02, high))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=LINE, linewidth=0.4)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.6)
    return figure


def overlays(attention: np.ndarray, pictures: list[bytes], read_at: int) -> Figure:
    """Draw pictures, and the attention of their tokens in some layers, the one that features are read at among them.

    Colours are logarithmic, and the same in all of them.
    """
    side = math.isqrt(attention.shape[2])
    shown = _shown_layers(attention.shape[1], read_at)
    # [images, layers, patches], times the mean of the picture in that layer.
    attention = attention[: len(pictures)]
    relative = attention / attention.mean(-1, keepdims=True)
    norm = LogNorm(0.1, max(10, float(relative[:, shown].max())), clip=True)
    height = max(LEAST, 1.05 * len(pictures) + 0.2)
    figure = Figure((1.05 * (len(shown) + 1) + 0.8, height), layout="constrained")
    cells = figure.subplots(len(pictures), len(shown) + 1, squeeze=False)
    # One row for each picture: itself, and then the layers.
    for axes in cells.flat:
        axes.set_axis_off()
    for row, picture, layers in zip(cells, pictures, relative, strict=True):
        image = np.asarray(Image.open(BytesIO(picture)))
        # The picture itself, and beside it the layers.
        row[0].imshow(image)
        for axes, layer in zip(row[1:], shown, strict=True):
            heat = layers[layer].reshape(side, side)
            colours = _draw_overlay(axes, image, heat, norm)
    for axes, layer in zip(cells[0, 1:], shown, strict=True):
        suffix = " (features)" if layer == read_at else ""
        axes.set_title(f"layer {layer + 1}{suffix}", fontsize=7)
    bar = figure.colorbar(colours, ax=cells, aspect=30, format=PLAIN)
    bar.set_label("attention received,\ntimes the picture's mean")
    return figure


def _shown_layers(count: int, read_at: int) -> list[int]:
    """Return some of `count` layers, evenly spaced, with the one that features are read at in place of the last."""
    evenly = np.linspace(0, count - 1, min(count, COLUMNS)).round().astype(int)
    return sorted({*evenly.tolist()[:-1], read_at})


def _draw_overlay(axes, image: np.ndarray, heat: np.ndarray, norm: LogNorm):
    """Draw a heat map (side, side) over a picture in grey; returns what a colour bar is made of."""
    height, width = image.shape[:2]
    axes.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
    return axes.imshow(
        heat,
        cmap="viridis",
        norm=norm,
        alpha=OVER,
        # matplotlib counts from the centre of the first pixel.
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )
