"""The ablations beside the paper's numbers: figures 6 and 7, tables 1, 3 and 4, and what notebook 05 shows of the rest.

Functions that end in `_data` read the rows of a grid, and raise NoResult where there are none. The others are pure
functions from a table to a figure.
"""

from contextlib import suppress

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from entroformer_lib.studies.ablation import LAST_SHARE
from entroformer_lib.studies.results import POSITION_NAMES, NoResult, ablation, kinds, load, needed, reference
from entroformer_lib.studies.verdicts import differences, over_pictures
from entroformer_lib.views.style import COLOURS, MARKERS, ONE_COLUMN, TWO_COLUMNS, new_figure, styled

PUBLISHED = "published"
DASHES = ("", (4, 1), (1, 1), (4, 1, 1, 1), (6, 2, 1, 2), (3, 3), (1, 2))


def _published(table: str, *columns: str) -> pd.DataFrame:
    """A table of the paper, its columns named anew."""
    data = pd.DataFrame(reference("paper_tables")[table]["rows"])
    return data.set_axis(columns, axis=1)


def _seeds(bpp: pd.Series, by, order) -> np.ndarray:
    """Mean, spread and number of seeds for each of `order`, nan where there is none: [len(order), 3]"""
    return bpp.groupby(by).agg(["mean", "std", "count"]).reindex(order).to_numpy()


def _k_name(k: float) -> str:
    return "dense" if np.isinf(k) else f"k = {k:g}"


# ---- figure 6 ----


def figure6_data() -> pd.DataFrame:
    """radius (0: no position encoding, infinite: unlimited), seed, bpp, saving_percent against no position encoding,
    half_width (of the interval of the difference from h = 3, on the same scale; nan where there is none)."""
    rows = ablation("figure6")
    if not (rows["position"] == "none").any():
        raise NoResult("Figure 6 needs a run without positions.")
    base = rows[rows["position"] == "none"]["bpp"].mean()
    radius = rows["radius"].fillna(np.inf).where(rows["position"] != "none", 0)
    data = pd.DataFrame({"radius": radius, "seed": rows["seed"], "bpp": rows["bpp"]})
    data["saving_percent"] = 100 * (1 - data["bpp"] / base)
    data["half_width"] = np.nan
    with suppress(NoResult):
        told = differences("figure6", "diamond").set_index("kind")
        half = told["smallest"].replace(np.inf, np.nan) * told["bpp"]["diamond"] / base  # it was of h = 3's rate
        data["half_width"] = kinds(rows["run"]).map(half).where(radius != 0)  # whose saving is 0 by definition
    return data.sort_values(["radius", "seed"], ignore_index=True)


@styled()
def figure6(data: pd.DataFrame) -> Figure:
    """Saving against the clipping distance h; a point for each seed, a line through the means, and the interval of each
    one's difference from h = 3. The paper's best h, of which it gives no number, is marked."""
    figure, ax = new_figure(ONE_COLUMN, 2.6)
    values = sorted(data["radius"].unique())
    ax.plot(data["radius"].map(values.index), data["saving_percent"], "o", color=COLOURS[0], markersize=3, alpha=0.6)
    means = data.groupby("radius")[["saving_percent", "half_width"]].mean()
    ax.plot(range(len(values)), means["saving_percent"], color=COLOURS[0])
    if means["half_width"].notna().any():
        look = dict(
            fmt="none", ecolor="0.5", elinewidth=0.8, capsize=2, label="95% interval of the difference from h = 3"
        )
        ax.errorbar(range(len(values)), *means.to_numpy().T, **look)
        figure.legend(loc="outside lower center")
    ax.set_xticks(range(len(values)), ["none" if v == 0 else "all" if np.isinf(v) else f"{v:g}" for v in values])
    if 3 in values:
        ax.axvline(values.index(3), color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        ax.annotate("best in the paper", (values.index(3), 0), xytext=(4, 3), textcoords="offset points", fontsize=6)
    ax.set(xlabel="clipping distance h", ylabel="rate saved over no positions, %")
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    return figure


# ---- figure 7 ----


def figure7_data() -> pd.DataFrame:
    """top_k (infinite: dense), model (in words), step, seed, bpp."""
    rows = ablation("figure7")
    rows = rows.assign(top_k=rows["top_k"].fillna(np.inf)).sort_values(["top_k", "seed", "step"], ignore_index=True)
    return rows.assign(model=rows["top_k"].map(_k_name))[["top_k", "model", "step", "seed", "bpp"]]


def figure7(data: pd.DataFrame) -> Figure:
    """Learning curves, one for each k, and against dense attention."""
    return curves(data, "dense", "dense attention", "figure7", ordered=True)


@styled()
def curves(data: pd.DataFrame, base: str, base_in_words: str, grid: str, ordered: bool = False) -> Figure:
    """Learning curves: the mean over the seeds with their range; and how far they lie from one of them.

    Args:
        data: model, step, seed, bpp.
        base: The model that the others are compared with; it is thick.
        base_in_words: For the axis.
        grid: Of the ablations; if its crops grow in the course of the training, a line says when.
        ordered: The models have an order, and so have their colours.
    """
    import seaborn

    reference = data[data["model"] == base].groupby("step")["bpp"].mean()
    data = data.assign(percent=100 * (data["bpp"] / data["step"].map(reference) - 1))
    names = list(dict.fromkeys(data["model"]))
    colours = dict(zip(names, COLOURS, strict=False))
    if ordered:  # from dark to light, and what they are compared with in black
        others = [name for name in names if name != base]
        colours = {base: "black"} | dict(zip(others, seaborn.color_palette("viridis", len(others)), strict=True))
    look = dict(x="step", hue="model", style="model", palette=colours, dashes=list(DASHES[: len(names)]))
    look |= dict(size="model", sizes={name: 2 if name == base else 1.2 for name in names})
    figure, axes = new_figure(ONE_COLUMN, 4.6, 2, 1, sharex=True)
    for ax, y in zip(axes, ("bpp", "percent"), strict=True):
        seaborn.lineplot(data, y=y, **look, errorbar=("pi", 100), err_kws={"linewidth": 0}, legend=ax is axes[0], ax=ax)
        ax.grid(alpha=0.25, linewidth=0.5)
    axes[0].set(ylabel="bits per pixel\n(256 x 256 pixels)", xlabel="")
    axes[1].set(ylabel=f"rate against {base_in_words}, %")
    axes[0].get_legend().remove()
    handles, words = axes[0].get_legend_handles_labels()
    seeds = data.groupby("model", sort=False)["seed"].nunique()
    if several := list(seeds[seeds > 1].index):
        handles.append(Patch(facecolor="0.5", alpha=0.25, linewidth=0))
        words.append(
            "range of the seeds" if len(several) == len(seeds) else f"range of the seeds: {', '.join(several)}"
        )
    if (settings := (load(f"ablation-{grid}") or {}).get("settings", {})).get("last_crop"):
        for ax in axes:
            line = ax.axvline(settings["steps"] * (1 - LAST_SHARE), color="0.6", linewidth=0.8, zorder=0)
        handles.append(line)
        words.append("larger crops from here on")
    figure.legend(handles, words, loc="outside lower center", ncols=2, columnspacing=1)
    return figure


# ---- tables 1, 3 and 4 ----


def table1_data() -> pd.DataFrame:
    """A row for each of the paper's: model, position, published_bpp, published_saving_percent, bpp, spread, seeds,
    saving_percent."""
    rows = ablation("table1")
    columns = ("model", "position", "published_bpp", "published_saving_percent")
    data = _published("table1_position_encoding", *columns)
    kind = np.where(rows["context"] == "cnn", "cnn", rows["position"])
    data[["bpp", "spread", "seeds"]] = _seeds(rows["bpp"], kind, list(POSITION_NAMES))
    data["position"] = ["-", *list(POSITION_NAMES.values())[1:]]
    data["saving_percent"] = 100 * (1 - data["bpp"] / data["bpp"][0])
    return data


def curves_data(grid: str, names: dict[str, str] = POSITION_NAMES) -> pd.DataFrame:
    """`curves` of a grid: model (in words), step, seed, bpp of the parts as large as the crops.

    names: kinds to show, in their order, and what they are called.
    """
    rows = ablation(f"{grid}_curve")
    rows = rows.assign(model=pd.Categorical(kinds(rows["run"]).map(names), list(names.values())))
    rows = rows.dropna(subset="model").sort_values(["model", "seed", "step"], ignore_index=True)
    return rows.astype({"model": str})[["model", "step", "seed", "bpp"]]


def table1_dots(rows: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """`dots` of table 1: saving over the CNN in percent, of whole pictures and of parts as large as the crops.

    rows: of the grid; table: of `table1_data`
    """
    cnn, found = rows["context"] == "cnn", []
    for one, (position, row) in zip(table.itertuples(), POSITION_NAMES.items(), strict=True):
        found.append((row, PUBLISHED, one.published_saving_percent))
        kind = cnn if position == "cnn" else rows["position"].eq(position) & ~cnn
        for source, column in (("here, whole pictures", "bpp"), ("here, 256 x 256 pixels", "bpp_middle")):
            base = rows[cnn][column].mean()
            found += [(row, source, 100 * (1 - bpp / base)) for bpp in rows[kind][column]]
    return pd.DataFrame(found, columns=["row", "source", "value"])


def table3_data() -> pd.DataFrame:
    """context, published_bpp, published_saving_percent, bpp, spread, seeds, saving_percent: rate of the second slice,
    and what is saved over the hyperprior alone."""
    rows = ablation("table3")
    data = _published("table3_second_slice_bpp", "context", "published_bpp")
    data["published_saving_percent"] = 100 * (1 - data["published_bpp"] / data["published_bpp"][0])
    data[["bpp", "spread", "seeds"]] = _seeds(rows["bpp"], rows["context"], data["context"])
    return data.assign(saving_percent=100 * (1 - data["bpp"] / data["bpp"][0]))


def table4_data() -> pd.DataFrame:
    """size, published_absolute_bpp, published_relative_bpp, published_saving_percent, absolute_bpp, relative_bpp,
    seeds, saving_percent."""
    rows = ablation("table4")
    columns = ("size", "published_absolute_bpp", "published_relative_bpp", "published_saving_percent")
    data = _published("table4_image_size", *columns)
    rows = rows[rows["position"] != "none"]
    kind = np.where(rows["position"] == "absolute", "absolute_bpp", "relative_bpp")
    ours = rows["bpp"].groupby([rows["size"], kind]).mean().unstack().reindex(data["size"])
    data[["absolute_bpp", "relative_bpp"]] = ours[["absolute_bpp", "relative_bpp"]].to_numpy()
    data["seeds"] = rows.groupby("size")["seed"].nunique().reindex(data["size"]).to_numpy()
    data["saving_percent"] = 100 * (1 - data["relative_bpp"] / data["absolute_bpp"])
    return data


# ---- any grid ----


@styled()
def dots(data: pd.DataFrame, label: str) -> Figure:
    """A line for each row, a point for each seed, a tick for the mean of several; what is published is grey and hollow.

    Args:
        data: row, source (PUBLISHED, or where our number comes from), value.
        label: of the axis of values.
    """
    rows, sources = (list(dict.fromkeys(data[column])) for column in ("row", "source"))
    figure, ax = new_figure(TWO_COLUMNS * 0.75, 0.75 + 0.32 * len(rows))
    ours, ticks = [source for source in sources if source != PUBLISHED], False
    for source, part in data.groupby("source", sort=False):
        place = (sources.index(source) - (len(sources) - 1) / 2) * 0.22
        if source == PUBLISHED:
            look = dict(color="0.4", marker="d", markerfacecolor="none")
        else:
            i = ours.index(source)
            look = dict(color=COLOURS[i], marker=MARKERS[i], alpha=0.8)
            several = part.groupby("row", sort=False)["value"].agg(["mean", "count"]).query("count > 1")
            ticks, means = ticks or len(several) > 0, several["mean"]
            ax.plot(means, means.index.map(rows.index) + place, "|", color=COLOURS[i], markersize=9)
        y = part["row"].map(rows.index) + place
        ax.plot(part["value"], y, linestyle="", markersize=4, label=source, **look)
    if data["value"].min() <= 0 <= data["value"].max():
        ax.axvline(0, color="0.7", linewidth=0.8)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    handles, words = ax.get_legend_handles_labels()
    words = ["a run" if len(words) == 1 and word == "here" else word for word in words]
    if ticks:
        handles.append(Line2D([], [], linestyle="", marker="|", color=COLOURS[0], markersize=9))
        words.append("mean of the seeds")
    figure.legend(handles, words, loc="outside lower center", ncols=len(handles))
    return figure


# ---- how gains grow with training ----

COMPARISONS = {  # colour and marker of each, in all figures
    "transformers throughout over CNNs throughout": (COLOURS[0], "o"),
    "transformer context over CNN, same hyperprior": (COLOURS[1], "s"),
    "transformer context over CNN, no hyperprior": (COLOURS[5], "P"),
    "transformer hyperprior over CNN, no context": (COLOURS[6], "*"),
    "two passes": (COLOURS[4], "v"),
    "two passes over CNN, same hyperprior": (COLOURS[4], "v"),
    "GroupedMixer, 12 groups": (COLOURS[2], "^"),
    "GroupedMixer, 32 groups": (COLOURS[3], ">"),
    "GroupedMixer over CNN, same hyperprior": (COLOURS[2], "^"),
}
GAINS = {  # what is compared with what: (it, against); a gain is positive where it needs fewer bits
    "transformers throughout over CNNs throughout": ("serial", "minnen"),
    "transformer context over CNN, same hyperprior": ("serial", "cnn"),
    "transformer context over CNN, no hyperprior": ("context", "context-cnn"),
    "transformer hyperprior over CNN, no context": ("hyperprior", "hyperprior-cnn"),
}
COSTS = {  # the same of what is beside the serial model: a cost is positive where it needs more bits
    "two passes": ("parallel", "serial"),
    "GroupedMixer, 12 groups": ("groupedmixer", "serial"),
    "GroupedMixer, 32 groups": ("groupedmixer-32", "serial"),
}


def gains_data(pairs: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """What one kind of the family needs against another on held-out latents, over the training.

    Args:
        pairs: label: the two kinds.

    Returns:
        label, seed, step, percent (of rate, negative where the first kind needs less; the mean over the lambdas, of
        logarithms).

    Raises:
        NoResult: a kind was not trained as long as the longest.
    """
    rows = needed("family")["rows"]
    steps = max(row["steps"] for row in rows)
    curves = {  # of kind and seed: ln of the rate, a row for each step and a column for each lambda
        (row["kind"], row["seed"]): np.log(pd.DataFrame(row["held_out"]).set_index("step"))
        for row in rows
        if row["steps"] == steps
    }
    found = []
    for label, (one, other) in pairs.items():
        seeds = sorted(seed for kind, seed in curves if kind == one and (other, seed) in curves)
        if not seeds:
            raise NoResult(f"Of {one} and {other} one was not trained for {steps:,} steps.")
        for seed in seeds:
            ratio = (curves[one, seed] - curves[other, seed]).mean(axis=1)
            row = {"label": label, "seed": seed, "step": ratio.index, "percent": 100 * np.expm1(ratio.to_numpy())}
            found.append(pd.DataFrame(row))
    return pd.concat(found, ignore_index=True)


@styled()
def gains_over_training(gains: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """Savings of attention, and what is paid beside the serial model, over the steps: the mean over seeds, and a small
    point for each seed where there are several."""
    figure, axes = new_figure(TWO_COLUMNS, 3.0, 1, 2, sharex=True)
    for ax, data, sign in ((axes[0], gains, -1), (axes[1], costs, 1)):
        for label, part in data.groupby("label", sort=False):
            colour, marker = COMPARISONS.get(label, ("0.35", "o"))
            mean = sign * part.groupby("step")["percent"].mean()
            ax.plot(mean.index, mean, color=colour, marker=marker, markersize=3, label=label)
            if part["seed"].nunique() > 1:
                ax.plot(part["step"], sign * part["percent"], ".", color=colour, markersize=2.5)
                dot = dict(linestyle="", marker=".", color="0.4", markersize=2.5, label="one seed of two")
        ax.axhline(0, color="0.7", linewidth=0.8)
        line = dict(color="0.6", linewidth=0.8, linestyle="--", zorder=0, label="larger crops from here on")
        ax.axvline(data["step"].max() * (1 - LAST_SHARE), **line)
        if (data.groupby("label")["seed"].nunique() > 1).any():
            ax.plot([], [], **dot)
        ax.grid(axis="y", alpha=0.25, linewidth=0.5)
        ax.set(xlabel="training step", ylabel="rate saved, %" if sign < 0 else "rate above the serial model, %")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


SIZES = {  # what is compared with what in squares of each size
    "transformers throughout over CNNs throughout": ("equal-serial", "equal-minnen"),
    "transformer context over CNN, same hyperprior": ("equal-serial", "equal-cnn"),
    "two passes over CNN, same hyperprior": ("equal-parallel", "equal-cnn"),
    "GroupedMixer over CNN, same hyperprior": ("equal-groupedmixer", "equal-cnn"),
}


def gains_by_size_data(pairs: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """What one model needs against another where pictures are cut into squares that are coded alone.

    Args:
        pairs: label: the two models, of picture_size.json.

    Returns:
        label, side (pixels), saving_percent (of the mean rate over the pictures, the mean over the lambdas), half_width
        (of its interval over the pictures).
    """
    rows = pd.DataFrame(needed("picture_size")["rows"])
    found = []
    for label, names in pairs.items():
        for side, part in rows.groupby("side"):
            rates = part.pivot(index="image", columns=["model", "lmbda"], values="bpp")
            effect = over_pictures(*(rates[name] for name in names))
            row = {"label": label, "side": side, "saving_percent": effect.value, "half_width": effect.half_width}
            found.append(row)
    return pd.DataFrame(found)


@styled()
def gains_by_size(data: pd.DataFrame) -> Figure:
    """Saving against the size of the squares, with the interval over the pictures."""
    figure, ax = new_figure(ONE_COLUMN, 3.1)
    sides = sorted(data["side"].unique())
    for i, (label, part) in enumerate(data.groupby("label", sort=False)):
        places = part["side"].map(sides.index) + 0.06 * (i - 1.5)  # the bars do not cover each other
        colour, marker = COMPARISONS.get(label, ("0.35", "o"))
        look = dict(color=colour, marker=marker, markersize=4, capsize=2, elinewidth=0.8)
        ax.errorbar(places, part["saving_percent"], part["half_width"], label=label, **look)
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.set_xticks(range(len(sides)), [f"{side}" for side in sides])
    ax.set(xlabel="side of the squares, pixels", ylabel="rate saved, %")
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", title="bars: 95% interval over the pictures", title_fontsize=7)
    return figure
