"""Rate and distortion on a set of pictures, always through real bytes."""

import io
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from entroformer_lib.coding import codec
from entroformer_lib.errors import DataError
from entroformer_lib.models.entroformer import Entroformer
from entroformer_lib.training.data import find_sources


def pictures_to_test(folder, limit: int | None = None) -> list[Path]:
    """The picture files of a folder, sorted by name.

    Raises:
        DataError: none there.
    """
    paths = sorted(find_sources(folder)[0])[:limit]
    if not paths:
        raise DataError(f"There is no picture to test on in {folder}.")
    return paths


def evaluate(model: Entroformer, paths: Iterable[Path]) -> pd.DataFrame:
    """Codes each picture to bytes and back. One row per picture, see `evaluate_picture`."""
    return pd.DataFrame([evaluate_picture(model, path) for path in paths])


def evaluate_picture(model: Entroformer, path: Path) -> dict:
    """One picture through the codec.

    Returns:
        image, width, height (pixels), bytes (the whole .ef file), bpp (of the whole file), bpp_estimated (from the
        likelihoods alone), psnr_db and ms_ssim (8-bit RGB; MS-SSIM is None below 161 pixels), encode_s, decode_s.
    """
    picture, _ = codec.to_rgb(codec.open_picture(path))
    start = time.perf_counter()
    data = codec.encode(model, path)
    middle = time.perf_counter()
    decoded = codec.decode(data, model).convert("RGB")
    end = time.perf_counter()
    pixels = picture.width * picture.height
    return {
        "image": path.stem,
        "width": picture.width,
        "height": picture.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / pixels,
        "bpp_estimated": estimated_bits(model, picture) / pixels,
        "psnr_db": psnr_db(picture, decoded),
        "ms_ssim": ms_ssim(picture, decoded),
        "encode_s": middle - start,
        "decode_s": end - middle,
    }


@torch.inference_mode()
def bit_maps(model: Entroformer, picture: Image.Image) -> dict[str, np.ndarray]:
    """Where the bits go: {"y": [H/16, W/16], "z": [H/64, W/64]} in bits, summed over channels; padding included."""
    y = model.eval().scaled(model.g_a(codec.to_tensor(picture, model)))
    return {name: bits[0].cpu().numpy() for name, bits in model.estimated_bits(y).items()}


def estimated_bits(model: Entroformer, picture: Image.Image) -> float:
    """Size that the likelihoods promise, in bits, without container and coder."""
    return float(sum(bits.sum() for bits in bit_maps(model, picture).values()))


def psnr_db(a: Image.Image, b: Image.Image) -> float:
    """PSNR of two 8-bit pictures in dB, over all pixels and channels; infinite when equal."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mse = np.mean(difference**2)
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ms_ssim(a: Image.Image, b: Image.Image) -> float | None:
    """MS-SSIM of two 8-bit RGB pictures (Wang 2003, five scales); None below 161 pixels, where it is not defined."""
    from pytorch_msssim import ms_ssim as measure

    if min(a.size) <= 160:
        return None
    x, y = (torch.from_numpy(np.array(p)).permute(2, 0, 1)[None].float() for p in (a, b))
    return float(measure(x, y, data_range=255))


def jpeg_of_size(picture: Image.Image, size: int, optimize: bool = True) -> tuple[bytes, int]:
    """The smallest JPEG (Pillow, 4:2:0) of at least `size` bytes, or the largest there is, and its quality.

    JPEG gets at least as many bytes as what it is compared with. Huffman tables made for the picture (`optimize`) save
    a fifth at low rates; the published JPEG curves use the standard tables.
    """

    def coded(quality: int) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=quality, optimize=optimize)
        return buffer.getvalue()

    low, high = 1, 95  # size grows with quality
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(coded(middle)) >= size else (middle + 1, high)
    return coded(low), low


def jpeg_psnr_db(path: Path, size: int, optimize: bool = True) -> float:
    """PSNR of the JPEG of a picture that has at least `size` bytes, in dB; see `jpeg_of_size`."""
    picture, _ = codec.to_rgb(codec.open_picture(path))
    data, _ = jpeg_of_size(picture, size, optimize)
    with Image.open(io.BytesIO(data)) as jpeg:
        return psnr_db(picture, jpeg.convert("RGB"))
