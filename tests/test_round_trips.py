"""What goes in comes out: pictures, headers and latents that hypothesis thinks of."""

import functools
import json

import numpy as np
import pytest
import torch
from format_vectors import FOLDER, formula_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from entroformer_lib.codec import codec
from entroformer_lib.codec.container import LARGEST_NAME, LARGEST_SIDE, Container
from entroformer_lib.codec.pictures import to_rgb
from entroformer_lib.errors import BitstreamError, RateError
from entroformer_lib.exact import hyper_latents
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.rangecoder import MORE_BYTES, Y_BYTES, Z_BYTES, decode_gaussian, encode_gaussian

# The same examples in every run, and none kept on disk; the machine may be slow
quietly = functools.partial(settings, deadline=None, derandomize=True, database=None)
KEPT = json.loads((FOLDER / "vectors.json").read_text())
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16")
ONE_RATE = ("parallel", "hyperprior", "context-parallel", "official-parallel", "grouped-no-cross", "blocks", "minnen")


@functools.cache
def model_of(name: str):
    return formula_model(EntroformerConfig.from_json(json.dumps(KEPT[name]["config"])), name)


def picture(width: int, height: int, mode: str, seed: int, flat: bool) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    colour = Image.fromarray(pixels // 255 * 255 if flat else pixels)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return colour.convert(mode)


pictures = st.builds(
    picture,
    *(st.integers(1, 80) | st.sampled_from((1, 63, 64, 65)) for _ in "wh"),
    st.sampled_from(MODES),
    st.integers(0, 99),
    st.booleans(),
)


def check(model, data: bytes, original: Image.Image) -> None:
    """Size, kind and pixels are those of the model's reconstruction."""
    rgb, grey = to_rgb(original)
    expected = codec.reconstruction(model, rgb)
    found = codec.decode(data, model)
    assert found.size == original.size and found.mode == ("L" if grey else "RGB")
    assert np.array_equal(np.asarray(found), np.asarray(expected.convert("L") if grey else expected))


@quietly(max_examples=30)
@given(st.sampled_from(ONE_RATE), pictures)
def test_pictures_of_any_size_and_mode(name, original):
    model = model_of(name)
    check(model, codec.encode(model, original), original)


@quietly(max_examples=12)
@given(st.sampled_from(("rates", "aware-parallel", "aware-grouped")), st.integers(0, 512), pictures)
def test_any_rate(name, step, original):
    model = model_of(name)
    model.level = step / 256
    data = codec.encode(model, original)
    assert Container.unpack(data).level == step / 256
    check(model, data, original)


@quietly(max_examples=6)
@given(st.floats(0.5, 200), pictures)
def test_a_wanted_size_is_kept_or_refused(bpp, original):
    model = model_of("aware-parallel")
    try:
        data = codec.encode(model, original, bpp)
    except RateError:
        return
    assert 8 * len(data) <= bpp * original.width * original.height
    model.level = Container.unpack(data).level
    check(model, data, original)


containers = st.builds(
    Container,
    width=st.integers(1, LARGEST_SIDE),
    height=st.integers(1, LARGEST_SIDE),
    grey=st.booleans(),
    model=st.text(max_size=300).filter(lambda name: name.isprintable() and len(name.encode()) <= LARGEST_NAME),
    weights=st.binary(min_size=4, max_size=4),
    latents_crc=st.integers(0, 2**32 - 1),
    z_string=st.binary(max_size=300),
    y_string=st.binary(max_size=300),
    level=st.none() | st.integers(0, 2**16 - 1).map(lambda step: step / 256),
)


@quietly(max_examples=200)
@given(containers)
def test_any_header(container):
    assert Container.unpack(container.pack()) == container


@quietly(max_examples=200)
@given(containers, st.binary(max_size=40), st.integers(0, 60), st.integers(0, 60))
def test_any_bytes_with_the_right_checksum(container, piece, start, length):
    """Whatever is read is what would be written: no file has a second form."""
    import struct
    import zlib

    data = container.pack()[:-4]
    data = data[:4] + (data[4 : 4 + start] + piece + data[4 + start + length :])
    data += struct.pack("<I", zlib.crc32(data))
    try:
        found = Container.unpack(data)
    except BitstreamError:
        return
    assert found.pack() == data


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
latents = st.lists(st.tuples(st.integers(-32767, 32767), numbers, st.floats(1e-3, 1e5)), min_size=1, max_size=60)


@quietly(max_examples=100)
@given(latents)
def test_any_latents_of_y(rows):
    symbols, means, scales = (np.array(column) for column in zip(*rows, strict=True))
    string = encode_gaussian(symbols, means, scales)
    assert np.array_equal(decode_gaussian(string, means, scales), symbols)
    assert len(string) <= Y_BYTES * len(symbols) + MORE_BYTES  # what a decoder takes at most


@quietly(max_examples=100)
@given(st.lists(st.integers(-32767, 32767) | st.integers(-4, 4), min_size=1, max_size=12), st.booleans())
def test_any_latents_of_z(values, official):
    prior = model_of("official-parallel" if official else "parallel").z_prior
    z = prior.quantize_z(torch.tensor(values).float().repeat(6, 1)[None, :, None].clamp(-32766, 32766)).detach()
    (string,) = hyper_latents.encode(prior, z)
    assert torch.equal(hyper_latents.decode(prior, [string], z.shape[-2:]), z)
    assert len(string) <= Z_BYTES * z.numel() + MORE_BYTES


def test_the_models_are_lively():
    for name in ONE_RATE:
        y_hat, _ = model_of(name).latents(torch.rand(1, 3, 64, 64))
        assert y_hat.unique().numel() > 5
    with pytest.raises(RateError):
        codec.encode(model_of("parallel"), picture(8, 8, "RGB", 0, False), bpp=1.0)
