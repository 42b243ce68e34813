"""Released checkpoints: read without running them, and equal, stage by stage, to a plain version of the released code.

That version is written down here a second time, with the most direct arithmetic, and pickled in the authors' layout.
Where the reference fixtures are at hand, they are compared too.
"""

import copy
import io
import math
import os
import pickle
import re
import sys
import types
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from entroformer_lib.coding import codec
from entroformer_lib.errors import WeightsError
from entroformer_lib.models.official import import_official, load_official
from entroformer_lib.models.zoo import load_model

FIXTURES = {path.stem: path for path in (Path(__file__).parents[2] / "shared/reference/official_tiny").glob("*.pth")}
COMMON = dict(serial=True, N=8, M=12, Z=6, dim=24, heads=2, layers=2, ratio=4, k=4, size=(1, 64, 128))
COMMON |= dict(side=7, shared=True, hyper_sides=(7, 5, 5))  # table of the context model, one for all blocks, and of h_a
CASES = {
    "serial": COMMON,
    "parallel": COMMON
    | dict(
        serial=False, dim=40, heads=5, layers=3, k=6, side=3, shared=False, hyper_sides=(5, 7, 3), size=(2, 128, 64)
    ),
    "one wide head": COMMON | dict(M=20, heads=1, k=40, side=9, hyper_sides=(9, 3, 5), ratio=2, size=(1, 128, 128)),
    "narrow heads": COMMON | dict(serial=False, N=5, Z=9, dim=32, heads=8, layers=1, k=8, size=(1, 192, 64)),
}

# ---- the released code, plainly --------------------------------------------------------------------------------------


class Part(nn.Module):
    """Any of the authors' classes: children and attributes only, the arithmetic is in `Reference`."""

    __module__ = "module.entroformer"

    def __init__(self, **items):
        super().__init__()
        for name, item in items.items():
            setattr(self, name, nn.ModuleList(item) if isinstance(item, list) else item)


def released(c: dict) -> dict[str, nn.Module]:
    """The seven parts with random weights that make lively latents, the same at every call."""
    torch.manual_seed(c["dim"])
    N, M, Z, dim, wide = c["N"], c["M"], c["Z"], c["dim"], c["ratio"] * c["dim"]

    def gdn(inverse):
        beta, gamma = torch.rand(N) + 0.5, torch.rand(N, N) * 0.5 - 0.1  # some gammas lie below their bound
        return Part(beta=nn.Parameter(beta), gamma=nn.Parameter(gamma), inverse=inverse, beta_bound=torch.ones(1))

    def norm():
        layer = nn.LayerNorm(dim)
        layer.weight.data, layer.bias.data = torch.rand(dim) + 0.5, torch.randn(dim) * 0.1
        return layer

    def block(side=None):
        attention = Part(qkv=nn.Linear(dim, 3 * dim, bias=False), o=nn.Linear(dim, dim, bias=False))
        attention.qkv.weight.data *= 2
        if side:
            attention.relative_attention_bias = nn.Embedding(side**2, dim // c["heads"])
        net = nn.Sequential(nn.Linear(dim, wide), nn.LeakyReLU(0.2), nn.Linear(wide, dim))
        return Part(layer=[Part(SelfAttention=attention, layer_norm=norm()), Part(norm=norm(), fn=Part(net=net))])

    def hyper(inputs, sides, scales, head):
        stages = [nn.ModuleList([block(side)]) for side in sides]
        return Part(to_patch_embedding=nn.Linear(inputs, dim), trans_blocks=stages, scale_blocks=scales, mlp_head=head)

    def down():
        return nn.Conv2d(dim, dim, 3, 2, 1)

    def up():
        return Part(conv2d=nn.Conv2d(dim, 4 * dim, 3, padding=1), up=nn.PixelShuffle(2))

    def upsample(a, b):
        return Part(transpose=nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1))

    encoder = [layer for a, b in pairwise((3, N, N, N, M)) for layer in (nn.Conv2d(a, b, 5, 2, 2), gdn(False))]
    decoder = [layer for a, b in pairwise((M, N, N, N, 3)) for layer in (upsample(a, b), gdn(True))]
    blocks = [block(c["side"] if i == 0 or not c["shared"] else None) for i in range(c["layers"])]
    parts = {
        "encode": Part(encoder=nn.Sequential(*encoder[:-1]), norm=Part),
        "decode": Part(decoder=nn.Sequential(*decoder[:-1]), norm=Part),
        "cit_he": hyper(M, c["hyper_sides"], [down(), down()], nn.Sequential(norm(), nn.Linear(dim, Z))),
        "cit_hd": hyper(Z, c["hyper_sides"][::-1], [up(), up()], nn.Identity()),
        "prob": Part(mu=nn.Parameter(torch.randn(1, Z, 1, 1)), log_sigma=nn.Parameter(torch.rand(1, Z, 1, 1))),
        "cit_ar": Part(to_patch_embedding=nn.Linear(M, dim), blocks=blocks, attn_topk=c["k"], drop=nn.Dropout(0.0)),
        "cit_pn": nn.Sequential(nn.Conv2d(2 * dim, 4 * dim, 1), nn.LeakyReLU(0.2), nn.Conv2d(4 * dim, 2 * M, 1)),
    }
    parts["cit_pn"][2].weight.data *= 5
    if c["serial"]:
        parts["cit_ar"].sos_pred_token = nn.Parameter(torch.randn(1, 1, dim))
    return parts


class Reference:
    """The stages of the released code in float64, with loops over pairs of sites and [n, n, d] position tensors."""

    def __init__(self, c: dict, parts: dict[str, nn.Module]):
        self.c, self.parts = c, copy.deepcopy(nn.ModuleDict(parts)).double()
        self.gap = 1.0  # smallest step from a k-th score to the next: rounding noise must not decide between the two

    def transform(self, layers, x):
        for layer in layers:
            if hasattr(layer, "beta"):
                beta = layer.beta.clamp(min=(1e-6 + 2**-36) ** 0.5) ** 2 - 2**-36
                gamma = layer.gamma.clamp(min=2**-18) ** 2 - 2**-36
                norm = (beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x * x)).sqrt()
                x = x * norm if layer.inverse else x / norm
            else:
                x = getattr(layer, "transpose", layer)(x)
        return x

    def block(self, block, table, x, width, k, mask):
        """x: [B, n, D], table: [side^2, d], mask: [n, n] of pairs that may be attended to."""
        first, second = block.layer
        n, side, sites = x.size(1), math.isqrt(len(table)), [divmod(i, width) for i in range(x.size(1))]
        bucket = torch.zeros(n, n, dtype=torch.long)
        for i, (row, column) in enumerate(sites):
            for j, (dy, dx) in enumerate((r - row, s - column) for r, s in sites):
                if abs(dy) + abs(dx) <= side // 2:
                    bucket[i, j] = (dy + side // 2) * side + dx + side // 2
        qkv = first.SelfAttention.qkv(first.layer_norm(x)).unflatten(-1, (self.c["heads"], -1, 3))  # [B, n, H, d, 3]
        q, key, v = qkv.unbind(-1)
        scores = torch.einsum("bihd,bjhd->bhij", q, key) + torch.einsum("bihd,ijd->bhij", q, table[bucket])
        scores = (scores * self.c["dim"] ** -0.5).masked_fill(~mask, -1e300)
        if k < n:
            best = scores.sort(-1, descending=True).values
            steps = (best[..., k - 1] - best[..., k])[best[..., k] > -1e300]
            self.gap = min([self.gap, *steps.tolist()])
            scores = scores.masked_fill(scores < best[..., k - 1 : k], -1e300)
        x = x + first.SelfAttention.o(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))
        return x + second.fn.net(second.norm(x))

    def hyper(self, part, x, ks):
        """x: [B, C, h, w]  ->  z or the hyperprior's feature."""
        x = part.to_patch_embedding(x.movedim(1, -1))
        for stage, k in enumerate(ks):
            B, h, w, dim = x.shape
            block = part.trans_blocks[stage][0]
            table = block.layer[0].SelfAttention.relative_attention_bias.weight
            x = self.block(block, table, x.flatten(1, 2), w, k, torch.ones(h * w, h * w, dtype=torch.bool))
            x = x.view(B, h, w, dim)
            if stage < 2:
                scale = part.scale_blocks[stage]
                x = x.movedim(-1, 1)
                x = (scale.up(scale.conv2d(x)) if hasattr(scale, "up") else scale(x)).movedim(1, -1)
        return part.mlp_head(x).movedim(-1, 1)

    def context(self, y_hat):
        """y_hat: [B, M, h, w]  ->  the context feature."""
        part, (h, w) = self.parts["cit_ar"], y_hat.shape[-2:]
        odd = torch.tensor([[(r + s) % 2 == 1 for s in range(w)] for r in range(h)])
        mask = torch.ones(h * w, h * w, dtype=torch.bool).tril()
        if not self.c["serial"]:
            y_hat, mask = y_hat * odd, odd.flatten()[None, :] | torch.eye(h * w, dtype=torch.bool)
        x = part.to_patch_embedding(y_hat.flatten(2).mT)
        for block in part.blocks:
            owner = part.blocks[0] if self.c["shared"] else block
            x = self.block(block, owner.layer[0].SelfAttention.relative_attention_bias.weight, x, w, self.c["k"], mask)
        if self.c["serial"]:
            return torch.cat((part.sos_pred_token.expand(len(x), 1, -1), x[:, :-1]), 1).mT.unflatten(-1, (h, w))
        return x.mT.unflatten(-1, (h, w)) * ~odd

    @torch.no_grad()
    def stages(self) -> dict[str, torch.Tensor]:
        """Under the names of the fixtures' arrays."""
        p, k, (B, H, W) = self.parts, self.c["k"], self.c["size"]
        ks = (k, max(2, k // 2), max(2, k // 4))
        r = {"x": torch.rand(B, 3, H, W).double()}
        r["encode_out"] = self.transform(p["encode"].encoder, 2 * r["x"] - 1)
        r["y"] = (r["encode_out"] * 4 / r["encode_out"].std()).float().double()
        r["y_hat"] = torch.floor(r["y"] + 0.5)
        r["z"] = self.hyper(p["cit_he"], r["y"], ks)
        r["z_hat"] = torch.floor(3 * r["z"] + 0.5)
        r["feat_hyper"], r["feat_context"] = self.hyper(p["cit_hd"], r["z_hat"], ks[::-1]), self.context(r["y_hat"])
        r["params"] = p["cit_pn"](torch.cat((r["feat_hyper"], r["feat_context"]), 1)).float().double()
        log_sigma, mu = r["params"].chunk(2, 1)
        r["nats_y"] = -mass(r["y_hat"], mu, log_sigma.clamp(min=-7).exp()).log()
        r["prob_z"] = mass(r["z_hat"], p["prob"].mu, p["prob"].log_sigma.exp())
        r["decode_in"] = r["y_hat"] / 16
        r["decode_out"] = self.transform(p["decode"].decoder, r["decode_in"])
        r["x_hat"] = (r["decode_out"] / 2 + 0.5).clamp(0, 1)
        return {name: value.float() for name, value in r.items()}


def mass(v, mu, sigma):
    """Probability of the integers v, as released."""
    near, far = ((v - mu).abs() - 0.5) / (sigma * 2**0.5), ((v - mu).abs() + 0.5) / (sigma * 2**0.5)
    return (0.5 * torch.erfc(near) - 0.5 * torch.erfc(far)).clamp(min=1e-12)


def save(content, path: Path, **options) -> Path:
    """torch.save while the authors' class can be imported; when it is loaded, it cannot."""
    authors = {name: types.ModuleType(name) for name in ("module", "module.entroformer")}
    authors["module.entroformer"].Part = Part
    sys.modules.update(authors)
    try:
        with warnings.catch_warnings(action="ignore"):  # the old format misses the source of the class
            torch.save(content, path, **options)
    finally:
        for name in authors:
            del sys.modules[name]
    return path


# ---- the tests -------------------------------------------------------------------------------------------------------

STAGES = {
    "encode_out": lambda m, r: m.g_a(r["x"]),
    "z": lambda m, r: m.h_a(r["y"]),
    "feat_hyper": lambda m, r: m.h_s(r["z_hat"]),
    "feat_context": lambda m, r: m.context_model(r["y_hat"]),
    "means": lambda m, r: m.entropy_parameters(r["feat_hyper"], r["feat_context"])[0],
    "log_scales": lambda m, r: m.entropy_parameters(r["feat_hyper"], r["feat_context"])[1].log(),
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
    assert (direct.name, direct.path, direct.card, direct.training) == (path.stem, path, model.card, False)
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
    "io.open": lambda marker: Calls(open, str(marker), "w"),
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
