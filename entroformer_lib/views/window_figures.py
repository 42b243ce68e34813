"""What a search window costs in bits and saves in time, on large pictures."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from entroformer_lib.studies.results import NoResult, load
from entroformer_lib.views.style import COLOURS, MARKERS, ONE_COLUMN, new_figure, styled


def window_data() -> pd.DataFrame:
    """picture (empty for mosaics), width, height, megapixels, window (infinite: none); of photographs bytes and
    change_percent against no window; of mosaics decode_seconds."""
    bits, times = load("window_bits"), load("window_times")
    if bits is None and times is None:
        raise NoResult("There is neither window_bits.json nor window_times.json among the saved results.")
    tables = [pd.DataFrame(result["rows"]) for result in (bits, times) if result is not None]
    rows = pd.concat([t if "picture" in t else t.rename(columns={"seconds": "decode_seconds"}) for t in tables])
    rows["window"] = rows["window"].astype(float).fillna(np.inf)
    rows["megapixels"] = rows["width"] * rows["height"] / 1e6
    rows = rows.reindex(columns=["picture", "width", "height", "megapixels", "window", "bytes", "decode_seconds"])
    rows.loc[rows["picture"].isna(), "bytes"] = np.nan
    whole = rows[np.isinf(rows["window"])].dropna(subset="picture").set_index("picture")["bytes"]
    rows["change_percent"] = 100 * (rows["bytes"] / rows["picture"].map(whole) - 1)
    return rows.reset_index(drop=True)


@styled()
def cost_and_time(data: pd.DataFrame) -> Figure:
    """Above the size of files against the window, a thin line for each photograph and a thick one through the means;
    below seconds to decode against pixels, a line for each window."""
    photographs, mosaics = data[data["picture"].notna()], data[data["picture"].isna()]
    panels = [(draw, rows) for draw, rows in ((_cost, photographs), (_time, mosaics)) if len(rows)]
    figure, axes = new_figure(ONE_COLUMN, 2.1 * len(panels), rows=len(panels), squeeze=False)
    for ax, (draw, rows) in zip(axes[:, 0], panels, strict=True):
        draw(ax, rows)
        ax.grid(alpha=0.25, linewidth=0.5)
    return figure


def _cost(ax, rows: pd.DataFrame) -> None:
    rows = rows[np.isfinite(rows["window"])]
    windows = sorted(rows["window"].unique())
    for i, (_, part) in enumerate(rows.groupby("picture")):
        look = dict(color="0.7", linewidth=0.7, marker=".", markersize=3, label="_" * (i > 0) + "a photograph")
        ax.plot(part["window"], part["change_percent"], **look)
    mean = rows.groupby("window")["change_percent"].mean()
    ax.plot(windows, mean, color="black", marker="o", markersize=4, label="mean")
    ax.legend()
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xticks(windows, [f"{w:g}" for w in windows])
    ax.minorticks_off()
    ax.set(xlabel="search window, latents of 16 pixels", ylabel="size of the file, change in %")


def _time(ax, rows: pd.DataFrame) -> None:
    for i, (window, part) in enumerate(sorted(rows.groupby("window"), reverse=True)):
        name = "none" if np.isinf(window) else f"{window:g}"
        look = dict(color=COLOURS[i], marker=MARKERS[i], markersize=4, label=name)
        ax.plot(part["megapixels"], part["decode_seconds"], linewidth=1, **look)
    ax.set(xscale="log", yscale="log", xlabel="megapixels", ylabel="seconds to decode")
    pixels = sorted(rows["megapixels"].unique())
    ax.set_xticks(pixels, [f"{p:.1f}" for p in pixels])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.legend(title="search window", title_fontsize=7)
