"""Rate against decoding time: how many bits a model takes for the same picture, and how long it decodes them.

    python benchmarks/tradeoff.py --kodak pictures/kodak

Two families are measured, each on terms of its own. *Shipped* models have one name each and code at any lambda. *Runs*
are folders of training runs, such as those of the ablations, in which only what a row names differs:

    python benchmarks/tradeoff.py --kodak pictures/kodak --runs runs/ablation/groups-*-seed0 \
        runs/ablation/{hyperprior,parallel,serial}-seed0

Inside a family all models share their transforms, so quality is the same and rates can be compared; where it is not,
nothing is saved. Rates are those of whole files. Seconds are the quickest of the repeats, and models take turns in each
repeat, so that what slows the machine slows all. Compare ratios, not seconds, and measure on an idle machine.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import tyro
from PIL import Image

from benchmarks.latency import timed
from entroformer_lib.codec import codec
from entroformer_lib.codec.quality import psnr_db
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import StudyError
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.studies.rate_distortion import pictures_of
from entroformer_lib.studies.results import result_path
from entroformer_lib.studies.results import save as save_result
from entroformer_lib.studies.same_transforms import SAME_QUALITY, saved_rates
from entroformer_lib.training.config import RUNTIME_FIELDS
from entroformer_lib.weights.zoo import device_name, load_model, weights_digest

SHIPPED, RUNS = "shipped", "runs"
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
            coded = [codec.encode(model, picture) for model in models]
            new = [_row(family, *pair, name, picture) for pair in zip(models, coded, strict=True)]
            _check_quality(new)
            turns = [[_decoding(*pair) for pair in zip(models, coded, strict=True)] for _ in range(repeats)]
            for row, times in zip(new, zip(*turns, strict=True), strict=True):
                row.update(min(times, key=lambda one: one["decode_s"]))
                print(f"{row['model']:24} {name:10} {row['bpp']:.4f} bpp {row['decode_s']:8.3f} s", flush=True)
            rows += new
    return rows


def _row(family: str, model: Entroformer, data: bytes, name: str, picture: Image.Image) -> dict:
    c, (width, height) = model.config, picture.size
    decoded = codec.decode(data, model)  # also makes what the first decoding has to make
    return {
        "family": family,
        "model": model.name,
        "variant": kind_of(model),
        "groups": c.groups[0] * c.groups[1] * c.groups[2] if c.context == "grouped" else None,
        "parameters": sum(p.numel() for part in model.entropy_model_parts() for p in part.parameters()),
        "image": name,
        "width": width,
        "height": height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (width * height),
        "psnr_db": psnr_db(picture, decoded.convert("RGB")),
    }


def _decoding(model: Entroformer, data: bytes) -> dict:
    """Seconds of one decoding and of its stages."""
    found, _ = timed(lambda: codec.decode(data, model))
    return {"decode_s": found.pop("seconds"), **found}


def _check_reference(family: str, models: list[Entroformer]) -> None:
    found = [model.name for model in models if kind_of(model) == "parallel"]
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


def kind_of(model: Entroformer) -> str:
    """Its variant, or what its card calls it where a family has two of a variant."""
    return model.card.get("kind") or model.config.variant


def model_at(name_or_folder: str | Path, lmbda: float) -> Entroformer:
    """A model by name, or the weights of a run's folder, coding at a lambda.

    Raises:
        StudyError: a model that does not know this lambda.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        model = load_model(folder / "weights.safetensors", "cpu", name=folder.resolve().name)
    else:
        model = load_model(name_or_folder, "cpu")
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
    """Names of the published family, as measured on Kodak."""
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
        models: Names of shipped models with common transforms, one of them parallel; by default the
            published family. None after the option leaves them out.
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
    }
    machine = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    save_result(out or result_path("tradeoff"), result, **machine)


def _terms(models: list[Entroformer]) -> dict:
    """What a family's trainings differ in, their steps, and whose weights they are."""
    return {
        "differences": differences(models),
        "steps": {model.name: (model.card.get("training") or {}).get("steps") for model in models},
        "weights_sha256": {model.name: weights_digest(model).hex() for model in models},
    }


if __name__ == "__main__":
    tyro.cli(save)
