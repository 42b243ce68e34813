"""What the context is worth: figure 3 of the paper, drawn from position_masking.json.

Functions that end in `_data` read the saved result, and raise NoResult where there is none. The others are pure
functions from a table to a figure.
"""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entroformer_lib.studies.results import POSITION_NAMES, needed, of_mean_rates
from entroformer_lib.views.style import (
    DIVERGING,
    FROM_ZERO,
    ONE_COLUMN,
    TWO_COLUMNS,
    new_figure,
    points_and_means,
    styled,
)

# ---- figure 3 ----

PLACE = ["model", "dy", "dx"]
MEASURES = {"missing": "over_pictures", "alone": "alone_over_pictures"}


def masking_data(measure: str = "missing") -> pd.DataFrame:
    """model, dy, dx, percent (of the mean rates), spread, pictures, L1, L2, L-infinity; without positions that a model
    cannot see, which change no bit.

    measure: missing (what the rate rises when the position is missing) or alone (what is saved when it alone is known).
    """
    saved = {name: pd.DataFrame(needed("position_masking")[key]) for name, key in MEASURES.items()}
    places = [
        tuple(row) for one in saved.values() for row in one.loc[one["percent"] != 0, PLACE].itertuples(index=False)
    ]
    data = saved[measure]
    seen = pd.MultiIndex.from_frame(data[PLACE]).isin(places)
    return data[seen].reset_index(drop=True)


def masking_by_distance_data() -> pd.DataFrame:
    """Both, one below the other: measure ("missing" or "alone"), and the columns of `masking_data`."""
    return pd.concat([masking_data(name).assign(measure=name) for name in MEASURES], ignore_index=True)


def beyond_data() -> pd.DataFrame:
    """model, radius, percent (of the mean rates), spread, pictures."""
    rows = pd.DataFrame(needed("position_masking")["beyond"])
    return of_mean_rates(rows, ["model", "radius"], "bpp_all", "bpp_masked")


NAMES = POSITION_NAMES | {  # of models in position_masking.json: how figures call them
    "hyper-parallel-none": "two passes, no positions",
    "hyper-parallel-diamond": "two passes, diamond",
    "blocks-parallel@0.014": "blocks-parallel, shipped",
}
LABELS = {"missing": "rate increase when missing, %", "alone": "rate saved alone, %"}
CODED = "x: the latent to be coded"


def _plain(data: pd.DataFrame) -> pd.DataFrame:
    return data.assign(model=data["model"].replace(NAMES))


def two_measures(data: pd.DataFrame) -> Figure:
    """Figure 3: what a position costs when it is missing, and what it saves alone, in the model without positions, as
    in the paper; where there is none, in the last.

    data: of `masking_by_distance_data`
    """
    model = "none" if (data["model"] == "none").any() else data["model"].iloc[-1]
    parts = {label: data[(data["model"] == model) & (data["measure"] == name)] for name, label in LABELS.items()}
    figure = _maps(parts, rings=True)
    figure.suptitle(
        f"model: {NAMES.get(model, model)}; {CODED}\nframed: L1 distance up to 1, 2 and 3 latents", fontsize=7
    )
    return figure


def masking_maps(data: pd.DataFrame, measure: str = "missing", of: str | None = None) -> Figure:
    """A map for each model; positions that are no context stay empty.

    data: of `masking_data` of the same measure; of: what was measured, for the title
    """
    of = of or f"{data['pictures'].max()} pictures"
    parts = dict(iter(_plain(data).groupby("model", sort=False)))
    figure = _maps(parts, LABELS[measure])
    figure.suptitle(f"{of}; {CODED}", fontsize=7)
    return figure


@styled()
def _maps(parts: dict[str, pd.DataFrame], label: str | None = None, rings: bool = False) -> Figure:
    """Maps of percent: on a symmetric scale, logarithmic but around 0 and blue below it; on a plain one from 0 where
    nothing is below.

    Args:
        parts: title, and the positions of one map.
        label: of the one scale; None: each map has its own, which its title names.
        rings: frame the positions up to an L1 distance of 1, 2 and 3.
    """
    columns = 1 if label is None else min(3, len(parts))
    rows, reach = -(-len(parts) // columns), max(int(part[["dy", "dx"]].abs().max().max()) for part in parts.values())
    tables = list(parts.values())
    lowest = [  # causal models have no lower half
        max(part["dy"].max() for part in tables[i : i + columns]) + 0.5 for i in range(0, len(tables), columns)
    ]
    width = ONE_COLUMN if columns < 3 else TWO_COLUMNS
    panel = (width - 0.75) / columns
    heights = [panel * (reach + 0.5 + low) / (2 * reach + 1) for low in lowest]
    figure, axes = new_figure(width, sum(heights) + 0.3 * rows, rows, columns, squeeze=False, height_ratios=heights)
    for ax in axes.flat[len(parts) :]:
        ax.set_visible(False)
    for i, (ax, (title, part)) in enumerate(zip(axes.flat, parts.items(), strict=False)):
        shared = [part] if label is None else tables
        most = max(one["percent"].abs().max() for one in shared)
        plain = min(one["percent"].min() for one in shared) > 0
        image = _map(ax, part, reach, Normalize(0, most) if plain else SymLogNorm(0.1, vmin=-most, vmax=most))
        ax.set(title=title, ylim=(lowest[i // columns] + reach, -0.5))
        for radius in (1, 2, 3) if rings else ():
            near = set(
                part[part["dy"].abs() + part["dx"].abs() <= radius][["dy", "dx"]].itertuples(index=False, name=None)
            )
            lines = LineCollection(_outline(near, reach), colors="black", linewidths=0.9, capstyle="projecting")
            ax.add_collection(lines, autolim=False)
        if label is None or i == len(parts) - 1:
            bar = figure.colorbar(image, ax=axes if label else ax, pad=0.01)
            ticks = [t for t in (range(0, 101, 5 if most < 25 else 10) if plain else SYMLOG_TICKS) if abs(t) <= most]
            bar.set_ticks(ticks, labels=[f"{t:+g}" if t else "0" for t in ticks])
            bar.ax.minorticks_off()
            words = (label or "%") + ("" if plain else " (logarithmic above 0.1)")
            bar.set_label(textwrap.fill(words, 18 if rows == 1 and label else 40))  # one row of maps is low
            bar.outline.set_visible(False)
    return figure


SYMLOG_TICKS = (-10, -1, -0.1, 0, 0.1, 1, 10, 100)


def _outline(cells: set[tuple[int, int]], reach: int) -> list:
    """The border of some cells, along their sides, so that no number is crossed; not towards the cell to be coded."""
    sides = []
    for dy, dx in cells:
        for y, x in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if (dy + y, dx + x) not in {*cells, (0, 0)}:
                middle = np.array([dx + x / 2, dy + y / 2]) + reach
                along = np.array([y, x]) / 2
                sides.append((middle - along, middle + along))
    return sides


def _map(ax, part: pd.DataFrame, reach: int, scale: Normalize):
    grid = np.full((2 * reach + 1, 2 * reach + 1), np.nan)
    grid[part["dy"] + reach, part["dx"] + reach] = part["percent"]
    plain = scale.vmin == 0
    image = ax.imshow(grid, cmap=FROM_ZERO if plain else DIVERGING, norm=scale)
    for dy, dx, percent in part[["dy", "dx", "percent"]].itertuples(index=False):
        colour = "w" if (scale(percent) > 0.6 if plain else abs(scale(percent) - 0.5) > 0.3) else "k"
        ax.text(dx + reach, dy + reach, _short(percent), ha="center", va="center", fontsize=6, color=colour)
    ax.plot(reach, reach, marker="x", color="k", markersize=5)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return image


def _short(percent: float) -> str:
    """A percentage in as few characters as can be: "+1.2", "-.34" or "0"; the sign is for those who print in grey."""
    if abs(percent) < 0.005:
        return "0"
    return f"{percent:+.1f}" if abs(percent) >= 0.995 else f"{percent:+.2f}".replace("0.", ".", 1)


@styled()
def masking_by_distance(data: pd.DataFrame) -> Figure:
    """Percent against the three distances, a colour for each model, with the mean at each distance as a line.

    data: of `masking_by_distance_data`
    """
    data, norms = _plain(data), ("L1", "L2", "L-infinity")
    figure, axes = new_figure(TWO_COLUMNS, 4.4, 2, 3, sharey="row", sharex="col")
    for row, (measure, label) in zip(axes, LABELS.items(), strict=True):
        for ax, norm in zip(row, norms, strict=True):
            part = data[data["measure"] == measure]
            points_and_means(ax, part, norm, "percent", "model", legend=ax is axes[0, -1])
            ax.axhline(0, color="0.7", linewidth=0.6)
            ax.set(xlabel=f"{norm} distance, latents" if measure == "alone" else "", ylabel=label)
        if measure == "missing":
            row[0].set_yscale("symlog", linthresh=0.1)
            row[0].yaxis.set_major_formatter("{x:g}")
            row[0].set_ylabel(f"{label}\n(logarithmic above 0.1)", fontsize=7)
            row[0].set_ylim(top=1.4 * data[data["measure"] == measure]["percent"].max())  # room for whole markers
    handles, words = axes[0, -1].get_legend_handles_labels()
    axes[0, -1].get_legend().remove()
    title = "pale points: single positions; lines: means at each distance"
    figure.legend(handles, words, loc="outside lower center", ncols=4, fontsize=6, title=title, title_fontsize=6)
    for ax in axes[-1]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled()
def beyond_curve(data: pd.DataFrame) -> Figure:
    """Rate when everything beyond a distance is masked, against that distance.

    data: of `beyond_data`
    """
    figure, ax = new_figure(ONE_COLUMN, 3.6)
    points_and_means(ax, _plain(data), "radius", "percent", "model")
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_formatter("{x:g}")
    words = "rate against all context, %\n(logarithmic above 1)"
    ax.set(xlabel="L1 distance up to which context is known, latents", ylabel=words)
    ax.set_ylim(top=1.4 * data["percent"].max())  # room for whole markers
    handles, words = ax.get_legend_handles_labels()
    ax.get_legend().remove()
    title = "pale points: single runs; lines: means" if (data.groupby(["model", "radius"]).size() > 1).any() else None
    figure.legend(handles, words, loc="outside lower center", ncols=2, title=title)
    return figure
