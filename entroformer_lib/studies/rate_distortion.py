"""Rate and distortion on a set of pictures, always through real bytes."""

import collections
import functools
import hashlib
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from entroformer_lib.codec import codec
from entroformer_lib.codec.container import LARGEST_SIDE
from entroformer_lib.codec.quality import ms_ssim, psnr_db
from entroformer_lib.datasets import files_under, is_picture
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import DataError
from entroformer_lib.files import file_digest, in_text
from entroformer_lib.studies.commands import at_least
from entroformer_lib.training.data import find_sources

Pictures = Sequence[tuple[str, Image.Image]]  # name and picture (RGB)
Tell = Callable[[str], None]


def pictures_to_test(folder, limit: int | None = None, tell: Tell = warnings.warn) -> list[Path]:
    """The picture files of a folder and its subfolders that can be read, sorted.

    Args:
        folder: or one picture, or a .txt list of pictures.
        limit: take only the first so many.
        tell: called with a sentence for each file that is left out.

    Raises:
        DataError: no such folder, or no picture in it that can be read.
        StudyError: a limit below 1.
    """
    return [path for path, _ in _read(folder, limit, tell)]


def pictures_of(folder, limit: int | None = None, side: int | None = None) -> Pictures:
    """What `pictures_to_test` finds, with names: the pictures whole or, with a `side`, their `middle`."""
    paths, pictures = zip(*_read(folder, limit, warnings.warn), strict=True)
    pictures = pictures if side is None else [middle(picture, side) for picture in pictures]
    return list(zip(names_of(paths), pictures, strict=True))


def _read(folder, limit: int | None, tell: Tell) -> Iterator[tuple[Path, Image.Image]]:
    """Files and pictures (RGB) of `pictures_to_test`, one after the other."""
    at_least(1, limit=limit)
    if not Path(folder).exists():
        raise DataError(f"There is no folder {folder}.")
    files = filter(is_picture, files_under(folder)) if Path(folder).is_dir() else sorted(find_sources(folder)[0])
    first = None
    for first in itertools.islice(_readable(files, tell), limit):
        yield first
    if first is None:
        raise DataError(f"There is no picture in {folder} that can be read.")


def _readable(files: Iterator[Path], tell: Tell) -> Iterator[tuple[Path, Image.Image]]:
    for path in tqdm(files, "reading", unit="picture", delay=1, leave=False, disable=None):
        try:
            opened = codec.open_picture(path)
            picture, _ = codec.to_rgb(opened)
        except DataError as error:
            tell(f"{path} is left out: {error}")
            continue
        if max(picture.size) > LARGEST_SIDE:
            tell(f"{path} is left out: a side is longer than {LARGEST_SIDE} pixels.")
            continue
        if opened.info.get("animated"):
            tell(f"Of {path} only the first frame is taken.")
        yield path, picture


def names_of(paths: Sequence[Path]) -> list[str]:
    """What pictures are called in a result: as their file without its ending, and where two are alike in that, by
    their place under the folder that all have in common."""
    stems = collections.Counter(path.stem for path in paths)
    places = [path.absolute() for path in paths]
    root = os.path.commonpath([place.parent for place in places])
    return [in_text(p.stem if stems[p.stem] == 1 else p.relative_to(root).as_posix()) for p in places]


def digest_of(paths: Sequence[Path]) -> str:
    """Of the names and the bytes of pictures: what an answer depends on that has the names in it."""
    lines = [f"{file_digest(path)} {name}" for path, name in zip(paths, names_of(paths), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def middle(picture: Image.Image, side: int) -> Image.Image:
    """The square in the middle, or as much of it as there is.  side: pixels"""
    left, top = (max(0, (length - side) // 2) for length in picture.size)
    return picture.crop((left, top, min(picture.width, left + side), min(picture.height, top + side)))


def evaluate_picture(model: Entroformer, path: Path, effort: int = 0) -> dict:
    """One picture through the codec, with the effort of `encode`.

    Returns:
        The columns of `measured`, and bpp_estimated: from the likelihoods of rounded latents alone; None with effort.
    """
    picture, _ = codec.to_rgb(codec.open_picture(path))
    decode = functools.partial(codec.decode, model=model, max_pixels=None)
    row = measured(picture, lambda: codec.encode(model, path, effort=effort), decode)
    estimated = None if effort else estimated_bits(model, picture) / (picture.width * picture.height)
    return {**row, "bpp_estimated": estimated}


def measured(picture: Image.Image, encode: Callable[[], bytes], decode: Callable[[bytes], Image.Image]) -> dict:
    """What a codec makes of a picture. The row has no name of the picture; the run adds it.

    Returns:
        width, height (pixels), bytes (the whole file), bpp (of the whole file), psnr_db and ms_ssim (8-bit RGB;
        MS-SSIM is None below 161 pixels), encode_s, decode_s.
    """
    start = time.perf_counter()
    data = encode()
    middle = time.perf_counter()
    decoded = decode(data).convert("RGB")
    end = time.perf_counter()
    return {
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
    return model.scaled(model.analysis(codec.to_tensor(picture, model)))


def bit_maps(model: Entroformer, picture: Image.Image) -> dict[str, np.ndarray]:
    """Where the bits go: {"y": [H/16, W/16], "z": [H/64, W/64]} in bits, summed over channels; padding included."""
    bits_of = model.estimated_bits(latents_of(model, picture))
    return {name: bits[0].cpu().numpy() for name, bits in bits_of.items()}


def estimated_bits(model: Entroformer, picture: Image.Image) -> float:
    """Size that the likelihoods promise, in bits, without container and coder."""
    return float(sum(bits.sum() for bits in bit_maps(model, picture).values()))
