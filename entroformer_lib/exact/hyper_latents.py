"""The bytes of z: CompressAI's coder for the learned prior, ours for the Gaussian one. Those of y are in coder.py."""

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.errors import BitstreamError, WeightsError
from entroformer_lib.models.priors import FactorizedPrior, GaussianPrior
from entroformer_lib.rangecoder import LARGEST, RansDecoder, decode_gaussian, encode_gaussian, scale_of


def encode(prior: FactorizedPrior | GaussianPrior, z: Tensor) -> list[bytes]:
    """One string per picture of the batch. A learned prior's tables must be there.

    z: [B, Z, h/4, w/4]

    Raises:
        WeightsError: fewer than three numbers, or one far from its median: CompressAI's coder would not survive it.
    """
    if isinstance(prior, GaussianPrior):
        symbols = torch.floor(z + 0.5).int().cpu().numpy()
        return [encode_gaussian(s, *_gaussians(prior, s.shape)) for s in symbols]
    far = float((z - _medians(prior)).abs().amax())
    if not far <= LARGEST:  # also where a median is no number
        raise WeightsError(f"A hyper-latent is {far:g} away from its median, and the coder takes up to {LARGEST}.")
    if z[0].numel() < 3:
        raise WeightsError(
            "The coder of z takes at least three numbers for a picture: a model with more channels of z."
        )
    return prior.compress(z)


def decode(prior: FactorizedPrior | GaussianPrior, strings: list[bytes], size: tuple[int, int]) -> Tensor:
    """Inverse of `encode`.  size: rows and columns of z  ->  z_hat: [B, Z, h/4, w/4]

    Raises:
        BitstreamError: damaged strings.
    """
    if isinstance(prior, GaussianPrior):
        shape = (prior.mu.size(1), *size)
        symbols = np.stack([decode_gaussian(s, *_gaussians(prior, shape)) for s in strings])
        return torch.from_numpy(symbols).to(prior.mu)
    count, symbols = size[0] * size[1], []
    for string in strings:
        decoder = RansDecoder(string)
        for cdf, length, offset in zip(*(t.tolist() for t in _tables(prior)), strict=True):
            symbols.append([symbol + offset for symbol in decoder.read(count, cdf[:length])])
        decoder.finish()
    medians = _medians(prior)
    z_hat = torch.tensor(symbols).view(len(strings), -1, *size).to(medians) + medians
    if z_hat.abs().amax() > LARGEST + 1:  # the encoder refuses what is larger before it rounds
        raise BitstreamError("The coded hyper-latents are damaged.")
    return z_hat


def check_tables(prior: FactorizedPrior) -> None:
    """Raises WeightsError for tables with which CompressAI's coder would read behind their ends."""
    cdf, length, offset = _tables(prior)
    if not length.numel():
        return  # they are made before they are needed
    Z = prior.quantiles.size(0)
    good = cdf.dim() == 2 and cdf.size(0) == Z and length.shape == offset.shape == (Z,)
    good = good and bool((length >= 3).all()) and bool((length <= cdf.size(1)).all())
    good = good and bool((offset.long().abs() <= LARGEST).all())
    rows = [row[:n] for row, n in zip(cdf.tolist(), length.tolist(), strict=True)] if good else []
    if not good or not all(row[0] == 0 and row[-1] == 2**16 and row == sorted(set(row)) for row in rows):
        raise WeightsError("The tables of z's probabilities make no sense.")


def _medians(prior: FactorizedPrior) -> Tensor:
    """[1, Z, 1, 1]"""
    return prior._get_medians().detach().view(1, -1, 1, 1)


def _tables(prior: FactorizedPrior) -> tuple[Tensor, Tensor, Tensor]:
    """Cumulative frequencies [Z, n], how many of them count [Z], value of the first symbol [Z]."""
    return prior._quantized_cdf, prior._cdf_length, prior._offset


def _gaussians(prior: GaussianPrior, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Means and scales of every symbol, float64, straight from the weights: the same on every machine."""
    mu, log_sigma = (p.detach().double().flatten().tolist() for p in (prior.mu, prior.log_sigma))
    columns = np.array([mu, [scale_of(v) for v in log_sigma]])[..., None, None]  # [2, Z, 1, 1]
    means, scales = np.broadcast_to(columns, (2, *shape))
    return means, scales
