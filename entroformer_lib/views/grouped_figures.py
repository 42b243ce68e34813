"""How GroupedMixer works, in figures: its groups, what each mixer sees. No model runs in here."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter

from entroformer_lib.models.groupedmixer import Counts, group_order, windows
from entroformer_lib.views.style import COLOURS, SEQUENTIAL, TWO_COLUMNS, new_figure, styled

ORDERS = {
    "channels": "channels: slice by slice,\ndiagonal phases first",
    "raster": "raster: slice by slice,\nphases row by row",
    "sites": "sites: phase by phase,\nin each all slices",
}
UNSEEN, SEEN, TOKEN = "0.92", COLOURS[4], COLOURS[1]


# ---- groups ----


def group_numbers(counts: Counts, order: str, size: tuple[int, int]) -> np.ndarray:
    """Which group a latent belongs to, counted from 0 in the order of coding.

    size: rows and columns of latents  ->  [k_c, rows, columns]
    """
    numbers = np.empty((counts[0], *size), dtype=int)
    for g, (s, i, j) in enumerate(group_order(counts, order)):
        numbers[s, i :: counts[1], j :: counts[2]] = g
    return numbers


@styled()
def tiling(counts: Counts, orders: Iterable[str] = tuple(ORDERS)) -> Figure:
    """A corner of the latents, slice below slice: in each cell the number of its group, counted from 0 as it is coded.
    A column for each order; a white frame around each k_h x k_w latents.
    """
    orders = list(orders)
    k_c, k_h, k_w = counts
    size = (2 * k_h, 2 * k_w)
    panel = TWO_COLUMNS / max(3, len(orders)) - 0.45  # inches wide
    height = k_c * (panel * size[0] / size[1] * 0.62 + 0.08) + 0.75
    figure, axes = new_figure(TWO_COLUMNS, height, k_c, len(orders), squeeze=False)
    G = k_c * k_h * k_w
    for column, order in enumerate(orders):
        numbers = group_numbers(counts, order, size)
        for s, ax in enumerate(axes[:, column]):
            image = ax.imshow(numbers[s], cmap=SEQUENTIAL, vmin=0, vmax=G - 1, aspect="auto")
            for (row, at), number in np.ndenumerate(numbers[s]):
                colour = "k" if number > 0.6 * (G - 1) else "w"
                ax.text(at, row, number, ha="center", va="center", color=colour)
            for row in range(0, size[0], k_h):
                for at in range(0, size[1], k_w):
                    ax.add_patch(Rectangle((at - 0.5, row - 0.5), k_w, k_h, fill=False, edgecolor="w", linewidth=2.5))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if column == 0:
                ax.set_ylabel(f"slice {s}")
        axes[0, column].set_title(ORDERS.get(order, order))
    for ax in axes[-1]:
        ax.set_xlabel("columns of latents")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_ticks(sorted({0, (G - 1) // 2, G - 1}))
    bar.set_label("group, in the order of coding")
    bar.outline.set_visible(False)
    return figure


# ---- the inner mixer's windows ----


def seen_in_windows(grid: tuple[int, int], side: int, place: tuple[int, int], layers: Iterable[int]) -> np.ndarray:
    """The places of a group from which something reaches the token at `place` through inner mixers one after the other.

    grid: rows and columns of the group; side: of a window; layers: their numbers, first to last  ->  bool [rows,
    columns]
    """
    seen = np.zeros(grid[0] * grid[1], dtype=bool)
    seen[place[0] * grid[1] + place[1]] = True
    for layer in reversed(list(layers)):
        for window in windows(*grid, side, side // 2 * (layer % 2))[0].numpy():
            inside = window[window >= 0]
            seen[inside] |= seen[inside].any()
    return seen.reshape(grid)


@styled()
def inner_windows(grid: tuple[int, int], side: int, place: tuple[int, int]) -> Figure:
    """Windows of the inner mixer in even and odd layers, and what a token sees through both.

    grid: rows and columns of a group; place: of the token
    """
    figure, axes = new_figure(TWO_COLUMNS, TWO_COLUMNS / 3 * grid[0] / grid[1] + 0.75, 1, 3, sharey=True)
    panels = (
        ("windows of layers 0, 2, …", (0,)),
        ("windows of layers 1, 3, …", (1,)),
        ("layer 0, then layer 1", (0, 1)),
    )
    colours = ListedColormap([UNSEEN, SEEN, TOKEN])
    for ax, (title, layers) in zip(axes, panels, strict=True):
        shown = seen_in_windows(grid, side, place, layers).astype(int)
        shown[place] = 2
        ax.imshow(shown, cmap=colours, vmin=0, vmax=2)
        if len(layers) == 1:
            start = side // 2 * (layers[0] % 2)
            for at in range(-start, grid[0] + 1, side):
                ax.axhline(at - 0.5, color="0.3", linewidth=1)
            for at in range(-start, grid[1] + 1, side):
                ax.axvline(at - 0.5, color="0.3", linewidth=1)
        ax.set(title=title, xlabel="column of the group", xlim=(-0.5, grid[1] - 0.5), ylim=(grid[0] - 0.5, -0.5))
    axes[0].set_ylabel("row of the group")
    entries = ((TOKEN, "a token"), (SEEN, "what reaches it"), (UNSEEN, "what does not"))
    figure.legend(
        [Patch(facecolor=c) for c, _ in entries], [w for _, w in entries], loc="outside lower center", ncols=3
    )
    return figure


# ---- attention of a model ----


@styled()
def cross_maps(cross: np.ndarray, every: int = 4) -> Figure:
    """How much each slot looks at earlier ones, for each layer and head, the mean over places. S is the learned
    start; the first row has nothing else to look at and sets no scale.

    Args:
        cross: [layers, heads, G, G]: layer, head, slot that looks, slot looked at.
        every: groups between two lines: those of a slice, or of a phase.
    """
    layers, heads, G, _ = cross.shape
    panel = (TWO_COLUMNS - 0.9) / max(heads, 3)
    figure, axes = new_figure(TWO_COLUMNS, layers * panel + 0.5, layers, heads, squeeze=False, sharex=True, sharey=True)
    later = np.triu(np.ones((G, G), dtype=bool), 1)
    norm = PowerNorm(0.5, 0, cross[:, :, 1:].max(), clip=True)
    firsts = list(range(0, G, every))
    for (layer, head), ax in np.ndenumerate(axes):
        image = ax.imshow(np.where(later, np.nan, cross[layer, head]), cmap=SEQUENTIAL, norm=norm)
        for at in firsts:  # slot i predicts group i, and slot i + 1 holds it
            ax.plot([-0.5, at + 0.5], [at - 0.5] * 2, color="w", linewidth=0.5)
            ax.plot([at + 0.5] * 2, [at + 0.5, G - 0.5], color="w", linewidth=0.5)
        ax.set_xticks([0, *(at + 1 for at in firsts if at + 1 < G)], ["S", *(at for at in firsts if at + 1 < G)])
        ax.set_yticks(firsts, firsts)
        ax.set_title(f"layer {layer}, head {head}")
    for ax in axes[-1]:
        ax.set_xlabel("group looked at; S: the start")
    for ax in axes[:, 0]:
        ax.set_ylabel("group predicted")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_ticks([*(at for at in (0, 0.05, 0.25, 0.5, 1) if at <= 0.8 * norm.vmax), norm.vmax])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.set_label("attention, mean over all places (square-root scale)")
    bar.outline.set_visible(False)
    return figure


def cross_shares(cross: np.ndarray, order: list[tuple[int, int, int]]) -> pd.DataFrame:
    """Of what a cross mixer's attention consists, in percent, the mean over the slots after the first two.

    cross: [layers, heads, G, G]; order: of `group_order`. A row for each layer and head: the last group (which the own
    slot holds), the start, and of the other groups those of the predicted slice, of the predicted phase, of neither.
    """
    layers, heads, G, _ = cross.shape
    kinds = ["last group", "start", "same slice", "same phase", "neither"]
    looks, looked_at = np.tril_indices(G)
    looks, looked_at = looks[looks > 1], looked_at[looks > 1]
    same_slice, *same_phase = (part[looked_at - 1] == part[looks] for part in np.array(order).T)
    tests = [looked_at == looks, looked_at == 0, same_slice, np.all(same_phase, axis=0)]
    index = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
    table = pd.DataFrame(cross[:, :, looks, looked_at].reshape(layers * heads, -1).T, columns=index)
    sums = table.groupby(np.select(tests, kinds[:4], kinds[4])).sum().T
    return 100 * sums.reindex(columns=kinds, fill_value=0.0) / max(G - 2, 1)


def even_attention(cross: np.ndarray) -> np.ndarray:
    """What `cross` would be if each slot looked at all that it may see alike."""
    G = cross.shape[-1]
    return np.broadcast_to(np.tril(np.ones((G, G))) / np.arange(1, G + 1)[:, None], cross.shape)
