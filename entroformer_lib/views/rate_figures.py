"""Rate against quality, against decoding time, and of entropy models behind the same transforms.

Functions that end in `_data` read saved results, and raise NoResult where there are none. The others are pure functions
from a table to a figure.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.interpolate import PchipInterpolator

from entroformer_lib.studies.results import (
    AUTHORS,
    LABELS,
    QUALITIES,
    NoResult,
    ablation,
    in_order,
    kodak_means,
    load,
    published,
)
from entroformer_lib.studies.same_transforms import against, front, saved_rates
from entroformer_lib.studies.verdicts import over_pictures
from entroformer_lib.views.style import (
    COLOURS,
    GREYS,
    MARKERS,
    ONE_COLUMN,
    TWO_COLUMNS,
    label_ends,
    label_points,
    new_figure,
    styled,
)

# One look for a name in all figures: colour and marker of our models, colour and dashes of published curves
OURS = {
    "blocks-serial": (COLOURS[0], "o"),
    "blocks-parallel": (COLOURS[4], "v"),
    "blocks-serial-effort8": (COLOURS[1], "s"),
    "blocks-parallel-effort8": (COLOURS[5], "D"),
    "blocks-groupedmixer": (COLOURS[2], "^"),
    "blocks-hyperprior": (COLOURS[3], "X"),
    "blocks-parallel-msssim": ("#8a8a00", "P"),
}
THEIRS = {  # dashes that differ in grey too
    AUTHORS: ("black", (0, (5, 2))),
    "BPG 4:4:4": ("0.45", (0, (4, 1, 1, 1))),
    "VTM 9.1 (VVC)": ("#7b5ea7", (0, (9, 2))),
    "JPEG": ("0.6", (0, (1, 1))),
    "WebP": ("#d08770", (0, (3, 3))),
    "JPEG 2000": ("#6b8530", (0, (6, 2, 1, 2, 1, 2))),
    "AV1": ("#4c566a", (0, (7, 2, 2, 2))),
    "Minnen 2018 context + hyperprior (paper)": ("#7a4a21", (0, (2, 1))),
    "cheng2020-anchor (CompressAI)": ("#b03060", (0, (1, 2.5))),
    "cheng2020-anchor for MS-SSIM": ("#b03060", (0, (3, 1, 1, 1, 1, 1))),
    "mbt2018 (CompressAI)": ("#a8763e", (0, (6, 2, 1, 2, 1, 2))),
    "mbt2018 for MS-SSIM": ("#a8763e", (0, (3, 3))),
    "ELIC 2022 (paper)": ("#2f6f6f", (0, (7, 2, 2, 2))),
}
LIVE = {  # classical codecs as Pillow has them: the colour of the published curve
    "jpeg": ("JPEG, Pillow", (THEIRS["JPEG"][0], "h", "-")),
    "webp": ("WebP, Pillow", (THEIRS["WebP"][0], "<", "-")),
    "jpeg2000": ("JPEG 2000, Pillow", (THEIRS["JPEG 2000"][0], "*", "-")),
    "avif": ("AVIF, Pillow", (THEIRS["AV1"][0], ">", "-")),
}
# Of other names, in their order
MORE = ("#2f6f6f", "#7c9a3c", "#d08770", "#4c566a")
DASHES = ((0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
LOOKS = {  # variant: colour, marker, dashes of a line
    "minnen": ("0.3", "s", "-"),
    "cnn": ("0.55", "D", "-"),
    "serial": (COLOURS[0], "o", "-"),
    "parallel": (COLOURS[4], "v", "-"),
    "parallel-9": (COLOURS[5], "<", "-"),
    "groupedmixer": (COLOURS[2], "^", "-"),
    "groupedmixer-32": (COLOURS[3], ">", "-"),
    "hyperprior-cnn": ("0.3", "X", "--"),
    "hyperprior": (COLOURS[0], "*", "--"),
    "context-cnn": ("0.3", "h", ":"),
    "context-serial": (COLOURS[0], "P", ":"),
}
OTHER = ("0.35", "o", "-")


# ---- rate and quality ----

BASE = "minnen"  # what figure 5 compares with: context and hyperprior are CNNs
CNN_OF_THE_PAPER = "Minnen 2018 context + hyperprior (paper)"
MOST = 60  # percent that are shown
GOALS = {"ms-ssim": "trained for MS-SSIM; and BPG", "mse": "for mean squared error; classical codecs"}
IN_BOTH = "BPG 4:4:4"  # it stands in both panels of figure 12


def whole_models_data() -> pd.DataFrame:
    """Figure 5, left: entropy models behind the same transforms, and the paper's own: codec, source (None: ours), bpp,
    psnr_db, base (the CNN entropy model to compare with: ours is behind the same transforms). Where there is no such
    family, our models by their names, and the base is the paper's."""
    ours = kodak_means()
    whole = (BASE, "serial", "parallel", "groupedmixer", "groupedmixer-32")
    family = in_order(ours[ours["transforms"].notna() & ours["variant"].isin(whole)])
    if (family["variant"] == BASE).any():
        ours = family.assign(codec=family["variant"].map(LABELS), base=LABELS[BASE])
    else:
        ours = _alone(["mse"]).assign(base=CNN_OF_THE_PAPER)
    theirs = _named(published(), (AUTHORS, CNN_OF_THE_PAPER)).assign(base=CNN_OF_THE_PAPER)
    return pd.concat([ours, theirs], ignore_index=True)[["codec", "source", "bpp", "psnr_db", "base"]]


def codecs_data(names: tuple[str, ...], base: str) -> pd.DataFrame:
    """Figure 11: our serial and parallel models (or, where there are none, all) and other people's codecs, by PSNR:
    codec, source (None: ours), bpp, psnr_db, base.

    names: of the published curves; base: the one to compare with.
    """
    ours = _alone(["mse"])
    points = ours.groupby("codec")["bpp"].transform("size")
    ours = ours.loc[points.sort_values(ascending=False, kind="stable").index]  # whole curves first
    curves = pd.concat([ours, _named(published(), names)], ignore_index=True)
    return curves[["codec", "source", "bpp", "psnr_db"]].assign(base=base)


def goals_data(names: tuple[str, ...]) -> pd.DataFrame:
    """Figure 12, by MS-SSIM: codec, optimised_for ("mse" for classical codecs too), source, bpp, ms_ssim_db.

    Serial models are left out: their curve lies on that of the parallel ones.

    Raises:
        NoResult: none of ours was measured by MS-SSIM, for which a picture may be too small.
    """
    ours = _alone(list(GOALS))
    ours = ours[~ours["codec"].str.contains("-effort")]
    ours = ours[(ours["variant"] != "serial") | ~(ours["variant"] == "parallel").any()]
    for_it, others = (_named(published(optimised_for=goals), names) for goals in (("ms-ssim",), ("mse", "codec")))
    both = for_it["codec"].isin(others.dropna(subset="ms_ssim_db")["codec"])  # one name, two curves
    apart = for_it["codec"].str.removesuffix(" (CompressAI)") + " for MS-SSIM"
    theirs = (for_it.assign(codec=for_it["codec"].mask(both, apart)), others)
    curves = pd.concat([ours, *theirs], ignore_index=True).dropna(subset="ms_ssim_db")
    if curves["source"].notna().all():
        raise NoResult("No picture was large enough for MS-SSIM.")
    curves["optimised_for"] = curves["optimised_for"].replace("codec", "mse")
    return curves[["codec", "optimised_for", "source", "bpp", "ms_ssim_db"]]


def _alone(goals: list[str]) -> pd.DataFrame:
    """Our serial and parallel models without those of a family; all where there are no others.

    goals: what they were trained for
    """
    ours = kodak_means()
    ours = ours[(ours["transforms"].isna() | ours["transforms"].notna().all()) & ours["optimised_for"].isin(goals)]
    if ours.empty:
        raise NoResult(f"No model trained for {' or '.join(goals)} was measured.")
    main = ours["variant"].isin(["serial", "parallel"])
    return ours[main | ~main.any()]


def _named(curves: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    return pd.concat([curves[curves["codec"] == name] for name in names])


@styled()
def rate_distortion(
    curves: pd.DataFrame, quality: str = "psnr_db", base: str = "BPG 4:4:4", width: float = TWO_COLUMNS
) -> Figure:
    """Rate and quality, and what each curve needs at equal quality, in percent of another's.

    Measured here: full lines with points; published: dashed. The range is that of the measured ones. In one column the
    panels are one below the other.

    Args:
        curves: codec, source (None: measured here), bpp, and the quality; of `results.kodak_means` and `published`. A
            column `base` names for each the curve to compare with.
        quality: psnr_db or ms_ssim_db.
        base: it, where there is no such column. If it is not among the curves there is one panel.
        width: ONE_COLUMN or TWO_COLUMNS.
    """
    curves = curves.dropna(subset=quality)
    bases = curves.drop_duplicates("codec").set_index("codec")
    bases = bases["base"] if "base" in curves else bases["bpp"].map(lambda _: base)
    panels = 2 if set(bases) <= set(curves["codec"]) else 1
    narrow = width == ONE_COLUMN
    wide = width if panels == 2 or narrow else 0.75 * width
    size, shape = ((width, 2.1 * panels + 1), (panels, 1)) if narrow else ((wide, 3.8), (1, panels))
    figure, axes = new_figure(*size, *shape, squeeze=False)
    looks = _looks(curves)
    _curves(axes.flat[0], curves, quality, looks)
    if panels == 2:
        _percent(axes.flat[1], curves, quality, looks, bases)
    _legend(figure, curves, looks)
    return figure


@styled()
def by_goal(curves: pd.DataFrame, quality: str = "ms_ssim_db", width: float = ONE_COLUMN) -> Figure:
    """Rate and quality, a panel for each measure that models were trained for.

    curves: as for `rate_distortion`, with optimised_for; width: ONE_COLUMN or TWO_COLUMNS.
    """
    size, shape = ((width, 5.2), (2, 1)) if width == ONE_COLUMN else ((width, 3.8), (1, 2))
    figure, axes = new_figure(*size, *shape, sharex=True, sharey=True)
    looks = _looks(curves)
    for ax, (goal, title) in zip(axes.flat, GOALS.items(), strict=True):
        _curves(ax, curves[(curves["optimised_for"] == goal) | (curves["codec"] == IN_BOTH)], quality, looks)
        ax.set_title(title, loc="left")
    ours = curves[curves["source"].isna()]
    axes[0].set(xlim=(0, 1.15 * ours["bpp"].max()), ylim=(ours[quality].min() - 1, curves[quality].max() + 0.5))
    for ax in axes.flat:
        ax.label_outer()
    _legend(figure, curves, looks)
    return figure


def _looks(curves: pd.DataFrame) -> dict[str, dict]:
    """Of each codec: how its line is drawn."""
    known = {LABELS[variant]: look for variant, look in LOOKS.items()} | {n: (*look, "-") for n, look in OURS.items()}
    known |= {name: look for name, (_, look) in LIVE.items()}
    ours, theirs = (
        list(curves[here]["codec"].unique()) for here in (curves["source"].isna(), curves["source"].notna())
    )
    taken = {known[name][0] for name in ours if name in known}
    colours = [colour for colour in (*COLOURS, "0.5", *MORE) if colour not in taken]
    free = [(colour, MARKERS[-1 - i % len(MARKERS)], "-") for i, colour in enumerate(colours)]
    looks = {}
    for i, name in enumerate(name for name in ours if name not in known):
        known[name] = free[i % len(free)]
    for i, name in enumerate(name for name in theirs if name not in THEIRS):
        looks[name] = dict(color=MORE[i % len(MORE)], linewidth=1, linestyle=DASHES[i % len(DASHES)])
    for name in ours:
        colour, marker, dashes = known[name]
        looks[name] = dict(color=colour, linewidth=1.2, marker=marker, markersize=4, linestyle=dashes)
    for name in theirs:
        if name in THEIRS:
            looks[name] = dict(color=THEIRS[name][0], linewidth=1, linestyle=THEIRS[name][1])
    return looks


def _curves(ax, curves: pd.DataFrame, quality: str, looks: dict[str, dict]) -> None:
    for name, part in curves.groupby("codec", sort=False):
        ax.plot(part["bpp"], part[quality], **looks[name])
    ours = curves[curves["source"].isna()]
    if len(ours):
        most, lowest = 1.15 * ours["bpp"].max(), ours[quality].min() - 1
        shown = curves[(curves["bpp"] <= most) & (curves[quality] >= lowest)]
        ax.set(xlim=(0, most), ylim=(lowest, shown[quality].max() + 0.5))
    ax.set(xlabel="bits per pixel (whole files)", ylabel=QUALITIES[quality])
    ax.grid(alpha=0.25, linewidth=0.5)


def _percent(ax, curves: pd.DataFrame, quality: str, looks: dict[str, dict], bases: pd.Series) -> None:
    """Rate at equal quality against each curve's base; a curve of one point has none."""
    parts = {name: part.sort_values(quality) for name, part in curves.groupby("codec", sort=False)}
    logs = {name: PchipInterpolator(p[quality], np.log(p["bpp"])) for name, p in parts.items() if len(p) > 1}
    ours, ends = curves[curves["source"].isna()][quality], []
    for name, part in parts.items():
        base = parts[bases[name]]
        if name == bases[name] or len(base) < 2:
            continue
        low, high = (
            limit(of(p) for p in (part[quality], base[quality], ours)) for limit, of in ((max, min), (min, max))
        )
        if name in logs and low < high:
            at = np.linspace(low, high, 60)
            percent = 100 * np.expm1(logs[name](at) - logs[bases[name]](at))
            ax.plot(at, percent, **{**looks[name], "marker": None})
            ends += [percent.min(), percent.max()] if percent.min() < MOST else []  # JPEG lies far outside
        if looks[name].get("marker"):
            inside = part[part[quality].between(low, high)]
            there = 100 * np.expm1(np.log(inside["bpp"]) - logs[bases[name]](inside[quality]))
            ax.plot(inside[quality], there, **{**looks[name], "linestyle": ""})
            ends += list(there)
    ax.axhline(0, color="0.3", linewidth=0.6, zorder=0)
    if ends:
        lowest, highest = min(ends), max(ends)
        if lowest < MOST and highest > -MOST:  # something is left when the rest is cut off
            lowest, highest = max(lowest, -MOST), min(highest, MOST)
        ax.set_ylim(lowest - 4, highest + 4)
    against = bases.unique()
    apart = "CNNs, %\n(authors against Minnen 2018)"
    words = apart if len(against) > 1 else against[0].removesuffix(" (paper)") + ", %"
    edge = 0.03 * (ours.max() - ours.min()) or 1  # room for whole markers
    ax.set(
        xlim=(ours.min() - edge, ours.max() + edge),
        xlabel=QUALITIES[quality],
        ylabel=f"rate against\n{words}" if len(against) == 1 else f"rate against {words}",
    )
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    ax.grid(alpha=0.25, linewidth=0.5)


def _legend(figure: Figure, curves: pd.DataFrame, looks: dict[str, dict]) -> None:
    """Below the panels: what was measured here on the left, what is published on the right."""
    first = curves.drop_duplicates("codec")
    groups = {"measured here": first[first["source"].isna()], "published": first[first["source"].notna()]}
    nothing, columns = Line2D([], [], linestyle=""), []
    for title, part in groups.items():
        names = (
            part["codec"]
            .replace({name: words for name, (words, _) in LIVE.items()})
            .str.removesuffix(" (paper)")
            .str.replace("-effort", ", effort ")
        )
        lines = [(Line2D([], [], **looks[name]), words) for name, words in zip(part["codec"], names, strict=True)]
        columns += [[(nothing, title), *lines]] if lines else []
    longest = max(map(len, columns))
    entries = [pair for one in columns for pair in one + [(nothing, "")] * (longest - len(one))]
    handles, words = zip(*entries, strict=True)
    figure.legend(handles, words, loc="outside lower center", ncols=len(columns), fontsize=6, columnspacing=1)


# ---- entropy models behind the same transforms ----


def same_transforms_data() -> pd.DataFrame:
    """variant, lmbda, psnr_db, base_bpp, bpp, percent of BASE, half_width (of its interval over the pictures), label: a
    row for each model and lambda. Without the nine layers, whose curve lies on that of the six."""
    rates = saved_rates().query("variant != 'parallel-9'")
    if not (rates["variant"] == BASE).any():
        raise NoResult(f"No published model is of the kind {BASE}.")
    data = against(rates, BASE)
    tables = {key: part.set_index("image")[["bpp"]] for key, part in rates.groupby(["variant", "lmbda"])}
    data["half_width"] = [
        over_pictures(tables[variant, lmbda], tables[BASE, lmbda]).half_width
        for variant, lmbda in zip(data["variant"], data["lmbda"], strict=True)
    ]
    return data.assign(label=data["variant"].map(lambda variant: LABELS.get(variant, variant)))


@styled()
def same_transforms(data: pd.DataFrame, width: float = TWO_COLUMNS) -> Figure:
    """Rate against the CNN's at equal pictures: whole entropy models in one panel, their halves in the other. A bar is
    the 95% interval over the pictures.

    width: ONE_COLUMN (one below the other) or TWO_COLUMNS
    """
    narrow = width == ONE_COLUMN
    figure, axes = new_figure(width, 5.2 if narrow else 3.6, *((2, 1) if narrow else (1, 2)))
    halves = data["label"].str.endswith("alone")
    panels = {"context and hyperprior": data[~halves], "one alone": data[halves]}
    for ax, (title, part) in zip(axes, panels.items(), strict=True):
        for (variant, label), line in part.groupby(["variant", "label"], sort=False):
            colour, marker, dashes = LOOKS.get(variant, OTHER)
            look = dict(color=colour, markersize=4, elinewidth=0.6, label=label)
            ax.errorbar(line["base_bpp"], line["percent"], line["half_width"], fmt=marker + dashes, **look)
        ax.axhline(0, color="0.3", linewidth=0.6, zorder=0)
        ax.set(xlabel="bits per pixel of CNNs throughout", ylabel="rate against CNNs, %")
        ax.set_title(title, loc="left")
        ax.grid(alpha=0.25, linewidth=0.5)
    if not narrow:
        axes[1].set_ylabel("")
    handles, words = zip(
        *(pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)), strict=True
    )
    handles = [handle.lines[0] for handle in handles] + [Line2D([], [], linestyle="", marker="|", color="0.4")]
    words = [*words, "95% interval over the pictures"]
    look = dict(ncols=2 if narrow else 3, fontsize=6, columnspacing=1, handlelength=1.6)
    figure.legend(handles, words, loc="outside lower center", **look)
    return figure


# ---- rate against the number of groups ----


def groups_data() -> pd.DataFrame:
    """groups, slices, phases, seed, bpp of the grid `groups`, whole pictures."""
    return ablation("groups").sort_values(["groups", "seed"], ignore_index=True)


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
    colour, marker, _ = LOOKS["groupedmixer"]
    ax.plot(rows["groups"].map(place), rows["bpp"], marker, color=colour, markersize=4, alpha=0.7)
    ax.plot(range(len(means)), means, color=colour)
    kinds = rows.drop_duplicates("groups").set_index("groups")
    names = [f"{G}\n{kinds.loc[G, 'slices']} x {kinds.loc[G, 'phases']}" for G in means.index]
    ax.set_xticks(range(len(means)), names)
    most, values = len(means) - 0.7, [*rows["bpp"], *(lines or {}).values()]
    ends = [(means.iloc[-1], len(means) - 1, LABELS["groupedmixer"], colour)]
    for grey, dashes, (name, bpp) in zip(GREYS, ("--", ":", "-."), (lines or {}).items(), strict=False):
        ax.axhline(bpp, color=grey, linestyle=dashes, linewidth=1)
        ends.append((bpp, most, name, grey))
    room = max(values) - min(values) or 0.01
    label_ends(ax, ends, most, gap=room / 12)
    ax.set(xlim=(-0.3, most), ylim=(min(values) - 0.08 * room, max(values) + 0.08 * room))
    ax.set(xlabel="number of groups G\nchannel slices x phases", ylabel="bits per pixel, estimated")
    ax.grid(axis="y", alpha=0.25, linewidth=0.5)
    return figure


# ---- rate against decoding time ----

FAMILIES = {"shipped": "the family, 8,000 steps", "runs": "runs of the ablations"}
TIMES = {"decode_s": "seconds to decode a picture", "context_s": "of these in the context model, s"}


@styled()
def tradeoff(points: pd.DataFrame) -> Figure:
    """Rate against decoding time, a row of panels for each family: of the whole decoding, and of the context
    model's own stages. Left and down is better; the dashed line joins what no other model beats in both.

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
        colour, marker, dashes = LOOKS.get(variant, OTHER)
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
