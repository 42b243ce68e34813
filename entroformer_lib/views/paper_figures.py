"""The paper's figures: pure functions from the tables of `paper_data` to a figure, and tables as pictures and text."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from entroformer_lib.views.style import (
    COLOURS,
    GREYS,
    ONE_COLUMN,
    SEQUENTIAL,
    TWO_COLUMNS,
    label_ends,
    new_figure,
    styled,
)

MODEL_COLOURS, MARKERS = (*COLOURS, "0.5"), "osD^vPX*"  # of the models in figure 3


# ---- figure 3 ----


@styled
def masking_maps(data: pd.DataFrame, label: str = "rate increase, %") -> Figure:
    """A map for each model; positions that are no context stay empty."""
    models = list(dict.fromkeys(data["model"]))
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    largest, reach = data["percent"].max(), int(data[["dy", "dx"]].abs().max().max())
    lowest = [
        data[data["model"].isin(models[i : i + columns])]["dy"].max() + 0.5 for i in range(0, len(models), columns)
    ]
    panel = min(1.6, (TWO_COLUMNS - 0.8) / columns) if columns > 2 else 2.7  # inches wide
    heights = [panel * (reach + 0.5 + low) / (2 * reach + 1) for low in lowest]  # causal models have no lower half
    width = max(ONE_COLUMN, columns * panel + 0.8)
    size = 4.5 if columns > 2 else 6
    figure, axes = new_figure(
        width, max(1.9, sum(heights) + 0.28 * rows), rows, columns, squeeze=False, height_ratios=heights
    )
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    for i, (ax, model) in enumerate(zip(axes.flat, models, strict=False)):
        part = data[data["model"] == model]
        grid = np.full((2 * reach + 1, 2 * reach + 1), np.nan)
        grid[part["dy"] + reach, part["dx"] + reach] = part["percent"]
        image = ax.imshow(_logarithm(grid), cmap=SEQUENTIAL, vmin=_logarithm(0), vmax=_logarithm(largest))
        for dy, dx, percent in zip(part["dy"], part["dx"], part["percent"], strict=True):
            bright = _logarithm(percent) > 0.6 * _logarithm(largest)
            text = f"{percent:.1f}" if abs(percent) >= 0.995 else f"{percent:.2f}".replace("0.", ".", 1)
            text = "0" if abs(percent) < 0.005 else text
            ax.text(dx + reach, dy + reach, text, ha="center", va="center", fontsize=size, color="k" if bright else "w")
        ax.plot(reach, reach, marker="x", color=COLOURS[1], markersize=5)
        ax.set(xticks=[], yticks=[], title=model, ylim=(lowest[i // columns] + reach, -0.5))
        ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    ticks = [t for t in (0, 0.1, 1, 3, 10, 30, 100) if t <= largest]
    bar.set_ticks([_logarithm(t) for t in ticks], labels=[f"{t:g}" for t in ticks])
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure


def _logarithm(percent):
    return np.log10(0.1 + np.maximum(percent, 0))


def alone_maps(data: pd.DataFrame) -> Figure:
    """`masking_maps` of what a position saves alone."""
    return masking_maps(data, "rate saved alone, %")


@styled
def masking_by_distance(data: pd.DataFrame) -> Figure:
    """Percent against the three distances, a colour for each model, with the mean at each distance as a line."""
    norms = ("L1", "L2", "L-infinity")
    figure, axes = new_figure(TWO_COLUMNS, 4.4, 2, 3, sharey="row", sharex="col")
    labels = {"missing": "rate increase when missing, %", "alone": "rate saved alone, %"}
    for row, (measure, label) in zip(axes, labels.items(), strict=True):
        row[0].set_ylabel(label)
        for ax, norm in zip(row, norms, strict=True):
            for i, (model, part) in enumerate(data[data["measure"] == measure].groupby("model", sort=False)):
                colour, marker = MODEL_COLOURS[i % len(MODEL_COLOURS)], MARKERS[i % len(MARKERS)]
                mean = part.groupby(norm)["percent"].mean()
                ax.plot(part[norm], part["percent"], marker, color=colour, markersize=2, alpha=0.4)
                ax.plot(mean.index, mean, color=colour, linewidth=1, label=model, marker=marker, markersize=3)
            ax.set_yscale("symlog", linthresh=0.1 if measure == "missing" else 2)
            ax.axhline(0, color="0.7", linewidth=0.6)
    for ax, norm in zip(axes[1], norms, strict=True):
        ax.set_xlabel(f"{norm} distance, latents")
    axes[0, -1].legend(loc="upper right", fontsize=5.5)
    return figure


@styled
def beyond_curve(data: pd.DataFrame) -> Figure:
    """Rate when everything beyond a distance is masked, against that distance."""
    figure, ax = new_figure(ONE_COLUMN * 1.4, 2.8)
    for i, (model, part) in enumerate(data.groupby("model", sort=False)):
        colour, marker = MODEL_COLOURS[i % len(MODEL_COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(part["radius"], part["percent"], color=colour, marker=marker, markersize=3.5, label=model)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set(xlabel="L1 distance up to which the context is known, latents", ylabel="rate against all context, %")
    ax.legend()
    return figure


# ---- rate and distortion ----


def rate_distortion_figure(quality: str) -> Callable[[pd.DataFrame], Figure]:
    """A drawer of rate-distortion curves; quality: label of the upright axis."""

    @styled
    def draw(data: pd.DataFrame) -> Figure:
        figure, ax = new_figure(TWO_COLUMNS * 0.75, 3.8)
        ours, theirs = data[~data["published"]], data[data["published"]]
        most = max(1.0, 1.15 * ours["bpp"].max())
        low = ours["quality"].min() - 3
        ends = []
        for i, (label, part) in enumerate(theirs.groupby("label", sort=False)):
            colour, dashes = GREYS[i % len(GREYS)], ((0, ()), (0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))[i % 4]
            ax.plot(part["bpp"], part["quality"], linestyle=dashes, color=colour, linewidth=0.9)
            end = np.interp(most, part["bpp"], part["quality"])
            ends.append((end, min(most, part["bpp"].max()), f"{label.removesuffix(' (paper)')}, published", colour))
        marks = zip(ours.groupby("label", sort=False), COLOURS * 3, "osD^vPX" * 3, strict=False)
        for (label, part), colour, marker in marks:
            ax.plot(part["bpp"], part["quality"], marker, linestyle="-", color=colour, markersize=4, label=label)
        high = max([end for end, *_ in ends], default=ours["quality"].max()) + 0.5
        ax.set(xlim=(0, most), ylim=(low, high), xlabel="bits per pixel", ylabel=quality)
        label_ends(ax, ends, most, gap=(high - low) / 28)
        ax.legend(loc="upper left", title="measured here")
        ax.grid(alpha=0.25, linewidth=0.5)
        return figure

    return draw


LINES = {  # variant of figure 5 right: colour, marker, dashes
    "minnen": ("0.3", "s", "-"),
    "cnn": (COLOURS[1], "D", "-"),
    "serial": (COLOURS[0], "o", "-"),
    "parallel": (COLOURS[4], "v", "-"),
    "groupedmixer": (COLOURS[2], "^", "-"),
    "hyperprior-cnn": ("0.3", "s", "--"),
    "hyperprior": (COLOURS[0], "o", "--"),
    "context-cnn": ("0.3", "s", ":"),
    "context-serial": (COLOURS[0], "o", ":"),
}


@styled
def same_transforms(data: pd.DataFrame) -> Figure:
    """Rate against the CNN's at equal pictures: whole entropy models on the left, their halves on the right."""
    figure, axes = new_figure(TWO_COLUMNS, 3.6, 1, 2)
    halves = data["label"].str.endswith("alone")
    for ax, part, title in zip(
        axes, (data[~halves], data[halves]), ("context and hyperprior", "one alone"), strict=True
    ):
        for variant, line in part.groupby("variant", sort=False):
            colour, marker, dashes = LINES[variant]
            ax.plot(line["base_bpp"], line["percent"], marker + dashes, color=colour, markersize=4,
                    label=line["label"].iloc[0])  # fmt: skip
        ax.axhline(0, color="0.3", linewidth=0.6, zorder=0)
        ax.set(title=title, xlabel="bits per pixel of CNNs throughout")
        ax.grid(alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=3)
    axes[0].set_ylabel("rate against CNNs throughout, %")
    return figure


# ---- grids of the ablation ----


@styled
def figure6(data: pd.DataFrame) -> Figure:
    """Saving against the clipping distance h; a point for each seed, a line through the means."""
    figure, ax = new_figure(ONE_COLUMN, 2.4)
    values = sorted(data["radius"].unique())
    place = data["radius"].map(values.index)
    ax.plot(place, data["saving_percent"], "o", color=COLOURS[0], markersize=3, alpha=0.6)
    ax.plot(range(len(values)), data.groupby("radius")["saving_percent"].mean(), color=COLOURS[0])
    names = ["none" if v == 0 else "all" if np.isinf(v) else f"{v:g}" for v in values]
    ax.set_xticks(range(len(values)), names)
    ax.set(xlabel="clipping distance h", ylabel="rate saved, %")
    return figure


@styled
def figure7(data: pd.DataFrame) -> Figure:
    """Learning curves, one for each k: the mean over the seeds with their range; on the right their second half."""
    figure, axes = new_figure(TWO_COLUMNS, 2.8, 1, 2)
    half = data["step"].max() / 2
    for (k, part), colour in zip(data.groupby("top_k"), COLOURS, strict=False):
        curve = part.groupby("step")["bpp"].agg(["mean", "min", "max"])
        name, line = ("dense", "--") if np.isinf(k) else (f"k = {k:g}", "-")
        for ax, shown in zip(axes, (curve, curve[curve.index >= half]), strict=True):
            ax.plot(shown.index, shown["mean"], line, color=colour, label=name)
            ax.fill_between(shown.index, shown["min"], shown["max"], color=colour, alpha=0.2, linewidth=0)
    for ax in axes:
        ax.set(xlabel="step", ylabel="bits per pixel")
    axes[0].legend()
    return figure


# ---- attention maps ----


@styled
def attention_maps(data: pd.DataFrame) -> Figure:
    """A map for each title, the query marked. The scale is a logarithm from 0.01%: most weight lies on few latents."""
    titles = list(dict.fromkeys(data["title"]))
    columns = min(5, len(titles))
    rows = -(-len(titles) // columns)
    height, width = data["row"].max() + 1, data["column"].max() + 1
    panel = (TWO_COLUMNS - 0.8) / columns  # inches wide
    figure, axes = new_figure(TWO_COLUMNS, (panel * height / width + 0.3) * rows, rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes.flat, titles, strict=False):
        part = data[data["title"] == title]
        probs = part.pivot(index="row", columns="column", values="prob")
        image = ax.imshow(probs.clip(lower=1e-4), cmap=SEQUENTIAL, norm=LogNorm(1e-4, 1))
        ax.plot(part["query_column"].iloc[0], part["query_row"].iloc[0], "x", color=COLOURS[1], markersize=4)
        ax.set_title(title)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_ticks([1e-4, 1e-2, 1], labels=["0.01%", "1%", "100%"])
    bar.set_label("attention")
    bar.outline.set_visible(False)
    return figure


# ---- tables as pictures and text ----


def words(value, column: str) -> str:
    """A cell of a table as a reader wants it."""
    if value is None or isinstance(value, float) and np.isnan(value):
        return "–"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and column in ("seeds", "size", "parameters"):
        return f"{int(value):,}"
    digits = 1 if column.endswith(("percent", "ms", "mb", "megabytes")) else 4
    return f"{value:,.{digits}f}"


def cells(data: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table, as text."""
    headings = [column.replace("_", " ") for column in data.columns]
    return headings, [
        [words(v, c) for v, c in zip(row, data.columns, strict=True)] for row in data.itertuples(index=False)
    ]


@styled
def table_figure(data: pd.DataFrame) -> Figure:
    """A table as a picture, lines above and below as in print."""
    headings, rows = cells(data)
    figure, ax = new_figure(TWO_COLUMNS, 0.22 * (len(rows) + 1) + 0.15)
    ax.set_axis_off()
    widths = [max(map(len, column)) + 2 for column in zip(headings, *rows, strict=True)]
    table = ax.table([headings, *rows], loc="center", colWidths=[w / sum(widths) for w in widths], bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(6.5)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "TB" if row == 0 else "B" if row == len(rows) else ""
        text = isinstance(data.iloc[0, column], str)
        cell.get_text().set_ha("left" if text else "right")
        cell.PAD = 0.03
        cell.set_text_props(weight="bold" if row == 0 else "normal")
    return figure


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
