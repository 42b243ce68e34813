"""Figures of the course's lessons: pictures in a row, curves, bars, and diagrams of coders and codecs."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from entroformer_lib.views.style import COLOURS, MARKERS, SEQUENTIAL, TWO_COLUMNS, new_figure, styled


@styled()
def pictures(
    panels: dict[str, np.ndarray],
    bar: str = "",
    columns: int = 4,
    height: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Arrays beside each other with a title each.

    Args:
        panels: {title: [H, W] or [H, W, 3]}. Pictures of bytes or of numbers in [0, 1] are shown in grey or colour.
        bar: unit of the maps. All [H, W] panels but those of bytes are then maps with a colour bar.
        height: inches of one row.
        limits: the values of all maps that have the first and the last colour; by default each map has its own.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    shape = next(iter(panels.values())).shape
    height = height or TWO_COLUMNS / columns * shape[0] / shape[1] * (0.8 if bar else 1) + 0.3
    figure, axes = new_figure(TWO_COLUMNS, rows * height, rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (title, values) in zip(axes.flat, panels.items(), strict=False):
        is_map = bool(bar) and values.ndim == 2 and values.dtype != np.uint8
        low, high = (limits or (None, None)) if is_map else (0, 255 if values.dtype == np.uint8 else 1)
        image = ax.imshow(values, SEQUENTIAL if is_map else "gray", interpolation="nearest", vmin=low, vmax=high)
        ax.set_title(title)
        if is_map:
            figure.colorbar(image, ax=ax, shrink=0.8, label=bar).outline.set_visible(False)
    return figure


@styled()
def masks(panels: dict[str, np.ndarray]) -> Figure:
    """What is seen around a site: squares that are filled where a mask is not 0, and a ring in the middle.

    Args:
        panels: {title: [side, side]}, an odd side.
    """
    figure, axes = new_figure(1.5 * len(panels), 1.7, 1, len(panels), squeeze=False)
    for ax, (title, mask) in zip(axes[0], panels.items(), strict=True):
        for row, column in np.ndindex(mask.shape):
            face = COLOURS[0] if mask[row, column] else "white"
            ax.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="0.6", linewidth=0.5))
        ring = "white" if mask[mask.shape[0] // 2, mask.shape[1] // 2] else COLOURS[1]
        ax.plot(mask.shape[1] / 2, mask.shape[0] / 2, "o", color=ring, markersize=5, fillstyle="none")
        ax.set(xlim=(-0.1, mask.shape[1] + 0.1), ylim=(mask.shape[0] + 0.1, -0.1), aspect="equal", title=title)
        ax.axis("off")
    return figure


@styled()
def tiles(patterns: np.ndarray, columns: int = 8, title: str = "") -> Figure:
    """Small patterns, each with its own grey scale around 0.  patterns: [n, side, side]"""
    rows = -(-len(patterns) // columns)
    figure, axes = new_figure(TWO_COLUMNS * 0.7, TWO_COLUMNS * 0.7 * rows / columns + 0.3, rows, columns, squeeze=False)
    for ax in axes.flat[len(patterns) :]:
        ax.axis("off")
    for ax, pattern in zip(axes.flat, patterns, strict=False):
        most = np.abs(pattern).max() or 1
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="0.7", linewidth=0.5)
        ax.imshow(pattern, cmap="gray", vmin=-most, vmax=most, interpolation="nearest")
    figure.suptitle(title, fontsize=8)
    return figure


@styled()
def curves(
    lines: dict[str, tuple], xlabel: str, ylabel: str, points: bool = True, log: str = "", best: bool = False
) -> Figure:
    """Lines with a legend.

    Args:
        lines: {name: (x, y)}; a single point is drawn as one.
        log: axes on a logarithmic scale: "", "x", "y" or "xy".
        best: marks the lowest point of each line.
    """
    figure, ax = new_figure(TWO_COLUMNS * 0.6, 2.6)
    for place, (name, (x, y)) in enumerate(lines.items()):
        x, y, colour = np.atleast_1d(x), np.atleast_1d(y), COLOURS[place % len(COLOURS)]
        marker = MARKERS[place % len(MARKERS)] if points else None
        ax.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
        if best:
            lowest = np.argmin(y)
            ax.plot(x[lowest], y[lowest], "o", color=colour, markersize=9, fillstyle="none")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    for axis in log:
        getattr(ax, f"set_{axis}scale")("log", base=2)
    if len(lines) > 1:
        ax.legend()
    return figure


@styled()
def bars(values: dict[str, float], xlabel: str, limit: float | None = None, limit_name: str = "") -> Figure:
    """A bar for each name, with its number: three decimals where all are below 1.  limit: a dashed line with a name"""
    figure, ax = new_figure(TWO_COLUMNS * 0.7, 0.3 * len(values) + 0.7)
    shown = ax.barh(list(values), list(values.values()), color=COLOURS[0], height=0.6)
    decimals = 3 if max(values.values()) < 1 else 2
    words = [f"{value:,.0f}" if value >= 100 else f"{value:.{decimals}f}" for value in values.values()]
    ax.bar_label(shown, words, label_type="center", color="white")
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, xlim=(0, 1.05 * max(values.values())))
    if limit is not None:
        ax.axvline(limit, color=COLOURS[1], linestyle="--", linewidth=1)
        ax.text(limit, -0.6, f"{limit_name} ", color=COLOURS[1], fontsize=7, ha="right", va="bottom")
    return figure


@styled()
def histograms(
    panels: dict[str, np.ndarray], xlabel: str, bins: np.ndarray | list[np.ndarray], density: bool = False
) -> Figure:
    """Histograms side by side on the same axes.

    Args:
        panels: {title: values of any shape}.
        bins: edges of the bars, of all panels or of each.
    """
    figure, axes = new_figure(TWO_COLUMNS, 2.0, 1, len(panels), sharex=True, sharey=True, squeeze=False)
    edges = bins if isinstance(bins, list) else [bins] * len(panels)
    for ax, (title, values), of_panel in zip(axes[0], panels.items(), edges, strict=True):
        ax.hist(np.ravel(values), bins=of_panel, color=COLOURS[0], density=density, edgecolor="white", linewidth=0.2)
        ax.set(title=title, xlabel=xlabel)
    axes[0, 0].set_ylabel("density" if density else "how often")
    return figure


@styled()
def intervals(probs: dict[str, float], message: str) -> Figure:
    """Diagram of a range coder: every symbol of a message narrows the interval to its own share.

    Args:
        probs: {symbol: probability}, in order.
        message: symbols, one letter each.
    """
    figure, ax = new_figure(TWO_COLUMNS * 0.8, 2.6)
    low, width, gap = 0.0, 1.0, 1.6
    for step in range(len(message) + 1):
        chosen = message[step] if step < len(message) else None
        start = 0.0
        for place, (symbol, prob) in enumerate(probs.items()):
            colour = COLOURS[place % len(COLOURS)]
            face = dict(facecolor=colour, alpha=0.75 if symbol == chosen else 0.2, edgecolor="white")
            ax.add_patch(Rectangle((step * gap, start), 0.7, prob, **face))
            ax.text(step * gap + 0.35, start + prob / 2, symbol, ha="center", va="center")
            if symbol == chosen:
                for edge, target in ((start, 0), (start + prob, 1)):
                    ax.plot([step * gap + 0.7, (step + 1) * gap], [edge, target], color="0.5", linewidth=0.7)
                next_low, next_width = low + width * start, width * prob
            start += prob
        title = f"[{low:.3f}, {low + width:.3f})\n{max(0.0, -np.log2(width)):.2f} bits"
        ax.text(step * gap + 0.35, -0.05, title, ha="center", va="top", fontsize=7)
        if chosen:
            low, width = next_low, next_width
    ax.set(xlim=(-0.1, len(message) * gap + 0.9), ylim=(-0.3, 1.02))
    ax.axis("off")
    return figure


Box = tuple[str, float, float]  # text, and the place of its middle: columns from the left, rows from the top


@styled()
def diagram(boxes: dict[str, Box], arrows: list[tuple[str, str, str]]) -> Figure:
    """Boxes and arrows between them.

    Args:
        boxes: {name: (text, column, row)}.
        arrows: (name, name, text beside the arrow).
    """
    columns = max(column for _, column, _ in boxes.values())
    rows = max(row for *_, row in boxes.values())
    figure, ax = new_figure(TWO_COLUMNS, 0.95 * (rows + 1))
    for text, column, row in boxes.values():
        style = dict(boxstyle="round,pad=0.02,rounding_size=0.08", facecolor="#eef3f8", edgecolor=COLOURS[0])
        ax.add_patch(FancyBboxPatch((column - 0.33, -row - 0.24), 0.66, 0.48, **style))
        ax.text(column, -row, text, ha="center", va="center", fontsize=7.5)
    for start, end, text in arrows:
        (_, c0, r0), (_, c1, r1) = boxes[start], boxes[end]
        across = c0 != c1
        tail = (c0 + 0.36 * np.sign(c1 - c0), -r0) if across else (c0, -r0 - 0.27 * np.sign(r1 - r0))
        head = (c1 - 0.36 * np.sign(c1 - c0), -r1) if across else (c1, -r1 + 0.27 * np.sign(r1 - r0))
        ax.annotate("", head, tail, arrowprops=dict(arrowstyle="->", color="0.3", shrinkA=0, shrinkB=0))
        middle = ((tail[0] + head[0]) / 2 + (0 if across else 0.05), (tail[1] + head[1]) / 2 + (0.07 if across else 0))
        ax.text(*middle, text, ha="center" if across else "left", va="bottom" if across else "center", fontsize=7)
    ax.set(xlim=(-0.45, columns + 0.45), ylim=(-rows - 0.4, 0.4))
    ax.axis("off")
    return figure
