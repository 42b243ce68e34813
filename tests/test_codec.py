"""Pictures to real bytes and back."""

import io
import itertools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import VARIANTS, micro_model, pictures_folder
from PIL import Image

from entroformer_lib.codec import codec, pictures
from entroformer_lib.codec.container import Container
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import BitstreamError, DataError, WeightsError
from entroformer_lib.models.config import named_config
from entroformer_lib.studies.rate_distortion import estimated_bits
from entroformer_lib.weights.zoo import REPLACED, list_models, load_model, save_weights, weights_digest


def of_forward(model, picture) -> np.ndarray:
    """What forward says the decoded picture should be."""
    with torch.no_grad():
        x_hat = model(pictures.to_tensor(picture, model))["x_hat"].clamp(0, 1)
    return np.asarray(pictures.to_picture(pictures.unpad(x_hat, picture.height, picture.width)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (17, 3), (63, 65), (64, 64), (100, 130)])
def test_any_size_comes_back(variant, size, photo):
    model = micro_model(variant)
    picture = photo.resize(size)
    decoded = codec.decode(codec.encode(model, picture), model)
    assert decoded.size == size and decoded.mode == "RGB"
    for expected in (of_forward(model, picture), np.asarray(codec.reconstruction(model, picture))):
        assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_are_exact_on_flat_pictures(variant, flat_picture):
    model = micro_model(variant, top_k=4)
    x = pictures.to_tensor(flat_picture, model)
    y_hat, _ = model.latents(x)
    decoded, _ = model.decompress_latents(**{k: v for k, v in model.compress(x).items()})
    assert torch.equal(decoded, y_hat)
    assert y_hat.unique().numel() > 5


FOREIGN = """
import sys, torch
torch.set_num_threads(%d)
torch.backends.mkldnn.set_flags(False)
from entroformer_lib.codec import codec, pictures
from entroformer_lib.weights.zoo import load_model
model = load_model(sys.argv[1])
sys.stdout.buffer.write(codec.decode(open(sys.argv[2], "rb").read(), model).tobytes())
"""


def test_decodes_under_other_thread_counts_and_kernels(tmp_path, flat_picture):
    """The default file does not depend on how the machine sums: threads, vector width, oneDNN. All are others there."""
    model = micro_model("parallel", top_k=4)
    save_weights(model, tmp_path / "m.safetensors", {})
    model = load_model(tmp_path / "m.safetensors", "cpu")
    (tmp_path / "flat.ef").write_bytes(codec.encode(model, flat_picture))
    here = np.asarray(codec.decode((tmp_path / "flat.ef").read_bytes(), model)).astype(int)
    threads = 1 if torch.get_num_threads() > 1 else 2
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN % threads, tmp_path / "m.safetensors", tmp_path / "flat.ef"],
        capture_output=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
    )
    assert done.returncode == 0, done.stderr.decode()
    there = np.frombuffer(done.stdout, dtype=np.uint8).reshape(here.shape).astype(int)
    assert np.abs(there - here).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_every_kind_of_picture(mode, photo):
    model = micro_model("parallel")
    picture = photo.convert("L") if mode in ("I;16", "I", "PA") else photo
    if mode in ("I;16", "I"):
        wide = np.asarray(picture).astype(np.uint16) * 257
        picture = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
    picture = picture.convert(mode)
    decoded = codec.decode(codec.encode(model, picture), model)
    assert decoded.size == picture.size
    assert decoded.mode == ("L" if mode in ("1", "L", "LA", "I;16", "I") else "RGB")


def test_what_the_codec_sees():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    rgb, grey = pictures.to_rgb(pictures.open_picture(ramp))
    assert grey and rgb.mode == "RGB"
    assert np.array_equal(np.asarray(rgb)[..., 0], ramp // 257)  # 16 bits to 8

    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.asarray(pictures.to_rgb(clear)[0]).min() == 255  # transparent becomes white
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(int(np.asarray(pictures.to_rgb(half)[0])[0, 0, 0]) - 127) <= 1

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert np.asarray(pictures.to_rgb(palette)[0])[0, 0].tolist() == [200, 100, 50]
    palette.info["transparency"] = 1
    assert np.asarray(pictures.to_rgb(palette)[0])[0, 0].tolist() == [255, 255, 255]


def test_a_file_and_its_bytes_are_the_same_picture(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    assert pictures.open_picture(data) == pictures.open_picture(tmp_path / "photo.png")
    assert np.array_equal(pictures.pixels_of(data), np.asarray(photo))
    with pytest.raises(DataError, match="cannot be read"):
        pictures.open_picture(data[:900])
    with pytest.raises(DataError, match="not a picture"):
        pictures.open_picture(b"hello")


def test_an_image_that_is_not_loaded_yet_is_its_file(photo):
    """Its transparent value in the bits of the file, and what is wrong with it in a sentence."""
    file = io.BytesIO()
    grey = Image.fromarray(np.array([[0, 1, 2, 3]] * 4, np.uint8) * 85)
    grey.save(file, "PNG", bits=2, transparency=1)
    opened = [pictures.open_picture(file.getvalue()), pictures.open_picture(Image.open(io.BytesIO(file.getvalue())))]
    assert np.array_equal(*(np.asarray(pictures.to_rgb(image)[0]) for image in opened))
    file = io.BytesIO()
    photo.save(file, "JPEG")
    with pytest.raises(DataError, match="cannot be read"):
        pictures.open_picture(Image.open(io.BytesIO(file.getvalue()[:-2000])))


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (80, 40), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.open_picture(tmp_path / "turned.jpg").size == (40, 80)


def test_padding_repeats_the_border_and_is_taken_off_again():
    x = torch.rand(1, 3, 5, 70)
    padded = pictures.pad(x, 64)
    assert padded.shape == (1, 3, 64, 128)
    assert torch.equal(pictures.unpad(padded, 5, 70), x)
    assert torch.equal(padded[:, :, 0, 29:99], x[:, :, 0])  # 59 missing rows: 29 above; 58 columns: 29 left
    assert torch.equal(padded[:, :, 29:34, 0], x[:, :, :, 0])


def test_a_damaged_file_is_an_error_and_never_a_picture(photo):
    model = micro_model("parallel")
    data = codec.encode(model, photo)
    for i in range(0, len(data), 29):
        with pytest.raises(BitstreamError):
            codec.decode(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], model)


def test_damage_behind_a_forged_checksum_is_noticed(photo):
    """Bits flipped inside the strings with the outer checksum made to fit: the latents' checksum still notices."""
    from dataclasses import replace

    model = micro_model("parallel")
    whole = Container.unpack(codec.encode(model, photo))
    for i in (4, 40, len(whole.y_string) - 9):
        damaged = whole.y_string[:i] + bytes([whole.y_string[i] ^ 4]) + whole.y_string[i + 1 :]
        with pytest.raises(BitstreamError):
            codec.decode(replace(whole, y_string=damaged).pack(), model)
    with pytest.raises(BitstreamError):
        codec.decode(replace(whole, z_string=whole.z_string[:-2]).pack(), model)
    with pytest.raises(BitstreamError):
        codec.decode(replace(whole, y_string=whole.y_string[:100]).pack(), model)


def test_a_decoder_that_differs_is_noticed(photo, monkeypatch):
    """As if this machine computed other parameters: an error, not a wrong picture."""
    model = micro_model("parallel")
    data = codec.encode(model, photo)
    from entroformer_lib.exact import coder

    right = coder.snap
    monkeypatch.setattr(coder, "snap", lambda means, scales: right(means + 0.02, scales))
    with pytest.raises(BitstreamError):
        codec.decode(data, model)


def test_other_weights_are_refused(photo, monkeypatch):
    model = micro_model("parallel")
    data = codec.encode(model, photo)
    with pytest.raises(BitstreamError, match="other weights of the model .* at hand.$"):
        codec.decode(data, micro_model("parallel", seed=1))
    monkeypatch.setitem(REPLACED, weights_digest(model)[:4].hex(), "abc")
    with pytest.raises(BitstreamError, match="Revision abc has them"):
        codec.decode(data, micro_model("parallel", seed=1))
    with pytest.raises(BitstreamError, match="must be given"):
        codec.decode(data)


def test_a_model_that_is_not_here_is_named(photo):
    model = micro_model("parallel", name="my-own-model")
    with pytest.raises(BitstreamError, match="my-own-model"):
        codec.decode(codec.encode(model, photo))


def test_a_picture_that_is_too_large_is_told_what_can_be_read(photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", photo.width * photo.height // 3)
    with pytest.raises(DataError, match=r"large\.png is too large: up to 0 million pixels can be read\.$"):
        pictures.open_picture(tmp_path / "large.png")


@pytest.mark.parametrize(
    "image", [np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4), np.float32), np.zeros((0, 4), np.uint8)]
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(DataError):
        pictures.open_picture(image)
    with pytest.raises(DataError, match="floating"):
        pictures.to_rgb(Image.new("F", (4, 4)))


# ---- the shipped models ----


def real_pictures() -> list:
    kodak = pictures_folder("kodak")
    return [kodak / "kodim04.png", kodak / "kodim20.png"] if kodak else [sample_picture("coffee"), sample_picture()]


def lowest_and_highest() -> list[str]:
    """Of every shipped model the lowest and the highest rate; the rates between add nothing but time."""
    rows = sorted(list_models(), key=lambda row: (row["path"], row["lmbda"] or 0))
    groups = [[row["name"] for row in group] for _, group in itertools.groupby(rows, key=lambda row: row["path"])]
    return [name for names in groups for name in sorted({names[0], names[-1]})]


@pytest.mark.parametrize("name, picture", zip(lowest_and_highest(), itertools.cycle((0, 1))))
def test_real_bits_are_what_the_likelihoods_promise(name, picture):
    model, picture = load_model(name, "cpu"), pictures.open_picture(real_pictures()[picture])
    container = Container.unpack(codec.encode(model, picture))
    real = 8 * (len(container.y_string) + len(container.z_string))
    promised = estimated_bits(model, picture)
    assert abs(real - promised) < 0.01 * promised + 256
    assert 8 * len(container.pack()) < 1.01 * promised + 512  # the container's own bytes included


def test_a_file_names_its_model():
    name = list_models()[0]["name"]
    data = codec.encode(load_model(name, "cpu"), sample_picture("chelsea"))
    assert codec.decode(data).size == sample_picture("chelsea").size


# ---- whatever stands around ----


def test_surroundings_change_nothing(photo):
    """Autocast, defaults of dtype and device, a compiled model."""
    model = micro_model("parallel")
    plain = codec.encode(model, photo)
    picture = codec.decode(plain, model).tobytes()
    compiled = torch.compile(model)  # compiles nothing before it is called
    assert codec.encode(compiled, photo) == plain and codec.decode(plain, compiled).tobytes() == picture
    for around in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with around:
            assert codec.encode(model, photo) == plain and codec.decode(plain, model).tobytes() == picture
    torch.set_default_dtype(torch.float64)
    try:
        assert codec.encode(model, photo) == plain and codec.decode(plain, model).tobytes() == picture
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_share_a_model(photo):
    """Each asks for another k, and finds the model as it was."""
    model = micro_model("parallel")
    alone = {k: codec.encode(model, photo, ks=(k,)) for k in (2, 0)}
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda k: (k, codec.encode(model, photo, ks=(k,))), [2, 0] * 3))
    assert all(data == alone[k] for k, data in found) and model.context_k == model.config.top_k
    assert codec.decode(alone[2], model).size == photo.size


@pytest.mark.parametrize("fields", [dict(groups=(24, 2, 2)), dict(heads=24)], ids=["a channel a slice", "heads of one"])
def test_a_product_of_one_column_is_exact(fields, photo):
    """Which torch's int8 product is not."""
    model = micro_model("groupedmixer" if "groups" in fields else "parallel", **fields)
    data = codec.encode(model, photo)
    assert codec.decode(data, model).tobytes() == codec.reconstruction(model, photo).tobytes()


def test_what_the_coder_of_z_would_not_survive_is_refused(photo):
    small = photo.crop((0, 0, 64, 64))
    with pytest.raises(WeightsError, match="at least three numbers"):
        codec.encode(micro_model("parallel", Z=2), small)
    for median in (math.nan, math.inf, 1e9):
        model = micro_model("parallel")
        model.refresh_tables()
        with torch.no_grad():
            model.z_prior.quantiles[0, 0, 1] = median
        model._tables_of = model._prior_state()  # as weights come that bring their tables along
        with pytest.raises(WeightsError, match="away from its median|not finite"):
            codec.encode(model, small)
    model = micro_model("parallel", "official")
    with torch.no_grad():
        model.z_prior.log_sigma.fill_(-800)
    with pytest.raises(WeightsError, match="a scale of 0"):
        codec.encode(model, small)


def test_memory_of_a_groupedmixer_holds_its_cache():
    """Measured: 725 bytes a pixel with the largest of size base, between 256 and 512 pixels a side."""
    sizes = {name: codec.bytes_per_pixel(named_config(f"base-{name}")) for name in ("parallel", "groupedmixer-large")}
    assert sizes["parallel"] == pytest.approx(380, abs=1) and sizes["groupedmixer-large"] == pytest.approx(740, abs=1)
