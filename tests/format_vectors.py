"""Test vectors of the format (docs/format.md): models whose weights an integer formula makes, so none are stored.

    python tests/format_vectors.py

writes tests/vectors/ anew. That is done once for each version of the format: later versions of this library decode the
files, and `test_format.py` compares.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from entroformer_lib.codec import codec
from entroformer_lib.codec.container import Container
from entroformer_lib.datasets import sample_picture
from entroformer_lib.entroformer import Entroformer, searching
from entroformer_lib.models.config import EntroformerConfig, named_config

FOLDER = Path(__file__).parent / "vectors"
SMALL = dict(N=8, M=12, Z=6, dim=16, heads=2, top_k=4, hyper_top_k=(4, 4, 4), context_layers=2)
RATES = dict(lmbdas=(0.01, 0.04, 0.16))
AWARE = dict(**RATES, rate_aware=True)
BLOCKS = dict(transforms="blocks", stages=((4, 8, 1), (8, 10, 1)))
GROUPS = dict(groups=(2, 2, 2), window=2)
STEP = 4  # every fourth pixel of every fourth row is stored

# name -> variant, preset, fields of the config, and the level where there are several rates
VECTORS: dict[str, tuple[str, str, dict, float | None]] = {
    "serial": ("serial", "paper", {}, None),
    "parallel": ("parallel", "paper", {}, None),
    "cnn": ("cnn", "paper", {}, None),
    "hyperprior": ("hyperprior", "paper", {}, None),
    "minnen": ("minnen", "paper", {}, None),
    "hyperprior-cnn": ("hyperprior-cnn", "paper", {}, None),
    "context": ("context", "paper", {}, None),
    "context-parallel": ("context", "paper", dict(context="parallel"), None),
    "context-cnn": ("context-cnn", "paper", {}, None),
    "official-serial": ("serial", "official", {}, None),
    "official-parallel": ("parallel", "official", {}, None),
    "grouped-channels-window": ("groupedmixer", "paper", GROUPS, None),
    "grouped-raster-top_k": ("groupedmixer", "paper", dict(GROUPS, group_order="raster", inner="top_k"), None),
    "grouped-sites-none": ("groupedmixer", "paper", dict(GROUPS, group_order="sites", inner="none"), None),
    "grouped-no-cross": ("groupedmixer", "paper", dict(GROUPS, cross=False), None),
    "rates": ("parallel", "paper", RATES, 1.25),
    "aware-parallel": ("parallel", "paper", AWARE, 0.5),
    "aware-serial": ("serial", "paper", AWARE, 2.0),
    "aware-context": ("context", "paper", AWARE, 1.75),
    "aware-grouped": ("groupedmixer", "paper", dict(GROUPS, **AWARE), 0.0),
    "blocks": ("parallel", "paper", BLOCKS, None),
    "linear-path": ("parallel", "paper", dict(linear_path="dct"), None),
    "blocks-linear-path": ("parallel", "paper", dict(BLOCKS, linear_path="dct", hyper_input="rounded"), None),
    "position-none": ("parallel", "paper", dict(position="none"), None),
    "position-absolute": ("parallel", "paper", dict(position="absolute"), None),
    "position-1d": ("serial", "paper", dict(position="relative_1d"), None),
    "position-2d": ("serial", "paper", dict(position="relative_2d"), None),
    "dense": ("serial", "paper", dict(top_k=None, hyper_top_k=(None, None, None)), None),
    "window-parallel": ("parallel", "paper", dict(search_window=1), None),
    "window-serial": ("serial", "paper", dict(search_window=1), None),
    "k-parallel": ("parallel", "paper", {}, None),
    "k-serial": ("serial", "paper", {}, None),
    "grey": ("parallel", "paper", {}, None),
    "one-pixel": ("parallel", "paper", {}, None),
}


def numbers(count: int, name: str) -> np.ndarray:
    """`count` numbers in [-1, 1) for the parameter of a name, float64: number i is a hash, in integers of 32 bits, of i
    and the name's CRC-32."""
    h = (np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))) * np.uint64(2654435761) % 2**32
    h = (h ^ (h >> np.uint64(15))) * np.uint64(2246822519) % 2**32
    h = h ^ (h >> np.uint64(13))
    return h / 2**31 - 1


# Factors of the matrices of a part. The last layer of g_a, the one with M outputs, has 8.
FACTORS = {"h_s": 2, "context_model": 2, "entropy_parameters": 2, "g_s": 0.375}


def value(name: str, shape: tuple[int, ...], M: int) -> np.ndarray:
    """The parameter of a name and shape, float64."""
    u = numbers(math.prod(shape), name).reshape(shape)
    last = name.rpartition(".")[2]
    if name.startswith("z_prior"):
        return u + (np.array([-10, 0, 10]) if last == "quantiles" else 0)
    if last in ("log_gain", "log_inverse"):
        level = np.arange(shape[0])[:, None] - (shape[0] - 1) / 2
        return u / 8 + (level if last == "log_gain" else -level) / 2
    if last == "beta" or (last == "weight" and len(shape) == 1):  # of GDN, of norms
        return 1 + u / 4
    if last == "gamma":
        return abs(u) / 4
    if last == "weight":
        inputs = shape[0] * shape[2] * shape[3] / 4 if _grows(name, shape) else math.prod(shape[1:])
        factor = 8 if name.startswith("g_a") and shape[0] == M else FACTORS.get(name.partition(".")[0], 1)
        return u * (factor * math.sqrt(3 / inputs))
    return u / 4


def _grows(name: str, shape: tuple[int, ...]) -> bool:
    """A transposed convolution: its inputs come first."""
    return name.startswith("g_s.") and shape[-1:] == (5,)


def tables(Z: int) -> dict[str, np.ndarray]:
    """Tables of a factorized p(z): 2c + 3 symbols around 0 in channel c, rising and falling in even steps; 65536 in
    all, of which the last symbol, which stands for all others, has what is left."""
    widest = 2 * Z + 1
    cdf, length = np.zeros((Z, widest + 2), np.int32), np.zeros(Z, np.int32)
    for c in range(Z):
        count = 2 * c + 3
        hill = np.minimum(np.arange(1, count + 1), np.arange(count, 0, -1))
        cdf[c, 1 : count + 1] = np.cumsum(60000 * hill // hill.sum())
        cdf[c, count + 1] = 65536
        length[c] = count + 2
    return {"_quantized_cdf": cdf, "_cdf_length": length, "_offset": -np.arange(1, Z + 1, dtype=np.int32)}


def formula_model(config: EntroformerConfig, name: str = "") -> Entroformer:
    """The model of a config whose weights the formula makes."""
    blank = Entroformer(config)
    state = blank.state_dict()
    for key, _ in blank.named_parameters():
        state[key] = torch.from_numpy(value(key, tuple(state[key].shape), config.M).astype(np.float32))
    if "z_prior._offset" in state:
        state |= {f"z_prior.{key}": torch.from_numpy(table) for key, table in tables(config.Z).items()}
    return Entroformer.from_state_dict(state, name)


def picture_of(name: str) -> Image.Image:
    """What was coded: a piece of a photograph."""
    if name == "one-pixel":
        return Image.new("RGB", (1, 1), (200, 120, 40))
    picture = sample_picture("astronaut").crop((180, 60, 250, 100))  # 70 x 40
    return picture.convert("L") if name == "grey" else picture


def decoded(model: Entroformer, data: bytes) -> dict[str, str]:
    """What is stored of a file's latents and pixels: SHA-256 of y as int32, of z as float32; some pixels in
    hexadecimal digits."""
    container = Container.unpack(data)
    y_shape, z_shape = codec.latent_shapes(container.width, container.height, model)
    strings = [[container.y_string], [container.z_string]]
    with searching(model, container.window, container.k):
        y_hat, z_hat = model.decompress_latents(strings, z_shape or y_shape, container.level)
    y = y_hat.numpy().astype("<i4")
    assert len(np.unique(y)) > 5, "latents that are all alike would show nothing"
    pixels = np.asarray(codec.decode(data, model))[::STEP, ::STEP]
    return {
        "y_sha256": hashlib.sha256(y.tobytes()).hexdigest(),
        "z_sha256": "" if z_hat is None else hashlib.sha256(z_hat.numpy().astype("<f4").tobytes()).hexdigest(),
        "pixels": pixels.tobytes().hex(),
    }


def write() -> None:
    """Writes all vectors."""
    FOLDER.mkdir(exist_ok=True)
    kept = {}
    for name, (variant, preset, fields, level) in VECTORS.items():
        config = named_config(f"tiny-{variant}", preset, **{**SMALL, **fields})
        model = formula_model(config, name)
        model.level = level
        data = codec.encode(model, picture_of(name), ks=(2,) if name.startswith("k-") else ())
        (FOLDER / f"{name}.ef").write_bytes(data)
        kept[name] = {"config": json.loads(config.to_json()), **decoded(model, data)}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in kept.items())
    (FOLDER / "vectors.json").write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    write()
