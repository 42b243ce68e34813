"""Saved results: where they lie, where they come from, and how figures and tables call what was measured.

A result is a JSON file in data/results with a record of its provenance. Two tables are read from several files:
`kodak` has every Kodak picture coded by every model and classical codec, `ablation` has the rows of one grid of the
ablation study. Curves that other people published come as a table with the same columns as `kodak_means`; their
`source` tells them apart.
"""

import datetime
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from entroformer_lib.errors import DataError
from entroformer_lib.files import data_folder, read_json, write_bytes
from entroformer_lib.weights.zoo import device_name, weights_digest

LIBRARIES = ("torch", "compressai", "constriction", "numpy", "pillow")

# config.variant: how figures and tables call it. They show the variants in this order.
LABELS = {
    "minnen": "CNN context, CNN hyperprior",
    "cnn": "CNN context, transformer hyperprior",
    "serial": "Entroformer, serial",
    "parallel": "Entroformer, parallel",
    "parallel-9": "Entroformer, parallel, 9 layers",
    "groupedmixer": "GroupedMixer",
    "groupedmixer-32": "GroupedMixer, 32 groups",
    "hyperprior-cnn": "CNN hyperprior alone",
    "hyperprior": "transformer hyperprior alone",
    "context-cnn": "CNN context alone",
    "context-serial": "transformer context alone",
}
POSITION_NAMES = {  # config.position, and the CNN that table 1 compares with: how figures and tables call it
    "cnn": "CNN",
    "none": "no positions",
    "absolute": "absolute",
    "relative_1d": "relative, 1D + 1D",
    "relative_2d": "relative, 2D",
    "diamond": "relative, diamond",
}
QUALITIES = {"psnr_db": "PSNR, dB", "ms_ssim_db": "MS-SSIM, dB"}  # column: the axis in a figure
ABOUT = ["codec", "variant", "transforms", "optimised_for", "setting"]
AUTHORS = "Entroformer, serial (authors)"  # among the published curves


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by their `variant`, in the order of LABELS; others last."""
    order = {variant: i for i, variant in enumerate(LABELS)}
    places = rows["variant"].map(lambda variant: order.get(variant, len(order)))
    return rows.loc[places.sort_values(kind="stable").index]


# ---- saving ----


def provenance(model=None, seed: int | None = None) -> dict:
    """command, revision, date, device, library versions, seed; model name and SHA-256 of its weights."""
    record = {
        "command": command_line(sys.argv),
        "revision": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "seed": seed,
    }
    if model is not None:
        record["model"] = model.name or None
        record["weights_sha256"] = weights_digest(model).hex()
        record["device"] = device_name(next(model.g_s.parameters()).device)
    return record


def command_line(words: list[str]) -> str:
    """The command that runs, without the folders of this machine: of an absolute path only its last name stays."""
    return shlex.join(re.sub(r"(^|=)/\S.*", lambda found: found[1] + Path(found[0]).name, word) for word in words)


def git_revision() -> str | None:
    """The commit of this library's checkout, with "+" where files were changed; None outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[2]:
            return None  # installed inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(result: dict) -> str:
    """JSON with one line for each row of a table; null in the place of what is no number, or infinite."""
    parts = []
    for key, value in _finite(result).items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        else:
            text = json.dumps(value, indent=1)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _finite(value):
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(path: Path, result: dict, model=None, **more) -> dict:
    """Writes a result with its provenance.  ->  the provenance

    Args:
        model: the one that was measured, if there is one.
        more: what else belongs to the provenance, such as the number of threads.
    """
    record = {**provenance(model), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, as_json({**result, "provenance": record}).encode())
    return record


def records(table: pd.DataFrame, digits: int = 8) -> list[dict]:
    """Rows of a table as a result has them; None where there is no number (dense attention has no k).

    digits: behind the point
    """
    return json.loads(table.to_json(orient="records", double_precision=digits))


# ---- loading ----


_folder: ContextVar[Path | None] = ContextVar("results", default=None)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Results are read from and written to this folder inside, instead of data/results; it is made."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(before)


def results_folder() -> Path:
    """Where results lie: data/results, or another folder inside `kept_in`."""
    return _folder.get() or data_folder() / "results"


def result_path(name: str) -> Path:
    """Where a result lies, whether it exists or not."""
    return results_folder() / f"{name}.json"


def load(name: str | Path) -> dict | None:
    """A saved result by its name or its file, or None where there is none."""
    path = name if isinstance(name, Path) else result_path(name)
    return read_json(path) if path.is_file() else None


class NoResult(DataError):
    """What is asked for was not measured, or its result is not saved here."""


def needed(name: str) -> dict:
    """`load` of a result that has to be there.

    Raises:
        NoResult: it is not.
    """
    saved = load(name)
    if saved is None:
        raise NoResult(f"There is no {name}.json among the saved results.")
    return saved


def reference(name: str):
    """Published numbers: `paper_tables` or `rd_curves`."""
    return read_json(data_folder() / "reference" / f"{name}.json")


def ablation_rows() -> Iterator[tuple[dict, dict]]:
    """Settings and row, of every row in all ablation*.json. Only those of whole pictures have `bpp_middle`."""
    for path in sorted(results_folder().glob("ablation*.json")):
        saved = read_json(path)
        yield from ((saved.get("settings", {}), row) for row in saved["rows"])


def ablation(grid: str) -> pd.DataFrame:
    """The rows of a grid out of all ablation*.json.

    Raises:
        NoResult: there are none.
    """
    rows = [row for _, row in ablation_rows() if row.get("grid") == grid]
    if not rows:
        raise NoResult(f"No ablation*.json among the saved results has rows of {grid}.")
    return pd.DataFrame(rows).drop(columns="grid")


def trainings(grid: str) -> pd.DataFrame:
    """Every training of the ablation study on the same terms as those of a grid: kind, seed, bpp (whole pictures, at
    the end).

    Raises:
        NoResult: the grid has no result.
    """
    own = needed(f"ablation-{grid}")["settings"]
    found = [row for settings, row in ablation_rows() if settings == own and "bpp_middle" in row]
    rows = pd.DataFrame(found).drop_duplicates("run")
    return rows.assign(kind=kinds(rows["run"]))[["kind", "seed", "bpp"]]


def kinds(runs: pd.Series) -> pd.Series:
    """Names of runs without their seeds."""
    return runs.str.replace(r"-seed\d+$", "", regex=True)


def decoding_times() -> pd.DataFrame:
    """model, what (is in it), seconds (median over repeats): decoding of a picture of 768 x 512 pixels.

    Raises:
        NoResult: nothing was measured.
    """
    rows = pd.DataFrame(needed("latency")["rows"]).query("direction == 'decode' and width == 768 and height == 512")
    rows = rows.reindex(columns=["model", "seconds", "transforms_s"])
    rows["what"] = rows["transforms_s"].isna().map({True: "whole decoding", False: "decoding without transforms"})
    rows["seconds"] -= rows["transforms_s"].fillna(0)
    return rows.groupby(["model", "what"])["seconds"].median().reset_index()


def kodak() -> pd.DataFrame:
    """Every Kodak picture by every measured model and classical codec, whole files on disk.

    Returns:
        codec, variant, transforms (whose were kept, of an entropy model behind frozen ones), optimised_for (mse,
        ms-ssim, or codec for a classical one), setting (lambda, quality, or nan where there is only one), image, and
        the columns of `rate_distortion.evaluate_picture`.
    """
    tables = []
    for path in sorted((results_folder()).glob("*-kodak.json")):
        saved = read_json(path)
        about = {"codec": path.name.removesuffix("-kodak.json"), "optimised_for": saved.get("optimised_for", "mse")}
        about |= {"variant": saved.get("variant"), "transforms": saved.get("transforms")}
        tables.append(pd.DataFrame(saved["images"]).rename(columns={"lmbda": "setting"}).assign(**about))
    if classical := load("classical"):
        about = {"optimised_for": "codec", "variant": None, "transforms": None}
        tables.append(pd.DataFrame(classical["rows"]).assign(**about))
    if not tables:
        return pd.DataFrame(columns=[*ABOUT, "image", "bpp", "psnr_db", "ms_ssim"])
    texts = {"variant": object, "transforms": object, "setting": float}
    return pd.concat([table.astype(texts) for table in tables], ignore_index=True)


def kodak_means() -> pd.DataFrame:
    """Means of `kodak` over the pictures: a row for each codec and setting, from low rate to high.

    Returns:
        codec, variant, transforms, optimised_for, setting, bpp, psnr_db, ms_ssim_db (of the mean MS-SSIM), source
        (None: it was measured here).
    """
    groups = kodak().groupby(ABOUT, dropna=False, sort=False)
    means = groups[["bpp", "psnr_db", "ms_ssim"]].mean().reset_index()
    means["ms_ssim_db"] = decibels(means.pop("ms_ssim"))
    return means.assign(source=None).sort_values(["codec", "bpp"], ignore_index=True)


def published(dataset: str = "kodak", optimised_for: Iterable[str] = ("mse", "codec")) -> pd.DataFrame:
    """Curves that other people published: codec, optimised_for, bpp, psnr_db, ms_ssim_db, source.

    Args:
        dataset: kodak or tecnick.
        optimised_for: mse, ms-ssim, and codec for classical codecs.
    """
    found = []
    for curve in reference("rd_curves"):
        if curve["dataset"] == dataset and curve["optimised_for"] in tuple(optimised_for):
            about = {"codec": curve["label"], "optimised_for": curve["optimised_for"], "source": curve["source"]}
            nothing = np.full(len(curve["bpp"]), np.nan)
            quality = {"psnr_db": curve.get("psnr", nothing), "ms_ssim_db": decibels(curve.get("ms_ssim", nothing))}
            found.append(pd.DataFrame({**about, "bpp": curve["bpp"], **quality}).sort_values("bpp"))
    return pd.concat(found, ignore_index=True)


def decibels(ms_ssim) -> np.ndarray:
    """MS-SSIM as -10 log10(1 - MS-SSIM), in which its small differences near 1 can be seen."""
    return -10 * np.log10(1 - np.asarray(ms_ssim, dtype=float))


def of_mean_rates(table: pd.DataFrame, keys: list[str], before: str, after: str) -> pd.DataFrame:
    """How much a rate rises from one column to another, for each group of rows, which are pictures.

    ->  keys, percent (of the mean rates), spread (standard deviation of the pictures' own percentages), pictures
    """
    groups = table.assign(own=100 * (table[after] / table[before] - 1)).groupby(keys, sort=False)
    mean = groups.agg(before=(before, "mean"), after=(after, "mean"), spread=("own", "std"), pictures=("own", "count"))
    mean.insert(0, "percent", 100 * (mean["after"] / mean["before"] - 1))
    return mean.drop(columns=["before", "after"]).reset_index()
