"""Some of the mutated files of `benchmarks/fuzz.py`, and everything that it found."""

import json
import pickle
import struct
import zipfile
import zlib
from dataclasses import replace

import pytest
import torch
from conftest import VARIANTS, micro_model
from format_vectors import FOLDER
from safetensors.torch import load_file, save_file

from benchmarks import fuzz
from entroformer_lib.codec import codec
from entroformer_lib.codec.container import Container
from entroformer_lib.entroformer import Entroformer, least_weights
from entroformer_lib.errors import BitstreamError, ConfigError, WeightsError
from entroformer_lib.exact.coder import snap
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.rangecoder import SymbolDecoder
from entroformer_lib.weights.official import load_official
from entroformer_lib.weights.zoo import load_model, save_weights


@pytest.mark.parametrize("part", range(2))
def test_mutated_files(part):
    result = fuzz.fuzz(1000, seed=1, first=1000 * part)
    assert result["found"] == []
    assert all(sum(outcomes.values()) and "refused" in outcomes for outcomes in result["outcomes"].values())


def test_every_field_of_the_header_is_changed():
    files = fuzz.Files()
    seen = {files.case(fuzz.random.Random(n))[2] for n in range(300)}
    assert seen == {*fuzz.FIELDS, "any byte", "any byte, right CRC"}


def test_what_goes_wrong_is_found(monkeypatch):
    """A decoder without its checks of the latents gives wrong pictures, and any other error than ours is noticed."""
    files = fuzz.Files()
    _, data, *_ = files.originals[0]
    monkeypatch.setattr(files, "case", lambda chance: (0, fuzz.forged(Container.unpack(data), "y", chance), "y"))
    monkeypatch.setattr(SymbolDecoder, "finish", lambda self: None)
    monkeypatch.setattr(codec, "latents_checksum", lambda y_hat, z_hat: Anything())
    assert "wrong" in {fuzz.outcome(files.decode, fuzz.random.Random(n))[0] for n in range(40)}
    monkeypatch.setattr(codec, "latents_checksum", None)
    assert "traceback" in {fuzz.outcome(files.decode, fuzz.random.Random(n))[0] for n in range(40)}


class Anything:
    def __ne__(self, other):
        return False


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
    """A weights file with other metadata or another config."""
    path = tmp_path / "x.safetensors"
    save_weights(micro_model("parallel"), path, {})

    def change(metadata: dict | None = None, config: bytes | None = None, **tensors):
        kept = load_file(path)
        if config is not None:
            kept["_extra_state"] = torch.tensor(list(config), dtype=torch.uint8)
        save_file({**kept, **tensors}, path, metadata={"format": "entroformer", "card": "{}", **(metadata or {})})
        return path

    return change


@pytest.mark.parametrize("metadata, sentence", [
    (dict(card="no JSON"), "card in .* no record"),
    (dict(card="[1]"), "card in .* no record"),
    (dict(card="[" * 100_000), "card in .* no record"),
    (dict(transforms="x"), "transforms in .* no record"),
    (dict(transforms="[]"), "transforms in .* no record"),
    (dict(transforms="{}"), "where its transforms are"),
    (dict(transforms='{"name": 1, "sha256": []}'), "where its transforms are"),
])  # fmt: skip
def test_metadata_that_are_no_record(changed, metadata, sentence):
    with pytest.raises(WeightsError, match=sentence):
        load_model(changed(metadata))


def test_a_config_that_is_no_text(changed):
    with pytest.raises(WeightsError, match="in no text"):
        load_model(changed(config=b"\xff\xfe"))
    with pytest.raises(WeightsError, match="in no text"):
        load_model(changed(_extra_state=torch.tensor([1.5, 2.5])))


@pytest.mark.parametrize("fields", [
    dict(dim=16384, heads=1), dict(M=16384), dict(N=16384), dict(context_layers=32, dim=2400), dict(ffn_ratio=32),
])  # fmt: skip
def test_a_config_of_a_larger_network_is_refused_before_it_is_built(changed, fields, monkeypatch):
    config = json.loads(micro_model("parallel").config.to_json()) | fields
    path = changed(config=json.dumps(config).encode())
    monkeypatch.setattr(Entroformer, "__init__", None)
    with pytest.raises(WeightsError, match="larger network"):
        load_model(path)


@pytest.mark.parametrize("fields", [
    dict(dim=10**9), dict(context_layers=33), dict(radius=65), dict(groups=(12, 16, 16)), dict(window=2000),
    dict(lmbdas=(1, 10**400)), dict(lmbdas=tuple(range(1, 2000))), dict(scale_floor=float("inf")),
])  # fmt: skip
def test_configs_that_no_machine_can_hold(fields):
    with pytest.raises(ConfigError):
        named_config("tiny-groupedmixer", **fields)


@pytest.mark.parametrize("size", ["tiny", "study"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_have_the_weights_that_are_expected_at_least(size, variant):
    """And not many times as many, or a small file could claim a large network."""
    config = named_config(f"{size}-{variant}")
    count = sum(tensor.numel() for tensor in Entroformer(config).state_dict().values())
    assert least_weights(config) <= count < 4 * least_weights(config)


def test_small_networks_too():
    for row in json.loads((FOLDER / "vectors.json").read_text()).values():
        config = EntroformerConfig.from_json(json.dumps(row["config"]))
        assert least_weights(config) <= sum(parameter.numel() for parameter in Entroformer(config).parameters())


def test_tables_that_are_missing():
    tensors = micro_model("parallel").state_dict()
    del tensors["z_prior._quantized_cdf"]
    with pytest.raises(WeightsError, match="lack z_prior._quantized_cdf"):
        Entroformer.from_state_dict(tensors)


@pytest.mark.parametrize("name", ["z_prior", "z_priorx.quantiles", "h_s.more\n"])  # the first two trip CompressAI
def test_tensors_that_nobody_knows(name):
    tensors = micro_model("parallel").state_dict() | {name: torch.zeros(1)}
    with pytest.raises(WeightsError, match="describes no '") as caught:
        Entroformer.from_state_dict(tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["U\nh", "\x1b[31mred", "a\u202eb"])
def test_names_that_would_change_what_a_terminal_shows(name):
    whole = Container.unpack((FOLDER / "parallel.ef").read_bytes())
    with pytest.raises(WeightsError, match="printable"):
        replace(whole, model=name).pack()
    good = replace(whole, model="x" * len(name.encode())).pack()[:-4]
    data = good.replace(b"x" * len(name.encode()), name.encode(), 1)
    with pytest.raises(BitstreamError):
        Container.unpack(data + struct.pack("<I", zlib.crc32(data)))


def test_a_scale_that_is_no_number():
    """Finite weights can be so large that what they predict is none; the coder's table of scales has no such row."""
    with pytest.raises(WeightsError, match="not a finite number"):
        snap(torch.zeros(2), torch.tensor([0.0, float("nan")]))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def archive(path, pickled: bytes, how: int = zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("x/data.pkl", pickled)
    return path


@pytest.mark.parametrize("pickled, sentence", [
    (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo with gaps"),  # Python would allocate 34 GB and fill them
    (b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.", "more tuples"),  # and here overflow the stack
    (b"\x80\x02N" + b"\x85" * 200_000 + b".", "more tuples"),
])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_grow(tmp_path, pickled, sentence, zipped):
    path = tmp_path / "x.pth"
    if zipped:
        archive(path, pickled)
    else:
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickled)
        path.write_bytes(path.read_bytes() + pickled * 3)
    with pytest.raises(WeightsError, match=sentence):
        load_official(path)


def test_archives_that_grow(tmp_path):
    path = archive(tmp_path / "x.pth", b"\x80\x02]" + b"N" * 10_000 + b".", zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed"):
        load_official(path)


def test_a_string_that_claims_all_memory(tmp_path):
    path = archive(tmp_path / "x.pth", b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"N.")
    with pytest.raises(WeightsError, match="damaged"):
        load_official(path)
