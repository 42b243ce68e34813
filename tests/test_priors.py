import numpy as np
import pytest
import torch

from entroformer_lib.exact import hyper_latents
from entroformer_lib.models.priors import FactorizedPrior, GaussianConditional, GaussianPrior, gaussian_mass, ste_round


@pytest.mark.parametrize("mean, scale", [(0.0, 0.11), (0.3, 0.5), (-2.7, 3.0), (11.5, 40.0)])
def test_likelihoods_of_y_sum_to_one(mean, scale):
    v = torch.arange(-400.0, 401, dtype=torch.float64)
    mass = gaussian_mass(v, torch.tensor(mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    assert mass.sum().item() == pytest.approx(1, abs=1e-12)
    bounded = GaussianConditional()(v, torch.full_like(v, mean), torch.full_like(v, scale))
    assert bounded.sum().item() == pytest.approx(1, abs=1e-5)  # the floor of 1e-9 adds a little
    assert bounded.min() >= 0.999e-9


@pytest.mark.parametrize("prior", [FactorizedPrior(3), GaussianPrior(3)])
def test_likelihoods_of_z_sum_to_one(prior):
    if isinstance(prior, GaussianPrior):
        prior.mu.data.uniform_(-2, 2)
    z = torch.arange(-200.0, 201).expand(1, 3, 1, -1)
    total = prior.likelihood(z).sum((0, 2, 3))
    assert total.detach().numpy() == pytest.approx(np.ones(3), abs=1e-4)


def test_far_symbols_keep_a_relative_precision():
    """Both terms come from one tail, so that a symbol 7 sigma away is not lost to cancellation."""
    near = gaussian_mass(torch.tensor(7.0), torch.tensor(0.0), torch.tensor(1.0)).item()
    exact = gaussian_mass(*(torch.tensor(v, dtype=torch.float64) for v in (7.0, 0.0, 1.0))).item()
    assert near == pytest.approx(exact, rel=1e-4)


def test_rounding_passes_the_gradient():
    v = torch.tensor([-1.5, -0.2, 0.5, 2.7], requires_grad=True)
    rounded = ste_round(v)
    assert rounded.tolist() == [-1, 0, 1, 3]  # floor(v + 0.5)
    rounded.sum().backward()
    assert v.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("prior", [FactorizedPrior(4), GaussianPrior(4)])
def test_z_survives_its_bytes(prior):
    if isinstance(prior, FactorizedPrior):
        prior.quantiles.data[:, 0, 1] = torch.tensor([0.3, -0.2, 0.0, 1.7])
        prior.update(force=True)
    z = torch.randn(2, 4, 3, 5) * 30  # some far outside what the prior expects
    with torch.no_grad():
        z_hat = hyper_latents.decode(prior, hyper_latents.encode(prior, z), (3, 5))
        torch.testing.assert_close(z_hat, prior.quantize_z(z), atol=1e-4, rtol=0)
        assert torch.equal(z_hat.round(), prior.quantize_z(z).round())
