"""The long run's network for the GPU computes what the library's does. (Its graph needs a GPU.)"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LMBDAS

from entroformer_lib.models import attention, gain, position
from entroformer_lib.models.config import named_config
from entroformer_lib.models.context import NO_GAPS, Gaps
from entroformer_lib.models.network import Network

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import long_run_gpu


@pytest.fixture
def restored(monkeypatch):
    """`install` changes classes: these are as before behind the test."""
    for where, name in (
        (attention, "sinusoidal_positions"),
        (attention.Block, "forward"),
        (position.RelativePosition, "forward"),
        (gain, "at_level"),
        (gain.RateGain, "forward"),
    ):
        monkeypatch.setattr(where, name, getattr(where, name))
    monkeypatch.setattr(long_run_gpu, "low", torch.float32)
    monkeypatch.setattr(long_run_gpu, "ONE_HOT", {})
    # Of two nearly equal scores bisection keeps both
    monkeypatch.setattr(long_run_gpu, "kth_largest", lambda scores, lowest, k: scores.topk(int(k)).values[..., -1:])


def test_outputs_and_gradients_are_the_networks_own(restored):
    blocks = dict(transforms="blocks", stages=((8, 16, 2),), linear_path="dct", M=16, rate_aware=True, lmbdas=LMBDAS)
    torch.manual_seed(0)
    model = Network(named_config("tiny-parallel", **blocks)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    x, level = torch.rand(3, 3, 256, 256), torch.tensor([0.0, 1.0, 2.0])

    def results() -> tuple[dict, list]:
        out = model(x, level=level)
        loss = sum(-p.log().mean() for p in out["likelihoods"].values()) + (out["x_hat"] - x).square().mean()
        used = [p for name, p in model.named_parameters() if "quantiles" not in name]
        return out, torch.autograd.grad(loss, used, allow_unused=True)

    expected, gradients = results()
    long_run_gpu.install(model)
    found, others = results()
    torch.testing.assert_close(found["x_hat"], expected["x_hat"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["likelihoods"]["y"], expected["likelihoods"]["y"], rtol=1e-3, atol=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-3 * one.norm() + 1e-7


def test_a_batch_is_cut_from_the_pictures(restored):
    colours = ((10, 20, 30), (200, 100, 50))
    photographs = [(".png", np.full((300, 320, 3), colour, np.uint8)) for colour in colours]
    photographs.append((".jpg", np.zeros((100, 300, 3), np.uint8)))  # too small
    graphics = np.full((1, 3, 256, 256), 51, np.uint8)
    pictures = long_run_gpu.Pictures(photographs, graphics, torch.device("cpu"))
    assert len(pictures.rows) == 2 * long_run_gpu.VERSIONS
    x = torch.zeros(40, 3, 256, 256)
    pictures.fill(x)
    drawn = long_run_gpu.DRAWN
    assert x[:drawn].eq(0.2).all()
    found = {tuple(sorted((crop.amin((1, 2)) * 255).round().int().tolist())) for crop in x[drawn:]}
    assert found == {tuple(sorted(colour)) for colour in colours}
    assert torch.equal(x[drawn:].amin((2, 3)), x[drawn:].amax((2, 3)))  # no pixel of another picture


def test_a_threshold_keeps_the_k_largest():
    scores = torch.randn(5, 40)
    threshold = long_run_gpu.kth_largest(scores, scores.amin(-1, keepdim=True), 16)
    kept = (scores >= threshold).sum(-1)
    assert ((kept >= 16) & (kept <= 17)).all()


BLOCKS = dict(transforms="blocks", stages=((8, 16, 1),), linear_path="dct", M=12, rate_aware=True, lmbdas=LMBDAS)
HIDDEN = Gaps(missing=torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.3)
ONE_WAY = Gaps(one_way=torch.tensor([True, False]))


@pytest.mark.parametrize(
    "variant, fields, gaps",
    [
        ("parallel", {"top_k": None}, NO_GAPS),
        ("parallel", {"position": "none"}, ONE_WAY),
        ("context", {"position": "absolute"}, NO_GAPS),
        ("context", {"position": "relative_1d"}, HIDDEN),
        ("context", {"position": "relative_2d", "radius": 5}, NO_GAPS),
        ("serial", {"activation": "gelu"}, HIDDEN),
        ("serial", {"share_position": True, "top_k": 8}, NO_GAPS),
        ("groupedmixer", {"groups": (2, 2, 2), "inner": "top_k"}, NO_GAPS),
        ("groupedmixer", {"groups": (2, 2, 2), "window": 4}, NO_GAPS),
    ],
)
def test_an_entropy_model_of_any_kind_is_the_librarys_own(variant, fields, gaps, restored):
    torch.manual_seed(0)
    model = Network(named_config(f"tiny-{variant}", **BLOCKS, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    y, level = 3 * torch.randn(2, 12, 16, 16), torch.tensor([0.0, 2.0])

    def results() -> tuple[torch.Tensor, list]:
        likelihoods, _ = model.likelihoods(model.scaled(y, level), gaps=gaps, level=level)
        loss = sum(-p.log().mean() for p in likelihoods.values())
        return loss, torch.autograd.grad(loss, list(model.context_model.parameters()), allow_unused=True)

    expected, gradients = results()
    long_run_gpu.install(model)
    found, others = results()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-3 * one.norm() + 1e-6


@pytest.mark.parametrize(
    "word", ["serial:1e-3", "context/missing=0.5:1e-3", "parallel@64#1/one_way=0.5:1e-3", "hyperprior-cnn:1e-3",
             "groupedmixer/groups=[2,2,2]/inner=none:1e-3"]
)  # fmt: skip
def test_an_entropy_model_alone_learns_behind_frozen_transforms(word, restored):
    device = torch.device("cpu")
    model, note = long_run_gpu.entropy_model(word, named_config("tiny-serial", **BLOCKS), {}, device)
    long_run_gpu.install(model)
    latents = long_run_gpu.Latents(model, 3, device)
    latents.capture()
    pictures = [(".png", np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))]
    source = long_run_gpu.Pictures(pictures, np.zeros((1, 3, 256, 256), np.uint8), device)
    latents.next(source)
    step = long_run_gpu.RateStep(model, latents, note["lr"], **note["hidden"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = step.capture(source)
    step.lr.fill_(1e-3)
    one()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not any(name.startswith(("g_a.", "g_s.", "gain.")) for name in changed)
    assert (step.missing, step.one_way) == (0.5 * ("missing" in word), 0.5 * ("one_way" in word))


def test_weights_in_pieces_come_back(tmp_path, restored, monkeypatch):
    monkeypatch.setattr(long_run_gpu, "PIECE", 200_000)
    word, config = "serial#2/top_k=8:1e-3", named_config("tiny-serial", **BLOCKS)
    model, note = long_run_gpu.entropy_model(word, config, {}, torch.device("cpu"))
    own = {f"{note['name']}/{k}": v for k, v in long_run_gpu.rounded(model, ("g_a.", "g_s.", "gain.")).items()}
    long_run_gpu.in_pieces(own, tmp_path, "kinds", {"kinds": [note]})
    pieces = sorted(tmp_path.glob("kinds-*"))
    before, about = long_run_gpu.read_pieces(pieces)
    assert len(pieces) > 1 and before.keys() == own.keys() and "serial_2-top_k8" in about["note"]
    with torch.no_grad():
        model.context_model.embed.weight.zero_()
    again, _ = long_run_gpu.entropy_model(word, config, {}, torch.device("cpu"), before)
    assert torch.equal(again.context_model.embed.weight, before["serial_2-top_k8/context_model.embed.weight"])


def test_what_of_the_old_entropy_model_a_new_one_begins_with(restored):
    """Nothing, with + all that fits, with ^ its hyperprior."""
    config, cpu = named_config("tiny-parallel", **BLOCKS), torch.device("cpu")
    torch.manual_seed(7)
    old = Network(config).state_dict()
    parts = ("h_s", "context_model")
    for ending, begins in (("", ()), ("+", parts), ("^", parts[:1])):
        model, note = long_run_gpu.entropy_model(f"serial{ending}:1e-3", config, old, cpu)
        for name, parameter in model.named_parameters():
            if name in old and name.split(".")[0] in parts and parameter.dim() > 1:
                assert torch.equal(parameter, old[name]) == (name.split(".")[0] in begins), name
        assert note["fresh"] == (ending != "+")
