"""What each context position is worth: Figure 3, for any model of ours.

    python -m entroformer_lib.studies.position_masking train --transforms tiny-parallel --latents runs/latents \\
        --runs runs/masking
    python -m entroformer_lib.studies.position_masking measure --runs runs/masking --kodak pictures/kodak

The question: by how much does the rate rise when the latent at (dy, dx) from the one to be coded is unknown?

**What "unknown" means.** The paper feeds "a random mask to self-attention" and says no more. Hiding the key at (dy, dx)
from every query, layer by layer, would not do: the tokens between have seen that latent and pass it on in the next
layer, and in the serial model the query's own token *is* the latent to the left. So a missing latent is missing for the
whole model: its token enters as zero and no other token sees it, in any layer (`missing` of the context models); in the
convolution its taps get zero. The models of this study are trained with just such gaps, a random share of them in each
crop (`TrainConfig.missing`), so that a gap is nothing new to them.

**How it is measured.** One pass with a single missing latent t answers for every neighbour of t, one position each. And
latents far enough apart do not disturb each other: we hide a lattice, every `spacing`-th latent in both directions, and
move it through all spacing² phases. Then every site has met a gap at every position of the neighbourhood exactly once,
in 49 passes for 7 x 7, a few in one batch, instead of one pass for each of 1,536 latents; and a pass computes only that
half of the attention which causality or the checkerboard leaves (`features` of the context models). What the lattice
costs: other gaps are `spacing` away. In the convolution that changes nothing; for transformers a wider lattice says how
much (`spacing=14`; the saved result has that check).

**Alone.** "A corresponding mask, which are set to 1 except position i", says section 3.2, and that can also mean the
reverse: only position i is known. A gap is small news where its neighbours say nearly the same; so we measure this too:
what one position saves against no context at all. It is exact, from a small patch around each site.

**Beyond distance r.** Each site is predicted alone from a small patch in which everything farther than r (L1) is
missing. The model does the same as in a whole picture, so nothing can leak in over several layers. (Absolute positions
then count from the patch's corner.)

Rates are those of y, estimated from the likelihoods, over the sites that have the position inside the picture. The
saved result is of the middle 256 x 256 pixels of each Kodak picture: as large as the crops these models were trained
on, and so without what a longer sequence than in training does to a transformer.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from PIL import Image
from scipy.optimize import curve_fit
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from entroformer_lib.coding import codec
from entroformer_lib.errors import StudyError
from entroformer_lib.files import data_folder, write_bytes
from entroformer_lib.memory import keep_freed_memory
from entroformer_lib.models.context import first_slice
from entroformer_lib.models.entroformer import Entroformer
from entroformer_lib.models.zoo import load_model, save_weights, weights_digest
from entroformer_lib.studies.provenance import provenance
from entroformer_lib.studies.rate_distortion import pictures_to_test
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.variants import Variant, trained

Offset = tuple[int, int]  # (dy, dx) of a context position from the site to be coded: (0, -1) is left, (-1, 0) above

BATCH_SITES = 4096  # sites in one pass: two masks of a Kodak picture; more are not quicker
RADII = (0, 1, 2, 3, 4, 6)
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


# ---- one picture ----


@dataclasses.dataclass
class Scene:
    """A picture as a model sees it: latents, hyperprior feature and rate, computed once for all masks.

    y_hat: [1, M, h, w], hyper: [1, D, h, w] or None, bits: [h, w] of y with all context, in float64.
    """

    model: Entroformer
    y_hat: Tensor
    hyper: Tensor | None
    bits: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.y_hat.shape[-2:])

    def predicted(self) -> Tensor:
        """Sites that have context: bool [h, w]. In the parallel model, the second slice."""
        if self.model.config.context == "parallel":
            return ~first_slice(*self.size)
        return torch.ones(self.size, dtype=torch.bool)


@torch.inference_mode()
def scene_of(model: Entroformer, picture: Image.Image) -> Scene:
    """Runs transforms and hyperprior.

    Raises:
        StudyError: a model without context.
    """
    if model.context_model is None:
        raise StudyError(f"The model {_name(model)} has no context model, so no position can be missing.")
    model.eval()
    y = model.scaled(model.g_a(codec.to_tensor(picture, model)))
    hyper = None if model.h_a is None else model.h_s(model.z_prior.quantize_z(model.h_a(y)))
    scene = Scene(model, torch.floor(y + 0.5), hyper, y.new_zeros(y.shape[-2:]))
    scene.bits = site_bits(scene, torch.zeros(1, 1, *scene.size, dtype=torch.bool, device=y.device))[0]
    return scene


@torch.inference_mode()
def site_bits(scene: Scene, missing: Tensor) -> Tensor:
    """Bits of every site of y when some latents are missing.  missing: bool [B, 1, h, w]  ->  [B, h, w], float64"""
    B = len(missing)
    y_hat = scene.y_hat.expand(B, -1, -1, -1)
    hyper = None if scene.hyper is None else scene.hyper.expand(B, -1, -1, -1)
    return _bits(scene.model, y_hat, hyper, scene.model.context_model.features(y_hat, missing))


def _bits(model: Entroformer, y_hat: Tensor, hyper: Tensor | None, context: Tensor) -> Tensor:
    means, scales = model.entropy_parameters(hyper, context)
    return -model.gaussian(y_hat, means, scales).double().log2().sum(1)


# ---- one position missing ----


def neighbourhood(model: Entroformer, side: int = 7) -> list[Offset]:
    """The context positions of a model in a square of side x side around a site.

    Serial and cnn: those before it in raster order. Parallel: those of the first slice, odd in L1 distance.

    Raises:
        StudyError: an even side, or no context model.
    """
    if side < 3 or side % 2 == 0:
        raise StudyError(f"A neighbourhood has an odd side of at least 3, not {side}.")
    reach = side // 2
    square = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    return [offset for offset in square if _is_context(model, offset)]


def _is_context(model: Entroformer, offset: Offset) -> bool:
    if model.context_model is None:
        raise StudyError(f"The model {_name(model)} has no context model, so no position can be missing.")
    return sum(offset) % 2 == 1 if model.config.context == "parallel" else offset < (0, 0)


def mask_positions(
    scene: Scene, offsets: Sequence[Offset], spacing: int | None = None, bar: tqdm | None = None
) -> list[dict]:
    """The rate with each position missing, all others known.

    Args:
        offsets: (dy, dx) of each position.
        spacing: distance of the gaps of one mask; by default as large as the neighbourhood of the offsets.
        bar: is moved on by one for every mask.

    Returns:
        A row for each offset: dy, dx, sites, and over these sites bpp_all, bpp_masked, ratio.

    Raises:
        StudyError: an offset that is no context, or outside of the picture.
    """
    (h, w), reach = scene.size, max(max(map(abs, offset)) for offset in offsets)
    for dy, dx in offsets:
        if abs(dy) >= h or abs(dx) >= w:
            raise StudyError(f"The position ({dy}, {dx}) is outside of latents of {h} x {w}.")
        if not _is_context(scene.model, (dy, dx)):
            raise StudyError(f"The position ({dy}, {dx}) is no context of the model {_name(scene.model)}.")
    spacing = spacing or 2 * reach + 1
    if spacing <= reach:
        raise StudyError(f"Gaps {spacing} apart come too close to each other for positions up to {reach} away.")
    totals = np.zeros((len(offsets), 3))  # sites, bits with all context, bits without the position
    predicted = scene.predicted()
    for gaps in _lattices(scene, spacing):
        bits = site_bits(scene, gaps[:, None].to(scene.y_hat.device)).cpu()
        for row, offset in zip(totals, offsets, strict=True):
            here = _seen_from(gaps, offset) & predicted  # sites whose position is a gap: [B, h, w]
            row += (int(here.sum()), float(scene.bits.cpu().expand_as(bits)[here].sum()), float(bits[here].sum()))
        if bar is not None:
            bar.update(len(gaps))
    return [
        {"dy": dy, "dx": dx, "sites": int(n), "bpp_all": a / n / 256, "bpp_masked": m / n / 256, "ratio": m / a}
        for (dy, dx), (n, a, m) in zip(offsets, totals, strict=True)
    ]


def _lattices(scene: Scene, spacing: int) -> Iterable[Tensor]:
    """Every spacing-th site in both directions, in all phases: bool [B, h, w] at a time."""
    h, w = scene.size
    phases = [(a, b) for a in range(min(spacing, h)) for b in range(min(spacing, w))]
    rows, columns = torch.arange(h)[:, None] % spacing, torch.arange(w)[None] % spacing
    size = max(1, BATCH_SITES // (h * w))
    for start in range(0, len(phases), size):
        yield torch.stack([(rows == a) & (columns == b) for a, b in phases[start : start + size]])


def _seen_from(gaps: Tensor, offset: Offset) -> Tensor:
    """Sites from which a gap lies at `offset`.  gaps: [B, h, w]  ->  [B, h, w]"""
    h, w = gaps.shape[-2:]
    dy, dx = offset
    seen = torch.zeros_like(gaps)
    seen[:, max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)] = gaps[
        :, max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)
    ]
    return seen


# ---- everything beyond a distance missing ----


@torch.inference_mode()
def mask_beyond(scene: Scene, radii: Sequence[int] = RADII, stride: int = 3) -> list[dict]:
    """The rate when only context up to an L1 distance is known.

    Args:
        radii: distances in latents; 0 is no context at all.
        stride: measured at every stride-th site in both directions.

    Returns:
        A row for each radius: radius, sites, and over these sites bpp_all, bpp_masked, ratio.

    Raises:
        StudyError: a radius larger than the latents.
    """
    h, w = scene.size
    if max(radii) >= min(h, w):
        raise StudyError(f"A radius of {max(radii)} is larger than latents of {h} x {w}.")
    lattice = torch.zeros(h, w, dtype=torch.bool)
    lattice[::stride, ::stride] = True
    sites = (lattice & scene.predicted()).nonzero()  # [n, 2]
    at = scene.bits.cpu()[sites[:, 0], sites[:, 1]].sum()
    rows = []
    for radius in radii:
        step = max(1, BATCH_SITES // (2 * radius + 1) ** 2)
        inside = _distances(radius) <= radius
        bits = sum(float(_bits_in_patches(scene, part, inside).sum()) for part in sites.split(step))
        bpp_all, bpp = float(at) / len(sites) / 256, bits / len(sites) / 256
        rows.append(
            {"radius": radius, "sites": len(sites), "bpp_all": bpp_all, "bpp_masked": bpp, "ratio": bpp / bpp_all}
        )
    return rows


@torch.inference_mode()
def only_positions(scene: Scene, offsets: Sequence[Offset], stride: int = 3) -> list[dict]:
    """The other way round: the rate with one position known and all others missing, against no context at all. What
    many positions know together, no single gap can show; this does.

    Args:
        offsets: (dy, dx) of each position.
        stride: measured at every stride-th site in both directions.

    Returns:
        A row for each offset: dy, dx, sites, and over these sites bpp_none, bpp_only, ratio.
    """
    h, w = scene.size
    reach = max(max(map(abs, offset)) for offset in offsets)
    lattice = torch.zeros(h, w, dtype=torch.bool)
    lattice[::stride, ::stride] = True
    sites = (lattice & scene.predicted()).nonzero()  # [n, 2]
    nothing = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.bool)
    none = _bits_in_patches(scene, sites, nothing)
    rows = []
    for dy, dx in offsets:
        position = sites + torch.tensor((dy, dx))
        there = ((position >= 0) & (position < torch.tensor((h, w)))).all(1)
        known = nothing.clone()
        known[reach + dy, reach + dx] = True
        n, before = int(there.sum()), float(none[there].sum())
        after = float(_bits_in_patches(scene, sites[there], known).sum())
        row = {"dy": dy, "dx": dx, "sites": n, "bpp_none": before / n / 256, "bpp_only": after / n / 256}
        rows.append({**row, "ratio": after / before})
    return rows


def _distances(radius: int) -> Tensor:
    """L1 distances from the centre: [2 radius + 1, 2 radius + 1]"""
    line = torch.arange(-radius, radius + 1).abs()
    return line[:, None] + line


def _bits_in_patches(scene: Scene, sites: Tensor, known: Tensor) -> Tensor:
    """Bits of sites [n, 2], each predicted from a patch of its own, of which only what is known: bool [side, side],
    its middle the site  ->  [n]"""
    model, (h, w), side = scene.model, scene.size, len(known)
    radius = side // 2
    height = side if model.config.context == "parallel" else radius + 1  # nothing below is seen by causal models
    down, right = torch.meshgrid(torch.arange(height) - radius, torch.arange(side) - radius, indexing="ij")
    rows, columns = sites[:, 0, None, None] + down, sites[:, 1, None, None] + right  # [n, height, side]
    known = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w) & known[:height]
    patches = scene.y_hat[0][:, rows.clamp(0, h - 1), columns.clamp(0, w - 1)].transpose(0, 1)  # [n, M, height, side]
    missing = ~known[:, None].to(patches.device)
    context = model.context_model(patches, None, missing)[:, :, radius : radius + 1, radius : radius + 1]
    hyper = None if scene.hyper is None else scene.hyper[0][:, sites[:, 0], sites[:, 1]].T[..., None, None]
    return _bits(model, patches[:, :, radius : radius + 1, radius : radius + 1], hyper, context)[:, 0, 0]


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
                bar.set_postfix_str(f"{name}, {_name(model)}")
                scene = scene_of(model, picture)
                if side > min(scene.size):
                    raise StudyError(
                        f"A neighbourhood of {side} x {side} is larger than the latents of {name}, "
                        f"{scene.size[0]} x {scene.size[1]}."
                    )
                for row in mask_positions(scene, neighbourhood(model, side), spacing, bar):
                    rows.append({"model": _name(model), "image": name, **row})
    return pd.DataFrame(rows)


def run_beyond(
    models: Iterable[Entroformer], pictures: Iterable[tuple[str, Image.Image]], radii: Sequence[int] = RADII
) -> pd.DataFrame:
    """`mask_beyond` for each model and picture: model, image, radius, sites, bpp_all, bpp_masked, ratio."""
    return _table(models, pictures, lambda scene: mask_beyond(scene, radii))


def run_alone(
    models: Iterable[Entroformer], pictures: Iterable[tuple[str, Image.Image]], side: int = 7
) -> pd.DataFrame:
    """`only_positions` for each model and picture: model, image, dy, dx, sites, bpp_none, bpp_only, ratio."""
    return _table(models, pictures, lambda scene: only_positions(scene, neighbourhood(scene.model, side)))


def _table(models, pictures, rows_of) -> pd.DataFrame:
    pictures = list(pictures)
    return pd.DataFrame(
        {"model": _name(model), "image": name, **row}
        for model in models
        for name, picture in pictures
        for row in rows_of(scene_of(model, picture))
    )


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


def _name(model: Entroformer) -> str:
    return getattr(model, "name", None) or model.config.variant


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
        if measured["models"].get(_name(model), {}).get("weights_sha256") == weights_digest(model).hex():
            continue
        tables = {
            "rows": run([model], pictures, side, progress=True),
            "alone": run_alone([model], pictures, side),
            "beyond": run_beyond([model], pictures),
            "wider_lattice": run([model], pictures[:1], side, spacing=2 * side, progress=True),
        }
        measured["models"][_name(model)] = {**_description(model), **provenance(model, seed=_seed(model))}
        for key, table in tables.items():
            measured[key] = [row for row in measured[key] if row["model"] != _name(model)] + _rounded(table)
        save(measured, [_name(m) for m in loaded])


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
    write_bytes(path, _lines(result).encode())
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


def _lines(result: dict) -> str:
    """JSON with one line for each row of a table."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        else:
            text = json.dumps(value, indent=1)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    keep_freed_memory()
    tyro.extras.subcommand_cli_from_dict({"train": train_models, "measure": measure, "ship": ship})
