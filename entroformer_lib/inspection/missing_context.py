"""What is lost when a model does not know some latents: the rate of one picture under masks.

**What "unknown" means.** The paper feeds "a random mask to self-attention" and says no more. Hiding the key at (dy, dx)
from every query, layer by layer, would not do: the tokens between have seen that latent and pass it on in the next
layer, and in the serial model the query's own token *is* the latent to the left. So a missing latent is missing for the
whole model: its token enters as zero and no other token sees it, in any layer (`missing` of the context models); in the
convolution its taps get zero. The models of this study are trained with such gaps, a random share of up to half of each
crop (`TrainConfig.missing`), so that a gap is nothing new to them.

**How it is measured.** One pass with a single missing latent t answers for every neighbour of t, one position each. And
latents far enough apart do not disturb each other: we hide a lattice, every `spacing`-th latent in both directions, and
move it through all spacing² phases. Then every site has met a gap at every position of the neighbourhood exactly once,
in 49 passes for 7 x 7, a few in one batch, instead of one pass for each of 1,536 latents. What the lattice costs: other
gaps are `spacing` away. In the convolution that changes nothing; for transformers a wider lattice says how
much (`spacing=14`; the saved result has that check).

**Alone.** "A corresponding mask, which are set to 1 except position i", says section 3.2, and that can also mean the
reverse: only position i is known. A gap is small news where its neighbours say nearly the same; so we measure this too:
what one position saves against the same patch without any context. It is exact, from a small patch around each site;
but nearly everything is missing there, more than in training.

**Beyond distance r.** Each site is predicted alone from a small patch in which everything farther than r (L1) is
missing, so nothing can leak in over several layers. The first column is left out: in a picture the serial model
predicts its sites from the end of the row above, with other offsets, and a patch would spare it that.

In a patch absolute positions count from its corner, so a model that has them knows less there than in the picture.

Rates are those of y, estimated from the likelihoods, over the sites that have the position inside the picture.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from entroformer_lib.entroformer import Entroformer, in_parts
from entroformer_lib.errors import StudyError
from entroformer_lib.inspection.scene import Scene
from entroformer_lib.models.context import Gaps, first_slice

Offset = tuple[int, int]  # (dy, dx) of a context position from the site to be coded: (0, -1) is left, (-1, 0) above

BATCH_SITES = 4096  # sites in one pass: two masks of a Kodak picture; more are not quicker
RADII = (0, 1, 2, 3, 4, 6)


def model_name(model: Entroformer) -> str:
    """The name a model was loaded by, or its variant."""
    return model.name or model.config.variant


def scene_of(model: Entroformer, picture: Image.Image) -> Scene:
    """The picture as all masks of a model see it, in float32.

    Raises:
        StudyError: a model whose context has no positions.
    """
    check_context(model)
    return Scene(model, picture, torch.float32)


def check_context(model: Entroformer) -> None:
    """A sentence for a model whose context has no positions.

    Raises:
        StudyError: there is no context model, or it is GroupedMixer.
    """
    if model.config.context == "none":
        raise StudyError(f"The model {model_name(model)} has no context model, so no position can be missing.")
    if model.config.context == "grouped":
        raise StudyError("A GroupedMixer has no positions to leave out; the study takes Entroformer's context models.")


@torch.inference_mode()
def site_bits(scene: Scene, missing: Tensor | None = None) -> Tensor:
    """Bits of every site of y when some latents are missing.

    missing: bool [B, 1, h, w], by default one mask without gaps  ->  [B, h, w], in float64
    """
    if missing is None:
        missing = torch.zeros(1, 1, scene.height, scene.width, dtype=torch.bool, device=scene.y_hat.device)
    every = (len(missing), -1, -1, -1)
    hyper = None if scene.hyper is None else scene.hyper.expand(every)
    return _bits(scene, scene.y_hat.expand(every), hyper, missing)


def _bits(scene: Scene, y_hat: Tensor, hyper: Tensor | None, missing: Tensor) -> Tensor:
    with in_parts():
        means, scales = scene.model.distributions(y_hat, hyper, Gaps(missing=missing), scene.rate)
    return -scene.model.gaussian(y_hat, means, scales).double().log2().sum(1)


def has_context(scene: Scene) -> Tensor:
    """Sites that are predicted from context: bool [h, w]. In the parallel model, the second slice."""
    if scene.model.config.context == "parallel":
        return ~first_slice(scene.height, scene.width)
    return torch.ones(scene.height, scene.width, dtype=torch.bool)


# ---- one position missing ----


def neighbourhood(model: Entroformer, side: int = 7) -> list[Offset]:
    """The context positions of a model in a square of side x side around a site.

    Serial and cnn: those before it in raster order. Parallel: those of the first slice, odd in L1 distance.

    Raises:
        StudyError: an even side, or a model whose context has no positions.
    """
    check_context(model)
    if side < 3 or side % 2 == 0:
        raise StudyError(f"A neighbourhood has an odd side of at least 3, not {side}.")
    reach = side // 2
    square = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    return [offset for offset in square if _is_context(model, offset)]


def _is_context(model: Entroformer, offset: Offset) -> bool:
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
    reach = _reach(scene, offsets)
    spacing = spacing or 2 * reach + 1
    if spacing <= reach:
        raise StudyError(f"Gaps {spacing} apart come too close to each other for positions up to {reach} away.")
    totals = np.zeros((len(offsets), 3))  # sites, bits with all context, bits without the position
    predicted, known = has_context(scene), site_bits(scene).cpu()
    for gaps in _lattices(scene, spacing):
        bits = site_bits(scene, gaps[:, None].to(scene.y_hat.device)).cpu()
        for row, offset in zip(totals, offsets, strict=True):
            here = _seen_from(gaps, offset) & predicted  # sites whose position is a gap: [B, h, w]
            row += (int(here.sum()), float(known.expand_as(bits)[here].sum()), float(bits[here].sum()))
        if bar is not None:
            bar.update(len(gaps))
    return [
        {"dy": dy, "dx": dx, **_rates(int(n), bpp_all=a, bpp_masked=m)}
        for (dy, dx), (n, a, m) in zip(offsets, totals.tolist(), strict=True)
    ]


def _reach(scene: Scene, offsets: Sequence[Offset]) -> int:
    """The largest row or column distance among positions, which must be context inside the picture."""
    h, w = scene.height, scene.width
    for dy, dx in offsets:
        if abs(dy) >= h or abs(dx) >= w:
            raise StudyError(f"The position ({dy}, {dx}) is outside of latents of {h} x {w}.")
        if not _is_context(scene.model, (dy, dx)):
            raise StudyError(f"The position ({dy}, {dx}) is no context of the model {model_name(scene.model)}.")
    if not offsets:
        raise StudyError("There is no position to mask.")
    return max(max(map(abs, offset)) for offset in offsets)


def _lattices(scene: Scene, spacing: int) -> Iterable[Tensor]:
    """Every spacing-th site in both directions, in all phases: bool [B, h, w] at a time."""
    h, w = scene.height, scene.width
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
        stride: measured at every stride-th site in both directions, from the first row and the second column on.

    Returns:
        A row for each radius: radius, sites, and over these sites bpp_all, bpp_masked, ratio.

    Raises:
        StudyError: a radius below 0 or larger than the latents.
    """
    h, w = scene.height, scene.width
    if min(radii) < 0:
        raise StudyError(f"A radius is 0 or more, not {min(radii)}.")
    if max(radii) >= min(h, w):
        raise StudyError(f"A radius of {max(radii)} is larger than latents of {h} x {w}.")
    sites = _every(scene, stride, first_column=1)
    before = float(site_bits(scene)[0].cpu()[sites[:, 0], sites[:, 1]].sum())
    rows = []
    for radius in radii:
        side = max(radius, 1)  # a single site would be predicted from the serial model's start
        step = max(1, BATCH_SITES // (2 * side + 1) ** 2)
        line = torch.arange(-side, side + 1).abs()
        inside = line[:, None] + line <= radius
        after = sum(float(bits_in_patches(scene, part, inside).sum()) for part in sites.split(step))
        rows.append({"radius": radius, **_rates(len(sites), bpp_all=before, bpp_masked=after)})
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

    Raises:
        StudyError: an offset that is no context, or outside of the picture, or at none of the sites.
    """
    reach, sites = _reach(scene, offsets), _every(scene, stride)
    nothing = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.bool)
    none = bits_in_patches(scene, sites, nothing)
    rows = []
    for dy, dx in offsets:
        position = sites + torch.tensor((dy, dx))
        there = ((position >= 0) & (position < torch.tensor((scene.height, scene.width)))).all(1)
        if not there.any():
            raise StudyError(f"No site that is looked at has the position ({dy}, {dx}) inside the picture.")
        known = nothing.clone()
        known[reach + dy, reach + dx] = True
        before, after = float(none[there].sum()), float(bits_in_patches(scene, sites[there], known).sum())
        rows.append({"dy": dy, "dx": dx, **_rates(int(there.sum()), bpp_none=before, bpp_only=after)})
    return rows


def _every(scene: Scene, stride: int, first_column: int = 0) -> Tensor:
    """Every stride-th site in both directions that has context: [n, 2]"""
    lattice = torch.zeros(scene.height, scene.width, dtype=torch.bool)
    lattice[::stride, first_column::stride] = True
    return (lattice & has_context(scene)).nonzero()


def _rates(sites: int, **bits: float) -> dict:
    """sites, both bits in bpp by their names, and the ratio of the second to the first."""
    first, second = bits.values()
    return {"sites": sites, **{name: b / sites / 256 for name, b in bits.items()}, "ratio": second / first}


@torch.inference_mode()
def bits_in_patches(scene: Scene, sites: Tensor, known: Tensor) -> Tensor:
    """Bits of sites [n, 2], each predicted from a patch of its own.  known: bool [side, side], the latents of the patch
    that are known; the site is its middle  ->  [n]"""
    h, w, side = scene.height, scene.width, len(known)
    radius = side // 2
    height = side if scene.model.config.context == "parallel" else radius + 1  # nothing below is seen by causal models
    down, right = torch.meshgrid(torch.arange(height) - radius, torch.arange(side) - radius, indexing="ij")
    rows, columns = sites[:, 0, None, None] + down, sites[:, 1, None, None] + right  # [n, height, side]
    known = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w) & known[:height]
    patches = scene.y_hat[0][:, rows.clamp(0, h - 1), columns.clamp(0, w - 1)].transpose(0, 1)  # [n, M, height, side]
    missing = ~known[:, None].to(patches.device)
    hyper = None
    if scene.hyper is not None:  # of the site itself; what is predicted around it does not count
        hyper = scene.hyper[0][:, sites[:, 0], sites[:, 1]].T[..., None, None].expand(-1, -1, height, side)
    return _bits(scene, patches, hyper, missing)[:, radius, radius]
