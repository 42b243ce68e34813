"""Variable rate: one model for many rates (ours; the idea is Cui et al., CVPR 2021, "Asymmetric gained deep image
compression").

Between g_a and the rounding every channel of y is multiplied by a gain, and divided by about the same before g_s:

    x --g_a--> y --* gain--> round --> y_hat --* inverse--> g_s --> x_hat

A large gain means fine steps: more bits, less distortion. Everything the coder sees, y_hat included, is already
scaled, so without `rate_aware` it needs no gain. Each lambda the model was trained for is a *level*; between two levels
the gains are interpolated geometrically, so that the rate can be set continuously.

With `rate_aware=False` (the first models) the entropy model has to infer the gain from the latents, which is hard for a
transformer: its layer norms remove their magnitude. With `rate_aware=True` it sees y_hat divided by the gain, the same
at all rates, and its means and scales are multiplied by the gain afterwards (`RateKnowledge` makes these numbers, and
`ToldTheRate` in entropy_model.py uses them). Encoder and decoder then need the same gain to the last bit, so it is
computed exactly (exact/).
"""

import bisect
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RateGain(nn.Module):
    """Gains of every level and channel, stored as logarithms.

    With fine steps distortion grows as the square of the step. So the best step is proportional to 1 / sqrt(lambda),
    and the gain to sqrt(lambda): that is where training starts.

    Args:
        lmbdas: the lambda of each level, rising.
        M: channels of y.
        reference: the lambda whose gain starts at 1; None: the geometric mean of all.
    """

    def __init__(self, lmbdas: tuple[float, ...], M: int, reference: float | None = None):
        super().__init__()
        self.lmbdas = lmbdas
        logs = torch.tensor(lmbdas).log() / 2
        logs = logs - (logs.mean() if reference is None else math.log(reference) / 2)
        self.log_gain = nn.Parameter(logs[:, None].repeat(1, M))  # [levels, M]
        self.log_inverse = nn.Parameter(-logs[:, None].repeat(1, M))

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """level: [B] in [0, levels - 1]  ->  gain and inverse: [B, M, 1, 1]"""
        low = level.floor().clamp(0, len(self.lmbdas) - 2)
        part = (level - low)[:, None]  # [B, 1]
        i = low.long()
        # Not `at_level`: its last bit differs, and latents that training/latents.py has stored would be found stale.
        gain, inverse = (torch.lerp(t[i], t[i + 1], part.to(t.dtype)) for t in (self.log_gain, self.log_inverse))
        return gain.exp()[..., None, None], inverse.exp()[..., None, None]

    def level_of(self, lmbda: float) -> float:
        """The level of a lambda; between two trained ones in proportion to its logarithm.

        Raises:
            ValueError: a lambda outside the trained range.
        """
        if not self.lmbdas[0] <= lmbda <= self.lmbdas[-1]:
            raise ValueError(f"lmbda {lmbda:g} is outside {self.lmbdas[0]:g} to {self.lmbdas[-1]:g}.")
        i = min(bisect.bisect_right(self.lmbdas, lmbda) - 1, len(self.lmbdas) - 2)
        low, high = self.lmbdas[i], self.lmbdas[i + 1]
        return i + math.log(lmbda / low) / math.log(high / low)

    def lmbda_of(self, level: float) -> float:
        """Inverse of `level_of`."""
        i = min(int(level), len(self.lmbdas) - 2)
        low, high = self.lmbdas[i], self.lmbdas[i + 1]
        return low * (high / low) ** (level - i)


class Rate(NamedTuple):
    """What an entropy model is told of the level, for B pictures; not the rate R of eq. 2.

    gain, inverse, log_gain: of y, [B or 1, M, 1, 1]; z_gain, z_inverse: of z, [B or 1, Z, 1, 1]; vector: [B or 1, D, 1,
    1]; 1 where all pictures have the same level. An inverse here is one over the gain, not the learned one before g_s.
    """

    gain: Tensor
    inverse: Tensor
    log_gain: Tensor
    z_gain: Tensor
    z_inverse: Tensor
    vector: Tensor


class RateKnowledge(nn.Module):
    """Gains of z, and a vector for each level that is added to the features of h_s.

    Args:
        gain: of y; z's gains begin at its fourth root: z too becomes finer with the rate, but less than y.
        Z, dim: channels of z, width of the features.
    """

    def __init__(self, gain: RateGain, Z: int, dim: int):
        super().__init__()
        start = gain.log_gain.detach().mean(1, keepdim=True) / 4
        self.z_log_gain = nn.Parameter(start.repeat(1, Z))  # [levels, Z]
        self.vectors = nn.Parameter(torch.zeros(len(start), dim))

    def forward(self, gain: RateGain, level: Tensor) -> Rate:
        """level: [B]"""
        logs, z_logs, vector = (at_level(t, level) for t in (gain.log_gain, self.z_log_gain, self.vectors))
        y, z = logs.exp(), z_logs.exp()
        return Rate(*(t[..., None, None] for t in (y, 1 / y, logs, z, 1 / z, vector)))


def at_level(table: Tensor, level: Tensor) -> Tensor:
    """Rows of a table of levels, linear between them.  table: [levels, C], level: [B]  ->  [B, C]

    Written as single operations, none of which a machine may fuse, so that all machines give the same bits.
    """
    low = level.floor().clamp(0, len(table) - 2)
    part = (level - low)[:, None].to(table.dtype)  # [B, 1]
    below, above = table[low.long()], table[low.long() + 1]
    return below + (above - below) * part
