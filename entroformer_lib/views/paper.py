"""Every figure and table of the paper for which there are saved results: one command, no model runs.

    python -m entroformer_lib.views.paper

Reads data/results and data/reference, writes figures/: each item as PNG and SVG, the data it draws as CSV, tables also
as Markdown, and README.md, which puts the published number beside ours. An item whose results do not exist is left out
and said to be. A result that appears later is drawn without new code, if it has these columns:

    *-kodak.json             `mean`, or one for each lambda: bpp, psnr_db, ms_ssim         (figures 5, 11, 12)
    position_masking.json    of studies/position_masking.py                                (figure 3)
    latency.json             of studies/latency.py                                         (table 2)
    model_sizes.json         of studies/model_sizes.py                                     (table 6)
    ablation*.json           `rows`, each with grid, seed, bpp and                         (the others)
        grid table1    context ("cnn", or a transformer's) and position as in EntroformerConfig
        grid figure6   radius; None: unlimited; position "none" is the baseline
        grid figure7   top_k, None: dense; step
        grid table3    context: "hyperprior only", "hyperprior + unidirectional", "hyperprior + bidirectional"
        grid table4    size (pixels), position: "absolute" or another one
    attention.json           `maps`, each with figure (8, 9 or 10), title, query [row, column], probs [h][w]
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.views import style
from entroformer_lib.views.style import COLOURS, GREYS, ONE_COLUMN, SEQUENTIAL, TWO_COLUMNS, new_figure, styled

AUTHORS = "Entroformer, serial (authors)"
# Drawn in figures 5, 11 and 12 beside ours: published curves, darkest first
FEW_CURVES = (AUTHORS, "VTM 9.1 (VVC)", "BPG 4:4:4", "Minnen 2018 context + hyperprior (paper)", "JPEG")
MODEL_COLOURS, MARKERS = (*COLOURS, "0.5"), "osD^vPX*"  # of the models in figure 3
MORE_CURVES = (
    *FEW_CURVES,
    "Minnen 2020 channel-wise (paper)",
    "Ballé 2018 hyperprior (paper)",
    "cheng2020-anchor (CompressAI)",
)


@dataclass(frozen=True)
class Comparison:
    """One published number beside ours."""

    quantity: str
    published: float | None
    ours: float
    unit: str = ""

    @property
    def deviation(self) -> str:
        """Difference in the unit itself for percent and dB, otherwise in percent of the published number."""
        if self.published is None:
            return ""
        if self.unit in ("%", "dB"):
            return f"{self.ours - self.published:+.2f} {self.unit}"
        return f"{100 * (self.ours / self.published - 1):+.1f}%"


@dataclass(frozen=True)
class Item:
    """One figure or table.

    data: what is drawn, from the saved results; None where they do not exist.
    draw: data to figure. compare: data to published numbers and ours. table: also written as Markdown.
    """

    name: str
    title: str
    needs: str
    data: Callable[[], pd.DataFrame | None]
    draw: Callable[[pd.DataFrame], Figure]
    compare: Callable[[pd.DataFrame], list[Comparison]] = field(default=lambda data: [])
    claim: str = ""
    table: bool = False


# ---- reading ----


def result(name: str) -> dict | None:
    """A saved result, or None."""
    path = data_folder() / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def reference(name: str):
    """Published numbers: paper_tables or rd_curves."""
    return json.loads((data_folder() / "reference" / f"{name}.json").read_text())


def ablation(grid: str) -> pd.DataFrame | None:
    """The rows of a grid out of all ablation*.json, or None."""
    rows = []
    for path in sorted((data_folder() / "results").glob("ablation*.json")):
        rows += [row for row in json.loads(path.read_text())["rows"] if row.get("grid") == grid]
    return pd.DataFrame(rows).drop(columns="grid") if rows else None


# ---- figure 3 ----


def masking_data(key: str = "over_pictures") -> pd.DataFrame | None:
    """model, dy, dx, percent (mean over the pictures), spread, pictures, L1, L2, L-infinity.

    key: over_pictures (the position missing) or alone_over_pictures (the position alone known).
    """
    saved = result("position_masking")
    return None if saved is None else pd.DataFrame(saved[key])


def masking_by_distance_data() -> pd.DataFrame | None:
    """Both, one below the other: measure ("missing" or "alone"), and the columns of `masking_data`."""
    if result("position_masking") is None:
        return None
    parts = (("missing", masking_data()), ("alone", masking_data("alone_over_pictures")))
    return pd.concat([part.assign(measure=name) for name, part in parts], ignore_index=True)


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


def masking_comparison(data: pd.DataFrame) -> list[Comparison]:
    """Spearman's rank correlation of percent and L1 distance; the paper gives a picture and no number."""
    found = []
    for key, measure in (("fits", "increase when missing"), ("alone_fits", "saving alone")):
        for fit in result("position_masking")[key]:
            if fit["norm"] == "L1" and fit["spearman"] is not None:
                words = f"Spearman of {measure} and L1 distance, {fit['model']}"
                found.append(Comparison(words, None, fit["spearman"]))
    return found


def beyond_data() -> pd.DataFrame | None:
    """model, radius, percent (mean over the pictures), spread."""
    saved = result("position_masking")
    if saved is None:
        return None
    rows = pd.DataFrame(saved["beyond"])
    grouped = (100 * (rows["ratio"] - 1)).groupby([rows["model"], rows["radius"]], sort=False)
    data = grouped.agg(["mean", "std"]).reset_index()
    data.columns = ["model", "radius", "percent", "spread"]
    return data


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


def rate_distortion_data(metric: str, published: tuple[str, ...]) -> Callable[[], pd.DataFrame | None]:
    """Curves of `metric` (psnr or ms_ssim) on Kodak: label, published, bpp, quality (dB).  ->  a reader of them"""

    def read() -> pd.DataFrame | None:
        rows = []
        for path in sorted((data_folder() / "results").glob("*-kodak.json")):
            mean = json.loads(path.read_text()).get("mean", {})
            points = [mean] if "bpp" in mean else list(mean.values())
            key = "psnr_db" if metric == "psnr" else "ms_ssim"
            label = path.stem.removesuffix("-kodak")
            rows += [(label, False, p["bpp"], p[key]) for p in sorted(points, key=lambda p: p["bpp"]) if key in p]
        if not rows:
            return None
        for label in published:
            for curve in reference("rd_curves"):
                fits = curve["optimised_for"] in ("codec", "mse" if metric == "psnr" else "ms-ssim")
                if curve["dataset"] == "kodak" and curve["label"] == label and metric in curve and fits:
                    points = sorted(zip(curve["bpp"], curve[metric], strict=True))
                    rows += [(label, True, bpp, quality) for bpp, quality in points]
        data = pd.DataFrame(rows, columns=["label", "published", "bpp", "quality"])
        if metric == "ms_ssim":
            data["quality"] = -10 * np.log10(1 - data["quality"])
        return data

    return read


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
        _label_ends(ax, ends, most, gap=(high - low) / 28)
        ax.legend(loc="upper left", title="measured here")
        ax.grid(alpha=0.25, linewidth=0.5)
        return figure

    return draw


def _label_ends(ax, ends: list[tuple[float, float, str, str]], x: float, gap: float) -> None:
    """Names at the right ends of curves, moved apart until none covers another.  ends: (y, x, text, colour) of each"""
    free = np.inf
    for y, end, text, colour in sorted(ends, reverse=True):
        free = min(y, free - gap)
        options = dict(color=colour, fontsize=6, va="center", annotation_clip=False)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        ax.annotate(text, (end, y), xytext=(1.04 * x, free), arrowprops=line, **options)


def rate_distortion_comparison(data: pd.DataFrame) -> list[Comparison]:
    """Ours against the authors' curve at our rates (log-linear between their points), where that covers them."""
    theirs = data[data["label"] == AUTHORS].sort_values("bpp")
    found = []
    for row in data[~data["published"]].itertuples():
        if len(theirs) and theirs["bpp"].iloc[0] <= row.bpp <= theirs["bpp"].iloc[-1]:
            quality = float(np.interp(np.log(row.bpp), np.log(theirs["bpp"]), theirs["quality"]))
            found.append(Comparison(f"{row.label} at {row.bpp:.3f} bpp", quality, row.quality, "dB"))
    return found


# ---- grids of the ablation ----


def figure6_data() -> pd.DataFrame | None:
    """radius (0: no position encoding, infinite: unlimited), seed, bpp, saving_percent against no position encoding."""
    rows = ablation("figure6")
    if rows is None or not (rows["position"] == "none").any():
        return None
    base = rows[rows["position"] == "none"]["bpp"].mean()
    radius = rows["radius"].fillna(np.inf).where(rows["position"] != "none", 0)
    data = pd.DataFrame({"radius": radius, "seed": rows["seed"], "bpp": rows["bpp"]})
    data["saving_percent"] = 100 * (1 - data["bpp"] / base)
    return data.sort_values(["radius", "seed"], ignore_index=True)


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


def figure6_comparison(data: pd.DataFrame) -> list[Comparison]:
    """Which h is best; the paper says 3."""
    best = data[data["radius"] > 0].groupby("radius")["bpp"].mean().idxmin()
    return [Comparison("best clipping distance h", 3, float(best))]


def figure7_data() -> pd.DataFrame | None:
    """top_k (infinite: dense), step, seed, bpp."""
    rows = ablation("figure7")
    if rows is None:
        return None
    rows = rows.assign(top_k=rows["top_k"].fillna(np.inf))[["top_k", "step", "seed", "bpp"]]
    return rows.sort_values(["top_k", "seed", "step"], ignore_index=True)


@styled
def figure7(data: pd.DataFrame) -> Figure:
    """Learning curves, one for each k; the mean over the seeds with their range."""
    figure, ax = new_figure(ONE_COLUMN * 1.4, 2.8)
    for (k, part), colour in zip(data.groupby("top_k"), COLOURS, strict=False):
        curve = part.groupby("step")["bpp"].agg(["mean", "min", "max"])
        name, line = ("dense", "--") if np.isinf(k) else (f"k = {k:g}", "-")
        ax.plot(curve.index, curve["mean"], line, color=colour, label=name)
        ax.fill_between(curve.index, curve["min"], curve["max"], color=colour, alpha=0.2, linewidth=0)
    ax.set(xlabel="step", ylabel="bits per pixel")
    ax.legend()
    return figure


POSITIONS = ("none", "absolute", "relative_1d", "relative_2d", "diamond")


def table1_data() -> pd.DataFrame | None:
    """A row for each of the paper's: model, position, published_bpp, published_saving_percent, bpp, spread, seeds,
    saving_percent."""
    rows = ablation("table1")
    if rows is None:
        return None
    data = pd.DataFrame(reference("paper_tables")["table1_position_encoding"]["rows"])
    data.columns = ["model", "position", "published_bpp", "published_saving_percent"]
    kinds = np.where(rows["context"] == "cnn", "cnn", rows["position"])
    ours = rows["bpp"].groupby(kinds).agg(["mean", "std", "count"]).reindex(["cnn", *POSITIONS])
    data[["bpp", "spread", "seeds"]] = ours.to_numpy()
    data["saving_percent"] = 100 * (1 - data["bpp"] / ours.loc["cnn", "mean"])
    return data


def table1_comparison(data: pd.DataFrame) -> list[Comparison]:
    """Savings over the CNN."""
    rows = data[data["position"] != "-"].dropna(subset=["saving_percent"])
    return [
        Comparison(f"saving over the CNN, {row.position}", row.published_saving_percent, row.saving_percent, "%")
        for row in rows.itertuples()
    ]


def table2_data() -> pd.DataFrame | None:
    """model, published_ms (V100, entropy model), measured, device, ms (median), what (is in it)."""
    saved = result("latency")
    if saved is None:
        return None
    rows = pd.DataFrame(saved["rows"])
    if "width" in rows:  # of a Kodak picture
        rows = rows[(rows["width"] == 768) & (rows["height"] == 512)]
    rows = rows[rows["direction"] == "decode"]
    ours = ("bmshj2018-hyperprior", "mbt2018", "base-serial", "base-parallel")
    data = []
    for row, name in zip(reference("paper_tables")["table2_latency_ms"]["rows"], ours, strict=True):
        part = rows[rows["model"] == name]
        transforms = part["transforms_s"] if "transforms_s" in part else pd.Series(dtype=float)
        whole = transforms.isna().any() or transforms.empty
        seconds = part["seconds"] if whole else part["seconds"] - transforms
        what = "whole decoding" if whole else "decoding without transforms"
        data.append((row["model"], row["ms"], name, what, 1000 * seconds.median()))
    data = pd.DataFrame(data, columns=["model", "published_ms", "measured", "what", "ms"])
    return data.dropna(subset=["ms"], ignore_index=True)


def table2_comparison(data: pd.DataFrame) -> list[Comparison]:
    """Ratios: another device has other milliseconds."""
    ours, theirs = data.set_index("measured")["ms"], data.set_index("measured")["published_ms"]
    if not {"base-serial", "base-parallel", "mbt2018"} <= set(ours.index):
        return []
    pairs = (("base-serial", "base-parallel"), ("base-serial", "mbt2018"))
    return [
        Comparison(f"time of {a} over {b}", round(theirs[a] / theirs[b], 2), float(ours[a] / ours[b])) for a, b in pairs
    ]


def table3_data() -> pd.DataFrame | None:
    """context, published_bpp, bpp, spread, seeds: rate of the second slice."""
    rows = ablation("table3")
    if rows is None:
        return None
    data = pd.DataFrame(reference("paper_tables")["table3_second_slice_bpp"]["rows"])
    data.columns = ["context", "published_bpp"]
    ours = rows.groupby("context")["bpp"].agg(["mean", "std", "count"]).reindex(data["context"])
    data[["bpp", "spread", "seeds"]] = ours.to_numpy()
    return data


def table3_comparison(data: pd.DataFrame) -> list[Comparison]:
    """How much more the bidirectional context saves than the unidirectional one."""
    published, ours = (data.set_index("context")[column] for column in ("published_bpp", "bpp"))
    one, two = (f"hyperprior + {kind}directional" for kind in ("uni", "bi"))
    saved = [100 * (1 - values[two] / values[one]) for values in (published, ours)]
    return [] if np.isnan(saved[1]) else [Comparison("saving of bidirectional over unidirectional", *saved, "%")]


def table4_data() -> pd.DataFrame | None:
    """size, published_absolute_bpp, published_relative_bpp, published_saving_percent, absolute_bpp, relative_bpp,
    saving_percent."""
    rows = ablation("table4")
    if rows is None:
        return None
    data = pd.DataFrame(reference("paper_tables")["table4_image_size"]["rows"])
    data.columns = ["size", *(f"published_{name}" for name in data.columns[1:])]
    kinds = np.where(rows["position"] == "absolute", "absolute_bpp", "relative_bpp")
    ours = rows["bpp"].groupby([rows["size"], kinds]).mean().unstack().reindex(data["size"])
    data[["absolute_bpp", "relative_bpp"]] = ours[["absolute_bpp", "relative_bpp"]].to_numpy()
    data["saving_percent"] = 100 * (1 - data["relative_bpp"] / data["absolute_bpp"])
    return data


def table4_comparison(data: pd.DataFrame) -> list[Comparison]:
    """Saving of relative over absolute positions."""
    return [
        Comparison(f"saving of relative over absolute, {row.size_} pixels", row.theirs, row.ours, "%")
        for row in data.rename(
            columns={"size": "size_", "published_saving_percent": "theirs", "saving_percent": "ours"}
        ).itertuples()
        if not np.isnan(row.ours)
    ]


def table6_data() -> pd.DataFrame | None:
    """model, published_mb, megabytes of the entropy model, parameters."""
    saved = result("model_sizes")
    if saved is None:
        return None
    published = {
        row["model"]: row["value"] for row in reference("paper_tables")["table6_entropy_model_weights_MB"]["rows"]
    }
    rows = [(name, value, None, None) for name, value in published.items() if name != "Entroformer"]
    for row in saved["rows"]:
        theirs = published["Entroformer"] if row["model"] == "base-serial" else None
        rows.append((row["model"], theirs, row["megabytes"], row["parameters"]))
    return pd.DataFrame(rows, columns=["model", "published_mb", "megabytes", "parameters"])


def table6_comparison(data: pd.DataFrame) -> list[Comparison]:
    """Megabytes of the paper's model."""
    rows = data.dropna(subset=["published_mb", "megabytes"])
    return [
        Comparison(f"{row.model}, entropy model", row.published_mb, row.megabytes, "MB") for row in rows.itertuples()
    ]


# ---- attention maps ----


def attention_data(number: int) -> Callable[[], pd.DataFrame | None]:
    """The saved maps of figure 8, 9 or 10: title, query_row, query_column, row, column, prob.  ->  a reader of them"""

    def read() -> pd.DataFrame | None:
        saved = result("attention")
        maps = [m for m in (saved or {}).get("maps", []) if m.get("figure") == number]
        rows = [
            (m["title"], *m["query"], y, x, prob)
            for m in maps
            for y, line in enumerate(m["probs"])
            for x, prob in enumerate(line)
        ]
        return (
            pd.DataFrame(rows, columns=["title", "query_row", "query_column", "row", "column", "prob"])
            if rows
            else None
        )

    return read


@styled
def attention_maps(data: pd.DataFrame) -> Figure:
    """A map for each title, the query marked."""
    titles = list(dict.fromkeys(data["title"]))
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = new_figure(TWO_COLUMNS, 1.5 * rows, rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes.flat, titles, strict=False):
        part = data[data["title"] == title]
        ax.imshow(part.pivot(index="row", columns="column", values="prob"), cmap=SEQUENTIAL, vmin=0)
        ax.plot(part["query_column"].iloc[0], part["query_row"].iloc[0], "x", color=COLOURS[1])
        ax.set_title(title)
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


# ---- all of them ----

MASKING = "position_masking.json"
ITEMS = (
    Item("figure03_position_masking", "Rate increase when one context position is missing", MASKING, masking_data,
         masking_maps, claim="the closer, the more; in the shape of a diamond"),
    Item("figure03_alone", "Rate saved by one context position alone", MASKING,
         lambda: masking_data("alone_over_pictures"), alone_maps, claim="not in the paper, or the other reading of it"),
    Item("figure03_distance", "Both against three distances", MASKING, masking_by_distance_data, masking_by_distance,
         masking_comparison, claim="falls with L1 distance"),
    Item("figure03_beyond", "Rate when everything beyond a distance is missing", MASKING, beyond_data, beyond_curve,
         claim="not in the paper"),
    Item("figure05_rate_distortion", "Rate and PSNR on Kodak", "*-kodak.json",
         rate_distortion_data("psnr", FEW_CURVES), rate_distortion_figure("PSNR, dB"), rate_distortion_comparison),
    Item("figure06_clipping_distance", "Saving against the clipping distance h", "ablation*.json", figure6_data,
         figure6, figure6_comparison),
    Item("figure07_top_k", "Learning curves for several k", "ablation*.json", figure7_data, figure7,
         claim="better up to k = 64, then no difference from dense attention"),
    Item("figure08_attention_points", "Attention of three points", "attention.json", attention_data(8), attention_maps),
    Item("figure09_attention_heads", "Attention head by head", "attention.json", attention_data(9), attention_maps),
    Item("figure10_attention_k", "Attention with different k", "attention.json", attention_data(10), attention_maps),
    Item("figure11_psnr_kodak", "Rate and PSNR on Kodak, more codecs", "*-kodak.json",
         rate_distortion_data("psnr", MORE_CURVES), rate_distortion_figure("PSNR, dB"), rate_distortion_comparison),
    Item("figure12_ms_ssim_kodak", "Rate and MS-SSIM on Kodak; the published models trained for it, ours for MSE",
         "*-kodak.json", rate_distortion_data("ms_ssim", MORE_CURVES), rate_distortion_figure("MS-SSIM, dB"),
         rate_distortion_comparison),
    Item("table1_position_encoding", "Position encodings", "ablation*.json", table1_data, table_figure,
         table1_comparison, table=True),
    Item("table2_latency", "Latency of the entropy model", "latency.json", table2_data, table_figure,
         table2_comparison, table=True),
    Item("table3_bidirectional", "Context of the second slice", "ablation*.json", table3_data, table_figure,
         table3_comparison, table=True),
    Item("table4_image_size", "Position encodings and the size of the picture", "ablation*.json", table4_data,
         table_figure, table4_comparison, table=True),
    Item("table6_sizes", "Size of the entropy model", "model_sizes.json", table6_data, table_figure, table6_comparison,
         table=True),
)  # fmt: skip


def regenerate(out: Path | None = None, notebooks: Path | None = None) -> dict[str, pd.DataFrame]:
    """Draws everything there are results for.  ->  the data drawn, by name

    Args:
        out: Folder to write to; default: figures/ of the repository.
        notebooks: Folder whose notebooks' figures the README lists too; default: notebooks/ of the repository.
    """
    root = data_folder().parent
    out, notebooks = out or root / "figures", notebooks or root / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for item in ITEMS:
        data = item.data()
        for old in out.glob(f"{item.name}.*"):
            old.unlink()
        if data is None:
            continue
        drawn[item.name] = data
        style.write(item.draw(data), out, item.name, ("png", "svg"))
        write_bytes(out / f"{item.name}.csv", data.to_csv(index=False, float_format="%.6g").encode())
        if item.table:
            write_bytes(out / f"{item.name}.md", (f"# {item.title}\n\n" + markdown(*cells(data))).encode())
    write_bytes(out / "README.md", readme(drawn, notebooks).encode())
    return drawn


def readme(drawn: dict[str, pd.DataFrame], notebooks: Path) -> str:
    """figures/README.md: every item with the published value, ours, the deviation; what is missing; the notebooks'."""
    rows = []
    for item in ITEMS:
        if item.name not in drawn:
            continue
        link, numbers = f"[`{item.name}`]({item.name}.png)", item.compare(drawn[item.name])
        if item.claim or not numbers:
            rows.append([link, item.title, "", item.claim or "a picture", "see the figure", ""])
        for c in numbers:
            unit = f" {c.unit}" if c.unit else ""
            published = "no number" if c.published is None else f"{c.published:.4g}{unit}"
            rows.append([link, item.title, c.quantity, published, f"{c.ours:.4g}{unit}", c.deviation])
    missing = [f"- {item.name}: {item.title.lower()} ({item.needs})\n" for item in ITEMS if item.name not in drawn]
    headings = ["file", "shows", "quantity", "published", "ours", "deviation"]
    parts = [
        "# figures\n\nWritten by `make figures`; nothing here is drawn by hand. Each figure and table of the paper is "
        "drawn from\ndata/results alone, as PNG and SVG, with its data as CSV; tables as Markdown too.\n",
        "\n## The paper's figures and tables\n\nOurs are small models, trained for minutes to hours on two CPU cores; "
        "the authors' are three to four times\nas wide and had about 280,000 steps. Published curves and numbers are "
        "marked as such in every figure (sources: data/reference).\n\n",
        markdown(headings, rows),
        "\n## Not measured yet\n\n" + "".join(missing) if missing else "",
        "\n## The notebooks' figures\n\n" + markdown(["file", "from", "section"], _of_notebooks(notebooks)),
    ]
    return "".join(parts)


def _of_notebooks(folder: Path) -> list[list[str]]:
    """File, notebook and section of each figure that a notebook saves."""
    rows = []
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        section = ""
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                section = ([section] + re.findall(r"^#+ (?:\d+\. )?(.+)$", text, re.M))[-1]
            for name in re.findall(r'style\.save\(\w+, "(\w+)"', text):
                rows.append([f"[`{name}`]({name}.png)", f"`notebooks/{path.name}`", section])
    return rows


def main(out: Path | None = None) -> None:
    """Draws every figure and table of the paper from saved results.

    Args:
        out: Folder to write to; default: figures/ of the repository.
    """
    drawn = regenerate(out)
    print(f"{len(drawn)} of {len(ITEMS)} figures and tables of the paper have results and were drawn")
    for item in ITEMS:
        if item.name not in drawn:
            print(f"not measured yet: {item.name} (it would be drawn from {item.needs})")


if __name__ == "__main__":
    tyro.cli(main)
