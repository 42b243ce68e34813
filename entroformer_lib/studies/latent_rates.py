"""Rates of entropy models on latents that are computed once: what the ablations measure.

The transforms are frozen, so the latents of the test pictures are the same for all models, and a rate is an entropy
model's alone. All rates here are *estimated*: the bits that the model's likelihoods, computed in floating point,
promise for the rounded latents. No file is written; `studies/rate_distortion.py` measures files. Bits per pixel count
the pixels of the picture, without padding.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.models.context import Gaps, first_slice
from entroformer_lib.studies.rate_distortion import pictures_to_test

SQUARE = 256  # pixels: as large as the crops of training
MOSAIC = 1200  # pixels
ROWS, COLUMNS = 3, 2  # of pictures in a mosaic
CONTEXTS = ("hyperprior only", "hyperprior + unidirectional", "hyperprior + bidirectional")


@dataclass(frozen=True)
class Latents:
    """A picture's latents, not yet rounded.  y: [1, M, h, w], as scaled for coding; pixels: of the picture"""

    name: str
    y: Tensor
    pixels: int


@torch.inference_mode()
def latents_of(source: Entroformer, picture: Image.Image, name: str, factor: int) -> Latents:
    """g_a of a picture.  factor: pixels per side that the picture is padded to a multiple of"""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    x = pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255
    x = codec.pad(x.to(next(source.g_a.parameters()).device), factor)
    return Latents(name, source.scaled(source.eval().g_a(x)), picture.width * picture.height)


def batches(latents: Iterable[Latents], size: int = 8) -> list[Tensor]:
    """Latents of one shape together, up to `size` at a time: [B, M, h, w]"""
    shapes: dict[tuple, list[Tensor]] = {}
    for one in latents:
        shapes.setdefault(tuple(one.y.shape), []).append(one.y)
    return [part for alike in shapes.values() for part in torch.cat(alike).split(size)]


@functools.lru_cache(maxsize=4)
def pictures_of(folder: str, limit: int | None = None) -> list[tuple[str, Image.Image]]:
    """Name and picture (RGB) of all files of a folder."""
    return [(p.stem, codec.to_rgb(codec.open_picture(p))[0]) for p in pictures_to_test(Path(folder), limit)]


def square_in_the_middle(picture: Image.Image, side: int = SQUARE) -> Image.Image:
    """The square of so many pixels in the middle, or as much of it as there is."""
    left, top = (max(0, (length - side) // 2) for length in picture.size)
    return picture.crop((left, top, min(picture.width, left + side), min(picture.height, top + side)))


def mosaics(pictures: Sequence[tuple[str, Image.Image]], side: int = MOSAIC) -> list[tuple[str, Image.Image]]:
    """Large pictures out of small ones: six side by side (portraits turned), cut to the square in the middle."""
    found = []
    for start in range(0, len(pictures) - ROWS * COLUMNS + 1, ROWS * COLUMNS):
        part = [
            p if p.width >= p.height else p.transpose(Image.ROTATE_90) for _, p in pictures[start:][: ROWS * COLUMNS]
        ]
        width, height = part[0].size
        whole = Image.new("RGB", (COLUMNS * width, ROWS * height))
        for i, picture in enumerate(part):
            whole.paste(picture, (i % COLUMNS * width, i // COLUMNS * height))
        found.append((f"mosaic {start // (ROWS * COLUMNS) + 1}", square_in_the_middle(whole, side)))
    return found


def squares_of(picture: Image.Image, side: int) -> list[Image.Image]:
    """All squares of so many pixels that lie side by side from the left upper corner."""
    return [
        picture.crop((left, top, left + side, top + side))
        for top in range(0, picture.height - side + 1, side)
        for left in range(0, picture.width - side + 1, side)
    ]


# ---- rates ----


@torch.inference_mode()
def rates(model: Entroformer, latents: Iterable[Latents]) -> list[dict]:
    """A row for each picture: image, bpp, bpp_y, bpp_z."""
    rows = []
    model.eval()
    for one in latents:
        bits = {name: float(b.sum()) / one.pixels for name, b in model.estimated_bits(one.y).items()}
        rows.append({"image": one.name, "bpp": sum(bits.values()), "bpp_y": bits["y"], "bpp_z": bits.get("z", 0.0)})
    return rows


@torch.inference_mode()
def mean_rate(model: Entroformer, batches: Iterable[Tensor]) -> float:
    """Bits per pixel over all latents, a latent for 256 pixels.  batches: [B, M, h, w] each"""
    bits = pixels = 0
    model.eval()
    for y in batches:
        bits += sum(float(b.sum()) for b in model.estimated_bits(y).values())
        pixels += 256 * y[:, 0].numel()
    return bits / pixels


@torch.inference_mode()
def rate_and_error(model: Entroformer, picture: Image.Image, name: str) -> dict:
    """image, bpp (estimated) and mse (pixels in [0, 1], clamped) of a picture through a whole model."""
    x = codec.to_tensor(picture, model)
    out = model.eval()(x)
    size = (picture.height, picture.width)
    error = codec.unpad(out["x_hat"].clamp(0, 1) - x, *size).square().mean()
    bits = sum(-p.double().log2().sum() for p in out["likelihoods"].values())
    return {"image": name, "bpp": float(bits) / (size[0] * size[1]), "mse": float(error)}


@torch.inference_mode()
def second_slice_rates(model: Entroformer, latents: Iterable[Latents]) -> list[dict]:
    """What the second slice's latents cost (row + column even), by what they are predicted from.

    A parallel model is asked three times: by the hyperprior alone, as it predicts the first slice; with the first
    slice's latents before each site in raster order; with all of the first slice. Other models know one way, their own.

    ->  a row for each picture and context: image, context, bpp (bits of the second slice over all pixels)
    """
    rows = []
    model.eval()
    for one in latents:
        second = ~first_slice(*one.y.shape[-2:], device=one.y.device)
        for context, likelihood in _predictions(model, one.y):
            bits = -likelihood.double().log2().sum(1)[:, second].sum()
            rows.append({"image": one.name, "context": context, "bpp": float(bits) / one.pixels})
    return rows


def _predictions(model: Entroformer, y: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Likelihoods of y [1, M, h, w] with each context that the model can have."""
    if model.config.context != "parallel":
        own = {"none": CONTEXTS[0], "serial": "hyperprior + serial", "cnn": "hyperprior + convolution"}
        yield own[model.config.context], model.likelihoods(y)[0]["y"]
        return
    hyper = None
    if model.h_a is not None:
        hyper = model.h_s(model.z_prior.quantize_z(model.hyper_analysis(y, None)))
        means, log_scales = model.entropy_parameters(hyper, None)
        yield (
            CONTEXTS[0],
            model.gaussian(torch.floor(y + 0.5), means, model.entropy_parameters.bounded(log_scales).exp()),
        )
    for context, one_way in zip(CONTEXTS[1:], (True, False), strict=True):
        seen = torch.tensor([one_way], device=y.device)
        yield context, model.likelihoods(y, gaps=Gaps(one_way=seen))[0]["y"]


def use_top_k(model: Entroformer, top_k: int | None) -> None:
    """Lets the context model keep other than the k scores it was trained with, in place."""
    stack = model.context_model.stack
    stack.top_k = top_k
    for block in stack.blocks:
        block.attention.top_k = top_k
