"""Variable rate: one model for many rates (ours; the idea is Cui et al., CVPR 2021, "Asymmetric gained deep image
compression").

Between g_a and the rounding every channel of y is multiplied by a gain, and divided by about the same before g_s:

    x --g_a--> y --* gain--> round --> y_hat --* inverse--> g_s --> x_hat

A large gain means fine steps: more bits, less distortion. Everything the coder sees, y_hat included, is already
scaled, so the entropy model and the file's exactness know nothing of rates. Each lambda the model was trained for is a
*level*; between two levels the gains are interpolated geometrically, so that the rate can be set continuously. This is
one answer to the rate control that the paper's discussion leaves open.
"""

import bisect
import math

import torch
from torch import Tensor, nn


class RateGain(nn.Module):
    """Gains of every level and channel, stored as logarithms.

    Theory for fine steps says distortion grows with the square of the step and so the best step with
    1 / sqrt(lambda); that is where training starts.

    Args:
        lmbdas: the lambda of each level, rising.
        M: channels of y.
        reference: the lambda whose gain starts at 1.
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
        return tuple(
            torch.lerp(table[i], table[i + 1], part.to(table.dtype)).exp()[..., None, None]
            for table in (self.log_gain, self.log_inverse)
        )

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

    @torch.no_grad()
    def begin_from(self, other: "RateGain", scale: float = 1.0) -> None:
        """Takes the gains that another model's gains give at these lambdas: linear in the logarithms, beyond the ends
        with the slope there. Both must have as many channels. scale: our lambdas over theirs at the same rate, where
        the distortions differ."""
        known = torch.tensor(other.lmbdas).log()
        at = (torch.tensor(self.lmbdas) / scale).log()
        i = (torch.searchsorted(known, at, right=True) - 1).clamp(0, len(known) - 2)
        part = ((at - known[i]) / (known[i + 1] - known[i]))[:, None]  # below 0 and above 1 beyond the ends
        for mine, theirs in ((self.log_gain, other.log_gain), (self.log_inverse, other.log_inverse)):
            mine.copy_(torch.lerp(theirs[i], theirs[i + 1], part))
