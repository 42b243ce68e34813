"""More latents: the best linear ones for what is missing, and nothing else changes."""

import sys
from pathlib import Path

import torch
from conftest import LMBDAS, micro_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import more_latents


def test_the_regression_finds_what_is_missing():
    torch.manual_seed(0)
    b = torch.randn(4000, more_latents.PIXELS).double() * torch.linspace(2, 0.1, more_latents.PIXELS)
    missing = torch.linalg.qr(torch.randn(more_latents.PIXELS, 3).double())[0].T  # three directions
    r = b @ missing.T @ missing + 0.01 * torch.randn(b.shape)
    analysis, synthesis, explained = more_latents.regression(b.T @ b / len(b), r.T @ b / len(b), 3)
    torch.testing.assert_close(synthesis @ synthesis.T, torch.eye(3).double(), rtol=0, atol=1e-9)
    left = r - b @ analysis.T @ synthesis
    assert left.square().sum() < 0.05 * r.square().sum()
    total = r.square().sum(1).mean()
    torch.testing.assert_close(explained.sum() / total, 1 - left.square().sum() / r.square().sum(), rtol=0, atol=0.05)


def test_old_latents_and_their_distributions_stay():
    torch.manual_seed(0)
    blocks = dict(transforms="blocks", stages=((8, 12, 1),), linear_path="dct", lmbdas=LMBDAS, rate_aware=True)
    model = micro_model("parallel", **blocks)
    M = model.config.M
    rows, back = 0.01 * torch.randn(5, more_latents.PIXELS), 0.01 * torch.randn(5, more_latents.PIXELS)
    larger = more_latents.with_channels(model, rows, back, torch.full((5,), 0.25)).eval()
    x = torch.rand(1, 3, 128, 64)
    with torch.no_grad():
        y, more = model.g_a(x), larger.g_a(x)
        torch.testing.assert_close(more[:, :M], y, rtol=0, atol=1e-5)
        expected = torch.einsum("ck,bkhw->bchw", rows, torch.nn.functional.pixel_unshuffle(2 * x - 1, 16))
        torch.testing.assert_close(more[:, M:], expected, rtol=0, atol=1e-5)
        nothing = torch.zeros_like(more[:, M:])
        torch.testing.assert_close(larger.g_s(torch.cat((y, nothing), 1)), model.g_s(y), rtol=0, atol=1e-5)
        y_hat, level = y.round(), torch.tensor([1.0])
        hyper = model.hyper_synthesis(torch.zeros(1, model.config.Z, 2, 1), model.rate(level))
        means, scales = model.distributions(y_hat, hyper, rate=model.rate(level))
        theirs = larger.distributions(torch.cat((y_hat, nothing), 1), hyper, rate=larger.rate(level))
        torch.testing.assert_close(theirs[0][:, :M], means)
        torch.testing.assert_close(theirs[1][:, :M], scales)
        assert theirs[0][:, M:].eq(0).all()
