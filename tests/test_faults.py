"""What users of such programs ran into: numbers that are none, odd pictures, odd outputs, odd names, edited weights."""

import copy
import io
import json
import os
import stat
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import aware_model, micro_model
from PIL import Image
from test_cli import call

from entroformer_lib import cli
from entroformer_lib.codec import codec, pictures
from entroformer_lib.codec.container import Container
from entroformer_lib.datasets import sample_picture
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import BitstreamError, DataError, PassedOver, RateError, UserError, WeightsError
from entroformer_lib.files import write_bytes
from entroformer_lib.inspection.scene import Scene
from entroformer_lib.studies.rate_distortion import bit_maps
from entroformer_lib.weights.zoo import device_of, list_models, load_model, save_weights, split_name, weights_digest


@pytest.fixture
def model() -> Entroformer:
    return micro_model("parallel")


@pytest.fixture
def cat() -> Image.Image:
    return sample_picture("chelsea").crop((0, 0, 96, 64))


@pytest.fixture
def home(tmp_path, monkeypatch, model):
    """A folder with a picture and a model found by the name `micro`."""
    save_weights(model, tmp_path / "weights" / "micro.safetensors", {"lmbda": 0.5})
    sample_picture("chelsea").crop((0, 0, 96, 64)).save(tmp_path / "cat.png")
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_no_number(model, value):
    x = torch.rand(1, 3, 64, 64)
    x[0, 1, 5, 7] = value
    with pytest.raises(DataError, match="not finite"):
        model.compress(x)


@pytest.mark.parametrize("part", ["g_a", "h_a", "h_s", "context_model", "entropy_parameters", "z_prior"])
def test_weights_that_are_no_numbers(model, cat, part, tmp_path):
    for parameter in getattr(model, part).parameters():
        parameter.data.view(-1)[0] = float("nan")
    with pytest.raises(WeightsError):
        codec.encode(model, cat)
    with pytest.raises(WeightsError, match="not finite"):
        save_weights(model, tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_bias_that_is_no_number(model, cat):
    model.context_model.stack.blocks[0].norm1.bias.data[3] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        codec.encode(model, cat)


@pytest.mark.parametrize("part", ["h_a", "g_a"])
def test_latents_beyond_all_bounds(model, cat, part):
    """CompressAI's coder of z never ends on such numbers."""
    last = model.h_a.head[-1] if part == "h_a" else model.g_a[-1]
    last.weight.data.mul_(1e8)
    with pytest.raises(WeightsError, match="the coder takes up to 32767"):
        codec.encode(model, cat)


def test_loading_weights_that_are_no_numbers(model, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "x.safetensors"
    save_weights(model, path, {})
    tensors = load_file(path)
    tensors["h_s.embed.bias"][0] = float("inf")
    save_file(tensors, path, metadata={"format": "entroformer"})
    with pytest.raises(WeightsError, match="h_s.embed.bias .* not finite"):
        load_model(path)


def test_pixels_that_are_no_numbers_are_no_black_picture(model, cat):
    """The synthesis is not part of what the checksums see before it runs."""
    broken = copy.deepcopy(model)
    broken.g_s[-1].bias.data[1] = float("nan")
    data = codec.encode(broken, cat)
    with pytest.raises(WeightsError, match="pixels"):
        codec.decode(data, broken)
    with pytest.raises(WeightsError, match="pixels"):
        broken.decompress(**broken.compress(torch.rand(1, 3, 64, 64)))


# ---- odd pictures ---------------------------------------------------------------------------------------------------


def png(depth: int, kind: int, width: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of one row. kind: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha"""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b""]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")])


@pytest.mark.parametrize("data, expected", [
    (png(16, 0, 3, struct.pack(">3H", 0, 257 * 30, 65535), struct.pack(">H", 0)), [255, 30, 255]),
    (png(16, 0, 3, struct.pack(">3H", 0, 257 * 30, 65535), struct.pack(">H", 257 * 30)), [0, 255, 255]),
    (png(4, 0, 2, b"\x3f", struct.pack(">H", 3)), [255, 255]),
    (png(2, 0, 4, b"\x1b", struct.pack(">H", 1)), [0, 255, 170, 255]),
    (png(8, 0, 3, bytes([0, 10, 20]), struct.pack(">H", 10)), [0, 255, 20]),
    (png(16, 6, 2, struct.pack(">8H", 9, 9, 9, 0, *[257 * 9] * 3, 65535), b""), [255, 9]),
])  # fmt: skip
def test_transparent_pixels_become_white(data, expected):
    picture = pictures.open_picture(data)
    assert np.asarray(pictures.to_rgb(picture)[0])[0, :, 0].tolist() == expected
    said = " ".join(pictures.losses(picture))
    assert "white" in said and ("16 bits" in said) == (data[24] == 16)


def test_a_transparent_colour_of_16_bits_is_refused():
    """Pillow keeps the higher 8 bits, so it cannot tell 0x1234 from 0x1200."""
    data = png(16, 2, 2, struct.pack(">6H", *[0x1234] * 3, *[0x1200] * 3), struct.pack(">3H", *[0x1200] * 3))
    with pytest.raises(DataError, match="^A picture of 16 bits with a transparent colour"):
        pictures.open_picture(data)


def test_grey_with_alpha_stays_grey():
    for data in (png(16, 4, 1, struct.pack(">2H", 257 * 9, 65535), b""), png(8, 4, 1, bytes([9, 255]), b"")):
        rgb, grey = pictures.to_rgb(pictures.open_picture(data))
        assert grey and np.asarray(rgb).tolist() == [[[9, 9, 9]]]


def tiff(bits: int, zero: int, data: bytes) -> bytes:
    """A grey TIFF of two pixels. zero: 0 where 0 is white, 1 where it is black"""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: zero, 273: 122, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


def test_grey_tiffs_are_read_as_they_are_meant_or_refused():
    shown = {
        tiff(8, 0, b"\x00\xff"): [255, 0],
        tiff(8, 1, b"\x00\xff"): [0, 255],
        tiff(16, 1, b"\x00\x00\xff\xff"): [0, 255],
        tiff(16, 0, b"\x00\x00\xff\xff"): None,
        tiff(12, 1, b"\xff\xff\xff"): None,
    }
    for data, expected in shown.items():
        if expected is None:
            with pytest.raises(DataError, match="12 bits, or where 0 is white"):
                pictures.open_picture(data)
        else:
            assert pictures.pixels_of(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["1", "LA", "La", "P", "PA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16B"])
def test_every_kind_of_pixels_is_read(mode):
    assert pictures.pixels_of(Image.new(mode, (4, 4))).shape == (4, 4, 3)


def test_values_beyond_16_bits(tmp_path):
    for values in (np.array([[0, 70_000]], np.int32), np.array([[-5, 3]], np.int32)):
        Image.fromarray(values).save(tmp_path / "wide.tif")
        with pytest.raises(DataError, match="beyond 16 bits"):
            pictures.pixels_of(tmp_path / "wide.tif")


def test_animations_give_their_first_frame(home):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames[0].save(home / name, save_all=True, append_images=frames[1:])
        _, notes = call("compress", name, "--model", "micro", "-o", f"{name}.ef")
        assert "Only the first frame is kept." in notes
        assert pictures.pixels_of(home / name)[0, 0, 0] > 200


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of EXIF data that it passes over
def test_damaged_exif_does_not_matter(cat):
    """Orientation 6 can be read, but the rest cannot be written again."""
    tags = "49492a0008000000020012010300010000000600000069870200ffffffff1000000000000000"
    exif = b"Exif\0\0" + bytes.fromhex(tags)
    file = io.BytesIO()
    cat.save(file, "JPEG", exif=exif)
    assert pictures.open_picture(file.getvalue()).size == (cat.height, cat.width)
    for tail in (b"\x49\x49\x2a\x00\xff\xff\xff\xff", b"nonsense"):
        file = io.BytesIO()
        cat.save(file, "JPEG", exif=b"Exif\0\0" + tail)
        assert pictures.open_picture(file.getvalue()).size == cat.size


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_what_pillow_makes_of_it(cat, orientation, form):
    """Once: the command compress opens a picture, and hands it to an encoder that opens what it is given."""
    from PIL import ImageOps

    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    cat.save(file, form, exif=exif)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    ours = pictures.open_picture(file.getvalue())
    assert np.array_equal(np.asarray(ours), theirs)
    assert np.array_equal(np.asarray(pictures.open_picture(ours)), theirs)
    for key in ("xmp", "XML:com.adobe.xmp"):
        tagged = cat.copy()
        tagged.info[key] = f'<x tiff:Orientation="{orientation}"/>'
        once = pictures.open_picture(tagged)
        assert np.array_equal(np.asarray(pictures.open_picture(once)), np.asarray(once))


def test_a_photograph_from_a_telephone_is_the_right_way_up(home, cat):
    """Through the commands."""
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.crop((0, 0, 96, 64)).save(home / "phone.png", exif=exif)
    call("compress", "phone.png", "--model", "micro", "-o", "phone.ef")
    assert json.loads(call("info", "phone.ef", "--json")[0])["height"] == 96
    upright = pictures.open_picture(home / "phone.png")
    assert codec.decode((home / "phone.ef").read_bytes()) == codec.decode(codec.encode(load_model("micro"), upright))


def test_encode_takes_what_one_has_at_hand(model, cat, tmp_path):
    cat.save(tmp_path / "cat.png")
    expected = codec.encode(model, cat)
    with open(tmp_path / "cat.png", "rb") as file:
        assert codec.encode(model, file) == expected
    x = torch.from_numpy(np.array(cat)).permute(2, 0, 1) / 255
    assert codec.encode(model, x) == expected
    for wrong in (x[None], 2 * x, x * float("nan"), x.byte(), 7, [[1]]):
        with pytest.raises(DataError):
            codec.encode(model, wrong)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["context_model.embed.weight", "h_s.embed.weight", "z_prior.biases.0"])
def test_an_edited_weight_is_noticed(model, cat, part):
    """Through `.data`, which no version counter sees, and with the same sum."""
    first, digest = codec.encode(model, cat), weights_digest(model)
    w = model.get_parameter(part)
    w.data[[0, 1]] = w.data[[1, 0]].clone()
    edited = codec.encode(model, cat)
    assert weights_digest(model) != digest and edited != first
    again = Entroformer.from_state_dict(model.state_dict())
    again.update(force=True)
    assert codec.encode(again, cat) == edited
    with pytest.raises(BitstreamError, match="other weights"):
        codec.decode(first, model)


def test_the_callers_model_is_left_as_it_was(model, cat):
    model.train()
    model.g_s.eval()
    modes = [module.training for module in model.modules()]
    data = codec.encode(model, cat)
    codec.decode(data, model)
    codec.reconstruction(model, cat)
    bits = bit_maps(model, cat)
    Scene(model, cat)
    model.decompress(**model.compress(torch.rand(1, 3, 64, 64)))
    with pytest.raises(RateError):
        codec.encode(model, cat, bpp=1.0)
    assert [module.training for module in model.modules()] == modes
    assert np.array_equal(bits["y"], bit_maps(model.eval(), cat)["y"])  # without the noise of training


def test_a_model_that_is_trained_on_codes_with_new_tables(model, cat):
    model.train()
    codec.encode(model, cat)
    model.z_prior.biases[0].data.add_(0.3)  # as a step of training does
    data = codec.encode(model, cat)
    fresh = Entroformer.from_state_dict(model.state_dict())
    fresh.update(force=True)
    assert codec.encode(fresh, cat) == data


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions_code_by_a_copy(cat, dtype):
    model = aware_model().to(dtype)
    picture = codec.decode(codec.encode(model, cat), model)
    assert picture.size == cat.size and next(model.parameters()).dtype == dtype
    assert model.decompress(**model.compress(torch.rand(1, 3, 64, 64).to(dtype)))["x_hat"].shape == (1, 3, 64, 64)


def test_what_comes_back_may_be_learned_from(model):
    """No inference tensors, which autograd refuses."""
    out = model.decompress(**model.compress(torch.rand(1, 3, 64, 64)))["x_hat"]
    (torch.ones(1, requires_grad=True) * out).sum().backward()
    y_hat, _ = model.latents(torch.rand(1, 3, 64, 64))
    model.g_s(y_hat).sum().backward()
    model.g_s(model.analysis(torch.rand(1, 3, 64, 64))).sum().backward()


# ---- names and devices --------------------------------------------------------------------------------------------


def test_an_at_sign_in_a_name(home, model):
    place = home / "user@lab"
    place.mkdir()
    save_weights(aware_model(), place / "mine.safetensors", {})
    save_weights(model, home / "weights" / "a@b.safetensors", {})
    assert load_model(place / "mine.safetensors").level is not None
    assert load_model(f"{place}/mine.safetensors@0.04").level == 1
    assert load_model("a@b").name == "a@b"
    assert split_name("blocks-parallel@0.1") == ("blocks-parallel", "0.1")
    with pytest.raises(WeightsError, match="user@lab/gone.safetensors"):
        load_model(place / "gone.safetensors")
    call("compress", "cat.png", "--model", place / "mine.safetensors")


@pytest.mark.parametrize("name", ["banana", "cuda:77", "meta", ""])
def test_devices_that_are_not_there(home, name):
    with pytest.raises(UserError, match="no device"):
        device_of(name)
    call("compress", "cat.png", "--model", "micro")
    for words in (["compress", "cat.png", "--model", "micro", "-o", "x.ef"], ["decompress", "cat.ef", "-o", "x.png"]):
        assert "no device" in call(*words, "--device", name, expect=1)[1]
    assert not list(home.glob("x.*"))


def test_one_bad_file_does_not_hide_the_models(home):
    (home / "weights" / "bad.safetensors").write_bytes(b"no weights")
    (home / "weights" / "cut.safetensors").write_bytes((home / "weights" / "micro.safetensors").read_bytes()[:1000])
    with pytest.warns(PassedOver) as told:
        assert "micro" in {row["name"] for row in list_models()}
    assert len(told) == 2
    out, notes = call("models")
    assert "micro" in out and "bad.safetensors" in notes and "cut.safetensors" in notes


def test_a_file_whose_model_is_gone(home):
    call("compress", "cat.png", "--model", "micro")
    (home / "weights" / "micro.safetensors").rename(home / "moved.safetensors")
    assert "--model" in call("decompress", "cat.ef", "-o", "new.png", expect=1)[1]
    call("decompress", "cat.ef", "-o", "new.png", "--model", "moved.safetensors")


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_outputs_go_where_they_are_sent(tmp_path):
    """Links are followed, modes kept, the user's own files left alone, names as long as the system allows."""
    target, link, neighbour = tmp_path / "target", tmp_path / "link", tmp_path / "target.part"
    target.write_bytes(b"old")
    target.chmod(0o600)
    neighbour.write_bytes(b"mine")
    link.symlink_to(target)
    write_bytes(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and neighbour.read_bytes() == b"mine"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    long = tmp_path / ("x" * 251 + ".ef")
    write_bytes(long, b"new")
    assert stat.S_IMODE(long.stat().st_mode) == 0o666 & ~_umask()
    assert {p.name for p in tmp_path.iterdir()} == {"target", "link", "target.part", long.name}


def test_weights_have_the_mode_of_other_files(model, tmp_path):
    save_weights(model, tmp_path / "x.safetensors", {})
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are there on Unix alone")
def test_pipes_and_devices_stay_what_they_are(home):
    import threading

    pipe, got = home / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    call("compress", "cat.png", "--model", "micro", "-o", pipe)
    reader.join()
    assert stat.S_ISFIFO(pipe.stat().st_mode) and Container.unpack(got[0]).width == 96
    call("compress", "cat.png", "--model", "micro", "-o", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# ---- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, sentence", [
    (["compress", ""], "does not name a file"),
    (["decompress", ""], "does not name a file"),
    (["explore", ""], "does not name a file"),
    (["info", ""], "is a folder"),
    (["compress", "cat.png", "--model", "micro", "--bpp", "nan"], "number above 0"),
    (["compress", "cat.png", "--model", "micro", "--bpp", "-1"], "number above 0"),
    (["compress", "cat.png", "--model", "micro", "--bpp", "inf"], "number above 0"),
])  # fmt: skip
def test_words_that_make_no_sense(home, words, sentence):
    assert sentence in call(*words, expect=1)[1]


@pytest.mark.parametrize("name", ["x.psd", "x.xyz", "x", "x.xbm", "x.hdf", "x.png.part"])
def test_formats_are_checked_before_decoding(home, name, monkeypatch):
    call("compress", "cat.png", "--model", "micro")
    monkeypatch.setattr(codec, "decode", None)
    sentence = call("decompress", "cat.ef", "-o", name, expect=1)[1]
    assert "is not that of a picture format" in sentence or "cannot be written as" in sentence
    assert not (home / name).exists()


def test_icons_are_not_made_smaller(home):
    sample_picture("chelsea").save(home / "large.png")
    call("compress", "large.png", "--model", "micro")
    assert "cannot be written as ICO" in call("decompress", "large.ef", "-o", "large.ico", expect=1)[1]


def test_a_small_file_that_claims_a_large_picture(home, model):
    data = codec.encode(model, Image.new("RGB", (64, 64)))
    c = Container.unpack(data)
    (home / "claim.ef").write_bytes(
        Container(65535, 65535, c.grey, "micro", weights_digest(load_model("micro")), 0, c.z_string, c.y_string).pack()
    )
    assert "65535 x 65535 pixels, and 33,554,432 in all" in call("decompress", "claim.ef", expect=1)[1]
    assert "65535 x 65535 pixels takes more than" in call("decompress", "claim.ef", "--max-pixels", 2**32, expect=1)[1]


class Unknown(Exception):
    pass


@pytest.mark.parametrize("error, sentence", [
    (Unknown("what is this"), "Unknown: what is this\nPlease report it"),
    (AssertionError(), "AssertionError: \nPlease report it"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
    (MemoryError(), "memory"),
    (OSError(5, "Input/output error", "disk"), "disk: Input/output error."),
])  # fmt: skip
def test_every_error_becomes_a_sentence(home, monkeypatch, error, sentence):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(codec, "encode", fail)
    assert sentence in call("compress", "cat.png", "--model", "micro", expect=1)[1]
    monkeypatch.setenv("ENTROFORMER_TRACEBACK", "1")
    if isinstance(error, Unknown):
        monkeypatch.setattr(sys, "argv", ["entroformer", "compress", "cat.png", "--model", "micro"])
        with pytest.raises(Unknown):
            cli.main()


def test_version():
    assert call("--version")[0].startswith("entroformer 0.")


def test_a_name_that_is_no_text_and_a_reader_that_leaves(home):
    """In processes: what Python does with its streams at the end counts too."""
    import subprocess

    call("compress", "cat.png", "--model", "micro", "-o", os.fsdecode(b"c\xe4t.ef"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "entroformer_lib", "info", b"c\xe4t.ef"]
    odd = subprocess.run(command, capture_output=True, env=environment)
    assert odd.returncode == 0 and b"\\udce4" in odd.stdout, odd.stderr
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert gone.returncode == 1 and not gone.stderr, gone.stderr
