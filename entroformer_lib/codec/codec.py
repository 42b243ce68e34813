"""Pictures to `.ef` bytes and back.

encode: picture -> RGB -> pad to the model's blocks -> latents -> strings -> container
decode: the same backwards; damage is a BitstreamError, never a wrong picture
"""

import bisect
import math
import zlib
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from entroformer_lib.codec.container import LARGEST_SIDE, LEVEL_STEPS, MAX_PIXELS, Container
from entroformer_lib.codec.pictures import open_picture, to_picture, to_rgb, to_tensor, unpad
from entroformer_lib.codec.search import searched
from entroformer_lib.entroformer import Entroformer, coding, searching
from entroformer_lib.errors import BitstreamError, ConfigError, DataError, RateError, WeightsError
from entroformer_lib.exact import hyper_latents
from entroformer_lib.memory import free_memory
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.rangecoder import MORE_BYTES, Y_BYTES, Z_BYTES
from entroformer_lib.weights.zoo import REPLACED, load_model, weights_digest

CONTAINER_BYTES = 45  # about what surrounds the coded strings
# Decoding takes 244 and 384 bytes of memory a pixel with the parallel study and base models, of 96 and 192 channels
# inside g_s (data/results/latency_growth.json), and 212 with tiny, of 64. So many a pixel, and a pixel and channel:
BYTES_PER_PIXEL, BYTES_PER_CHANNEL = 130, 1.3
SEARCH_BYTES = 2500  # a pixel, with blocks-parallel; 1,840 with the base models


@torch.inference_mode(False)  # a search needs gradients
@torch.no_grad()
def encode(model: Entroformer, image, bpp: float | None = None, ks: Sequence[int] = (), effort: int = 0) -> bytes:
    """A picture as the bytes of an `.ef` file.

    Args:
        model: from `load_model` (its name goes into the file), or any model (then `decode` must be given it). One of
            variable rate codes at its `level`. It is left as it was.
            Its `search_window` goes into the file, and its `context_k` where that is not its config's.
        image: what `open_picture` takes. See `to_rgb` for what happens to grey, palettes, 16 bits and transparency.
        bpp: the most bits per pixel that the whole file may have; takes a model of variable rate.
        ks: values of k, the number of keys that the context model's attention keeps (0 for all). The one with the
            fewest estimated bits is taken for this picture. By default the model's own.
        effort: rounds of search for better latents than the nearest integers (codec/search.py).

    Raises:
        DataError: the picture cannot be read, or is larger than 65,535 pixels on a side or than the memory allows.
        RateError: the wanted size cannot be had.
        WeightsError: weights that give no finite numbers.
        ConfigError: a k that cannot be, or a model that takes none; effort with a model that was not trained for a mean
            squared error.
    """
    check_bpp(bpp)
    picture, grey = to_rgb(open_picture(image))
    width, height = picture.size
    if max(width, height) > LARGEST_SIDE:
        raise DataError(f"The picture has {width} x {height} pixels; .ef files hold up to {LARGEST_SIDE} on a side.")
    _check_memory(width, height, SEARCH_BYTES if effort else 24)  # pixels in float32, and a copy
    with coding(model) as model:
        x = to_tensor(picture, model)
        if bpp is None:
            return _encode_at(model, x, picture.size, grey, level_of_file(model), ks, effort)
        most = math.floor(bpp * width * height / 8)
        best = level_within(model, x, most)
        # a little less where the estimate was too small
        for step in sorted({max(best - less, 0) for less in (0, 2, 8, 32, best)}, reverse=True):
            data = _encode_at(model, x, picture.size, grey, step / LEVEL_STEPS, ks, effort)
            if len(data) <= most:
                return data
    least = 8 * len(data) / (width * height)
    raise RateError(f"This picture takes at least {least:.3f} bits per pixel with this model; {bpp:g} were allowed.")


def check_bpp(bpp: float | None) -> None:
    """Raises RateError for bits per pixel that no file can have."""
    if bpp is not None and not 0 < bpp <= 1e6:
        raise RateError(f"The bits per pixel must be a number above 0 and up to a million, and are {bpp:g}.")


def bytes_per_pixel(c: EntroformerConfig) -> float:
    """About what decoding takes of memory; a GroupedMixer's context cache comes to the rest."""
    cache = 4 * 2 * c.dim * c.context_layers * c.groups[0] / 256 if c.context == "grouped" else 0  # keys and values
    return BYTES_PER_PIXEL + BYTES_PER_CHANNEL * c.N + cache


def _check_memory(width: int, height: int, per_pixel: float) -> None:
    """Raises DataError for a picture that does not fit into the memory left, at so many bytes a pixel."""
    needed, left = per_pixel * width * height, free_memory()
    if needed > left:
        raise DataError(
            f"A picture of {width} x {height} pixels takes more than {needed / 1e9:.0f} GB of memory, "
            f"and {left / 1e9:.0f} GB are free."
        )


def level_of_file(model: Entroformer) -> float | None:
    """The level that `encode` codes at: the model's, as a file can say it; None in a model of one rate.

    Raises:
        RateError: the model has no such level.
    """
    if model.gain is None:
        return None
    step, last = model.level * LEVEL_STEPS, len(model.config.lmbdas) - 1
    if not -0.5 <= step <= last * LEVEL_STEPS + 0.5:
        raise RateError(f"The levels of this model go from 0 to {last}, and its level is {model.level:g}.")
    return round(step) / LEVEL_STEPS


@torch.no_grad()
def level_within(model: Entroformer, x: Tensor, size: int) -> int:
    """Rate search: the highest level, in 1 / LEVEL_STEPS, whose file is estimated to have at most `size` bytes.

    A bisection over the estimated rates, which needs no coding; 0 where even the lowest level is too large.

    Raises:
        RateError: the model has a single rate.
    """
    if model.gain is None:
        raise RateError("A wanted size takes a model of variable rate, and this one has a single rate.")
    y = model.analysis(x)

    def estimated_bytes(step: int) -> float:
        level = step / LEVEL_STEPS
        bits = model.estimated_bits(model.scaled(y, level), level)
        return sum(float(b.sum()) for b in bits.values()) / 8 + CONTAINER_BYTES

    steps = range((len(model.config.lmbdas) - 1) * LEVEL_STEPS + 1)
    return max(bisect.bisect_right(steps, size, key=estimated_bytes) - 1, 0)


def _encode_at(
    model: Entroformer,
    x: Tensor,
    size: tuple[int, int],
    grey: bool,
    level: float | None,
    ks: Sequence[int],
    effort: int,
) -> bytes:
    y_hat, z = model.latents(x, level)
    best = model.best_k(y_hat, z, ks, level) if ks else model.context_k or 0
    with searching(model, model.search_window, best if model.takes_k else None):
        if effort:
            y_hat = searched(model, x, size, y_hat, z, effort, level)
        coded = model.compress_latents(y_hat, z, level)
    y_string, z_string, z_hat = coded["strings"][0][0], b"", None
    if z is not None:
        z_string = coded["strings"][1][0]
        z_hat = hyper_latents.decode(model.z_prior, [z_string], coded["shape"])
    checksums = weights_digest(model), latents_checksum(y_hat, z_hat)
    k = best if model.takes_k and best != (model.config.top_k or 0) else None
    return Container(*size, grey, model.name, *checksums, z_string, y_string, level, model.search_window, k).pack()


@torch.no_grad()
def decode(
    data: bytes, model: Entroformer | None = None, device: str = "auto", max_pixels: int | None = MAX_PIXELS
) -> Image.Image:
    """The picture of an `.ef` file: mode RGB, or L where a grey picture went in.

    Args:
        model: needed only when the file names no model, or one that is not here. It is left as it was.
        device: where to load the model that the file names.
        max_pixels: files of larger pictures are refused before anything is made for them; None has no limit.

    Raises:
        DataError: a picture that is larger than `max_pixels` or than the memory allows.
        WeightsError: weights that give no finite numbers.
        BitstreamError: damaged data, another version, another model or other weights than those it was written with,
            or a decoder that computed other latents than the encoder did.
    """
    container = Container.unpack(data)
    container.check_pixels(max_pixels)
    with coding(model_named(container.model, device) if model is None else model) as model:
        return _decode_with(model, container)


def _check_lengths(container: Container, model: Entroformer) -> None:
    """Raises BitstreamError for strings that no picture of this size makes so long."""
    (h, w), z_shape = latent_shapes(container.width, container.height, model)
    longest_y = Y_BYTES * model.config.M * h * w + MORE_BYTES
    longest_z = 0 if z_shape is None else Z_BYTES * model.config.Z * z_shape[0] * z_shape[1] + MORE_BYTES
    if len(container.y_string) > longest_y or len(container.z_string) > longest_z:
        raise BitstreamError("The file has more bytes than a picture of its size can take.")


def _decode_with(model: Entroformer, container: Container) -> Image.Image:
    if weights_digest(model)[:4] != container.weights:
        raise BitstreamError(
            f"The file was written with other weights of the model '{container.model}' than those at hand."
            + (f" Revision {earlier} has them." if (earlier := REPLACED.get(container.weights.hex())) else "")
        )
    rates = len(model.config.lmbdas)
    if (container.level is None) == bool(rates) or (rates and container.level > rates - 1):
        raise BitstreamError("The file has a rate that this model does not know.")
    if container.window is not None and model.config.context == "grouped":
        raise BitstreamError("The file has a search window, and this model takes none.")
    if container.k is not None and not model.takes_k:
        raise BitstreamError("The file has a number k of keys, and this model takes none.")
    _check_lengths(container, model)
    width, height, factor = container.width, container.height, model.downsampling_factor
    padded = (width + -width % factor) * (height + -height % factor) / (width * height)
    _check_memory(width, height, padded * bytes_per_pixel(model.config))
    y_shape, z_shape = latent_shapes(container.width, container.height, model)
    strings = [[container.y_string], [container.z_string]]  # the second is empty and not read without hyperprior
    try:
        with searching(model, container.window, container.k):
            y_hat, z_hat = model.decompress_latents(strings, z_shape or y_shape, container.level)
    except (ValueError, IndexError, WeightsError) as error:
        raise BitstreamError(f"The coded latents cannot be decoded: {str(error).removesuffix('.')}.") from None
    if latents_checksum(y_hat, z_hat) != container.latents_crc:
        raise BitstreamError(
            "This machine computed other latents than the one that wrote the file, so the picture would be wrong."
        )
    picture = to_picture(unpad(model.reconstruct(y_hat, container.level), container.height, container.width))
    return picture.convert("L") if container.grey else picture


@torch.no_grad()
def reconstruction(model: Entroformer, picture: Image.Image) -> Image.Image:
    """What a model makes of an RGB picture, without coding it to bytes."""
    with coding(model) as model:
        y_hat, _ = model.latents(to_tensor(picture, model))
        return to_picture(unpad(model.reconstruct(y_hat), picture.height, picture.width))


def model_named(name: str, device: str = "auto") -> Entroformer:
    """The model that a file names.

    Raises:
        BitstreamError: it names none, or one that is not here.
    """
    if not name:
        raise BitstreamError("The file does not name its model, so the model must be given, with --model.")
    if name.endswith(".safetensors"):  # which `load_model` would take for a path
        raise BitstreamError("The file names a path where its model's name should be; give its weights, with --model.")
    try:
        return load_model(name, device)
    except (ConfigError, WeightsError, RateError) as error:
        raise BitstreamError(
            f"The file needs a model that is not here: give its weights, with --model FILE.safetensors. {error}"
        ) from None


def latents_checksum(y_hat: Tensor, z_hat: Tensor | None) -> int:
    """CRC-32 over the integers of y and the values of z."""
    crc = zlib.crc32(y_hat.cpu().numpy().astype("<i4").tobytes())
    return crc if z_hat is None else zlib.crc32(z_hat.cpu().numpy().astype("<f4").tobytes(), crc)


def latent_shapes(width: int, height: int, model: Entroformer) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """(h, w) of y and of z for a picture of that size; z's is None without hyperprior."""
    factor = model.downsampling_factor
    high, wide = -(-height // factor), -(-width // factor)
    scale = factor // 16
    return (scale * high, scale * wide), (high, wide) if model.h_a is not None else None
