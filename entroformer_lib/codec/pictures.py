"""The one reader of pictures, for the codec and for training alike; and pictures as tensors and back."""

import io
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import DataError


def open_picture(image) -> Image.Image:
    """A PIL image, upright whatever the camera's orientation tag says.

    Args:
        image: a path, the bytes of a file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4] of uint8 or uint16.

    Raises:
        DataError: missing, not a picture, or cut short.
    """
    if isinstance(image, str | os.PathLike):
        image = _from_file(Path(image), f"The picture {image}")
    elif isinstance(image, bytes):
        image = _from_file(io.BytesIO(image), "The picture")
    elif isinstance(image, np.ndarray):
        image = _from_array(image)
    if 0 in image.size:
        raise DataError("The picture has no pixels.")
    return ImageOps.exif_transpose(image)


def _from_file(file: Path | io.BytesIO, name: str) -> Image.Image:
    """name: what an error calls the picture."""
    if isinstance(file, Path) and file.is_dir():
        raise DataError(f"{file} is a folder, not a picture.")
    try:
        image = Image.open(file)
        image.load()
    except FileNotFoundError:
        raise DataError(f"There is no picture {file}.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a picture in a format that can be read.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read: {error}.") from None
    return image


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257).astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise DataError(
            f"An array of {pixels.dtype} and shape {pixels.shape} is no picture: uint8 or uint16, [H, W(, 3 or 4)]."
        )
    return Image.fromarray(pixels)


def to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """An 8-bit RGB picture, and whether it came from a grey one.

    Palettes become their colours; 16-bit values are scaled to 8 bits (divided by 257); transparent pixels are laid over
    white, and the transparency is not stored; grey is coded as three equal channels and decoded to grey again; colour
    profiles are ignored.

    Raises:
        DataError: floating-point pixels.
    """
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("The picture has floating-point pixels; convert it to 8 or 16 bits first.")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB"), grey


def pixels_of(image) -> np.ndarray:
    """uint8 [H, W, 3] of whatever `open_picture` takes.

    Raises:
        DataError: the picture cannot be read.
    """
    return np.array(to_rgb(open_picture(image))[0])


def to_tensor(picture: Image.Image, model: Entroformer) -> Tensor:
    """[1, 3, H, W] in [0, 1] of an RGB picture, on the model's device, padded for the model."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    return pad(pixels.to(next(model.g_s.parameters())) / 255, model.downsampling_factor)


def to_picture(x: Tensor) -> Image.Image:
    """[1, 3, H, W] in [0, 1] to a PIL image."""
    pixels = (x[0] * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def pad(x: Tensor, factor: int) -> Tensor:
    """Repeats the border of [B, 3, H, W] on all sides up to multiples of `factor`.

    As released, the smaller half of what is missing comes on top and left.
    """
    rows, columns = -x.size(2) % factor, -x.size(3) % factor
    top, left = rows // 2, columns // 2
    return F.pad(x, (left, columns - left, top, rows - top), mode="replicate")


def unpad(x: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pad`."""
    top, left = (x.size(2) - height) // 2, (x.size(3) - width) // 2
    return x[:, :, top : top + height, left : left + width]
