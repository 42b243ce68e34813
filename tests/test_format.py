"""The format as docs/format.md writes it down: test vectors, a second reader of the header, limits."""

import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import format_vectors
import numpy as np
import pytest
import warm
from conftest import aware_model, micro_model
from format_vectors import FOLDER, VECTORS, decoded, formula_model
from test_cli import call

from benchmarks.latency import peak_mb
from entroformer_lib.codec import codec
from entroformer_lib.codec.container import MAX_PIXELS, Container
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import BitstreamError, DataError, UserError, WeightsError
from entroformer_lib.exact import hyper_latents
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.rangecoder import RansDecoder
from entroformer_lib.stages import listening

KEPT = json.loads((FOLDER / "vectors.json").read_text())
DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text()


# ---- test vectors ---------------------------------------------------------------------------------------------------


def pixels(row: dict) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(row["pixels"]), np.uint8).astype(int)


@pytest.mark.parametrize("name", VECTORS)
def test_files_of_the_past_give_the_same_latents(name):
    kept = KEPT[name]
    model = formula_model(EntroformerConfig.from_json(json.dumps(kept["config"])), name)
    now = decoded(model, (FOLDER / f"{name}.ef").read_bytes())
    assert (now["y_sha256"], now["z_sha256"]) == (kept["y_sha256"], kept["z_sha256"])
    assert abs(pixels(now) - pixels(kept)).max() <= 1
    assert name == "one-pixel" or pixels(kept).std() > 5


def test_vectors_are_small_and_none_is_left_over():
    assert set(KEPT) == set(VECTORS) == {path.stem for path in FOLDER.glob("*.ef")}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 200_000


def test_another_version_is_refused_in_a_sentence():
    data = (FOLDER / "parallel.ef").read_bytes()
    for version in (1, 2, 4):
        with pytest.raises(BitstreamError, match=f"has version {version}; this program reads version 3"):
            codec.decode(data[:3] + bytes([version]) + data[4:])


def test_the_document_has_the_formula_and_names_every_vector():
    """Run as it stands there, the formula gives our numbers."""
    (source,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    told = {}
    exec(source, told)
    for name in ("h_s.embed.weight", "z_prior.mu"):
        assert told["numbers"](1000, name) == format_vectors.numbers(1000, name).tolist()
    for name in VECTORS:
        assert f"`{name}`" in DOCUMENT


# ---- a second reader of the header ----------------------------------------------------------------------------------


def header(data: bytes) -> dict:
    """Written from docs/format.md alone."""
    assert data[:3] == b"\x93EF" and struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4])
    version, flags = data[3], data[4]
    assert version == 3 and flags < 16
    at = 5

    def leb128() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value += (byte % 128) << shift
            shift += 7
            if byte < 128:
                return value

    width, height, level, window, k = leb128(), leb128(), None, None, None
    if flags & 2:
        level = struct.unpack_from("<H", data, at)[0] / 256
        at += 2
    if flags & 4:
        window = leb128()
    if flags & 8:
        k = leb128()
    length = leb128()
    name = data[at : at + length].decode()
    weights = data[at + length : at + length + 4].hex()
    at += length + 8
    bytes_z = leb128()
    return {
        "version": version, "width": width, "height": height, "grey": bool(flags & 1), "model": name or None,
        "level": level, "window": window, "k": k, "weights": weights, "bytes": len(data),
        "bytes_y": len(data) - 4 - at - bytes_z, "bytes_z": bytes_z,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["parallel", "context", "rates", "grey", "one-pixel", "window-serial", "k-serial", "k-parallel"]
)
def test_two_readers_agree_on_the_header(name):
    path = FOLDER / f"{name}.ef"
    facts = json.loads(call("info", path, "--json")[0])
    read = header(path.read_bytes())
    assert read == {key: facts[key] for key in read}


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> Container:
    return Container.unpack((FOLDER / "parallel.ef").read_bytes())


@pytest.fixture(scope="module")
def model():
    return formula_model(EntroformerConfig.from_json(json.dumps(KEPT["parallel"]["config"])), "parallel")


def hostile(whole: Container) -> dict[str, bytes]:
    """Files whose checksums are right and whose headers claim far too much, by what they claim."""
    flat = struct.pack("<hh", 0, 0)
    start = replace(whole, model="").pack()[:9]  # up to the length of the name
    tail = b"\xff\xff\xff\xff\x7f" + bytes(40)

    def sealed(data: bytes) -> bytes:
        return data + struct.pack("<I", zlib.crc32(data))

    return {
        "sides": replace(whole, width=65535, height=65535, y_string=flat).pack(),
        "width": replace(whole, width=65535, height=2000, y_string=flat).pack(),
        "a side of 35 bits": sealed(b"\x93EF\x03\x00" + tail),
        "length of the name": sealed(start[:7] + tail),
        "name": sealed(start[:7] + b"\x80\x80\x40" + b"n" * 2**20 + bytes(9)),
        "path": replace(whole, model="/dev/zero/../x.safetensors").pack(),
        "long name": replace(whole, model="x" * 250).pack(),
        "length of z": sealed(start[:7] + b"\x00" + whole.weights[:4] + bytes(4) + tail),
        "y": replace(whole, y_string=whole.y_string + bytes(2**20)).pack(),
        "z": replace(whole, z_string=whole.z_string + bytes(2**20)).pack(),
        "level": replace(whole, level=255.99).pack(),
        "window": replace(whole, window=4097).pack(),
        "window of 35 bits": sealed(b"\x93EF\x03\x04\x46\x28" + tail),
        "k": replace(whole, k=2**16 + 1).pack(),
        "another k": replace(whole, k=2).pack(),
        "another window": replace(whole, window=1).pack(),
        "a window and no level": replace(whole, window=1, level=0.0, y_string=flat).pack(),
        "no z": replace(whole, z_string=b"").pack(),
        "symbols": replace(whole, y_string=struct.pack("<hh", -32768, 32767) + bytes(40)).pack(),
    }


def measure_hostile_files(out: str) -> None:
    """In a process of its own, which has decoded before: what was said of each file, and by how many megabytes its peak
    grew; then of a file that claims a picture of 512 x 512 pixels in few bytes."""
    data = (FOLDER / "parallel.ef").read_bytes()
    model = formula_model(EntroformerConfig.from_json(json.dumps(KEPT["parallel"]["config"])), "parallel")
    codec.decode(data, model)
    rows = []
    for what, file in [*hostile(Container.unpack(data)).items(), ("claim", flat_file(model, 512, wrong=False))]:
        before, said = peak_mb(), ""
        try:
            codec.decode(file, None if what in ("path", "long name") else model)
        except UserError as error:
            said = str(error)
        rows.append((what, said, peak_mb() - before))
    Path(out).write_text(json.dumps(rows))


def test_hostile_headers_take_no_memory(tmp_path):
    process = warm.start(measure_hostile_files, str(tmp_path / "rows"), output=tmp_path / "said")
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    *rows, (_, said, claimed) = json.loads((tmp_path / "rows").read_text())
    for what, sentence, grown in rows:
        assert sentence and grown < 16, (what, sentence, grown)
    N = KEPT["parallel"]["config"]["N"]
    assert not said and claimed < (codec.BYTES_PER_PIXEL + codec.BYTES_PER_CHANNEL * N) * 512 * 512 / 1e6 + 64
    assert f"{codec.BYTES_PER_PIXEL} + {codec.BYTES_PER_CHANNEL} N" in DOCUMENT and f"{MAX_PIXELS:,}" in DOCUMENT


def flat_file(model, side: int, wrong: bool) -> bytes:
    """An .ef file of zeros, of about 100 bytes; with the wrong checksum of its latents, or the right one."""
    import torch

    shape = side // 64, side // 64
    z_strings = hyper_latents.encode(model.z_prior, torch.zeros(1, model.config.Z, *shape))
    z_hat = hyper_latents.decode(model.z_prior, z_strings, shape)
    y_string = struct.pack("<hh", 0, 0)
    crc = codec.latents_checksum(torch.zeros(1, model.config.M, side // 16, side // 16), z_hat) ^ wrong
    weights = codec.weights_digest(model)
    return Container(side, side, False, "", weights, crc, z_strings[0], y_string).pack()


def test_a_claim_runs_no_longer_than_an_honest_file(model):
    """Its latents are read once, and no picture is made of wrong ones."""
    steps = []
    for wrong in (False, True):
        with listening(lambda what, done, total: steps.append((done, total))):
            if wrong:
                with pytest.raises(BitstreamError, match="other latents"):
                    codec.decode(flat_file(model, 128, wrong), model)
            else:
                codec.decode(flat_file(model, 128, wrong), model)
    assert steps[: len(steps) // 2] == steps[len(steps) // 2 :]
    assert steps[-1] == (12 * 8 * 8, 12 * 8 * 8)


def test_pixels_are_limited_before_the_model_is_loaded(whole, tmp_path, monkeypatch):
    path = tmp_path / "large.ef"
    path.write_bytes(replace(whole, width=65535, height=65535).pack())
    monkeypatch.setattr(codec, "load_model", None)
    for words in (["decompress", path, "-o", tmp_path / "x.png"], ["info", path, "--max-pixels", 1000]):
        assert "65535 x 65535 pixels, and" in call(*words, expect=1)[1]
    assert '"width": 65535' in call("info", path, "--json")[0]
    with pytest.raises(DataError, match="70 x 40 pixels, and 2,799"):
        codec.decode(whole.pack(), max_pixels=2799)


def test_what_lies_behind_the_last_latent_is_noticed(whole, model):
    for changed in (
        replace(whole, y_string=whole.y_string + bytes([1, 2, 3, 4] * 3)),
        replace(whole, z_string=whole.z_string + bytes(4)),
    ):
        with pytest.raises(BitstreamError, match="are damaged"):
            codec.decode(changed.pack(), model)
    with pytest.raises(BitstreamError, match="more bytes than a picture of its size"):
        codec.decode(replace(whole, y_string=whole.y_string * 9).pack(), model)


@pytest.mark.parametrize("cut", [0, 4, 8])
def test_hyper_latents_that_end_too_early(whole, model, cut):
    """CompressAI's decoder reads on behind the string."""
    with pytest.raises(BitstreamError, match="hyper-latents are"):
        codec.decode(replace(whole, z_string=whole.z_string[:cut]).pack(), model)


def test_a_value_of_too_many_groups_is_refused():
    """All ones: the last symbol of a table, and a number that would go on for ever."""
    decoder = RansDecoder(b"\xff" * 400)
    with pytest.raises(BitstreamError, match="damaged"):
        decoder.read(100, [0, 1, 65536])


def test_z_is_read_as_compressai_writes_it():
    import torch
    from compressai.entropy_models import EntropyBottleneck

    prior = micro_model("parallel").z_prior
    prior.update(force=True)
    for spread in (1, 40, 9000):
        z = (torch.randn(2, 12, 5, 3) * spread).clamp(-32000, 32000)
        strings = prior.compress(z)
        assert torch.equal(prior.decompress(strings, (5, 3)), EntropyBottleneck.decompress(prior, strings, (5, 3)))


@pytest.mark.parametrize("spoil", [
    lambda t: t["z_prior._cdf_length"].fill_(10_000),
    lambda t: t["z_prior._cdf_length"].fill_(1),
    lambda t: t["z_prior._cdf_length"].neg_(),
    lambda t: t["z_prior._quantized_cdf"].fill_(0),
    lambda t: t["z_prior._quantized_cdf"].neg_(),
    lambda t: t["z_prior._offset"].fill_(-(2**31)),
    lambda t: t.update({"z_prior._cdf_length": t["z_prior._cdf_length"][:2].clone()}),
    lambda t: t.update({"z_prior._quantized_cdf": t["z_prior._quantized_cdf"].flatten()}),
])  # fmt: skip
def test_tables_that_make_no_sense(model, spoil):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoil(tensors)
    with pytest.raises(WeightsError, match="tables of z|do not fit"):
        type(model).from_state_dict(tensors)


@pytest.mark.parametrize("name", ["n" * 256, "n\udce4"])
def test_names_that_no_file_can_hold(name):
    with pytest.raises(WeightsError, match="name is printable text of up to 255 bytes"):
        codec.encode(micro_model("parallel", name=name), sample_picture("chelsea").crop((0, 0, 16, 16)))


def test_a_number_has_one_form():
    data = (FOLDER / "parallel.ef").read_bytes()
    longer = data[:5] + bytes([data[5] | 0x80, 0]) + data[6:-4]
    with pytest.raises(BitstreamError, match="makes no sense"):
        Container.unpack(longer + struct.pack("<I", zlib.crc32(longer)))


def test_a_level_beyond_the_highest():
    model = aware_model()
    data = Container.unpack(codec.encode(model, sample_picture("chelsea").crop((0, 0, 16, 16))))
    with pytest.raises(BitstreamError, match="rate that this model does not know"):
        codec.decode(replace(data, level=2 + 1 / 256).pack(), model)
