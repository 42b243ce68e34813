"""Encoding with effort: other integers than the nearest, where rate and distortion together gain by them (ours).

Rounding y is quick and not the best that an encoder can do. g_a has learned what is good on average, knows nothing of
what the entropy model will predict, and moves all latents at once. Any integers can be decoded, so an encoder may look
for better ones. H.264 and its successors do so with their coefficients (rate-distortion optimised quantisation); for
learned codecs Yang et al. 2020 ("Improving inference for neural image compression") go down the gradient with
continuous latents for thousands of steps. Here latents stay integers, and some ten steps do most of it:

1. The change of R + lambda D by adding 1 to a latent, or taking 1 away, is predicted for each alone: the bits of the
   three integers by the entropy model, the distortion by g_s's gradient and its curvature.
2. At each site the most promising few take their step, all at once.
3. A site whose bits and whose own block of pixels cost more afterwards goes back, and tries half as many in the next
   round; a site that gained tries more.

Steps at one site disturb each other, because their patterns overlap; that is what 3 is for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from entroformer_lib.codec.pictures import unpad
from entroformer_lib.entroformer import Entroformer, in_parts
from entroformer_lib.errors import ConfigError
from entroformer_lib.models.transforms import SIDE
from entroformer_lib.stages import tell
from entroformer_lib.tiles import Tiles

FIRST_SHARE = 0.1  # of the nonzero latents of a site, that take their step in the first round
MORE, FEWER = 1.5, 0.35  # times as many in the next round, after a gain and after a loss


class Tried(NamedTuple):
    """Latents and what they cost, in bits.

    y_hat: [1, M, h, w] integers
    cost: [1, 1, h, w] of each site: bits of its latents, and what the error in its block of pixels counts
    step: [1, M, h, w] the better one of 1 and -1 for each latent
    change: [1, M, h, w] of the whole cost by that step alone, as predicted
    """

    y_hat: Tensor
    cost: Tensor
    step: Tensor
    change: Tensor


def check_effort(model: Entroformer, rounds: int) -> None:
    """Raises ConfigError where a model cannot be searched with, or for a number of rounds that cannot be."""
    if rounds < 0:
        raise ConfigError(f"The effort is a number of rounds from 0 on, and is {rounds}.")
    if rounds and model.card.get("metric", "mse") != "mse":
        raise ConfigError("Effort goes with models that were trained for a mean squared error.")
    if rounds and model.gain is None and not model.card.get("lmbda"):
        raise ConfigError("Effort takes a model whose card says for which lambda it was trained.")


def searched(
    model: Entroformer,
    x: Tensor,
    size: tuple[int, int],
    y_hat: Tensor,
    z: Tensor | None,
    rounds: int,
    level: float | None,
) -> Tensor:
    """Latents with less R + lambda D than the given ones, or these.

    Args:
        x: [1, 3, H, W], the padded picture. size: width and height of what is not padding; only its errors count.
        y_hat, z: as `model.latents` gives them.
        rounds: each takes g_s and its gradient once, and the entropy model once.
        level: of a variable-rate model.

    Returns:
        y_hat: [1, M, h, w] integers.

    Raises:
        ConfigError: as `check_effort`.
    """
    check_effort(model, rounds)
    cost = _Cost(model, x, size, z, level)
    start = best = cost.of(y_hat)
    moves = FIRST_SHARE * (y_hat != 0).sum(1, keepdim=True)  # [1, 1, h, w]
    refused = torch.zeros_like(y_hat, dtype=torch.bool)  # alone they were no gain
    for i in range(rounds):
        tell("rounds of search", i, rounds)
        moves = moves.clamp_min(1)
        change = best.change.masked_fill(refused, 0)
        least = change.sort(dim=1).values.gather(1, moves.long().clamp_max(change.size(1)) - 1)  # [1, 1, h, w]
        moved = (change < 0) & (change <= least)
        if not moved.any():
            break
        new = cost.of(torch.where(moved, best.y_hat + best.step, best.y_hat))
        tried = moved.any(1, keepdim=True)
        worse = tried & (new.cost > best.cost)
        refused |= moved & worse & (moves < 2)
        moves = torch.where(worse, FEWER * moves, torch.where(tried, MORE * moves, moves))
        best = Tried(*(torch.where(worse, old, now) for old, now in zip(best, new, strict=True)))
    # each site was judged by itself, so the whole is judged once more
    return best.y_hat if cost.whole(best.y_hat) < float(start.cost.sum()) else y_hat


class _Cost:
    """Bits and weighted errors of any latents of one picture."""

    def __init__(self, model: Entroformer, x: Tensor, size: tuple[int, int], z: Tensor | None, level: float | None):
        self.model, self.x = model, x
        lmbda = model.card["lmbda"] if model.gain is None else model.gain.lmbda_of(level)
        self.weight = lmbda * 255**2 / 3  # bits that a squared error of one pixel and channel counts
        self.inside = x.new_zeros(1, 1, *x.shape[2:])
        unpad(self.inside, size[1], size[0]).fill_(1)
        self.inverse, self.rate, self.hyper = model.gains(level)[1], model.rate(level), None
        if z is not None:
            with in_parts():
                self.hyper = model.hyper_synthesis(model.z_prior.quantize_z(z), self.rate)
        self.weights = {name: weight.detach() for name, weight in model.g_s.named_parameters()}  # keeps less memory
        self.curvature = None

    @torch.no_grad()
    def whole(self, y_hat: Tensor) -> float:
        """Of all sites together.  y_hat: [1, M, h, w]"""
        with Tiles():
            x_hat = self.model.g_s(y_hat * self.inverse)
        return float(self._bits_of(y_hat)(y_hat).sum() + self._error(x_hat).sum())

    @torch.no_grad()
    def of(self, y_hat: Tensor) -> Tried:
        """y_hat: [1, M, h, w]"""
        bits = self._bits_of(y_hat)
        here = bits(y_hat)
        slope, error = self._distortion(y_hat)
        up, down = bits(y_hat + 1) - here + slope, bits(y_hat - 1) - here - slope
        change = torch.minimum(up, down) + self.curvature
        return Tried(y_hat, here.sum(1, keepdim=True) + error, torch.where(up < down, 1.0, -1.0), change)

    def _bits_of(self, y_hat: Tensor) -> Callable[[Tensor], Tensor]:
        """The bits of other values in the place of each latent, where all others stay.  y_hat: [1, M, h, w]"""
        with in_parts():
            means, scales = self.model.distributions(y_hat, self.hyper, rate=self.rate)
        return lambda v: -self.model.gaussian(v, means, scales).log2()

    def _error(self, x_hat: Tensor) -> Tensor:
        """[1, 3, H, W]"""
        return self.weight * self.inside * (x_hat - self.x).square()

    def _distortion(self, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted error's gradient, [1, M, h, w], and its sum over each site's block, [1, 1, h, w]."""
        with torch.enable_grad():
            y_hat = y_hat.clone().requires_grad_()
            x_hat = functional_call(self.model.g_s, self.weights, y_hat * self.inverse)
            error = self._error(x_hat)
            (slope,) = torch.autograd.grad(error.sum(), y_hat, retain_graph=self.curvature is None)
            if self.curvature is None:
                self.curvature = self._curvature(x_hat, y_hat)
        return slope, F.avg_pool2d(error.detach().sum(1, keepdim=True), SIDE, divisor_override=1)

    def _curvature(self, x_hat: Tensor, y_hat: Tensor) -> Tensor:
        """What a step of 1 adds to the weighted error beyond its slope, by g_s's Jacobian: the mean of each channel,
        [1, M, 1, 1]. Random signs of pixels give the squares of a column of the Jacobian without computing it."""
        signs = torch.randint(0, 2, x_hat.shape, generator=torch.Generator().manual_seed(0)).to(x_hat) * 2 - 1
        (product,) = torch.autograd.grad(x_hat, y_hat, signs)
        return self.weight * product.square().mean((0, 2, 3), keepdim=True)
