"""Entropy models behind the same frozen transforms: their pictures are equal, so their rates may be divided.

Models of variable rate that were trained with `--transforms tiny-rates` round the same latents at the same lambda. Each
decoded picture is then the same, bit for bit, whichever model carried it, and no Bjontegaard interpolation stands
between two models: at equal quality one needs so many bytes and the other so many.
"""

import json
from pathlib import Path

import pandas as pd

from entroformer_lib.files import data_folder

# config.variant: how figures and tables call it
WORDS = {
    "minnen": "CNN context, CNN hyperprior",
    "cnn": "CNN context, transformer hyperprior",
    "serial": "Entroformer, serial",
    "parallel": "Entroformer, parallel",
    "groupedmixer": "GroupedMixer",
    "hyperprior-cnn": "CNN hyperprior alone",
    "hyperprior": "transformer hyperprior alone",
    "context-cnn": "CNN context alone",
    "context-serial": "transformer context alone",
}


def saved_rates(transforms: str = "tiny-rates", folder: Path | None = None) -> pd.DataFrame:
    """Every picture at every lambda by every model behind these transforms, from *-kodak.json in a folder, by default
    data/results.

    Columns: variant (in the order of WORDS), model, image, lmbda, bpp (whole files), psnr_db, encode_s, decode_s. Empty
    where no such model has been measured.
    """
    found = {}
    for path in sorted((folder or data_folder() / "results").glob("*-kodak.json")):
        saved = json.loads(path.read_text())
        if saved.get("transforms") == transforms:
            found[saved["variant"]] = (path.name.removesuffix("-kodak.json"), saved["images"])
    columns = ["image", "lmbda", "bpp", "psnr_db", "encode_s", "decode_s"]
    rows = [
        {"variant": variant, "model": found[variant][0], **{name: row[name] for name in columns}}
        for variant in WORDS
        if variant in found
        for row in found[variant][1]
    ]
    return pd.DataFrame(rows, columns=["variant", "model", *columns])


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


def by_picture(rates: pd.DataFrame, variant: str, base: str, lmbda: float) -> pd.DataFrame:
    """What one variant saves over another on each picture.  ->  image, bpp (of base), saving_percent, saved_bpp"""
    here = rates[rates["lmbda"] == lmbda]
    mine, theirs = (here[here["variant"] == v].set_index("image")["bpp"] for v in (variant, base))
    columns = {"bpp": theirs, "saving_percent": 100 * (1 - mine / theirs), "saved_bpp": theirs - mine}
    return pd.DataFrame(columns).dropna().reset_index(names="image")


def explained(rates: pd.DataFrame, variant: str, base: str, properties: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation, over the pictures, of what a variant saves with properties of the pictures.

    Args:
        properties: a column `image`, and one for each property.

    Returns:
        A row for each lambda and kind of saving (saving_percent or saved_bpp), a column for each property and `bpp`.
    """
    rows = []
    names = ["bpp", *properties.columns.drop("image")]
    for lmbda in sorted(rates["lmbda"].unique()):
        table = by_picture(rates, variant, base, lmbda).merge(properties, on="image")
        for saving in ("saving_percent", "saved_bpp"):
            rho = {name: table[name].corr(table[saving], method="spearman") for name in names}
            rows.append({"lmbda": lmbda, "saving": saving, **rho})
    return pd.DataFrame(rows)
