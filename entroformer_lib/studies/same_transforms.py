"""Entropy models behind the same frozen transforms: their pictures are equal, so their rates may be divided.

Models of variable rate that were trained with the same `--transforms` round the same latents at the same lambda. Each
decoded picture is then the same, bit for bit, whichever model carried it, and no Bjontegaard interpolation stands
between two models: at equal quality one needs so many bytes and the other so many.

Everything here is read from saved results; no model runs. `benchmarks/tradeoff.py` measures the times.
"""

import numpy as np
import pandas as pd

from entroformer_lib.errors import StudyError
from entroformer_lib.studies.results import NoResult, in_order, kodak, load

FAMILY = "blocks"  # whose transforms the published family has
SAME_QUALITY = 0.02  # dB: what the rounding of folded gains may change


def saved_rates(transforms: str = FAMILY) -> pd.DataFrame:
    """Every Kodak picture at every lambda by every model behind these transforms.

    Returns:
        variant (in the order of LABELS), model, image, lmbda, bpp (whole files), psnr_db, encode_s, decode_s. Empty
        where no such model has been measured.
    """
    rows = kodak()
    rows = rows[rows["transforms"] == transforms].rename(columns={"codec": "model", "setting": "lmbda"})
    rows = in_order(rows)
    columns = ["variant", "model", "image", "lmbda", "bpp", "psnr_db", "encode_s", "decode_s"]
    return rows.reindex(columns=columns).reset_index(drop=True)


def against(rates: pd.DataFrame, base: str) -> pd.DataFrame:
    """Rate of every variant against another's, at equal pictures.

    Args:
        rates: of `saved_rates`.
        base: variant that is compared with.

    Returns:
        variant, lmbda, psnr_db, base_bpp, bpp (means over the pictures), percent: of bpp over base_bpp, negative where
        the variant saves.
    """
    means = rates.groupby(["variant", "lmbda"], sort=False)[["bpp", "psnr_db"]].mean().reset_index()
    reference = means[means["variant"] == base].set_index("lmbda")["bpp"]
    means["base_bpp"] = means["lmbda"].map(reference)
    means["percent"] = 100 * (means["bpp"] / means["base_bpp"] - 1)
    return means.dropna(subset="base_bpp")[["variant", "lmbda", "psnr_db", "base_bpp", "bpp", "percent"]]


def overall(rates: pd.DataFrame, base: str) -> pd.DataFrame:
    """A row for each variant: the mean of `against` over all lambdas, and its smallest and largest. A mean of ratios at
    equal quality is what a BD-rate approximates.

    Returns:
        variant, model, percent, least, most.
    """
    each = against(rates, base).groupby("variant", sort=False)["percent"].agg(["mean", "min", "max"])
    models = rates.drop_duplicates("variant").set_index("variant")["model"]
    table = pd.DataFrame({"model": models, "percent": each["mean"], "least": each["min"], "most": each["max"]})
    return table.reset_index(names="variant")


def tradeoff_points(saved: dict) -> pd.DataFrame:
    """Rate and decoding time of each model of tradeoff.json, means over its pictures.

    Returns:
        family, model, variant, groups (nan where there are none), parameters, bpp, psnr_db, decode_s, context_s
        (the entropy model without h_s), percent (rate against the family's parallel model).

    Raises:
        StudyError: a family without a parallel model.
    """
    rows = pd.DataFrame(saved["rows"]).astype({"groups": float})
    keys = ["family", "model", "variant", "groups", "parameters"]
    columns = ["bpp", "psnr_db", "decode_s", "context_s"]
    table = rows.groupby(keys, sort=False, dropna=False)[columns].mean().reset_index()
    for family, part in table.groupby("family"):
        reference = part[part["variant"] == "parallel"]["bpp"]
        if len(reference) != 1:
            raise StudyError(f"The family '{family}' has {len(reference)} parallel models to compare with, not one.")
        table.loc[part.index, "percent"] = 100 * (part["bpp"] / float(reference.iloc[0]) - 1)
    return table


def front(points: pd.DataFrame, seconds: str = "decode_s") -> pd.DataFrame:
    """The points of `tradeoff_points` than which none is both faster and smaller, from the fastest on."""
    ordered = points.sort_values([seconds, "percent"])
    best_before = ordered["percent"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["percent"] < best_before]


def side_by_side(reference: str = "parallel") -> pd.DataFrame:
    """What each published model takes in bits, in seconds and in weights.

    Returns:
        variant, model, percent (rate against the reference, the mean over their lambdas), least and most percent,
        decode_s and context_s (of tradeoff.json; nan where not measured), parameters (of the entropy model),
        source (file).

    Raises:
        StudyError: a model that was measured at other lambdas, or has another quality at one of them.
        NoResult: the reference is not among them.
    """
    rates = saved_rates()
    if reference not in set(rates["variant"]):
        raise NoResult(f"No published model is of the kind {reference}.")
    _check(rates, reference)
    columns = ["model", "decode_s", "context_s", "parameters"]
    measured, saved = pd.DataFrame(columns=columns), load("tradeoff")
    if saved is not None:
        points = tradeoff_points(saved)
        measured = points[points["family"] == "shipped"][columns]
    table = overall(rates, reference).merge(measured, on="model", how="left")
    return table.assign(source="data/results/" + table["model"] + "-kodak.json")


def _check(rates: pd.DataFrame, reference: str) -> None:
    quality = rates.pivot_table("psnr_db", "lmbda", ["variant", "model"], sort=False)
    theirs = quality[reference].iloc[:, 0]
    for (_, model), mine in quality.items():
        if not mine.notna().equals(theirs.notna()):
            raise StudyError(f"{model} was measured at other lambdas than the {reference} model.")
        if (mine - theirs).abs().max() > SAME_QUALITY:
            raise StudyError(f"{model} has another quality than the {reference} model: other transforms.")
