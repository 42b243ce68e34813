"""Released checkpoints: read without running them, and equal, stage by stage, to a plain version of the released code.

That version is in `released.py`. Where the reference fixtures are at hand, they are compared too.
"""

import io
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from released import CASES, COMMON, Reference, released, save
from torch import nn

from entroformer_lib.codec import codec
from entroformer_lib.errors import WeightsError
from entroformer_lib.weights.official import import_official, load_official
from entroformer_lib.weights.zoo import load_model

FIXTURES = {path.stem: path for path in (Path(__file__).parents[2] / "shared/reference/official_tiny").glob("*.pth")}

STAGES = {
    "encode_out": lambda m, r: m.g_a(r["x"]),
    "z": lambda m, r: m.h_a(r["y"]),
    "feat_hyper": lambda m, r: m.h_s(r["z_hat"]),
    "feat_context": lambda m, r: m.context_model(r["y_hat"]),
    "means": lambda m, r: m.entropy_parameters(r["feat_hyper"], r["feat_context"])[0],
    "log_scales": lambda m, r: m.entropy_parameters.bounded(
        m.entropy_parameters(r["feat_hyper"], r["feat_context"])[1]
    ),
    "nats_y": lambda m, r: -m.gaussian(r["y_hat"], r["means"], r["log_scales"].exp()).log(),
    "prob_z": lambda m, r: m.z_prior.likelihood(r["z_hat"]),
    "decode_out": lambda m, r: 2 * m.g_s(r["decode_in"]) - 1,
    "x_hat": lambda m, r: m.g_s(r["decode_in"]).clamp(0, 1),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # everything here is tiny
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Path and stages of every checkpoint, ours and the reference fixtures."""
    folder, found = tmp_path_factory.mktemp("official"), {}
    for name, c in CASES.items():
        reference = Reference(c, released(c))
        found[name] = save(released(c), folder / f"{name}.pth"), reference.stages()
        assert reference.gap > 1e-5, name
    for name, path in FIXTURES.items():
        found[name] = path, {key: torch.from_numpy(value) for key, value in np.load(path.with_suffix(".npz")).items()}
    for _, stages in found.values():
        log_sigma, stages["means"] = stages["params"].chunk(2, 1)
        stages["log_scales"] = log_sigma.clamp(min=-7)
    return found


@torch.inference_mode()
@pytest.mark.parametrize("name", [*CASES, *FIXTURES])
def test_every_stage_agrees(checkpoints, name):
    path, stages = checkpoints[name]
    model = load_official(path)
    errors = {
        key: ((run(model, stages) - stages[key]).abs().max() / stages[key].abs().max()) for key, run in STAGES.items()
    }
    assert max(errors.values()) <= 1e-5, errors


def state_dicts(parts):
    return {name: part.state_dict() for name, part in parts.items()}


def views(parts):
    """Transposed in memory, and pieces of a longer array."""
    turned = {
        name: {k: t.mT.contiguous().mT if t.dim() > 1 else t for k, t in d.items()}
        for name, d in state_dicts(parts).items()
    }
    log_sigma = turned["prob"]["log_sigma"].flatten()
    turned["prob"]["log_sigma"] = torch.cat((torch.ones(3), log_sigma, torch.ones(2)))[3:-2].view(1, -1, 1, 1)
    return turned


def more(parts):
    """What else may lie in a checkpoint, and a loop."""
    parts["prob"].whole = parts
    return {**parts, "epoch": 500, "optimizer": {"state": {0: torch.ones(3)}}}


FORMS = {
    "modules": lambda parts: parts,
    "dicts": state_dicts,
    "parallel modules": lambda parts: {name: nn.DataParallel(part) for name, part in parts.items()},
    "parallel dicts": lambda parts: state_dicts({name: nn.DataParallel(part) for name, part in parts.items()}),
    "double precision": lambda parts: {name: part.double() for name, part in parts.items()},
    "dicts of views": views,
    "more than modules": more,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(checkpoints, tmp_path, form, zipped):
    path = save(FORMS[form](released(COMMON)), tmp_path / "other.pth", _use_new_zipfile_serialization=zipped)
    ours, model = load_official(checkpoints["serial"][0]), load_official(path, top_k=4 if "dicts" in form else None)
    assert model.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values(), strict=True))


def test_top_k_is_as_asked_or_as_stored_or_32(checkpoints, tmp_path):
    assert load_official(checkpoints["serial"][0]).config.hyper_top_k == (4, 2, 2)
    assert load_official(checkpoints["serial"][0], top_k=9).config.hyper_top_k == (9, 4, 2)
    assert load_official(save(state_dicts(released(COMMON)), tmp_path / "dicts.pth")).config.hyper_top_k == (32, 16, 8)


@pytest.mark.parametrize("name", ["serial", "parallel", *FIXTURES])
def test_an_imported_model_codes_exactly(checkpoints, tmp_path, name):
    path, dst = checkpoints[name][0], tmp_path / "new folder" / "imported.safetensors"
    import_official(path, dst)
    model, direct = load_model(dst, device="cpu"), load_official(path)
    assert (direct.name, direct.card, direct.training) == (path.stem, model.card, False)
    assert model.gaussian.bound.bound == direct.z_prior.bound.bound == torch.tensor(1e-12)
    with torch.no_grad():
        for each in (model, direct):
            each.g_a[-1].weight *= 20  # latents that are not all zero
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    x = codec.to_tensor(picture, model)
    with torch.inference_mode():
        y_hat, x_hat = torch.floor(model.g_a(x) + 0.5), direct(x)["x_hat"].clamp(0, 1)
    coded = model.compress(x)
    assert y_hat.abs().max() > 3
    assert torch.equal(direct.decompress_latents(coded["strings"], coded["shape"])[0], y_hat)
    assert codec.decode(codec.encode(model, picture), direct) == codec.to_picture(x_hat)


def test_import_does_not_replace_unasked(checkpoints, tmp_path):
    dst = tmp_path / "a.safetensors"
    dst.write_bytes(b"precious")
    with pytest.raises(WeightsError, match="exists already"):
        import_official(checkpoints["serial"][0], dst)
    assert dst.read_bytes() == b"precious"
    import_official(checkpoints["serial"][0], dst, force=True, top_k=5)
    assert load_model(dst, device="cpu").config.top_k == 5
    with pytest.raises(WeightsError, match="safetensors"):
        import_official(checkpoints["serial"][0], tmp_path / "a.pth")


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


EVIL = {
    f"{os.system.__module__}.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "builtins.eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"),
    "builtins.getattr": lambda marker: Calls(getattr, marker, "touch"),
    f"{open.__module__}.open": lambda marker: Calls(open, str(marker), "w"),
    "torch.serialization.load": lambda marker: Calls(torch.load, str(marker)),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", EVIL)
def test_nothing_in_the_file_runs(tmp_path, name, zipped):
    marker, parts = tmp_path / "it-ran", released(COMMON)
    parts["prob"].extra = EVIL[name](marker)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(EVIL[name](marker)))
    for path in (save(parts, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped), tmp_path / "bare.pth"):
        with pytest.raises(WeightsError, match=f"asks for '{name}',"):
            load_official(path)
    assert not marker.exists()


def test_the_authors_code_is_not_used_even_if_it_can_be_imported(checkpoints, monkeypatch):
    for name in ("module", "module.entroformer"):
        monkeypatch.setitem(sys.modules, name, None)  # any look at it raises ImportError
    load_official(checkpoints["serial"][0])


def but(part, name, tensor):
    """State dicts with another tensor in one place."""
    return lambda parts: {**(dicts := state_dicts(parts)), part: {**dicts[part], name: tensor}}


TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"
ROTTEN = Calls(
    torch._utils._rebuild_tensor_v2, torch.ones(6)._typed_storage(), 1, (1, 6, 1, 1), (6, 1, 1, 1), False, {}
)
WRONG = {
    "no dict of the parts encode, decode": lambda parts: [parts],
    "has no 'cit_pn'": lambda parts: {name: part for name, part in parts.items() if name != "cit_pn"},
    "has no 'prob.mu'": lambda parts: {**parts, "prob": {}},
    "has no 'encode.encoder.0.weight'": lambda parts: {**parts, "encode": parts["prob"]},
    "'decode.decoder.1.beta' has shape [9], and should have [8]": but("decode", "decoder.1.beta", torch.ones(9)),
    "'cit_pn.2.weight' has shape [24, 96], and": but("cit_pn", "2.weight", torch.ones(24, 96)),
    f"'cit_hd.trans_blocks.0.0.{TABLE}' has shape [49, 12]": but(
        "cit_hd", f"trans_blocks.0.0.{TABLE}", torch.ones(49, 12)
    ),
    f"'cit_ar.blocks.0.{TABLE}' has shape [50, 12]": but("cit_ar", f"blocks.0.{TABLE}", torch.ones(50, 12)),
    "Heads 7 wide": but("cit_ar", f"blocks.0.{TABLE}", torch.ones(49, 7)),
    "no model. Every size": but("cit_he", "mlp_head.1.weight", torch.tensor(1.0)),
    "a tensor 'cit_ar.mlp_head.weight', which has no place": but("cit_ar", "mlp_head.weight", torch.ones(2)),
    "'prob.mu' reaches beyond its numbers": but("prob", "mu", ROTTEN),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_content_is_named(tmp_path, message):
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        load_official(save(WRONG[message](released(COMMON)), tmp_path / "wrong.pth"))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def zip_without(data: bytes, ending: str) -> bytes:
    """The archive without one of its entries."""
    copied = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(copied, "w") as fresh:
        for name in old.namelist():
            if not name.endswith(ending):
                fresh.writestr(name, old.read(name))
    return copied.getvalue()


DAMAGED = {
    "cannot be read: File is not a zip file": lambda zipped, legacy: zipped[:-30],
    "cannot be read: Bad CRC-32": lambda zipped, legacy: zipped.replace(
        released(COMMON)["prob"].mu.detach().numpy().tobytes(), bytes(24)
    ),
    "has no 'good/data/5'": lambda zipped, legacy: zip_without(zipped, "/data/5"),
    "a zip archive, but not a checkpoint": lambda zipped, legacy: zip_without(zipped, "data.pkl"),
    "are not all there": lambda zipped, legacy: legacy[:-30],
    "not a checkpoint written by PyTorch, or is damaged": lambda zipped, legacy: legacy[:5000],
    "not a checkpoint written by PyTorch, or": lambda zipped, legacy: b"",
    "not a checkpoint written by PyTorch, or is": lambda zipped, legacy: b"Dear reader",
    "a pickle, but not a checkpoint": lambda zipped, legacy: pickle.dumps({"encode": {}}),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_files_are_told(tmp_path, message):
    content, path = released(COMMON), tmp_path / "good.pth"
    data = [save(content, path, _use_new_zipfile_serialization=zipped).read_bytes() for zipped in (True, False)]
    path.write_bytes(DAMAGED[message](*data))
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_official(path)


def test_unreadable_paths_are_told(tmp_path):
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "no.pth", "No such file or directory")):
        with pytest.raises(WeightsError, match=message):
            load_official(path)
