"""What each context position is worth: Figure 3, for any model of ours.

    python -m entroformer_lib.studies.position_masking train --transforms blocks-parallel --latents runs/latents \\
        --runs runs/masking
    python -m entroformer_lib.studies.position_masking measure --runs runs/masking --kodak pictures/kodak --lmbda 0.014

The question: by how much does the rate rise when the latent at (dy, dx) from the one to be coded is unknown?

What "unknown" means, and how the rate is measured without a position, with that position alone, and with everything
beyond a distance missing, is said in `missing_context.py`. Here are the tables over models and pictures, the fit of the
distances, the training of the models that the study needs, and the saved result.

Rates are those of y, estimated from the likelihoods, over the sites that have the position inside the picture. The
saved result is of the middle 256 x 256 pixels of each Kodak picture: as large as the crops these models were trained
on, and so without what a longer sequence than in training does to a transformer.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy.optimize import curve_fit
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import StudyError
from entroformer_lib.inspection.missing_context import (
    RADII,
    mask_beyond,
    mask_positions,
    model_name,
    neighbourhood,
    only_positions,
    scene_of,
)
from entroformer_lib.inspection.scene import Scene, name_at
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies import commands, results
from entroformer_lib.studies.ablation_grids import RECIPE, Entry
from entroformer_lib.studies.engine import Task, complete, training_task
from entroformer_lib.studies.rate_distortion import Pictures, digest_of, pictures_of, pictures_to_test
from entroformer_lib.studies.results import of_mean_rates, provenance, records
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.latents import frozen_transforms
from entroformer_lib.weights.zoo import load_model, weights_digest

NORMS = {
    "L1": lambda dy, dx: abs(dy) + abs(dx),
    "L2": lambda dy, dx: (dy**2 + dx**2) ** 0.5,
    "L-infinity": lambda dy, dx: max(abs(dy), abs(dx)),
}
POSITIONS = ("none", "absolute", "relative_1d", "relative_2d", "diamond")  # the paper's figure 3 is of `none`
VARIANTS = (  # without hyperprior, as in the paper's section 4.1; and two with it
    Entry("cnn", "cnn", {"hyperprior": False}),
    *(Entry(position, "context", {"position": position}) for position in POSITIONS),
    *(Entry(f"hyper-parallel-{p}", "parallel", {"position": p}) for p in ("none", "diamond")),
)
MISSING = 0.5  # largest share of gaps in a crop; uniform from none to this
DIGITS = 6  # of what is saved, behind the point


# ---- tables ----


def run(
    models: Iterable[Entroformer],
    pictures: Pictures,
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
    models = list(models)
    total = len(models) * len(pictures) * (spacing or side) ** 2
    with tqdm(total=total, disable=not progress, unit="mask") as bar:

        def masked(scene: Scene) -> list[dict]:
            return mask_positions(scene, neighbourhood(scene.model, side), spacing, bar)

        return _table(models, pictures, side, masked)


def run_beyond(models: Iterable[Entroformer], pictures: Pictures, radii: Sequence[int] = RADII) -> pd.DataFrame:
    """`mask_beyond` for each model and picture: model, image, radius, sites, bpp_all, bpp_masked, ratio."""
    return _table(models, pictures, 3, lambda scene: mask_beyond(scene, radii))


def run_alone(models: Iterable[Entroformer], pictures: Pictures, side: int = 7) -> pd.DataFrame:
    """`only_positions` for each model and picture: model, image, dy, dx, sites, bpp_none, bpp_only, ratio."""
    return _table(models, pictures, side, lambda scene: only_positions(scene, neighbourhood(scene.model, side)))


def _table(
    models: Iterable[Entroformer], pictures: Pictures, side: int, rows_of: Callable[[Scene], list[dict]]
) -> pd.DataFrame:
    models, rows = list(models), []
    for model in models:
        neighbourhood(model, side)  # refuses before anything runs
    for name, picture in pictures:
        for model in models:
            scene = scene_of(model, picture)
            h, w = scene.height, scene.width
            if side > min(h, w):
                raise StudyError(f"A neighbourhood of {side} x {side} is larger than the latents of {name}, {h} x {w}.")
            rows += [{"model": model_name(model), "image": name, **row} for row in rows_of(scene)]
    return pd.DataFrame(rows)


def over_pictures(table: pd.DataFrame) -> pd.DataFrame:
    """Of all pictures: model, dy, dx, percent, spread, pictures, and the distances L1, L2, L-infinity.

    Percent is the increase when the position is missing, for a table of `run`, and what the position saves alone, for
    one of `run_alone`: of the mean rates. The spread is the standard deviation of the pictures' own percentages."""
    alone = "bpp_only" in table
    mean = of_mean_rates(
        table, ["model", "dy", "dx"], *(("bpp_none", "bpp_only") if alone else ("bpp_all", "bpp_masked"))
    )
    mean["percent"] *= -1 if alone else 1
    for norm, distance in NORMS.items():
        mean[norm] = [distance(dy, dx) for dy, dx in zip(mean["dy"], mean["dx"], strict=True)]
    return mean


def distance_fits(table: pd.DataFrame) -> pd.DataFrame:
    """Which distance explains the increase best. For each model and norm: percent = a exp(-distance / b).

    Args:
        table: of `run` or `run_alone`.

    Returns:
        model, norm, a (percent), b (latents), r2 (share of the variance over positions explained by the fit), spearman
        (rank correlation of percent and distance). None where nothing can be fitted.
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
    with warnings.catch_warnings(action="ignore"):  # of a poor fit r2 tells
        try:
            (a, b), _ = curve_fit(
                lambda d, a, b: a * np.exp(-d / b), distance, percent, p0=(2 * percent.max(), 1.0), maxfev=5000
            )
        except RuntimeError:
            return nothing
        rest = percent - a * np.exp(-distance / b)
    return {
        **nothing,
        "a": float(a),
        "b": float(b),
        "r2": float(1 - rest.pow(2).sum() / (percent - percent.mean()).pow(2).sum()),
    }


# ---- the runs ----


def train_models(
    transforms: str,
    latents: str,
    runs: Path,
    steps: int = 2000,
    missing: float = MISSING,
    only: tuple[str, ...] = (),
    workers: int = 1,
    scheduler: str | None = None,
) -> None:
    """Trains the models of the study on equal terms; a finished run is not repeated.

    Args:
        transforms: The model whose transforms all of them have; where it has several rates, so have they.
        latents: Their cache, of crops of at least 256 pixels.
        runs: Folder for the runs.
        steps: Steps of each run, of eight crops.
        missing: Largest share of gaps in a crop.
        only: Names of variants; by default all.
        workers: Runs at a time on this machine.
        scheduler: Address of a dask scheduler to run on.
    """
    if unknown := set(only) - {variant.name for variant in VARIANTS}:
        there = ", ".join(variant.name for variant in VARIANTS)
        raise StudyError(f"There is no variant '{min(unknown)}'; there are {there}.")
    root, latents = runs.resolve(), str(Path(latents).resolve())
    terms = dict(transforms=transforms, latents=latents, steps=steps, missing=missing, crop=256, **RECIPE)
    told = {} if frozen_transforms(transforms).gain is None else {"rate_aware": True}
    tasks = []
    for variant in VARIANTS:
        if not only or variant.name in only:
            entry = dataclasses.replace(variant, architecture=variant.architecture | told)
            config = entry.config(TrainConfig("DATA", str(root / variant.name), **terms))
            tasks.append(training_task(config, progress=workers == 1 and scheduler is None))
    complete(tasks, root, print, workers=workers, scheduler=scheduler)


def measure(
    runs: Path,
    kodak: Path,
    side: int = 7,
    crop: int = 256,
    limit: int | None = None,
    lmbda: float | None = None,
    models: tuple[str, ...] = (),
    workers: int = 1,
    scheduler: str | None = None,
) -> None:
    """Measures all trained models on Kodak and saves data/results/position_masking.json.

    Models that the saved result has besides, measured in the same way, stay there.

    Args:
        runs: Folder of the runs, one folder for each model.
        kodak: Folder of the pictures.
        side: Side of the neighbourhood in latents.
        crop: Side in pixels of what is taken from the middle of each picture.
        limit: Only the first pictures.
        lmbda: The rate of runs that have several.
        models: More models by name or path, such as shipped ones.
        workers: Models at a time on this machine.
        scheduler: Address of a dask scheduler to run on.
    """
    commands.at_least(1, crop=crop, workers=workers)
    root, kodak = runs.resolve(), kodak.resolve()
    rate = "" if lmbda is None else f"@{lmbda:g}"
    weights = {path.parent.name: f"{path}{rate}" for path in sorted(root.glob("*/weights.safetensors"))}
    weights |= {_name(load_model(name, "cpu")): name for name in models}
    if not weights:
        raise StudyError(f"There is no finished run in {runs}.")
    paths = pictures_to_test(kodak, limit)
    settings, digest = {"side": side, "crop": crop, "pictures": len(paths)}, digest_of(paths)
    pictures = functools.partial(pictures_of, kodak, limit, crop)
    bar = workers == 1 and scheduler is None
    tasks = {name: _measuring(name, path, pictures, digest, settings, bar) for name, path in weights.items()}
    root = root / "measured"
    complete(list(tasks.values()), root, print, workers=workers, scheduler=scheduler)
    save(settings, {name: task.answer(root) for name, task in tasks.items()})


def _name(model: Entroformer) -> str:
    return name_at(model, model.level)


def _measuring(
    name: str, weights: str, pictures: Callable[[], Pictures], digest: str, settings: dict, progress: bool
) -> Task:
    """The run that gives all tables of one model, and what it is.  digest: of the pictures"""
    side = settings["side"]

    def work(folder: Path, answer: str) -> dict:
        model, squares = load_model(weights, name=name), pictures()
        tables = {
            "rows": run([model], squares, side, progress=progress),
            "alone": run_alone([model], squares, side),
            "beyond": run_beyond([model], squares),
            "wider_lattice": run([model], squares[:1], side, spacing=2 * side, progress=progress),
        }
        about = {**_description(model), **provenance(model, model.card.get("training", {}).get("seed"))}
        return {"about": about, **{key: records(table, DIGITS) for key, table in tables.items()}}

    model = load_model(weights, "cpu")
    neighbourhood(model, side)  # refuses before anything runs
    identity = {"model": name, "weights_sha256": weights_digest(model).hex(), "pictures_sha256": digest}
    identity |= {} if model.level is None else {"level": model.level}
    return Task.by_identity(name, work, {**identity, **settings})


def _description(model: Entroformer) -> dict:
    """What the figures say of a model."""
    training = model.card.get("training", {})
    keys = ("model", "transforms", "steps", "batch", "crop", "missing")
    return {
        "context": model.config.context,
        "hyperprior": model.config.hyperprior,
        "position": model.config.position,
        "lmbda": None if model.level is None else model.gain.lmbda_of(model.level),
        "training": {key: training[key] for key in keys if key in training},
    }


# ---- the saved result ----

TABLES = ("beyond", "wider_lattice", "rows", "alone")


def save(settings: dict, answers: dict[str, dict]) -> Path:
    """Writes data/results/position_masking.json: the tables, and what follows from them.

    Args:
        settings: side, crop, pictures. Of a saved result with the same ones the other models are kept.
        answers: of each model that was measured: about (with its provenance) and the rows of TABLES.
    """
    saved = results.load("position_masking") or {}
    kept = saved if saved.get("settings") == settings else {}
    models = {**kept.get("models", {}), **{name: answer["about"] for name, answer in answers.items()}}
    order = [variant.name for variant in VARIANTS if variant.name in models]  # as they are drawn
    order += [name for name in models if name not in order]
    tables = {}
    for key in TABLES:
        rows = [row for row in kept.get(key, []) if row["model"] not in answers]
        rows += [row for answer in answers.values() for row in answer[key]]
        tables[key] = sorted(rows, key=lambda row: order.index(row["model"]))
    missing, alone = pd.DataFrame(tables["rows"]), pd.DataFrame(tables["alone"])
    result = {
        "settings": settings,
        "models": {name: models[name] for name in order},
        "over_pictures": records(over_pictures(missing), DIGITS),
        "alone_over_pictures": records(over_pictures(alone), DIGITS),
        "fits": records(distance_fits(missing), DIGITS),
        "alone_fits": records(distance_fits(alone), DIGITS),
        **tables,
    }
    path = results.result_path("position_masking")
    results.save(path, result)
    return path


def main() -> None:
    """The commands train and measure; what the user can put right is one sentence and exit code 1."""
    keep_freed_memory()
    parts = {"train": train_models, "measure": measure}
    commands.run(lambda: tyro.extras.subcommand_cli_from_dict(parts))


if __name__ == "__main__":
    main()
