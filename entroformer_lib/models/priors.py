"""Likelihoods: the probability of an integer under the densities the model predicts (eq. 1).

A latent is rounded to an integer, and as in the released code its mean is not subtracted before. So its probability is
the density's mass over [v - 0.5, v + 0.5]. While training, v is the latent plus uniform noise instead, and the same
formula is a density: eq. 1's convolution with U(-0.5, 0.5).
"""

import math

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.ops import LowerBound
from torch import Tensor, nn

from entroformer_lib.errors import BitstreamError, WeightsError
from entroformer_lib.rangecoder import LARGEST, RansDecoder, decode_gaussian, encode_gaussian, scale_of

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

    y: [B, M, h, w] integers or noisy, means and scales alike  ->  likelihoods: [B, M, h, w] in [1e-9, 1]
    """

    def __init__(self):
        super().__init__()
        self.bound = LowerBound(LIKELIHOOD_FLOOR)

    def forward(self, y: Tensor, means: Tensor, scales: Tensor) -> Tensor:
        return self.bound(gaussian_mass(y, means, scales))


class FactorizedPrior(EntropyBottleneck):
    """p(z), learned per channel without assuming a shape (Ballé 2018): CompressAI's bottleneck, with the noise given.

    z: [B, Z, h, w]
    """

    def quantize_z(self, z: Tensor) -> Tensor:
        """Rounds to the grid through each channel's median; straight-through gradient."""
        medians = self._get_medians().detach().view(1, -1, 1, 1)
        return ste_round(z - medians) + medians

    def likelihood(self, z: Tensor) -> Tensor:
        """Likelihoods of quantised or noisy z, same shape."""
        B, Z, h, w = z.shape
        values = z.transpose(0, 1).reshape(Z, 1, -1)  # CompressAI's layout: channels first, then everything else
        mass = self.likelihood_lower_bound(self._likelihood(values)[0])
        return mass.view(Z, B, h, w).transpose(0, 1)

    def compress(self, z: Tensor) -> list[bytes]:
        """One string per picture of the batch. Its tables must be there.

        Raises:
            WeightsError: fewer than three numbers, or one far from its median: CompressAI's coder would not survive it.
        """
        far = float((z - self._get_medians().detach().view(1, -1, 1, 1)).abs().amax())
        if not far <= LARGEST:  # also where a median is no number
            raise WeightsError(f"A hyper-latent is {far:g} away from its median, and the coder takes up to {LARGEST}.")
        if z[0].numel() < 3:
            raise WeightsError(
                "The coder of z takes at least three numbers for a picture: a model with more channels of z."
            )
        return super().compress(z)

    def decompress(self, strings: list[bytes], size) -> Tensor:
        """size: (h, w)  ->  z_hat: [B, Z, h, w]; raises BitstreamError. Its tables must be there."""
        count, symbols = size[0] * size[1], []
        for string in strings:
            decoder = RansDecoder(string)
            for cdf, length, offset in zip(*(t.tolist() for t in self._tables()), strict=True):
                symbols.append([symbol + offset for symbol in decoder.read(count, cdf[:length])])
            decoder.finish()
        medians = self._get_medians().detach().view(1, -1, 1, 1)
        z_hat = torch.tensor(symbols).view(len(strings), -1, *size).to(medians) + medians
        if z_hat.abs().amax() > LARGEST + 1:  # the encoder refuses what is larger before it rounds
            raise BitstreamError("The coded hyper-latents are damaged.")
        return z_hat

    def check_tables(self) -> None:
        """Raises WeightsError for tables with which CompressAI's coder would read behind their ends."""
        cdf, length, offset = self._tables()
        if not length.numel():
            return  # they are made before they are needed
        Z = self.quantiles.size(0)
        good = cdf.dim() == 2 and cdf.size(0) == Z and length.shape == offset.shape == (Z,)
        good = good and bool((length >= 3).all()) and bool((length <= cdf.size(1)).all())
        good = good and bool((offset.long().abs() <= LARGEST).all())
        rows = [row[:n] for row, n in zip(cdf.tolist(), length.tolist(), strict=True)] if good else []
        if not good or not all(row[0] == 0 and row[-1] == 2**16 and row == sorted(set(row)) for row in rows):
            raise WeightsError("The tables of z's probabilities make no sense.")

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cumulative frequencies [Z, n], how many of them count [Z], value of the first symbol [Z]."""
        return self._quantized_cdf, self._cdf_length, self._offset


class GaussianPrior(nn.Module):
    """p(z) as the authors released it: one Gaussian per channel. Offers what FactorizedPrior offers.

    z: [B, Z, h, w]
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

    def compress(self, z: Tensor) -> list[bytes]:
        """One string per picture of the batch."""
        symbols = torch.floor(z + 0.5).int().cpu().numpy()
        return [encode_gaussian(s, *self._grid(s.shape)) for s in symbols]

    def decompress(self, strings: list[bytes], size) -> Tensor:
        """size: (h, w)  ->  z_hat: [B, Z, h, w]"""
        shape = (self.mu.size(1), *size)
        symbols = np.stack([decode_gaussian(s, *self._grid(shape)) for s in strings])
        return torch.from_numpy(symbols).to(self.mu)

    def _grid(self, shape) -> tuple[np.ndarray, np.ndarray]:
        """Means and scales of every symbol, float64, straight from the weights: the same on every machine."""
        mu, log_sigma = (p.detach().double().flatten().tolist() for p in (self.mu, self.log_sigma))
        columns = np.array([mu, [scale_of(v) for v in log_sigma]])[..., None, None]  # [2, Z, 1, 1]
        means, scales = np.broadcast_to(columns, (2, *shape))
        return means, scales
