"""Figures of the ablations beside the paper's numbers: pure functions from tables to a figure."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from entroformer_lib.views.paper_data import POSITIONS
from entroformer_lib.views.style import COLOURS, ONE_COLUMN, TWO_COLUMNS, new_figure, styled

PUBLISHED = "published"
MARKERS = "osD^v"


@styled
def dots(data: pd.DataFrame, label: str) -> Figure:
    """A line for each row, a point for each seed, a tick for their mean; what is published is grey and hollow.

    Args:
        data: row, source (PUBLISHED, or where our number comes from), value.
        label: of the axis of values.
    """
    rows, sources = (list(dict.fromkeys(data[column])) for column in ("row", "source"))
    figure, ax = new_figure(TWO_COLUMNS * 0.75, 0.5 + 0.32 * len(rows))
    ours = [source for source in sources if source != PUBLISHED]
    for source, part in data.groupby("source", sort=False):
        place = (sources.index(source) - (len(sources) - 1) / 2) * 0.22
        y = part["row"].map(rows.index) + place
        if source == PUBLISHED:
            style = dict(color="0.4", marker="d", markerfacecolor="none")
        else:
            i = ours.index(source)
            style = dict(color=COLOURS[i], marker=MARKERS[i], alpha=0.8)
            for row, mean in part.groupby("row")["value"].mean().items():
                ax.plot(mean, rows.index(row) + place, "|", color=COLOURS[i], markersize=9)
        ax.plot(part["value"], y, linestyle="", markersize=4, label=source, **style)
    if data["value"].min() < 0 < data["value"].max() or (data["value"] == 0).any():
        ax.axvline(0, color="0.7", linewidth=0.8)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    if len(sources) > 1:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def k_at_test(rows: pd.DataFrame) -> Figure:
    """Rate against the k used at test time, a line for each k of training; a ring where both are the same.

    rows: top_k (of training; nan: dense), k_at_test, bpp, seed
    """
    trained, tested = (rows[column].fillna(np.inf) for column in ("top_k", "k_at_test"))
    rows = rows.assign(top_k=trained, k_at_test=tested)
    values = sorted(tested.unique())
    figure, ax = new_figure(ONE_COLUMN * 1.5, 2.8)
    for i, (k, part) in enumerate(rows.groupby("top_k")):
        mean = part.groupby("k_at_test")["bpp"].mean()
        place = [values.index(value) for value in mean.index]
        colour, name = COLOURS[i % len(COLOURS)], "dense" if np.isinf(k) else f"k = {k:g}"
        ax.plot(place, mean, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=3, label=name)
        if k in mean.index:
            ax.plot(values.index(k), mean[k], "o", color=colour, markersize=8, markerfacecolor="none")
    ax.set_xticks(range(len(values)), ["dense" if np.isinf(value) else f"{value:g}" for value in values])
    ax.set(xlabel="k at test time", ylabel="bits per pixel")
    ax.legend(title="trained with", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def sizes(rows: pd.DataFrame) -> Figure:
    """Rate against the side of the picture, a line for each position encoding, a point for each seed.

    rows: size (pixels), position, bpp, seed
    """
    figure, ax = new_figure(ONE_COLUMN * 1.3, 2.6)
    for i, (position, part) in enumerate(rows.groupby("position", sort=False)):
        mean = part.groupby("size")["bpp"].mean()
        ax.plot(part["size"], part["bpp"], MARKERS[i], color=COLOURS[i], markersize=4)
        ax.plot(mean.index, mean, color=COLOURS[i], marker=MARKERS[i], markersize=4, label=position)
    ax.set_xticks(sorted(rows["size"].unique()))
    ax.set(xlabel="side of the picture, pixels", ylabel="bits per pixel")
    ax.legend(title="position encoding", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def table1_dots(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """`dots` of table 1: saving over the convolution in percent, of whole pictures and of parts as large as the crops.

    rows: of the grid; table: of `paper_data.table1_data`
    """
    convolution, found = rows["context"] == "cnn", []
    for one, position in zip(table.itertuples(), ("cnn", *POSITIONS), strict=True):
        row = "convolution" if position == "cnn" else one.position
        found.append((row, PUBLISHED, one.published_saving_percent))
        kind = convolution if position == "cnn" else rows["position"].eq(position) & ~convolution
        for source, column in (("here, whole pictures", "bpp"), ("here, 256 x 256 pixels", "bpp_middle")):
            base = rows[convolution][column].mean()
            found += [(row, source, 100 * (1 - bpp / base)) for bpp in rows[kind][column]]
    return pd.DataFrame(found, columns=["row", "source", "value"])


def table3_dots(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """`dots` of table 3: what a context saves of the second slice's bits against the hyperprior alone, in percent.

    table: of `paper_data.table3_data`; rows: of the grid, one model with both directions
    """
    alone = table["context"].iloc[0]
    published = table.set_index("context")["published_bpp"]
    found = [(c, PUBLISHED, 100 * (1 - published[c] / published[alone])) for c in published.index[1:]]
    for _, part in rows.groupby("seed"):
        bpp = part.set_index("context")["bpp"]
        found += [(c, "here", 100 * (1 - bpp[c] / bpp[alone])) for c in published.index[1:]]
    return pd.DataFrame(found, columns=["row", "source", "value"])
