"""Rate against quality, against decoding time, and of entropy models behind the same transforms.

Functions that end in `_data` read saved results, and give None where there is none. The others are pure functions from
a table to a figure.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from entroformer_lib.studies.results import (
    LABELS,
    QUALITIES,
    ablation,
    kodak_means,
    load,
    published,
)
from entroformer_lib.studies.same_transforms import against, front, saved_rates
from entroformer_lib.views.style import (
    COLOURS,
    GREYS,
    MARKERS,
    TWO_COLUMNS,
    label_ends,
    label_points,
    new_figure,
    styled,
)

DASHES = ((0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1)))  # of published curves
LOOKS = {  # variant: colour, marker, dashes of a line
    "minnen": ("0.3", "s", "-"),
    "cnn": (COLOURS[1], "D", "-"),
    "serial": (COLOURS[0], "o", "-"),
    "parallel": (COLOURS[4], "v", "-"),
    "groupedmixer": (COLOURS[2], "^", "-"),
    "hyperprior-cnn": ("0.3", "s", "--"),
    "hyperprior": (COLOURS[0], "o", "--"),
    "context-cnn": ("0.3", "D", ":"),
    "context-serial": (COLOURS[0], "P", ":"),
}


# ---- rate and quality ----


def rate_distortion_data(quality: str, names: tuple[str, ...]) -> Callable[[], pd.DataFrame | None]:
    """Our models' curves on Kodak and published ones: codec, source (None: ours), bpp, quality.  ->  a reader of them

    Of the models behind frozen transforms the serial one and GroupedMixer are shown. In PSNR, models that were trained
    for MS-SSIM are left out.

    Args:
        quality: psnr_db or ms_ssim_db.
        names: of the published curves, darkest first.
    """

    def read() -> pd.DataFrame | None:
        goals, theirs = (("mse",), "mse") if quality == "psnr_db" else (("mse", "ms-ssim"), "ms-ssim")
        ours = kodak_means()
        shown = ours["transforms"].isna() | ours["variant"].isin(("serial", "groupedmixer"))
        ours = ours[shown & ours["optimised_for"].isin(goals)]
        if ours.empty:
            return None
        curves = published(optimised_for=(theirs, "codec"))
        curves = [curves[curves["codec"] == name] for name in names]
        columns = ["codec", "source", "bpp", quality]
        return pd.concat([part[columns] for part in (ours, *curves)], ignore_index=True).dropna(subset=quality)

    return read


@styled()
def rate_distortion(curves: pd.DataFrame, quality: str = "psnr_db") -> Figure:
    """Rate against quality: measured here with points and full lines, published curves thin and dashed.

    The range is that of the measured ones.

    Args:
        curves: codec, source (None: measured here), bpp, and the quality; of `results.kodak_means` and `published`.
        quality: psnr_db or ms_ssim_db.
    """
    figure, ax = new_figure(TWO_COLUMNS * 0.75, 3.8)
    curves = curves.dropna(subset=quality)
    ours, theirs = curves[curves["source"].isna()], curves[curves["source"].notna()]
    most, ends = 1.15 * ours["bpp"].max(), []
    for i, (name, part) in enumerate(theirs.groupby("codec", sort=False)):
        colour = GREYS[i % len(GREYS)]
        ax.plot(part["bpp"], part[quality], linestyle=DASHES[i % len(DASHES)], color=colour, linewidth=0.9)
        end = np.interp(most, part["bpp"], part[quality])
        ends.append((end, min(most, part["bpp"].max()), f"{name.removesuffix(' (paper)')}, published", colour))
    for i, (name, part) in enumerate(ours.groupby("codec", sort=False)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(part["bpp"], part[quality], color=colour, marker=marker, markersize=4, label=name)
    low, high = ours[quality].min() - 1, max([ours[quality].max(), *(end for end, *_ in ends)]) + 0.5
    ax.set(xlim=(0, most), ylim=(low, high), xlabel="bits per pixel (whole files)", ylabel=QUALITIES[quality])
    label_ends(ax, ends, most, gap=(high - low) / 28)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.legend(loc="lower right", title="measured here")
    return figure


# ---- entropy models behind the same transforms ----

BASE = "minnen"  # what figure 5 right compares with: context and hyperprior are CNNs


def same_transforms_data() -> pd.DataFrame | None:
    """variant, lmbda, psnr_db, base_bpp, bpp, percent of BASE, label: a row for each model and lambda."""
    rates = saved_rates()
    if not (rates["variant"] == BASE).any():
        return None
    data = against(rates, BASE)
    return data.assign(label=data["variant"].map(LABELS))


@styled()
def same_transforms(data: pd.DataFrame) -> Figure:
    """Rate against the CNN's at equal pictures: whole entropy models on the left, their halves on the right."""
    figure, axes = new_figure(TWO_COLUMNS, 3.6, 1, 2)
    halves = data["label"].str.endswith("alone")
    panels = {"context and hyperprior": data[~halves], "one alone": data[halves]}
    for ax, (title, part) in zip(axes, panels.items(), strict=True):
        for (variant, label), line in part.groupby(["variant", "label"], sort=False):
            colour, marker, dashes = LOOKS[variant]
            ax.plot(line["base_bpp"], line["percent"], marker + dashes, color=colour, markersize=4, label=label)
        ax.axhline(0, color="0.3", linewidth=0.6, zorder=0)
        ax.set(title=title, xlabel="bits per pixel of CNNs throughout")
        ax.grid(alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=3)
    axes[0].set_ylabel("rate against CNNs throughout, %")
    return figure


# ---- rate against the number of groups ----


def groups_data() -> pd.DataFrame | None:
    """groups, slices, phases, seed, bpp of the grid `groups`, whole pictures."""
    rows = ablation("groups")
    return None if rows is None else rows.sort_values(["groups", "seed"], ignore_index=True)


def lines_beside(grid: str = "groups") -> dict[str, float]:
    """Mean rates of the hyperprior alone, the parallel and the serial model, where they were trained on the same terms
    as the runs of a grid; empty where they were not."""
    ours, theirs = (load(f"ablation-{name}") for name in (grid, "table3"))
    if ours is None or theirs is None or ours["settings"] != theirs["settings"]:
        return {}
    means = ablation("table3_whole").groupby("trained")["bpp"].mean()
    names = {"hyperprior": "hyperprior", "bidirectional": "parallel", "serial": "serial"}
    return {LABELS[variant]: float(means[trained]) for trained, variant in names.items() if trained in means}


@styled()
def groups_curve(rows: pd.DataFrame, lines: dict[str, float] | None = None) -> Figure:
    """Rate against the number of groups, a point for each seed, a line through the means; other models are level lines.

    rows: of `groups_data`; lines: of `lines_beside`
    """
    figure, ax = new_figure(TWO_COLUMNS * 0.75, 2.8)
    means = rows.groupby("groups")["bpp"].mean()
    place = {G: i for i, G in enumerate(means.index)}
    ax.plot(rows["groups"].map(place), rows["bpp"], "o", color=COLOURS[0], markersize=4, alpha=0.7)
    ax.plot(range(len(means)), means, color=COLOURS[0])
    kinds = rows.drop_duplicates("groups").set_index("groups")
    names = [f"{G}\n{kinds.loc[G, 'slices']} x {kinds.loc[G, 'phases']}" for G in means.index]
    ax.set_xticks(range(len(means)), names)
    most, values = len(means) - 0.7, [*rows["bpp"], *(lines or {}).values()]
    ends = [(means.iloc[-1], len(means) - 1, LABELS["groupedmixer"], COLOURS[0])]
    for colour, dashes, (name, bpp) in zip(GREYS, ("--", ":", "-."), (lines or {}).items(), strict=False):
        ax.axhline(bpp, color=colour, linestyle=dashes, linewidth=1)
        ends.append((bpp, most, name, colour))
    room = max(values) - min(values) or 0.01
    label_ends(ax, ends, most, gap=room / 12)
    ax.set(xlim=(-0.3, most), ylim=(min(values) - 0.08 * room, max(values) + 0.08 * room))
    ax.set(xlabel="number of groups G\nchannel slices x phases", ylabel="bits per pixel, estimated")
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    return figure


# ---- rate against decoding time ----

FAMILIES = {"shipped": "shipped models", "runs": "runs of the ablations"}
TIMES = {"decode_s": "seconds to decode a picture", "context_s": "of these in the entropy model, s"}


@styled()
def tradeoff(points: pd.DataFrame) -> Figure:
    """Rate against decoding time, a row of panels for each family: of the whole decoding, and of the entropy model's
    own stages. Left and down is better; the dashed line joins what no other model beats in both.

    points: of `same_transforms.tradeoff_points`
    """
    families = list(dict.fromkeys(points["family"]))
    figure, axes = new_figure(TWO_COLUMNS, 2.6 * len(families) + 0.6, len(families), 2, squeeze=False, sharey="row")
    for row, family in zip(axes, families, strict=True):
        part = points[points["family"] == family]
        for ax, seconds in zip(row, TIMES, strict=True):
            _points_and_front(ax, part[part[seconds] > 0], seconds)
        row[0].set_ylabel("rate against the parallel model, %")
        row[0].set_title(FAMILIES.get(family, family), loc="left")
    handles = {}
    for ax in axes.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    for row, family in zip(axes, families, strict=True):
        for ax, seconds in zip(row, TIMES, strict=True):
            groups = points.query(f"family == '{family}' and variant == 'groupedmixer' and {seconds} > 0")
            if len(groups) > 1:
                names = groups["groups"].map("G = {:.0f}".format)
                label_points(ax, groups[seconds], groups["percent"], names, LOOKS["groupedmixer"][0])
    return figure


def _points_and_front(ax, points: pd.DataFrame, seconds: str) -> None:
    best, groups = front(points, seconds), points[points["variant"] == "groupedmixer"].sort_values("groups")
    look = dict(color="0.6", linewidth=0.8, zorder=1, label="none is both faster and smaller")
    ax.plot(best[seconds], best["percent"], "--", **look)
    ax.plot(groups[seconds], groups["percent"], color=LOOKS["groupedmixer"][0], linewidth=1, zorder=2)
    for variant, part in points.groupby("variant", sort=False):
        colour, marker, dashes = LOOKS.get(variant, ("0.35", "o", "-"))
        face = colour if dashes == "-" else "white"
        label = LABELS.get(variant, variant)
        ax.plot(part[seconds], part["percent"], marker, color=colour, markerfacecolor=face, markersize=5, label=label)
    ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    ax.set(xscale="log", xlabel=TIMES[seconds])
    ax.margins(x=0.15, y=0.15)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.2, linewidth=0.5, which="both")
