"""Rate against decoding time: how many bits a model takes for the same picture, and how long it decodes them.

    python -m entroformer_lib.studies.tradeoff --kodak pictures/kodak

Two families are measured, each on terms of its own. *Shipped* models have one name each and code at any lambda. *Runs*
are folders of training runs, such as those of the ablations, in which only what a row names differs:

    python -m entroformer_lib.studies.tradeoff --kodak pictures/kodak --runs runs/ablation/groups-*-seed0 \
        runs/ablation/{hyperprior,parallel,serial}-seed0

Inside a family all models share their transforms, so quality is the same and rates can be compared; where it is not,
nothing is saved. Rates are those of whole files. Seconds are the quickest of the repeats, and models take turns in each
repeat, so that what slows the machine slows all. Compare ratios, not seconds, and measure on an idle machine.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import tyro
from PIL import Image

from entroformer_lib.codec import codec
from entroformer_lib.codec.quality import psnr_db
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import StudyError
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.stages import stage_times
from entroformer_lib.studies.latency import STAGES
from entroformer_lib.studies.rate_distortion import pictures_of
from entroformer_lib.studies.results import as_json, provenance
from entroformer_lib.studies.same_transforms import saved_rates
from entroformer_lib.training.config import RUNTIME_FIELDS
from entroformer_lib.weights.zoo import device_name, load_model, weights_digest

SHIPPED, RUNS = "shipped", "runs"
SAME_QUALITY = 0.02  # dB: what the rounding of folded gains may change
FREE = {*RUNTIME_FIELDS, "model", "architecture", "one_way", "seed", "out", "data", "latents", "init"}


def run(families: dict[str, list[Entroformer]], pictures: Iterable[tuple[str, Image.Image]], repeats: int = 3) -> list:
    """One row per family, model and picture.

    Returns:
        family, model, variant, groups (None where there are none), parameters (of the entropy model), image, width,
        height, bytes, bpp (of the whole file), psnr_db, decode_s (the quickest of the repeats), and of that repeat the
        seconds of each stage.

    Raises:
        StudyError: models of a family whose pictures differ in quality, or none that is parallel.
    """
    for family, models in families.items():
        _check_reference(family, models)
    rows = []
    for name, picture in pictures:
        for family, models in families.items():
            new = [_row(family, model, name, picture, data) for model, data in _encoded(models, picture)]
            _check_quality(new)
            for _ in range(repeats):
                for model, row in zip(models, new, strict=True):
                    _time(model, row)
            for row in new:
                del row["data"]
                print(f"{row['model']:24} {name:10} {row['bpp']:.4f} bpp {row['decode_s']:8.3f} s", flush=True)
            rows += new
    return rows


def _encoded(models: list[Entroformer], picture: Image.Image) -> Iterable[tuple[Entroformer, bytes]]:
    for model in models:
        yield model, codec.encode(model, picture)


def _row(family: str, model: Entroformer, name: str, picture: Image.Image, data: bytes) -> dict:
    c, (width, height) = model.config, picture.size
    decoded = codec.decode(data, model)  # also makes what the first decoding has to make
    return {
        "family": family, "model": model.name, "variant": c.variant,
        "groups": c.groups[0] * c.groups[1] * c.groups[2] if c.context == "grouped" else None,
        "parameters": sum(p.numel() for part in model.entropy_model_parts() for p in part.parameters()),
        "image": name, "width": width, "height": height, "bytes": len(data), "bpp": 8 * len(data) / (width * height),
        "psnr_db": psnr_db(picture, decoded.convert("RGB")), "decode_s": float("inf"), "data": data,
    }  # fmt: skip


def _time(model: Entroformer, row: dict) -> None:
    """Decodes once more, and keeps the times where it was quicker."""
    with stage_times() as stages:
        start = time.perf_counter()
        codec.decode(row["data"], model)
        seconds = time.perf_counter() - start
    if seconds < row["decode_s"]:
        row["decode_s"] = seconds
        row.update({f"{name.replace(' ', '_')}_s": stages.get(name, 0.0) for name in STAGES})


def _check_reference(family: str, models: list[Entroformer]) -> None:
    found = [model.name for model in models if model.config.variant == "parallel"]
    if len(found) != 1:
        raise StudyError(
            f"The {family} need one parallel model, against which the others are compared; there are "
            f"{len(found)}: {', '.join(found) or 'none'}."
        )


def _check_quality(rows: list[dict]) -> None:
    least, most = (choose(rows, key=lambda row: row["psnr_db"]) for choose in (min, max))
    if most["psnr_db"] - least["psnr_db"] > SAME_QUALITY:
        raise StudyError(
            f"{least['model']} gives {least['image']} {least['psnr_db']:.2f} dB and {most['model']} "
            f"{most['psnr_db']:.2f} dB: they have other transforms, and their rates cannot be compared."
        )


# ---- models ----


def model_at(name_or_folder: str | Path, lmbda: float) -> Entroformer:
    """A model by name, or the weights of a run's folder, coding at a lambda.

    Raises:
        StudyError: a model that does not know this lambda.
    """
    folder = Path(name_or_folder)
    is_run = folder.is_dir()
    model = load_model(folder / "weights.safetensors" if is_run else str(name_or_folder), "cpu")
    if is_run:
        model.name = folder.resolve().name
    trained = model.card.get("lmbda")
    if model.gain is not None:
        try:
            model.level = model.gain.level_of(lmbda)
        except ValueError as error:
            raise StudyError(f"{model.name} cannot code there: {error}") from None
    elif trained not in (None, lmbda):
        raise StudyError(f"{model.name} was trained at lambda {trained:g} and not at {lmbda:g}.")
    return model


def published() -> tuple[str, ...]:
    """Names of the shipped models behind the transforms of tiny-rates, as measured on Kodak."""
    return tuple(saved_rates()["model"].unique())


def differences(models: Iterable[Entroformer]) -> list[str]:
    """Names of what else the models' trainings differ in than the model, its fields, the seed and the machine."""
    trainings = [model.card.get("training") or {} for model in models]
    names = sorted({name for training in trainings for name in training} - FREE)
    return [name for name in names if any(t.get(name) != trainings[0].get(name) for t in trainings)]


def save(
    kodak: Path,
    models: tuple[str, ...] | None = None,
    runs: tuple[Path, ...] = (),
    lmbda: float = 0.02,
    limit: int | None = 4,
    repeats: int = 3,
    out: Path | None = None,
) -> None:
    """Measures and writes data/results/tradeoff.json.

    Args:
        kodak: Folder of the test pictures.
        models: Names of shipped models with common transforms, one of them parallel; by default all that were published
            behind the transforms of tiny-rates. None after the option leaves them out.
        runs: Folders of finished training runs with common transforms, one of them of the parallel model.
        lmbda: Where all of them code.
        limit: Only the first pictures.
        repeats: How often each picture is decoded; the quickest counts.
        out: Another file.
    """
    keep_freed_memory()
    names = {SHIPPED: published() if models is None else models, RUNS: runs}
    families = {family: [model_at(name, lmbda) for name in those] for family, those in names.items() if those}
    if not families:
        raise StudyError("There are no shipped models with common transforms to measure, and no runs were named.")
    pictures = pictures_of(kodak, limit)
    rows = run(families, pictures, repeats)
    result = {
        "settings": {"lmbda": lmbda, "pictures": len(pictures), "repeats": repeats},
        "terms": {family: _terms(those) for family, those in families.items()},
        "rows": rows,
        "provenance": {
            **provenance(), "device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()
        },
    }  # fmt: skip
    write_bytes(out or data_folder() / "results" / "tradeoff.json", as_json(result).encode())


def _terms(models: list[Entroformer]) -> dict:
    """What a family's trainings differ in, their steps, and whose weights they are."""
    return {
        "differences": differences(models),
        "steps": {model.name: (model.card.get("training") or {}).get("steps") for model in models},
        "weights_sha256": {model.name: weights_digest(model).hex() for model in models},
    }


# ---- what is read from the result ----


def points(saved: dict) -> pd.DataFrame:
    """A row for each model: family, model, variant, groups, parameters, bpp and seconds (means over the pictures:
    decode_s, and entropy_model_s, its stages context and parameters), percent (rate against the family's parallel
    model).

    saved: tradeoff.json

    Raises:
        StudyError: a family without a parallel model.
    """
    rows = pd.DataFrame(saved["rows"])
    rows["entropy_model_s"] = rows["context_s"] + rows["parameters_s"]
    rows["groups"] = rows["groups"].astype(float)
    keys = ["family", "model", "variant", "groups", "parameters"]
    columns = ["bpp", "psnr_db", "decode_s", "entropy_model_s"]
    table = rows.groupby(keys, sort=False, dropna=False)[columns].mean().reset_index()
    for family, part in table.groupby("family"):
        reference = part[part["variant"] == "parallel"]["bpp"]
        if len(reference) != 1:
            raise StudyError(f"The family '{family}' has {len(reference)} parallel models to compare with, not one.")
        table.loc[part.index, "percent"] = 100 * (part["bpp"] / float(reference.iloc[0]) - 1)
    return table


if __name__ == "__main__":
    tyro.cli(save)
