"""Figures from pictures and tables; pure functions, no model runs in here."""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from entroformer_lib.views.style import (
    COLOURS,
    GREYS,
    SEQUENTIAL,
    TWO_COLUMNS,
    NotebookFigure,
    label_ends,
    new_figure,
    styled,
)


@styled
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
            axes[0, column].add_patch(_frame(left, top, side))
            _picture(axes[1, column], picture.crop((left, top, left + side, top + side)))
    return figure


@styled
def bits_map(picture: Image.Image, bits: np.ndarray) -> Figure:
    """Where the bits went: the picture, the map over its 16x16 blocks, and the picture seen through the map.

    Args:
        bits: bits of each block of y, [h, w], without padding cut off: the map is stretched over the padded picture.
    """
    width, height = picture.size
    figure, axes = new_figure(TWO_COLUMNS, TWO_COLUMNS / 2 * height / width + 0.45, 1, 2)
    _picture(axes[0], picture, "The picture")
    down, right = bits.shape[0] * 16 - height, bits.shape[1] * 16 - width  # padding, the smaller half top and left
    extent = (
        -(right // 2) - 0.5,
        width + right - right // 2 - 0.5,
        height + down - down // 2 - 0.5,
        -(down // 2) - 0.5,
    )
    image = axes[1].imshow(bits, cmap=SEQUENTIAL, extent=extent, vmin=0, interpolation="nearest")
    axes[1].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes[1].set_title("Bits of each 16 x 16 block")
    axes[1].spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes[1], shrink=0.9)
    bar.set_label("bits (all channels of one site of y)")
    bar.outline.set_visible(False)
    return figure


@styled
def training(rows: list[dict], pictures: list[tuple[int, Image.Image]] = (), xlabel: str = "step") -> Figure:
    """A run so far: loss, rate and PSNR over the steps, and below it reconstructions with the step they are from.

    Args:
        rows: of the log: step, rd_loss, bpp, psnr_db.
        pictures: (step, picture); at most five are shown, spread over the run.
        xlabel: what the rows' `step` counts.
    """
    chosen = [pictures[i] for i in np.linspace(0, len(pictures) - 1, min(5, len(pictures))).round().astype(int)]
    figure = NotebookFigure(figsize=(TWO_COLUMNS, 1.9 + (1.5 if chosen else 0)))
    upper, *lower = figure.subfigures(
        2 if chosen else 1, 1, squeeze=False, height_ratios=[1.9, 1.5][: 1 + bool(chosen)]
    )[:, 0]
    steps = [row["step"] for row in rows]
    panels = (("rd_loss", "loss: bpp + lmbda 255² MSE", "log"), ("bpp", "rate, bits per pixel", "linear"))
    for axes, (key, label, scale), colour in zip(
        upper.subplots(1, 3), (*panels, ("psnr_db", "PSNR, dB", "linear")), COLOURS, strict=False
    ):
        axes.plot(steps, [row[key] for row in rows], color=colour)
        axes.set(xlabel=xlabel, title=label, yscale=scale)
    if chosen:
        for axes, (step, picture) in zip(lower[0].subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
            _picture(axes, picture, f"step {step}")
    return figure


@styled
def rate_distortion(measured: list, published: list, quality: str = "PSNR, dB") -> Figure:
    """Rate against quality: measured here with points and full lines, published ones thin and dashed.

    The range is that of the measured ones.

    Args:
        measured, published: curves with label, bpp and quality (`studies.bd.Curve`).
        quality: label of the upright axis.
    """
    figure, axes = new_figure(TWO_COLUMNS * 0.75, 3.6)
    most = 1.15 * max(max(curve.bpp) for curve in measured)
    least_quality = min(min(curve.quality) for curve in measured) - 1
    ends = []
    for i, curve in enumerate(published):
        colour, dashes = GREYS[i % len(GREYS)], ((0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1)))[i % 4]
        axes.plot(curve.bpp, curve.quality, linestyle=dashes, color=colour, linewidth=0.9)
        name = curve.label.removesuffix(" (paper)")
        ends.append(
            (np.interp(most, curve.bpp, curve.quality), min(most, max(curve.bpp)), f"{name}, published", colour)
        )
    for curve, colour, marker in zip(measured, COLOURS, "osD^v", strict=False):
        axes.plot(
            curve.bpp, curve.quality, marker=marker, color=colour, label=f"{curve.label} (measured)", markersize=4
        )
    axes.set(xlim=(0, most), xlabel="bits per pixel (whole files)", ylabel=quality)
    highest = max([max(curve.quality) for curve in measured] + [end[0] for end in ends]) + 0.5
    axes.set_ylim(least_quality, highest)
    label_ends(axes, ends, most, gap=(highest - least_quality) / 28)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(loc="lower right")
    return figure


@styled
def per_picture(rows: list[dict], rate: str, other: str, title: str = "") -> Figure:
    """What each picture gains over another codec with as many bytes, against the bits it takes.

    Args:
        rows: one per picture: image, `rate` (bits per pixel), psnr_db, and `other`, that of the other codec in dB.
    """
    figure, axes = new_figure(TWO_COLUMNS * 0.75, 3.4)
    gain = [row["psnr_db"] - row[other] for row in rows]
    axes.scatter([row[rate] for row in rows], gain, s=14, color=COLOURS[0])
    for row, y in zip(rows, gain, strict=True):
        name = row["image"].removeprefix("kodim")
        axes.annotate(name, (row[rate], y), xytext=(3, 3), textcoords="offset points", fontsize=6, color="0.35")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="bits per pixel", ylabel="PSNR above JPEG of the same bytes, dB", title=title)
    return figure


@styled
def who_gains(table, columns: dict[str, str], label: str = "rate saved, %") -> Figure:
    """What each picture saves, against several of its properties, with Spearman's rank correlations.

    Args:
        table: a row for each picture: image, saving_percent, and the properties.
        columns: {property: how the axis calls it}.
    """
    figure, axes = new_figure(TWO_COLUMNS, 2.7, 1, len(columns), sharey=True, squeeze=False)
    for ax, (column, words) in zip(axes[0], columns.items(), strict=True):
        ax.scatter(table[column], table["saving_percent"], s=12, color=COLOURS[0])
        for row in table.to_dict("records"):
            name = row["image"].removeprefix("kodim")
            place = (row[column], row["saving_percent"])
            ax.annotate(name, place, xytext=(2, 2), textcoords="offset points", fontsize=6, color="0.35")
        rho = table[column].corr(table["saving_percent"], method="spearman")
        ax.set(xlabel=words, title=f"rank correlation {rho:+.2f}")
        ax.axhline(0, color="0.6", linewidth=0.8)
    axes[0, 0].set_ylabel(label)
    return figure


@styled
def differences(names: list[str], percent: list[float], spread: float | None = None, label: str = "") -> Figure:
    """Horizontal bars of differences from a baseline in percent; the grey band is what another seed changes."""
    figure, axes = new_figure(TWO_COLUMNS * 0.75, 0.25 * len(names) + 0.7)
    order = np.argsort(percent)[::-1]
    values = [percent[i] for i in order]
    axes.barh(range(len(names)), values, color=[COLOURS[1] if v > 0 else COLOURS[0] for v in values], height=0.65)
    for row, value in enumerate(values):
        axes.annotate(
            f"{value:+.1f}%",
            (value, row),
            xytext=(3 if value >= 0 else -3, 0),
            textcoords="offset points",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=7,
        )
    if spread is not None:
        axes.axvspan(-abs(spread), abs(spread), color="0.85", zorder=0, label="another seed")
        axes.legend(loc="upper right")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [names[i] for i in order])
    axes.margins(x=0.15)
    axes.set_xlabel(label)
    return figure


STAGES = {  # column of the latency table: what it says in a figure
    "transforms_s": "g_a or g_s",
    "hyper_s": "hyperprior",
    "context_s": "context model",
    "parameters_s": "entropy parameters",
    "entropy_coding_s": "entropy coder",
    "other_s": "other",
}


@styled
def latency(rows: list[dict]) -> Figure:
    """Seconds to encode and decode, medians over repeats: ours split into stages, others in grey, on a log scale below.

    Args:
        rows: model, direction, seconds and, for ours, the stages' seconds.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = new_figure(TWO_COLUMNS, 0.28 * len(names) + 1.1, 1, 2, sharey=True)
    for axes, direction in zip(panels, ("encode", "decode"), strict=True):
        longest = 0.0
        for y, name in enumerate(names):
            mine = [row for row in rows if row["model"] == name and row["direction"] == direction]
            total = float(np.median([row["seconds"] for row in mine]))
            longest = max(longest, total)
            left = 0.0
            for colour, (column, label) in zip((*COLOURS[:5], "0.75"), STAGES.items(), strict=True):
                if column in mine[0]:
                    width = float(np.median([row[column] for row in mine]))
                    axes.barh(y, width, left=left, color=colour, label=label if y == 0 else None, height=0.65)
                    left += width
            if not left:
                axes.barh(y, total, color="0.55", height=0.65, label="CompressAI, whole")
            axes.annotate(
                f"{total:.2f} s", (total, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
            )
        axes.set(title=direction, xlabel="seconds", xlim=(0, 1.18 * longest))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    handles, labels = panels[1].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4)
    return figure


@styled
def growth(rows: list[dict], exponents: dict[str, float]) -> Figure:
    """How seconds and memory of decoding grow with the picture, both axes logarithmic, with the fitted exponents."""
    rows = [row for row in rows if row["direction"] == "decode"]
    megapixels = np.array([row["width"] * row["height"] / 1e6 for row in rows])
    figure, panels = new_figure(TWO_COLUMNS, 2.4, 1, 2)
    shown = (("seconds", "seconds to decode", "seconds"), ("peak_mb", "peak memory, MB", "memory"))
    for axes, (column, label, what), colour in zip(panels, shown, COLOURS, strict=False):
        axes.loglog(megapixels, [row[column] for row in rows], "o-", color=colour)
        axes.set(xlabel="megapixels", title=f"{label} (exponent {exponents[what]:.2f})")
        axes.grid(alpha=0.25, linewidth=0.5)
    return figure


@styled
def two_passes(prices: dict[int | None, list[dict]]) -> Figure:
    """What a parallel model pays and saves beside a serial one, and how that depends on the size of the picture.

    Args:
        prices: for each side of squares in pixels, and None for whole pictures, a row for each lambda: lmbda, and
            first, second, z and all in percent of the serial model's rate.
    """
    figure, (left, right) = new_figure(TWO_COLUMNS, 2.9, 1, 2)
    whole = prices[None]
    places = np.arange(len(whole))
    labels = {"first": "first half: no context", "z": "hyperprior z", "second": "second half: context all around"}
    above = np.zeros(len(whole))
    for (part, label), colour, hatch in zip(labels.items(), COLOURS, ("", "////", ""), strict=False):
        values = np.array([row[part] for row in whole])
        left.bar(places, values, bottom=above * (values > 0), color=colour, hatch=hatch, edgecolor="w", label=label)
        above += values.clip(min=0)
    left.plot(places, [row["all"] for row in whole], "kD", label="in all", markersize=4)
    left.axhline(0, color="0.4", linewidth=0.6)
    left.set_xticks(places, [f"{row['lmbda']:g}" for row in whole])
    left.set(xlabel="lambda", ylabel="against serial, % of its rate", title="whole pictures")
    left.set_ylim(top=1.45 * above.max())
    left.legend(fontsize=7, loc="upper right")
    names = [f"{side} x {side}" if side else "whole" for side in prices]
    for i, (row, colour, marker) in enumerate(zip(whole, COLOURS, "osD^vph", strict=False)):
        values = [rows[i]["all"] for rows in prices.values()]
        right.plot(names, values, marker + "-", color=colour, label=f"lambda {row['lmbda']:g}")
    right.set(xlabel="pixels coded together", ylabel="two passes cost, %", title="the same, cut into squares")
    right.set_ylim(0, 1.4 * max(row["all"] for rows in prices.values() for row in rows))
    right.legend(fontsize=7, ncols=2, loc="upper left")
    return figure


def _picture(axes, picture: Image.Image, title: str = "") -> None:
    axes.imshow(np.asarray(picture), cmap="gray" if picture.mode == "L" else None, interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def _frame(left: int, top: int, side: int):
    from matplotlib.patches import Rectangle

    return Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="white", linewidth=1.2)
