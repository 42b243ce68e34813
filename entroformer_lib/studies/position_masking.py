"""What each context position is worth: Figure 3, for any model of ours.

    python -m entroformer_lib.studies.position_masking train --transforms tiny-parallel --latents runs/latents \\
        --runs runs/masking
    python -m entroformer_lib.studies.position_masking measure --runs runs/masking --kodak pictures/kodak

The question: by how much does the rate rise when the latent at (dy, dx) from the one to be coded is unknown?

What "unknown" means, and how the rate is measured without a position, with that position alone, and with everything
beyond a distance missing, is said in `missing_context.py`. Here are the tables over models and pictures, the fit of the
distances, the training of the models that the study needs, and the saved result.

Rates are those of y, estimated from the likelihoods, over the sites that have the position inside the picture. The
saved result is of the middle 256 x 256 pixels of each Kodak picture: as large as the crops these models were trained
on, and so without what a longer sequence than in training does to a transformer.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from PIL import Image
from scipy.optimize import curve_fit
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import StudyError, UserError
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.inspection.missing_context import (
    RADII,
    Scene,
    mask_beyond,
    mask_positions,
    model_name,
    neighbourhood,
    only_positions,
    scene_of,
)
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.studies.results import as_json, provenance
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.variants import Variant, trained
from entroformer_lib.weights.zoo import load_model, save_weights, weights_digest

NORMS = {
    "L1": lambda dy, dx: abs(dy) + abs(dx),
    "L2": lambda dy, dx: (dy**2 + dx**2) ** 0.5,
    "L-infinity": lambda dy, dx: max(abs(dy), abs(dx)),
}

CONTEXT_ONLY = {"model": "tiny-context"}  # as the paper's section 4.1
VARIANTS = (
    Variant("cnn", {"hyperprior": False}, {"model": "tiny-cnn"}),
    Variant("none", {"position": "none"}, CONTEXT_ONLY),  # Figure 3
    Variant("absolute", {"position": "absolute"}, CONTEXT_ONLY),
    Variant("relative_1d", {"position": "relative_1d"}, CONTEXT_ONLY),
    Variant("relative_2d", {"position": "relative_2d"}, CONTEXT_ONLY),
    Variant("diamond", {"position": "diamond"}, CONTEXT_ONLY),
    Variant("hyper-parallel-none", {"position": "none"}, {"model": "tiny-parallel"}),
    Variant("hyper-parallel-diamond", {"position": "diamond"}, {"model": "tiny-parallel"}),
)
MISSING = 0.5  # largest share of gaps in a crop; uniform from none to this


# ---- tables ----


def run(
    models: Iterable[Entroformer],
    pictures: Iterable[tuple[str, Image.Image]],
    side: int = 7,
    spacing: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The study: one row per (model, image, dy, dx).

    Args:
        models: any models with a context model.
        pictures: (name, picture) pairs.
        side: of the neighbourhood, in latents.
        spacing: see `mask_positions`.
        progress: show a bar.

    Returns:
        model, image, dy, dx, sites, bpp_all, bpp_masked, ratio; rates of y over the sites that have the position.

    Raises:
        StudyError: a model without context, or a neighbourhood larger than the latents.
    """
    models, pictures, rows = list(models), list(pictures), []
    for model in models:
        neighbourhood(model, side)  # refuses before anything runs
    total = len(models) * len(pictures) * (spacing or side) ** 2
    with tqdm(total=total, disable=not progress, unit="mask") as bar:
        for name, picture in pictures:
            for model in models:
                bar.set_postfix_str(f"{name}, {model_name(model)}")
                scene = _scene(model, name, picture, side)
                for row in mask_positions(scene, neighbourhood(model, side), spacing, bar):
                    rows.append({"model": model_name(model), "image": name, **row})
    return pd.DataFrame(rows)


def run_beyond(
    models: Iterable[Entroformer], pictures: Iterable[tuple[str, Image.Image]], radii: Sequence[int] = RADII
) -> pd.DataFrame:
    """`mask_beyond` for each model and picture: model, image, radius, sites, bpp_all, bpp_masked, ratio."""
    return _table(models, pictures, 1, lambda scene: mask_beyond(scene, radii))


def run_alone(
    models: Iterable[Entroformer], pictures: Iterable[tuple[str, Image.Image]], side: int = 7
) -> pd.DataFrame:
    """`only_positions` for each model and picture: model, image, dy, dx, sites, bpp_none, bpp_only, ratio."""
    return _table(models, pictures, side, lambda scene: only_positions(scene, neighbourhood(scene.model, side)))


def _table(models, pictures, side: int, rows_of) -> pd.DataFrame:
    pictures = list(pictures)
    return pd.DataFrame(
        {"model": model_name(model), "image": name, **row}
        for model in models
        for name, picture in pictures
        for row in rows_of(_scene(model, name, picture, side))
    )


def _scene(model: Entroformer, name: str, picture: Image.Image, side: int) -> Scene:
    """`scene_of`, where a neighbourhood of this side fits into the latents."""
    scene = scene_of(model, picture)
    if side > min(scene.size):
        h, w = scene.size
        raise StudyError(f"A neighbourhood of {side} x {side} is larger than the latents of {name}, {h} x {w}.")
    return scene


def over_pictures(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread over the pictures: model, dy, dx, percent, spread (standard deviation), pictures, and the
    distances L1, L2, L-infinity. Percent is the increase when the position is missing, for a table of `run`, and what
    the position saves alone, for one of `run_alone`."""
    sign = -1 if "bpp_only" in table else 1
    percent = table.assign(percent=sign * 100 * (table["ratio"] - 1)).groupby(["model", "dy", "dx"], sort=False)[
        "percent"
    ]
    mean = percent.agg(["mean", "std", "count"]).reset_index()
    mean.columns = ["model", "dy", "dx", "percent", "spread", "pictures"]
    for norm, distance in NORMS.items():
        mean[norm] = [distance(dy, dx) for dy, dx in zip(mean["dy"], mean["dx"], strict=True)]
    return mean


def distance_fits(table: pd.DataFrame) -> pd.DataFrame:
    """Which distance explains the increase best. For each model and norm: percent = a exp(-distance / b).

    Returns:
        model, norm, a (percent), b (latents), r2 (share of the variance over positions explained by the fit), spearman
        (rank correlation of percent and distance). None where nothing can be fitted.  table: of `run` or `run_alone`
    """
    rows = []
    for model, part in over_pictures(table).groupby("model", sort=False):
        for norm in NORMS:
            rows.append({"model": model, "norm": norm, **_relation(part[norm], part["percent"])})
    return pd.DataFrame(rows)


def _relation(distance: pd.Series, percent: pd.Series) -> dict:
    nothing = {"a": None, "b": None, "r2": None, "spearman": None}
    if distance.nunique() < 2 or percent.nunique() < 2:
        return nothing
    nothing["spearman"] = float(spearmanr(distance, percent).statistic)
    try:
        (a, b), _ = curve_fit(
            lambda d, a, b: a * np.exp(-d / b), distance, percent, p0=(2 * percent.max(), 1.0), maxfev=5000
        )
    except RuntimeError:
        return nothing
    rest = percent - a * np.exp(-distance / b)
    return {**nothing, "a": float(a), "b": float(b), "r2": float(1 - rest.var() / percent.var())}


# ---- the saved result ----


def train_models(
    transforms: str, latents: str, runs: str, steps: int = 700, missing: float = MISSING, only: tuple[str, ...] = ()
) -> None:
    """Trains the models of the study on equal terms; a finished run is not repeated.

    Args:
        transforms: The model whose transforms all of them have.
        latents: Their cache, of crops of 256.
        runs: Folder for the runs.
        steps: Steps of each run, of eight crops.
        missing: Largest share of gaps in a crop.
        only: Names of variants; by default all.
    """
    base = TrainConfig(
        data="DATA",
        out=runs,
        transforms=transforms,
        latents=latents,
        steps=steps,
        missing=missing,
        crop=256,
        optimizer="muon",
        lr=2e-3,
        schedule="linear",
        precision="bfloat16",
    )
    for variant in VARIANTS:
        if not only or variant.name in only:
            trained(variant, base)


def middle(picture: Image.Image, side: int) -> Image.Image:
    """The square in the middle, or the whole picture where it is smaller.  side: pixels"""
    left, top = (max(0, (length - side) // 2) for length in picture.size)
    return picture.crop((left, top, min(picture.width, left + side), min(picture.height, top + side)))


def measure(
    runs: Path, kodak: Path, side: int = 7, crop: int = 256, limit: int | None = None, models: tuple[str, ...] = ()
) -> None:
    """Measures all trained models on Kodak and saves data/results/position_masking.json.

    Args:
        runs: Folder of the runs, one folder for each model.
        kodak: Folder of the pictures.
        side: Side of the neighbourhood in latents.
        crop: Side in pixels of what is taken from the middle of each picture.
        limit: Only the first pictures.
        models: More models by name or path, such as shipped ones.
    """
    order = [variant.name for variant in VARIANTS]
    paths = sorted(runs.glob("*/weights.safetensors"), key=lambda p: (order + [p.parent.name]).index(p.parent.name))
    loaded = [load_model(path) for path in paths]
    for model in loaded:
        model.name = model.path.parent.name
    loaded += [load_model(name) for name in models]
    if not loaded:
        raise StudyError(f"There is no finished run in {runs}.")
    paths = pictures_to_test(kodak, limit)
    pictures = [(path.stem, middle(codec.to_rgb(codec.open_picture(path))[0], crop)) for path in paths]
    settings = {"side": side, "crop": crop, "pictures": len(pictures)}
    measured = already_measured(settings)
    for model in loaded:
        if measured["models"].get(model_name(model), {}).get("weights_sha256") == weights_digest(model).hex():
            continue
        tables = {
            "rows": run([model], pictures, side, progress=True),
            "alone": run_alone([model], pictures, side),
            "beyond": run_beyond([model], pictures),
            "wider_lattice": run([model], pictures[:1], side, spacing=2 * side, progress=True),
        }
        measured["models"][model_name(model)] = {**_description(model), **provenance(model, seed=_seed(model))}
        for key, table in tables.items():
            measured[key] = [row for row in measured[key] if row["model"] != model_name(model)] + _rounded(table)
        save(measured, [model_name(m) for m in loaded])


def ship(runs: Path, only: tuple[str, ...] = ("none", "diamond")) -> None:
    """Puts models of the study into data/weights/position_masking, in half precision, for the notebook.

    Args:
        runs: Folder of the runs.
        only: Names of the models.
    """
    for name in only:
        model = load_model(runs / name / "weights.safetensors", "cpu")
        limits = "made for the study of context positions, with gaps in its context; other models compress better"
        training = {**model.card["training"], "out": f"runs/{name}", "latents": "runs/latents"}
        card = {**model.card, "training": training, "limits": limits}
        save_weights(model, data_folder() / "weights" / "position_masking" / f"{name}.safetensors", card, half=True)


TABLES = ("beyond", "wider_lattice", "rows", "alone")


def already_measured(settings: dict) -> dict:
    """The saved result, to which more models are added; an empty one where there is none with these settings."""
    path = data_folder() / "results" / "position_masking.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    if saved.get("settings") == settings:
        return saved
    return {"settings": settings, "models": {}, **{key: [] for key in TABLES}}


def save(measured: dict, order: Sequence[str]) -> Path:
    """Writes data/results/position_masking.json: the tables, and what follows from them.

    Args:
        measured: settings, models (with the provenance of each) and the rows of TABLES.
        order: names of the models, as they shall be drawn.
    """
    order = [name for name in order if name in measured["models"]]
    tables = {key: sorted(measured[key], key=lambda row: order.index(row["model"])) for key in TABLES}
    missing, alone = pd.DataFrame(tables["rows"]), pd.DataFrame(tables["alone"])
    result = {
        "settings": measured["settings"],
        "models": {name: measured["models"][name] for name in order},
        "over_pictures": _rounded(over_pictures(missing)),
        "alone_over_pictures": _rounded(over_pictures(alone)),
        "fits": _rounded(distance_fits(missing)),
        "alone_fits": _rounded(distance_fits(alone)),
        **tables,
        "provenance": provenance(),
    }
    path = data_folder() / "results" / "position_masking.json"
    write_bytes(path, as_json(result).encode())
    return path


def _description(model: Entroformer) -> dict:
    """What the figures say of a model."""
    training = getattr(model, "card", {}).get("training", {})
    keys = ("model", "transforms", "steps", "batch", "crop", "missing")
    return {
        "context": model.config.context,
        "hyperprior": model.config.hyperprior,
        "position": model.config.position,
        "training": {key: training[key] for key in keys if key in training},
    }


def _seed(model: Entroformer) -> int | None:
    return getattr(model, "card", {}).get("training", {}).get("seed")


def _rounded(table: pd.DataFrame) -> list[dict]:
    """Rows as JSON has them: six digits behind the point, None for what is not a number."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def main() -> None:
    """The commands train, measure and ship; what the user can put right is one sentence and exit code 1."""
    keep_freed_memory()
    try:
        tyro.extras.subcommand_cli_from_dict({"train": train_models, "measure": measure, "ship": ship})
    except UserError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
