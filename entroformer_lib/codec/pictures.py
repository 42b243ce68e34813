"""The one reader of pictures, for the codec and for training alike; and pictures as tensors and back."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import DataError


def open_picture(image) -> Image.Image:
    """A PIL image, upright whatever the camera's orientation tag says.

    Args:
        image: a path, an open file or the bytes of one, a PIL image, an array [H, W], [H, W, 3] or [H, W, 4] of uint8
            or uint16, or a tensor [3, H, W] in [0, 1]. Of an animated picture the first frame is taken.

    Raises:
        DataError: missing, not a picture, cut short or too large; an array or a tensor of another form.
    """
    if isinstance(image, str | os.PathLike):
        image = _from_file(Path(image), f"The picture {image}")
    elif isinstance(image, bytes):
        image = _from_file(io.BytesIO(image), "The picture")
    elif hasattr(image, "read"):
        image = _from_file(image, "The picture")
    elif isinstance(image, Tensor):
        image = _from_tensor(image)
    elif isinstance(image, np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        raise DataError(f"A picture cannot be made of a {type(image).__name__}.")
    elif getattr(image, "tile", None):  # opened, and its pixels are not read yet
        image = _loaded(lambda: image, "The picture")
    if 0 in image.size:
        raise DataError("The picture has no pixels.")
    return _upright(image)


# The orientation tag: from what the camera stored to upright
UPRIGHT = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip
EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow looks for it


def _upright(image: Image.Image) -> Image.Image:
    """Not by Pillow's exif_transpose, which also writes the EXIF data anew and fails where they are damaged."""
    try:
        how = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever damaged EXIF data make of themselves, the pixels are whole
        how = None
    if how is None:
        return image
    turned = image.transpose(how)
    for name in EXIF:  # Pillow keeps them, and they would turn it once more
        turned.info.pop(name, None)
    return turned


def _from_file(file: Path | BinaryIO, name: str) -> Image.Image:
    """name: what an error calls the picture."""
    if isinstance(file, Path) and file.is_dir():
        raise DataError(f"{file} is a folder, not a picture.")
    return _loaded(lambda: Image.open(file), name)


def _loaded(opened: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        image = opened()
        stored = str(image.tile[0][3]) if image.tile else ""  # with the bits of a value in the file, such as "L;4"
        with contextlib.suppress(Exception):  # of a damaged second frame
            image.info["animated"] = getattr(image, "is_animated", False)
        image.load()
        image = _as_stored(image, stored)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no picture {error.filename}.") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise DataError(f"{name} is too large: up to {most} million pixels can be read.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a picture in a format that can be read.") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        raise DataError(f"{name} cannot be read: {error or type(error).__name__}.") from None
    return image


def _as_stored(image: Image.Image, stored: str) -> Image.Image:
    """The picture where Pillow reads other values than the file has.

    A transparent value of a PNG stands in the bits of the file; Pillow compares it with pixels of 8 bits. It makes
    colours of 16-bit grey with alpha. Of TIFF's grey it takes 12 bits for 16, and does not turn over 16 bits where 0
    is white.

    Raises:
        DataError: values that cannot be had back.
    """
    value = image.info.get("transparency")
    if image.format == "PNG" and isinstance(value, int) and stored in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[stored]
    elif image.format == "PNG" and isinstance(value, tuple) and stored == "RGB;16B":
        raise DataError("A picture of 16 bits with a transparent colour cannot be read; give it an alpha channel.")
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        bits, zero = image.tag_v2.get(258, (16,)), image.tag_v2.get(262)  # BitsPerSample, PhotometricInterpretation
        if bits != (16,) or zero == 0:
            raise DataError("A TIFF of grey values in 12 bits, or where 0 is white, cannot be read; convert it first.")
    image.info["reduced"] = re.search(";16[BLN]", stored) is not None and not image.mode.startswith("I")
    return image.convert("LA") if stored == "LA;16B" else image


def _from_tensor(x: Tensor) -> Image.Image:
    if x.dim() != 3 or x.size(0) != 3 or not x.is_floating_point():
        raise DataError(f"A tensor of {x.dtype} and shape {list(x.shape)} is no picture: [3, H, W] in [0, 1].")
    if x.numel() and not (x.isfinite().all() and x.amin() >= 0 and x.amax() <= 1):
        raise DataError("A picture as a tensor has values from 0 to 1, and this one has others.")
    return to_picture(x[None].detach())


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

    Palettes become their colours; 16-bit values are scaled to 8 bits (grey divided by 257, of colours Pillow keeps the
    higher 8 bits); transparent pixels are laid over white, and the transparency is not stored; grey is coded as three
    equal channels and decoded to grey again; colour profiles are ignored.

    Raises:
        DataError: floating-point pixels, or values beyond 16 bits.
    """
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    if image.mode.startswith("I"):
        values = np.array(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("The picture has values beyond 16 bits; convert it to 8 or 16 bits first.")
        values[values == image.info.get("transparency")] = 65535
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("The picture has floating-point pixels; convert it to 8 or 16 bits first.")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB"), grey


def losses(image: Image.Image) -> list[str]:
    """What `to_rgb` does not keep of a picture from `open_picture`, a sentence each."""
    said = {
        "The transparency is not kept: transparent pixels are laid over white.": "transparency" in image.info
        or image.has_transparency_data,
        "16 bits are scaled to 8.": image.mode.startswith("I") or image.info.get("reduced", False),
        "Only the first frame is kept.": image.info.get("animated", False),
    }
    return [sentence for sentence, true in said.items() if true]


def within(picture: Image.Image, side: int) -> Image.Image:
    """A picture whose longer side has at most so many pixels: as it is, or scaled down."""
    longest = max(picture.size)
    if longest <= side:
        return picture
    width, height = (max(1, round(length * side / longest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


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


FINE = {"quality": 95, "subsampling": 0}
WRITTEN = {"WEBP": {"lossless": True}, "JPEG": FINE, "MPO": FINE, "PDF": FINE, "AVIF": {"quality": 95}}
LOSSY = ("JPEG", "MPO", "PDF", "AVIF", "GIF")


def lost_in(ending: str) -> list[str]:
    """A sentence where a format does not keep every pixel as it is."""
    form = Image.registered_extensions().get(ending.lower())
    return [f"{form} changes the decoded picture a little; PNG keeps it as it is."] if form in LOSSY else []


def file_of(picture: Image.Image | str, ending: str) -> bytes:
    """A picture in the format of a file's ending; or, of just a mode, a single pixel, to see whether that can be done.

    Raises:
        DataError: no format of pictures, or one that does not hold such a picture.
    """
    if isinstance(picture, str):
        picture = Image.new(picture, (1, 1))
    file, form = io.BytesIO(), Image.registered_extensions().get(ending.lower())
    if form not in Image.SAVE:
        raise DataError(f"The ending '{ending}' is not that of a picture format that can be written.")
    try:
        picture.save(file, form, **WRITTEN.get(form, {}))
    except Exception as error:  # Pillow's writers raise many kinds
        raise DataError(f"The picture cannot be written as {form}: {error or type(error).__name__}.") from None
    if form in ("ICO", "ICNS") and Image.open(file).size != picture.size:  # they are made smaller
        raise DataError(f"A picture of {picture.width} x {picture.height} pixels cannot be written as {form}.")
    return file.getvalue()


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
