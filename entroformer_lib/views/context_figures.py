"""What the context is worth: figure 3 of the paper, drawn from position_masking.json.

Functions that end in `_data` read the saved result, and give None where there is none. The others are pure functions
from a table to a figure.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from entroformer_lib.studies.results import load
from entroformer_lib.views.style import (
    COLOURS,
    ONE_COLUMN,
    SEQUENTIAL,
    TWO_COLUMNS,
    new_figure,
    points_and_means,
    styled,
)

# ---- figure 3 ----

MEASURES = {"missing": "over_pictures", "alone": "alone_over_pictures"}


def masking_data(measure: str = "missing") -> pd.DataFrame | None:
    """model, dy, dx, percent (mean over the pictures), spread, pictures, L1, L2, L-infinity.

    measure: missing (what the rate rises when the position is missing) or alone (what is saved when it alone is known).
    """
    saved = load("position_masking")
    return None if saved is None else pd.DataFrame(saved[MEASURES[measure]])


def alone_data() -> pd.DataFrame | None:
    """`masking_data` of positions that are known alone."""
    return masking_data("alone")


def masking_by_distance_data() -> pd.DataFrame | None:
    """Both, one below the other: measure ("missing" or "alone"), and the columns of `masking_data`."""
    if load("position_masking") is None:
        return None
    return pd.concat([masking_data(name).assign(measure=name) for name in MEASURES], ignore_index=True)


def beyond_data() -> pd.DataFrame | None:
    """model, radius, percent (mean over the pictures), spread."""
    saved = load("position_masking")
    if saved is None:
        return None
    rows = pd.DataFrame(saved["beyond"]).assign(percent=lambda table: 100 * (table["ratio"] - 1))
    grouped = rows.groupby(["model", "radius"], sort=False)["percent"]
    return grouped.agg(percent="mean", spread="std").reset_index()


@styled()
def masking_maps(data: pd.DataFrame, label: str = "rate increase, %") -> Figure:
    """A map for each model; positions that are no context stay empty.

    data: of `masking_data`
    """
    models = list(dict.fromkeys(data["model"]))
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    largest, reach = data["percent"].max(), int(data[["dy", "dx"]].abs().max().max())
    lowest = [  # causal models have no lower half
        data[data["model"].isin(models[i : i + columns])]["dy"].max() + 0.5 for i in range(0, len(models), columns)
    ]
    panel = min(1.6, (TWO_COLUMNS - 0.8) / columns) if columns > 2 else 2.7  # inches wide
    heights = [panel * (reach + 0.5 + low) / (2 * reach + 1) for low in lowest]
    size = (max(ONE_COLUMN, columns * panel + 0.8), max(1.9, sum(heights) + 0.28 * rows))
    figure, axes = new_figure(*size, rows, columns, squeeze=False, height_ratios=heights)
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    for i, (ax, model) in enumerate(zip(axes.flat, models, strict=False)):
        image = _map(ax, data[data["model"] == model], reach, largest, fontsize=4.5 if columns > 2 else 6)
        ax.set(title=model, ylim=(lowest[i // columns] + reach, -0.5))
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    ticks = [t for t in (0, 0.1, 1, 3, 10, 30, 100) if t <= largest]
    bar.set_ticks([_logarithm(t) for t in ticks], labels=[f"{t:g}" for t in ticks])
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure


def _map(ax, part: pd.DataFrame, reach: int, largest: float, fontsize: float):
    grid = np.full((2 * reach + 1, 2 * reach + 1), np.nan)
    grid[part["dy"] + reach, part["dx"] + reach] = part["percent"]
    image = ax.imshow(_logarithm(grid), cmap=SEQUENTIAL, vmin=_logarithm(0), vmax=_logarithm(largest))
    for dy, dx, percent in part[["dy", "dx", "percent"]].itertuples(index=False):
        colour = "k" if _logarithm(percent) > 0.6 * _logarithm(largest) else "w"
        ax.text(dx + reach, dy + reach, _short(percent), ha="center", va="center", fontsize=fontsize, color=colour)
    ax.plot(reach, reach, marker="x", color=COLOURS[1], markersize=5)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return image


def _logarithm(percent):
    return np.log10(0.1 + np.maximum(percent, 0))


def _short(percent: float) -> str:
    """A percentage in as few characters as can be: "1.2", ".34" or "0"."""
    if abs(percent) < 0.005:
        return "0"
    return f"{percent:.1f}" if abs(percent) >= 0.995 else f"{percent:.2f}".replace("0.", ".", 1)


def alone_maps(data: pd.DataFrame) -> Figure:
    """`masking_maps` of what a position saves alone."""
    return masking_maps(data, "rate saved alone, %")


@styled()
def masking_by_distance(data: pd.DataFrame) -> Figure:
    """Percent against the three distances, a colour for each model, with the mean at each distance as a line.

    data: of `masking_by_distance_data`
    """
    norms = ("L1", "L2", "L-infinity")
    labels = {"missing": "rate increase when missing, %", "alone": "rate saved alone, %"}
    figure, axes = new_figure(TWO_COLUMNS, 4.4, 2, 3, sharey="row", sharex="col")
    for row, (measure, label) in zip(axes, labels.items(), strict=True):
        for ax, norm in zip(row, norms, strict=True):
            part = data[data["measure"] == measure]
            points_and_means(ax, part, norm, "percent", "model", legend=ax is axes[0, -1])
            ax.axhline(0, color="0.7", linewidth=0.6)
            ax.set(xlabel=f"{norm} distance, latents" if measure == "alone" else "", ylabel=label)
        row[0].set_yscale("symlog", linthresh=0.1 if measure == "missing" else 2)
    axes[0, -1].legend(loc="upper right", fontsize=5.5)
    return figure


@styled()
def beyond_curve(data: pd.DataFrame) -> Figure:
    """Rate when everything beyond a distance is masked, against that distance.

    data: of `beyond_data`
    """
    figure, ax = new_figure(ONE_COLUMN * 1.4, 2.8)
    points_and_means(ax, data, "radius", "percent", "model")
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set(xlabel="L1 distance up to which the context is known, latents", ylabel="rate against all context, %")
    ax.legend()
    return figure
