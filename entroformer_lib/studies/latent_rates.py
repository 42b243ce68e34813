"""Estimated rates of entropy models: what the ablations measure.

All rates here are *estimated*: the bits that the model's likelihoods, computed in floating point, promise for the
rounded latents. No file is written; `rate_distortion.py` measures files. The transforms are frozen, so the latents of a
picture are the same for all models, and a difference in rate is one of the entropy models alone. Bits per pixel count
the pixels of the picture, without padding.
"""

from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer, evaluating
from entroformer_lib.models.context import Gaps, first_slice
from entroformer_lib.studies.rate_distortion import Pictures, bit_maps, latents_of, middle

MOSAIC = 1200  # pixels
ROWS, COLUMNS = 3, 2  # of pictures in a mosaic
CONTEXTS = ("hyperprior only", "hyperprior + unidirectional", "hyperprior + bidirectional")
OWN = {"none": CONTEXTS[0], **{c: f"hyperprior + {c}" for c in ("serial", "cnn", "grouped")}}  # of a whole model


# ---- pictures ----


def mosaics(pictures: Pictures, side: int = MOSAIC) -> list[Image.Image]:
    """Large pictures out of small ones: six side by side (portraits turned), cut to the square in the middle."""
    lying = [p if p.width >= p.height else p.transpose(Image.ROTATE_90) for _, p in pictures]
    found = []
    for start in range(0, len(lying) - ROWS * COLUMNS + 1, ROWS * COLUMNS):
        width, height = lying[start].size
        whole = Image.new("RGB", (COLUMNS * width, ROWS * height))
        for i in range(ROWS * COLUMNS):
            whole.paste(lying[start + i], (i % COLUMNS * width, i // COLUMNS * height))
        found.append(middle(whole, side))
    return found


def squares_of(picture: Image.Image, side: int) -> list[Image.Image]:
    """All squares of so many pixels that lie side by side from the left upper corner."""
    return [
        picture.crop((left, top, left + side, top + side))
        for top in range(0, picture.height - side + 1, side)
        for left in range(0, picture.width - side + 1, side)
    ]


def batches_of(model: Entroformer, pictures: Pictures, size: int = 8) -> list[Tensor]:
    """Latents of pictures, those of one shape together, up to `size` at a time: [B, M, h, w]"""
    shapes: dict[tuple, list[Tensor]] = {}
    for _, picture in pictures:
        y = latents_of(model, picture)
        shapes.setdefault(tuple(y.shape), []).append(y)
    return [part for alike in shapes.values() for part in torch.cat(alike).split(size)]


def cut(y: Tensor, side: int) -> Tensor:
    """All squares of so many latents that lie side by side.  [B, M, h, w]  ->  [n, M, side, side]; none where y is
    smaller."""
    rows, columns = y.size(2) // side, y.size(3) // side
    y = y[:, :, : rows * side, : columns * side].unflatten(3, (columns, side)).unflatten(2, (rows, side))
    return y.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # from [B, M, rows, side, columns, side]


# ---- rates ----


def rates(model: Entroformer, pictures: Pictures) -> list[dict]:
    """A row for each picture: image, bpp, bpp_y, bpp_z."""
    rows = []
    for name, picture in pictures:
        bits = {part: float(b.sum()) for part, b in bit_maps(model, picture).items()}
        y, z = (bits.get(part, 0.0) / (picture.width * picture.height) for part in ("y", "z"))
        rows.append({"image": name, "bpp": y + z, "bpp_y": y, "bpp_z": z})
    return rows


def mean_rate(model: Entroformer, batches: Iterable[Tensor]) -> float:
    """Bits per pixel over all latents, a latent for 256 pixels.  batches: [B, M, h, w] each"""
    bits = pixels = 0
    for y in batches:
        bits += sum(float(b.sum()) for b in model.estimated_bits(y).values())
        pixels += 256 * y[:, 0].numel()
    return bits / pixels


@torch.inference_mode()
def rate_and_error(model: Entroformer, picture: Image.Image, name: str) -> dict:
    """image, bpp (estimated) and mse (pixels in [0, 1], clamped) of a picture through a whole model."""
    x = codec.to_tensor(picture, model)
    with evaluating(model) as model:
        out = model(x)
    error = codec.unpad(out["x_hat"].clamp(0, 1) - x, picture.height, picture.width).square().mean()
    bits = sum(-p.double().log2().sum() for p in out["likelihoods"].values())
    return {"image": name, "bpp": float(bits) / (picture.width * picture.height), "mse": float(error)}


@torch.inference_mode()
def second_slice_rates(model: Entroformer, pictures: Pictures) -> list[dict]:
    """What the second slice's latents cost (row + column even), by what they are predicted from.

    A parallel model is asked three times: by the hyperprior alone; with the first slice's latents before each site in
    raster order; with all of the first slice. Only one that has learned them all (`no_context`, `one_way`) can be
    compared with itself: the usual one knows the hyperprior alone at the sites of the first slice, and is at a loss
    with it at the others. Other models know one way, their own.

    Returns:
        A row for each picture and context: image, context, bpp (bits of the second slice over all pixels).
    """
    rows = []
    for name, picture in pictures:
        y = latents_of(model, picture)
        second = ~first_slice(*y.shape[-2:], device=y.device)
        with evaluating(model) as model:
            for context, likelihood in _predictions(model, y):
                context = context if model.h_a is not None else context.removeprefix("hyperprior + ")
                bits = -likelihood.double().log2().sum(1)[:, second].sum()
                rows.append({"image": name, "context": context, "bpp": float(bits) / (picture.width * picture.height)})
    return rows


def _predictions(model: Entroformer, y: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Likelihoods of y [1, M, h, w] with each context that the model can have."""
    if model.config.context != "parallel":
        yield OWN[model.config.context], model.likelihoods(y)[0]["y"]
        return
    all_first = torch.ones(1, 1, *y.shape[-2:], dtype=torch.bool, device=y.device)  # the first slice has no context
    one_way, both_ways = (Gaps(one_way=torch.tensor([flag], device=y.device)) for flag in (True, False))
    for context, gaps in zip(CONTEXTS, (Gaps(kept=all_first), one_way, both_ways), strict=True):
        if context != CONTEXTS[0] or model.h_a is not None:
            yield context, model.likelihoods(y, gaps=gaps)[0]["y"]
