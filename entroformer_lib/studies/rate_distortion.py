"""Rate and distortion on a set of pictures, always through real bytes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from entroformer_lib.codec import codec
from entroformer_lib.codec.quality import ms_ssim, psnr_db
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import DataError
from entroformer_lib.training.data import find_sources

Pictures = Sequence[tuple[str, Image.Image]]  # name and picture (RGB)


def pictures_to_test(folder, limit: int | None = None) -> list[Path]:
    """The picture files of a folder, sorted by name.

    Raises:
        DataError: none there.
    """
    paths = sorted(find_sources(folder)[0])[:limit]
    if not paths:
        raise DataError(f"There is no picture to test on in {folder}.")
    return paths


def pictures_of(folder, limit: int | None = None, side: int | None = None) -> Pictures:
    """The pictures in the files of a folder, whole or, with a `side`, their `middle`."""
    pictures = [(path.stem, codec.to_rgb(codec.open_picture(path))[0]) for path in pictures_to_test(folder, limit)]
    return pictures if side is None else [(name, middle(picture, side)) for name, picture in pictures]


def middle(picture: Image.Image, side: int) -> Image.Image:
    """The square in the middle, or as much of it as there is.  side: pixels"""
    left, top = (max(0, (length - side) // 2) for length in picture.size)
    return picture.crop((left, top, min(picture.width, left + side), min(picture.height, top + side)))


def evaluate_picture(model: Entroformer, path: Path) -> dict:
    """One picture through the codec.

    Returns:
        The columns of `measured`, and bpp_estimated: from the likelihoods alone.
    """
    picture, _ = codec.to_rgb(codec.open_picture(path))
    row = measured(path, picture, lambda: codec.encode(model, path), lambda data: codec.decode(data, model))
    return {**row, "bpp_estimated": estimated_bits(model, picture) / (picture.width * picture.height)}


def measured(
    path: Path, picture: Image.Image, encode: Callable[[], bytes], decode: Callable[[bytes], Image.Image]
) -> dict:
    """What a codec makes of a picture.

    Returns:
        image, width, height (pixels), bytes (the whole file), bpp (of the whole file), psnr_db and ms_ssim (8-bit RGB;
        MS-SSIM is None below 161 pixels), encode_s, decode_s.
    """
    start = time.perf_counter()
    data = encode()
    middle = time.perf_counter()
    decoded = decode(data).convert("RGB")
    end = time.perf_counter()
    return {
        "image": path.stem,
        "width": picture.width,
        "height": picture.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (picture.width * picture.height),
        "psnr_db": psnr_db(picture, decoded),
        "ms_ssim": ms_ssim(picture, decoded),
        "encode_s": middle - start,
        "decode_s": end - middle,
    }


@torch.inference_mode()
def latents_of(model: Entroformer, picture: Image.Image) -> Tensor:
    """y of a picture (RGB), not yet rounded, as scaled for coding: [1, M, h, w]"""
    return model.eval().scaled(model.g_a(codec.to_tensor(picture, model)))


def bit_maps(model: Entroformer, picture: Image.Image) -> dict[str, np.ndarray]:
    """Where the bits go: {"y": [H/16, W/16], "z": [H/64, W/64]} in bits, summed over channels; padding included."""
    bits_of = model.estimated_bits(latents_of(model, picture))
    return {name: bits[0].cpu().numpy() for name, bits in bits_of.items()}


def estimated_bits(model: Entroformer, picture: Image.Image) -> float:
    """Size that the likelihoods promise, in bits, without container and coder."""
    return float(sum(bits.sum() for bits in bit_maps(model, picture).values()))
