"""Figures of pictures, trainings and times; pure functions, no model runs in here."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from entroformer_lib.views.style import (
    COLOURS,
    SEQUENTIAL,
    TWO_COLUMNS,
    NotebookFigure,
    label_points,
    new_figure,
    styled,
)


@styled()
def side_by_side(panels: list[tuple[str, Image.Image]], zoom: tuple[int, int, int] | None = None) -> Figure:
    """Pictures beside each other with a title each; below them the same detail of each, if asked for.

    Args:
        panels: (title, picture) pairs of pictures of one size.
        zoom: (left, top, side) of a square detail in pixels.
    """
    width, height = panels[0][1].size
    panel_width = TWO_COLUMNS / len(panels)
    ratios = [height / width, 1] if zoom else [height / width]
    figure, axes = new_figure(
        TWO_COLUMNS, panel_width * sum(ratios) + 0.4, len(ratios), len(panels), squeeze=False, height_ratios=ratios
    )
    for column, (title, picture) in enumerate(panels):
        _picture(axes[0, column], picture, title)
        if zoom:
            left, top, side = zoom
            frame = Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="white", linewidth=1.2)
            axes[0, column].add_patch(frame)
            _picture(axes[1, column], picture.crop((left, top, left + side, top + side)))
    return figure


@styled()
def bits_map(picture: Image.Image, bits: np.ndarray) -> Figure:
    """Where the bits went: the picture, the map over its 16x16 blocks, and the picture seen through the map.

    Args:
        bits: bits of each block of y, [h, w], those of the padding included: the map is stretched over the padded
            picture.
    """
    width, height = picture.size
    figure, axes = new_figure(TWO_COLUMNS, TWO_COLUMNS / 2 * height / width + 0.45, 1, 2)
    _picture(axes[0], picture, "The picture")
    down, right = bits.shape[0] * 16 - height, bits.shape[1] * 16 - width  # padding, the smaller half top and left
    left, top = -(right // 2) - 0.5, -(down // 2) - 0.5
    extent = (left, left + width + right, top + height + down, top)
    image = axes[1].imshow(bits, cmap=SEQUENTIAL, extent=extent, vmin=0, interpolation="nearest")
    axes[1].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes[1].set_title("Bits of each 16 x 16 block")
    axes[1].spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes[1], shrink=0.9)
    bar.set_label("bits (all channels of one site of y)")
    bar.outline.set_visible(False)
    return figure


@styled()
def training(rows: list[dict], pictures: list[tuple[int, Image.Image]] = (), xlabel: str = "step") -> Figure:
    """A run so far: loss, rate and PSNR over the steps, and below it reconstructions with the step they are from.

    Args:
        rows: of the log: step, rd_loss (R + lambda D; weighted where a model has many rates), bpp, psnr_db.
        pictures: (step, picture); at most five are shown, spread over the run.
        xlabel: what the rows' `step` counts.
    """
    chosen = [pictures[i] for i in np.linspace(0, len(pictures) - 1, min(5, len(pictures))).round().astype(int)]
    figure = NotebookFigure(figsize=(TWO_COLUMNS, 1.9 + (1.5 if chosen else 0)))
    heights = [1.9, 1.5] if chosen else [1.9]
    upper, *lower = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    steps = [row["step"] for row in rows]
    panels = {"rd_loss": "loss", "bpp": "rate, bits per pixel", "psnr_db": "PSNR, dB"}
    for axes, (key, label), colour in zip(upper.subplots(1, 3), panels.items(), COLOURS, strict=False):
        values = [row[key] for row in rows]
        wide = key == "rd_loss" and max(values) > 3 * min(values)
        axes.plot(steps, values, color=colour)
        axes.set(xlabel=xlabel, title=label, yscale="log" if wide else "linear")
    if chosen:
        for axes, (step, picture) in zip(lower[0].subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
            _picture(axes, picture, f"step {step}")
    return figure


@styled()
def by_picture(table: pd.DataFrame, value: str, label: str, columns: dict[str, str], title: str = "") -> Figure:
    """What each picture gains, against its properties; the numbers are those of the Kodak pictures.

    Args:
        table: a row for each picture: image, the value and the properties.
        value, label: what is gained: its column, and how the axis calls it.
        columns: {property: how its axis calls it}, a panel for each.
        title: of the panels; by default Spearman's rank correlation of value and property.
    """
    width, height = (TWO_COLUMNS, 2.7) if len(columns) > 1 else (TWO_COLUMNS * 0.75, 3.4)
    figure, axes = new_figure(width, height, 1, len(columns), sharey=True, squeeze=False)
    for ax, (column, words) in zip(axes[0], columns.items(), strict=True):
        ax.scatter(table[column], table[value], s=12, color=COLOURS[0])
        rho = table[column].corr(table[value], method="spearman")
        ax.set(xlabel=words, title=title or f"rank correlation {rho:+.2f}")
        ax.axhline(0, color="0.6", linewidth=0.8)
    axes[0, 0].set_ylabel(label)
    for ax, column in zip(axes[0], columns, strict=True):
        label_points(ax, table[column], table[value], table["image"].str.removeprefix("kodim"))
    return figure


STAGES = {  # column of the latency table: what it says in a figure
    "transforms_s": "transforms: g_a or g_s",
    "hyper_s": "hyperprior",
    "context_s": "context model",
    "entropy_coding_s": "entropy coder",
    "other_s": "other",
}


@styled()
def latency(rows: pd.DataFrame) -> Figure:
    """Seconds to encode and decode, medians over repeats: ours split into stages, CompressAI's whole and in grey.

    Args:
        rows: model, direction, seconds and, for ours, the stages' seconds.
    """
    models = list(dict.fromkeys(rows["model"]))
    figure, panels = new_figure(TWO_COLUMNS, 0.28 * len(models) + 1.1, 1, 2, sharey=True)
    rows = rows.reindex(columns=["model", "direction", "seconds", *STAGES])
    for axes, (direction, part) in zip(panels, rows.groupby("direction", sort=False), strict=True):
        medians = part.drop(columns="direction").groupby("model").median().loc[models]
        seconds = medians.pop("seconds")
        bars = medians.rename(columns=STAGES)
        bars["CompressAI, whole"] = seconds.where(medians.isna().all(axis=1))
        colours = [*COLOURS[:3], COLOURS[4], "0.85", "0.55"]
        bars.fillna(0).plot.barh(stacked=True, ax=axes, color=colours, width=0.65, legend=False, edgecolor="white")
        for patches, hatch in zip(axes.containers, ("", "////", "", "....", "", ""), strict=True):  # for grey prints
            for patch in patches:
                patch.set(hatch=hatch, linewidth=0.3)
        for y, total in enumerate(seconds):
            place = dict(xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
            axes.annotate(f"{total:.2f} s", (total, y), **place)
        axes.set(title=direction, xlabel="seconds", ylabel="", xlim=(0, 1.18 * seconds.max()))
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _picture(axes, picture: Image.Image, title: str = "") -> None:
    axes.imshow(np.asarray(picture), cmap="gray" if picture.mode == "L" else None, interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)
