"""Absolute positions with the same bits on every machine: sines of C libraries and vector units differ in their last
bits."""

import functools
import math
from decimal import Context, Decimal

import torch
from torch import Tensor

TURN = Decimal("6.283185307179586476925286766559005768394")  # 2 pi


def sinusoidal_positions(sites: Tensor, dim: int) -> Tensor:
    """`position.sinusoidal_positions`, rounded to multiples of 2^-16.  sites: [n, 2]  ->  [n, dim], float32"""
    per_site = torch.tensor(_turns_per_site(dim), dtype=torch.float64, device=sites.device)  # [dim / 4]
    turns = sites[..., None] * per_site  # [n, 2, dim / 4]
    waves = _sine(torch.stack((turns, turns + 0.25), dim=-2))  # [n, 2, 2, dim / 4]; a cosine is a quarter ahead
    waves = waves.flatten(1)  # [n, dim]
    return (torch.round(waves * 2**16) / 2**16).float()


@functools.cache
def _turns_per_site(dim: int) -> list[float]:
    """10000^(-2i / (dim / 2)) / 2 pi for i < dim / 4, in decimal digits that no C library computes."""
    digits = Context(prec=40)
    exponents = (digits.divide(Decimal(-i), Decimal(dim // 2)) for i in range(0, dim // 2, 2))
    return [float(digits.divide(digits.power(Decimal(10000), e), TURN)) for e in exponents]


def _sine(turns: Tensor) -> Tensor:
    """sin(2 pi turns), float64, by single operations that IEEE 754 fixes: Taylor's series up to the 21st power."""
    part = turns - turns.round()
    # Between 0 and pi / 2 there is the same sine, but for its sign
    angle = (0.25 - (part.abs() - 0.25).abs()) * float(TURN)
    square, series = angle.square(), torch.zeros_like(angle)
    for n in range(21, 0, -2):
        series = series.mul_(square).add_((-1) ** (n // 2) / math.factorial(n))
    return angle * series * part.sign()
