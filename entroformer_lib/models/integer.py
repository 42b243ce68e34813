"""Arithmetic that gives the same bits on every machine. The entropy model's layers in it: `integer_layers.py`.

A floating-point sum depends on its order, and the order depends on vector width, threads, library and device. Two ideas
remove that:

1. **Sums are sums of integers.** A row of numbers is written as x = (256 high + low) * scale with 8-bit digits and a
   power of two as scale. A matrix product is then made of products of digits, and integer sums are exact in any order:

       a . b  =  (65536 high.high + 256 (high.low + low.high) + low.low) * scales

   The last term is left out; it lies below the rounding to digits. An int8 matrix unit computes these products of
   many rows far faster than float64; where there is none, float32 does it, because sums
   of so small integers stay below 2^24 and so are exact too.
2. **Everything else is elementwise.** IEEE 754 fixes the result of +, -, *, /, sqrt, rounding and comparison of single
   numbers. exp is not among them, so `exp_of_negative` builds it from those that are. No step may be fused into
   multiply-and-add, which rounds once instead of twice: this module must not be compiled.
"""

import functools
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

PEAK = 2**14  # numbers are rounded to integers of at most this size: |high| <= 64, -128 <= low <= 127


class Digits(NamedTuple):
    """x = (256 high + low) * scale.  high, low: int8 [..., K]; scale: float32, powers of two, broadcast over x."""

    high: Tensor
    low: Tensor
    scale: Tensor


def digits(x: Tensor, scale: Tensor | None = None) -> Digits:
    """Rounds float32 numbers to 15 bits, by default with a scale for each row: [..., K] -> scale [..., 1]."""
    if scale is None:
        scale = step_for(x.abs().amax(-1, keepdim=True))
        v = (x / scale).round_()  # dividing by a power of two is exact
    else:
        v = (x / scale).round_().clamp_(-PEAK, PEAK)
    return Digits(*split(v.to(torch.int16)), scale)


def split(v: Tensor) -> tuple[Tensor, Tensor]:
    """int16 in [-2^14, 2^14] to its digits high and low, int8."""
    return ((v + 128) >> 8).to(torch.int8), v.to(torch.int8)  # the conversion keeps the low byte, as a signed number


def step_for(peak: Tensor) -> Tensor:
    """The power of two s with peak / s in [2^13, 2^14): the exponent bits of a float32 are just that power."""
    exponent = peak.contiguous().view(torch.int32) & 0x7F800000
    return exponent.clamp(min=64 << 23).view(torch.float32) * (2.0 / PEAK)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of two matrices of digits: int8 [m, k] times int8 [k, n]  ->  int32 [m, n]."""
    if not _int8_works(a.device.type):
        return _float_product(a, b)
    if a.device.type == "cpu":
        return torch._int_mm(a, b)
    m, n = a.size(0), b.size(1)  # CUDA wants more than 16 rows and multiples of 8
    pad = nn.functional.pad
    k = -a.size(1) % 8
    return torch._int_mm(pad(a, (0, k, 0, max(0, 24 - m))), pad(b, (0, -n % 8, 0, k)))[:m, :n]


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """The same in float32: over 1,024 terms at a time a sum stays within 2^24, so every partial sum is exact."""
    with torch.autocast(a.device.type, enabled=False):
        parts = (x.float() @ y.float() for x, y in zip(a.split(512, 1), b.split(512, 0), strict=True))
        return functools.reduce(torch.add, (part.to(torch.int32) for part in parts))


@functools.cache
def _int8_works(device: str) -> bool:
    """Whether the int8 matrix product is there, exact at its extremes (older processors saturate), and worth it.

    Either answer gives the same bits.
    """
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (48, 512), dtype=torch.int8, generator=draw).to(device)
    b = torch.randint(-128, 128, (512, 256), dtype=torch.int8, generator=draw).to(device)
    a[:8], b[:, :8] = -128, -128
    a[8:16], b[:, 8:16] = 127, 127
    exact = (a.cpu().double() @ b.cpu().double()).to(torch.int32)
    try:
        if not torch.equal(torch._int_mm(a, b).cpu(), exact):
            return False
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return device != "cpu" or _seconds(lambda: torch._int_mm(a, b)) < _seconds(lambda: _float_product(a, b))


def _seconds(run) -> float:
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


# ---- functions of single numbers ----

# 2^f on [0, 1): Taylor's polynomial of exp(f ln 2), as float32 constants; its error of 2^-20 is below that of a digit.
POLYNOMIAL = [float(torch.tensor(math.log(2) ** i / math.factorial(i))) for i in range(8)]
LOWEST_POWER = -40
_POWERS = torch.tensor([2.0**i for i in range(LOWEST_POWER, 1)])


def exp_of_negative(x: Tensor) -> Tensor:
    """exp(x) of float32 x <= 0, from operations that IEEE 754 fixes; 0 and below -27 about 2^-40."""
    t = (x * 1.4426950408889634).clamp_(min=LOWEST_POWER)
    whole = torch.floor(t)
    part = t - whole
    p = torch.full_like(part, POLYNOMIAL[-1])
    for c in reversed(POLYNOMIAL[:-1]):
        p = p.mul_(part).add_(c)  # two roundings, never one
    return p.mul_(_POWERS.to(x.device)[(whole - LOWEST_POWER).long()])


def joined(high: Tensor, cross: Tensor) -> Tensor:
    """256 high + cross as float32; each conversion and sum is rounded by IEEE's rule."""
    return high.to(torch.float32).mul_(256).add_(cross.to(torch.float32))


# ---- softmax over the k best ----


def chosen(scores: Tensor, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the k largest scores of each row, as integers: weights in digits and their sum.

    scores: float32 [q, n], -inf where a key is not seen  ->  high, low: int8 [q, n] with zeros at the keys that are not
    chosen; total: float32 [q, 1]
    """
    n = scores.size(-1)
    if top_k is None or top_k >= n:
        weights = _weights(scores - scores.amax(-1, keepdim=True))
        return *split(weights), weights.sum(-1, keepdim=True, dtype=torch.int64).float()
    best, index = largest(scores, top_k)
    weights = _weights(best - best[:, :1])
    digits_of_weights = split(weights)
    total = weights.sum(-1, keepdim=True, dtype=torch.int64)
    dense = [torch.zeros_like(scores, dtype=torch.int8).scatter_(1, index, d) for d in digits_of_weights]
    kept = scores >= best[:, -1:]
    more = kept.sum(-1, keepdim=True) - top_k
    if more.any():  # which of several equal ones topk returns differs between machines, so all of them are kept
        others = kept & ~torch.zeros_like(kept).scatter_(1, index, True)
        dense = [torch.where(others, d[:, -1:], all_d) for d, all_d in zip(digits_of_weights, dense, strict=True)]
        total = total + more * weights[:, -1:]
    return *dense, total.float()


def largest(scores: Tensor, k: int, groups: int = 8) -> tuple[Tensor, Tensor]:
    """scores.topk(k), several times as fast on long rows. [q, n]  ->  values, largest first, and indices: [q, k]

    A row is folded into columns of `groups` scores. The k largest scores lie in the k columns with the largest maxima,
    so only those columns need a closer look.
    """
    q, n = scores.shape
    width = -(-n // groups)
    if width < 2 * k:
        return scores.topk(k, dim=-1)
    if n % groups:
        scores = nn.functional.pad(scores, (0, width * groups - n), value=-math.inf)
    folded = scores.view(q, groups, width)
    columns = folded.amax(1).topk(k, dim=-1, sorted=False).indices  # [q, k]
    candidates = folded.gather(2, columns[:, None].expand(-1, groups, -1)).flatten(1)  # [q, groups k]
    values, place = candidates.topk(k, dim=-1)
    return values, place // k * width + columns.gather(1, place % k)


def _weights(difference: Tensor) -> Tensor:
    """exp of score minus largest score, in steps of 2^-14: int16."""
    return exp_of_negative(difference).mul_(PEAK).round_().to(torch.int16)
