"""One look for all figures: widths of one and two columns, colours that print and that everybody can tell apart."""

import io
import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMNS = 3.35, 7.2  # inches: 8.5 cm and 18.3 cm
# Okabe and Ito's palette, dark ones first
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREYS = ("0.25", "0.45", "0.6", "0.35", "0.55")  # for what is not ours
SEQUENTIAL = "cividis"  # for maps: even in grey, the same to colour-blind readers
DIVERGING = "RdBu_r"  # for maps of what may be above or below 0
FROM_ZERO = "Reds"  # for maps with numbers in them of what is above 0

MARKERS = "osD^vPX*<>h"

RC = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "svg.hashsalt": "entroformer",  # the same figure gives the same file
}


def styled():
    """This style for what is drawn inside: `with styled():` in a notebook, `@styled()` before a function."""
    return matplotlib.rc_context(RC)


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with styled():
            self.savefig(buffer, format="png", dpi=RC["figure.dpi"])
        return buffer.getvalue()


def points_and_means(ax, data, x: str, y: str, by: str, legend: bool = True, order=()) -> None:
    """Every row as a pale point, and a line through the means at each x; a colour and a marker for each value of `by`.

    order: of all values that may occur, so that each has its look whichever others are shown; by default of the data.
    Set a scale of the axis after it: seaborn would take the means on that scale.
    """
    import seaborn

    order, there = list(order) or list(dict.fromkeys(data[by])), set(data[by])
    cycles = ((cycle * len(order))[: len(order)] for cycle in ((*COLOURS, "0.5", "#7a4a21"), MARKERS))
    looks = {name: pair for name, *pair in zip(order, *cycles, strict=True) if name in there}
    names, (colours, markers) = list(looks), zip(*looks.values(), strict=True)
    look = dict(x=x, y=y, hue=by, hue_order=names, style=by, style_order=names, palette=list(colours), ax=ax)
    look["markers"] = dict(zip(names, markers, strict=True))
    seaborn.scatterplot(data, **look, s=9, alpha=0.4, linewidth=0, legend=False)
    line = dict(dashes=False, errorbar=None, linewidth=1, markersize=4, markeredgewidth=0)
    seaborn.lineplot(data, **look, **line, legend=legend)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **subplots):
    """A figure and its axes. width, height: inches."""
    figure = NotebookFigure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **subplots)


def label_ends(ax, ends: list[tuple[float, float, str, str]], x: float, gap: float) -> None:
    """Names at the right ends of curves, moved apart until none covers another.  ends: (y, x, text, colour) of each"""
    free = np.inf
    for y, end, text, colour in sorted(ends, reverse=True):
        free = min(y, free - gap)
        options = dict(color=colour, fontsize=6, va="center", annotation_clip=False)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        ax.annotate(text, (end, y), xytext=(1.04 * x, free), arrowprops=line, **options)


def label_points(ax, x, y, texts, colour: str = "0.35") -> None:
    """A text beside each point, moved until it covers no other text and no point; x, y, texts: of each point.

    Call it when the axes have their limits. A thin line joins a text with its point where it had to go far.
    """
    from adjustText import adjust_text

    ax.figure.draw_without_rendering()  # now the axes stand where they will be
    x, y = list(x), list(y)
    labels = [ax.text(*place, fontsize=6, color=colour) for place in zip(x, y, texts, strict=True)]
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.4}
    # The number of steps is fixed, and no clock: the same figure gives the same file.
    adjust_text(labels, x, y, ax=ax, iter_lim=150, min_arrow_len=8, expand=(1.5, 1.5), arrowprops=line)


def save(figure: Figure, name: str, formats: tuple[str, ...] = ("png",)) -> list[Path]:
    """Writes a figure into the folder ENTROFORMER_FIGURES, which `make figures` sets; elsewhere it writes nothing."""
    folder = os.environ.get("ENTROFORMER_FIGURES")
    if not folder:
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    return write(figure, Path(folder), name, formats)


def write(figure: Figure, folder: Path, name: str, formats: tuple[str, ...]) -> list[Path]:
    """Writes a figure into a folder; the same figure gives the same files."""
    paths = [folder / f"{name}.{ending}" for ending in formats]
    with styled():
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, metadata=metadata)
    return paths
