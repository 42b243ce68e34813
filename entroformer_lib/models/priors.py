"""Likelihoods: the probability of an integer under the densities the model predicts (eq. 1).

A latent is rounded to an integer, and as in the released code its mean is not subtracted before. So its probability is
the density's mass over [v - 0.5, v + 0.5]. While training, v is the latent plus uniform noise instead, and the same
formula is a density: eq. 1's convolution with U(-0.5, 0.5).
"""

import math

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.ops import LowerBound
from torch import Tensor, nn

LIKELIHOOD_FLOOR = 1e-9  # 30 bits: nothing costs more, so no loss is ever infinite. Released: 1e-12


def ste_round(v: Tensor) -> Tensor:
    """floor(v + 0.5), with the gradient of the identity ("straight through"). Released: clamped to [-128, 127]."""
    return v + (torch.floor(v + 0.5) - v).detach()


def gaussian_mass(v: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """Mass of N(means, scales^2) over [v - 0.5, v + 0.5]; same shape, not bounded below.

    Written with |v - mean|, so that both terms come from the same tail and do not cancel.
    """
    distance = (v - means).abs()
    root = scales * math.sqrt(2)
    return 0.5 * (torch.erfc((distance - 0.5) / root) - torch.erfc((distance + 0.5) / root))


class GaussianConditional(nn.Module):
    """p(y | ...): each latent a Gaussian of its own mean and scale (eq. 1). No parameters, no tables, no `update()`.
    (CompressAI's class of this name takes scales before means.)

    y: [B, M, h, w] integers or noisy, means and scales alike  ->  likelihoods: [B, M, h, w] in [1e-9, 1],
    with imported weights [1e-12, 1]
    """

    def __init__(self):
        super().__init__()
        self.bound = LowerBound(LIKELIHOOD_FLOOR)

    def forward(self, y: Tensor, means: Tensor, scales: Tensor) -> Tensor:
        return self.bound(gaussian_mass(y, means, scales))


class FactorizedPrior(EntropyBottleneck):
    """p(z), learned per channel without assuming a shape (Ballé 2018): CompressAI's bottleneck, with the noise given.

    z: [B, Z, h/4, w/4]
    """

    def quantize_z(self, z: Tensor) -> Tensor:
        """Rounds to the grid through each channel's median; straight-through gradient."""
        medians = self._get_medians().detach().view(1, -1, 1, 1)
        return ste_round(z - medians) + medians

    def likelihood(self, z: Tensor) -> Tensor:
        """Likelihoods of quantised or noisy z, same shape."""
        B, Z, h, w = z.shape  # its own rows and columns
        values = z.transpose(0, 1).reshape(Z, 1, -1)  # CompressAI's layout: channels first, then everything else
        mass = self.likelihood_lower_bound(self._likelihood(values)[0])  # [Z, 1, B h w]
        return mass.view(Z, B, h, w).transpose(0, 1)


class GaussianPrior(nn.Module):
    """p(z) as the authors released it: one Gaussian per channel. Offers what FactorizedPrior offers.

    z: [B, Z, h/4, w/4]
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_sigma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.bound = LowerBound(LIKELIHOOD_FLOOR)

    def quantize_z(self, z: Tensor) -> Tensor:
        return ste_round(z)

    def likelihood(self, z: Tensor) -> Tensor:
        return self.bound(gaussian_mass(z, self.mu, self.log_sigma.exp()))
