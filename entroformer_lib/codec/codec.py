"""Pictures to `.ef` bytes and back.

encode: picture -> RGB -> pad to the model's blocks -> latents -> strings -> container
decode: the same backwards; every way it can fail is a BitstreamError, never a wrong picture
"""

import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from entroformer_lib.codec.container import LARGEST_SIDE, LEVEL_STEPS, Container
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import BitstreamError, DataError, RateError, WeightsError
from entroformer_lib.weights.zoo import load_model, weights_digest

CONTAINER_BYTES = 45  # about what surrounds the coded strings


def encode(model: Entroformer, image, bpp: float | None = None) -> bytes:
    """A picture as the bytes of an `.ef` file.

    Args:
        model: from `load_model` (its name goes into the file), or any model (then `decode` must be given it). One of
            variable rate codes at its `level`.
        bpp: the most bits per pixel that the whole file may have; takes a model of variable rate, see `_encode_within`.
        image: a PIL image, a path, or an array [H, W], [H, W, 3] or [H, W, 4] of uint8 or uint16. See `to_rgb` for what
            happens to grey, palettes, 16 bits and transparency.

    Raises:
        DataError: the picture cannot be read, or is larger than 65,535 pixels on a side.
        RateError: the wanted size cannot be had.
    """
    picture, grey = to_rgb(open_picture(image))
    width, height = picture.size
    if max(width, height) > LARGEST_SIDE:
        raise DataError(f"The picture has {width} x {height} pixels; .ef files hold up to {LARGEST_SIDE} on a side.")
    model.eval()
    x = to_tensor(picture, model)
    if bpp is not None:
        return _encode_within(model, x, picture.size, grey, bpp)
    return _encode_at(model, x, picture.size, grey, level_of_file(model))


def level_of_file(model: Entroformer) -> float | None:
    """The level that `encode` codes at: the model's, as a file can say it; None in a model of one rate."""
    return None if model.gain is None else round(model.level * LEVEL_STEPS) / LEVEL_STEPS


def _encode_at(model: Entroformer, x: Tensor, size: tuple[int, int], grey: bool, level: float | None) -> bytes:
    y_hat, z = model.latents(x, level)
    coded = model.compress_latents(y_hat, z, level)
    strings = coded["strings"]
    if z is None:
        z_string, z_hat = b"", None
    else:
        z_string = strings[1][0]
        z_hat = model.z_prior.decompress([z_string], coded["shape"])
    return Container(
        *size,
        grey,
        getattr(model, "name", ""),
        weights_digest(model),
        latents_checksum(y_hat, z_hat),
        z_string,
        strings[0][0],
        level,
    ).pack()


@torch.inference_mode()
def _encode_within(model: Entroformer, x: Tensor, size: tuple[int, int], grey: bool, bpp: float) -> bytes:
    """Rate control: the highest level whose file has at most `bpp` bits per pixel.

    Bisection on the estimated rate, which needs no coding, finds the level; a file that is a little too large after
    all goes down in small steps.
    """
    if model.gain is None:
        raise RateError("A wanted size takes a model of variable rate, and this one has a single rate.")
    most = math.floor(bpp * size[0] * size[1] / 8)
    y = model.g_a(x)
    low, high = 0, (len(model.config.lmbdas) - 1) * LEVEL_STEPS
    while low < high:
        middle = (low + high + 1) // 2
        bits = model.estimated_bits(model.scaled(y, middle / LEVEL_STEPS), middle / LEVEL_STEPS)
        fits = sum(float(b.sum()) for b in bits.values()) / 8 + CONTAINER_BYTES <= most
        low, high = (middle, high) if fits else (low, middle - 1)
    for step in sorted({max(low - less, 0) for less in (0, 2, 8, 32, low)}, reverse=True):
        data = _encode_at(model, x, size, grey, step / LEVEL_STEPS)
        if len(data) <= most:
            return data
    smallest = 8 * len(data) / (size[0] * size[1])
    raise RateError(f"This picture takes at least {smallest:.3f} bits per pixel with this model; {bpp:g} were allowed.")


def decode(data: bytes, model: Entroformer | None = None) -> Image.Image:
    """The picture of an `.ef` file: mode RGB, or L where a grey picture went in.

    Args:
        model: needed only when the file names no model, or one that is not here.

    Raises:
        BitstreamError: damaged data, another version, another model or other weights than those it was written with,
            or a decoder that computed other latents than the encoder did.
    """
    container = Container.unpack(data)
    if model is None:
        model = _model_of(container)
    model.eval()
    if weights_digest(model)[:4] != container.weights:
        raise BitstreamError(
            f"The file was written with other weights of the model '{container.model}' than those at hand."
        )
    rates = len(model.config.lmbdas)
    if (container.level is None) == bool(rates) or (rates and container.level > rates - 1):
        raise BitstreamError("The file has a rate that this model does not know.")
    y_shape, z_shape = latent_shapes(container.width, container.height, model)
    try:
        if z_shape is None:
            y_hat, z_hat = model.decompress_latents([[container.y_string]], y_shape, container.level)
        else:
            strings = [[container.y_string], [container.z_string]]
            y_hat, z_hat = model.decompress_latents(strings, z_shape, container.level)
    except (ValueError, IndexError) as error:
        raise BitstreamError(f"The coded latents cannot be decoded: {error}.") from None
    if latents_checksum(y_hat, z_hat) != container.latents_crc:
        raise BitstreamError(
            "This machine computed other latents than the one that wrote the file, so the picture would be wrong."
        )
    x_hat = unpad(model.reconstruct(y_hat, container.level), container.height, container.width)
    picture = to_picture(x_hat)
    return picture.convert("L") if container.grey else picture


def _model_of(container: Container) -> Entroformer:
    if not container.model:
        raise BitstreamError("The file does not name its model, so the model must be given.")
    try:
        return load_model(container.model)
    except WeightsError as error:
        raise BitstreamError(f"The file needs a model that is not here. {error}") from None


def latents_checksum(y_hat: Tensor, z_hat: Tensor | None) -> int:
    """CRC-32 over the integers of y and the values of z."""
    crc = zlib.crc32(y_hat.cpu().numpy().astype("<i4").tobytes())
    return crc if z_hat is None else zlib.crc32(z_hat.cpu().numpy().astype("<f4").tobytes(), crc)


# ---- pictures ----


def open_picture(image) -> Image.Image:
    """A PIL image of what `encode` takes; upright, whatever the camera's orientation tag says.

    Raises:
        DataError: missing, not a picture, or cut short.
    """
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a picture.")
        try:
            image = Image.open(path)
            image.load()
        except FileNotFoundError:
            raise DataError(f"There is no picture {path}.") from None
        except UnidentifiedImageError:
            raise DataError(f"{path} is not a picture in a format that can be read.") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"The picture {path} cannot be read: {error}.") from None
    elif isinstance(image, np.ndarray):
        if image.dtype == np.uint16:
            image = np.round(image / 257).astype(np.uint8)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise DataError(
                f"An array of {image.dtype} and shape {image.shape} is no picture: uint8 or uint16, [H, W(, 3 or 4)]."
            )
        image = Image.fromarray(image)
    if 0 in image.size:
        raise DataError("The picture has no pixels.")
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """An 8-bit RGB picture, and whether it came from a grey one.

    Palettes become their colours; 16-bit values are scaled to 8 bits (divided by 257); transparent pixels are laid over
    white, and the transparency is not stored; grey is coded as three equal channels and decoded to grey again; colour
    profiles are ignored.
    """
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        values = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise DataError("The picture has floating-point pixels; convert it to 8 or 16 bits first.")
    grey = image.mode in ("1", "L", "LA", "La")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB"), grey


def to_tensor(picture: Image.Image, model: Entroformer) -> Tensor:
    """[1, 3, H, W] in [0, 1] on the model's device, padded for the model."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    return pad(pixels.to(next(model.g_s.parameters())) / 255, model.downsampling_factor)


def to_picture(x: Tensor) -> Image.Image:
    """[1, 3, H, W] in [0, 1] to a PIL image."""
    pixels = (x[0] * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _margins(size: int, factor: int) -> tuple[int, int]:
    missing = -size % factor
    return missing // 2, missing - missing // 2  # the smaller half on top and left, as released


def pad(x: Tensor, factor: int) -> Tensor:
    """Repeats the border of [B, 3, H, W] on all sides up to multiples of `factor`."""
    (top, bottom), (left, right) = _margins(x.size(2), factor), _margins(x.size(3), factor)
    return F.pad(x, (left, right, top, bottom), mode="replicate")


def unpad(x: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pad`."""
    top, left = (x.size(2) - height) // 2, (x.size(3) - width) // 2
    return x[:, :, top : top + height, left : left + width]


def latent_shapes(width: int, height: int, model: Entroformer) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """(h, w) of y and of z for a picture of that size; z's is None without hyperprior."""
    factor = model.downsampling_factor
    high, wide = -(-height // factor), -(-width // factor)
    scale = factor // 16
    return (scale * high, scale * wide), (high, wide) if model.h_a is not None else None
