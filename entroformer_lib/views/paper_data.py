"""What the paper's figures and tables draw: data from saved results and published numbers. No model runs.

For each figure or table a function `…_data` reads data/results (None where there is no result yet), and a function
`…_comparison` puts numbers of it beside published ones (data/reference). The results and their columns:

    *-kodak.json             `mean`, or one for each lambda: bpp, psnr_db, ms_ssim         (figures 5, 11, 12)
                             `transforms`: whose were kept; of such models, the serial one and GroupedMixer stand in
                             figures 5 left, 11 and 12, and all of them in 5 right
    position_masking.json    of studies/position_masking.py                                (figure 3)
    latency.json             of studies/latency.py                                         (table 2)
    model_sizes.json         of studies/model_sizes.py                                     (table 6)
    ablation*.json           `rows`, each with grid, seed, bpp and                         (the others)
        grid table1    context ("cnn", or a transformer's) and position as in EntroformerConfig
        grid figure6   radius; None: unlimited; position "none" is the baseline
        grid figure7   top_k, None: dense; step
        grid table3    context: "hyperprior only", "hyperprior + unidirectional", "hyperprior + bidirectional"
        grid table4    size (pixels), position: "absolute" or another one; "none" is not in the table
        (more grids stand beside them, for notebook 05: of studies/ablation.py)
    attention_maps.json      of studies/attention_maps.py                                  (figures 8, 9, 10)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from entroformer_lib.files import data_folder
from entroformer_lib.studies.same_transforms import WORDS, against, saved_rates

AUTHORS = "Entroformer, serial (authors)"
POSITIONS = ("none", "absolute", "relative_1d", "relative_2d", "diamond")


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


# ---- rate and distortion ----


def rate_distortion_data(metric: str, published: tuple[str, ...]) -> Callable[[], pd.DataFrame | None]:
    """Curves of `metric` (psnr or ms_ssim) on Kodak: label, published, bpp, quality (dB).  ->  a reader of them"""

    def read() -> pd.DataFrame | None:
        rows = []
        for path in sorted((data_folder() / "results").glob("*-kodak.json")):
            saved = json.loads(path.read_text())
            mean = saved.get("mean", {})
            if metric == "psnr" and saved.get("optimised_for") == "ms-ssim":
                continue
            if saved.get("transforms") and saved["variant"] not in ("serial", "groupedmixer"):
                continue  # a cloud of curves that differ by percents: figure 5 right
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


BASE = "minnen"  # what figure 5 right compares with: context and hyperprior are CNNs
CLAIMS = (  # variant, compared with, percent saved "at low bit rates" (section 4.2)
    ("serial", "minnen", 5.2),
    ("hyperprior", "hyperprior-cnn", 12.4),
    ("context-serial", "context-cnn", 11.3),
    ("parallel", "serial", -1.0),
)


def same_transforms_data() -> pd.DataFrame | None:
    """variant, lmbda, psnr_db, base_bpp, bpp, percent of BASE, label: a row for each model and lambda."""
    rates = saved_rates(folder=data_folder() / "results")
    if not (rates["variant"] == BASE).any():
        return None
    data = against(rates, BASE)
    return data.assign(label=data["variant"].map(WORDS))


def same_transforms_comparison(data: pd.DataFrame) -> list[Comparison]:
    """What the paper says of figure 5, at the lower half of our lambdas (its "low bit rates")."""
    low = data[data["lmbda"] <= data["lmbda"].median()].pivot(index="lmbda", columns="variant", values="bpp")
    found = []
    for variant, base, published in CLAIMS:
        if variant in low and base in low:
            saved = float((100 * (1 - low[variant] / low[base])).mean())
            found.append(Comparison(f"saved by {WORDS[variant]} over {WORDS[base]}", published, saved, "%"))
    return found


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
    rows = rows[rows["position"] != "none"]
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


# ---- latency and sizes ----


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
        saved = result("attention_maps")
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
