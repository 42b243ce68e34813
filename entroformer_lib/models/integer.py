"""Arithmetic that gives the same bits on every machine, and the entropy model's layers in it.

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

import copy
import functools
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from entroformer_lib.models.attention import Block, TopKAttention
from entroformer_lib.models.position import RelativePosition

PEAK = 2**14  # numbers are rounded to integers of at most this size: |high| <= 64, -128 <= low <= 127
FEW_ROWS = 16  # up to here reading the weights takes the time, and each digit of them is read once
TILE = 2**20  # scores of one head held at a time


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
_POLYNOMIAL = [float(torch.tensor(math.log(2) ** i / math.factorial(i))) for i in range(8)]
_LOWEST_POWER = -40
_POWERS = torch.tensor([2.0**i for i in range(_LOWEST_POWER, 1)])


def exp_of_negative(x: Tensor) -> Tensor:
    """exp(x) of float32 x <= 0, from operations that IEEE 754 fixes; 0 and below -27 about 2^-40."""
    t = (x * 1.4426950408889634).clamp_(min=_LOWEST_POWER)
    whole = torch.floor(t)
    part = t - whole
    p = torch.full_like(part, _POLYNOMIAL[-1])
    for c in reversed(_POLYNOMIAL[:-1]):
        p = p.mul_(part).add_(c)  # two roundings, never one
    return p.mul_(_POWERS.to(x.device)[(whole - _LOWEST_POWER).long()])


# ---- layers ----


class IntegerLinear(nn.Module):
    """nn.Linear in digits.  x: float32 [..., K]  ->  float32 [..., N]"""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        w = digits(weight.detach().float())
        self.rows = len(weight)
        self.register_buffer("stacked", torch.cat((w.high, w.low)))  # [2 N, K]
        self.register_buffer("crossed", torch.cat((w.low, w.high), dim=1))  # [N, 2 K]
        self.register_buffer("scale", w.scale[:, 0] * 256)  # [N]
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        return self.of_digits(digits(rows)).view(*x.shape[:-1], self.rows)

    def of_digits(self, a: Digits) -> Tensor:
        """a: [q, K]  ->  [q, N]"""
        q, N = a.high.size(0), self.rows
        if q <= FEW_ROWS:
            out = product(torch.cat((a.high, a.low)), self.stacked.T)  # [2 q, 2 N]
            high, cross = out[:q, :N], out[:q, N:] + out[q:, :N]
        else:
            high = product(a.high, self.stacked[:N].T)
            cross = product(torch.cat((a.high, a.low), dim=1), self.crossed.T)
        y = joined(high, cross).mul_(a.scale).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


def joined(high: Tensor, cross: Tensor) -> Tensor:
    """256 high + cross as float32; each conversion and sum is rounded by IEEE's rule."""
    return high.to(torch.float32).mul_(256).add_(cross.to(torch.float32))


class IntegerConv3x3(nn.Module):
    """A 3x3 convolution of stride 1 with zeros around.  x: float32 [1, C, h, w]  ->  [1, N, h, w]"""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        if conv.kernel_size != (3, 3) or conv.stride != (1, 1) or conv.padding != (1, 1):
            raise NotImplementedError("only what h_s has")
        N = conv.out_channels
        self.linear = IntegerLinear(conv.weight.detach().permute(0, 2, 3, 1).reshape(N, -1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        _, C, h, w = x.shape
        a = digits(x[0].movedim(0, -1), step_for(x.abs().amax()))  # [h, w, C], one scale for all
        around = Digits(*(self._neighbours(d, h, w) for d in (a.high, a.low)), a.scale)  # [h w, 9 C]
        return self.linear.of_digits(around).T.reshape(1, -1, h, w)

    @staticmethod
    def _neighbours(d: Tensor, h: int, w: int) -> Tensor:
        padded = d.new_zeros(h + 2, w + 2, d.size(-1))
        padded[1:-1, 1:-1] = d
        shifted = [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)]
        return torch.cat(shifted, dim=-1).view(h * w, -1)


class IntegerLayerNorm(nn.Module):
    """nn.LayerNorm over the last axis; its sums are sums of integers.  x: float32 [..., D]"""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.register_buffer("weight", norm.weight.detach().float())
        self.register_buffer("bias", norm.bias.detach().float())
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = step_for(x.abs().amax(-1, keepdim=True))
        v = (x / scale).round_()
        wide = v.double()  # integers below 2^14: float64 adds them and their squares exactly
        mean = wide.sum(-1, keepdim=True) / x.size(-1)
        variance = wide.square().sum(-1, keepdim=True) / x.size(-1) - mean.square()
        factor = 1 / (variance + self.eps / scale.double().square()).sqrt()
        return v.sub_(mean.float()).mul_(factor.float()).mul_(self.weight).add_(self.bias)


class IntegerPosition(nn.Module):
    """RelativePosition in digits: products of queries with every distinct vector, and where they belong."""

    def __init__(self, relative: RelativePosition):
        super().__init__()
        table = digits(relative.table().detach().float())  # [buckets, d]
        self.register_buffer("high", table.high.T.contiguous())
        self.register_buffer("low", table.low.T.contiguous())
        self.register_buffer("scale", table.scale[:, 0] * 256)
        self.spread, self.own_bucket = relative.spread, relative.own_bucket

    def products(self, q: Digits, heads: int) -> Tensor:
        """q: [q, D]  ->  [1, heads, q, buckets]"""
        high, low = (x.reshape(len(x) * heads, -1) for x in (q.high, q.low))
        out = joined(product(high, self.high), product(high, self.low) + product(low, self.high))
        out = out.mul_(q.scale.repeat_interleave(heads, 0)).mul_(self.scale)
        return out.view(len(q.high), heads, -1).transpose(0, 1)[None]


class IntegerGELU(nn.Module):
    """x Phi(x) with erf after Abramowitz and Stegun 7.1.26, whose error of 1.5e-7 no digit sees."""

    def forward(self, x: Tensor) -> Tensor:
        z = (x * math.sqrt(0.5)).abs()
        t = 1 / (z * 0.3275911 + 1)
        p = torch.full_like(t, 1.061405429)
        for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0):
            p = p.mul_(t).add_(c)
        tail = p.mul_(exp_of_negative(-(z * z))).mul_(0.5)  # 1 - Phi(|x|)
        return x * torch.where(x < 0, tail, 1 - tail)


class IntegerCache:
    """Keys and values of the tokens coded so far, as digits: [layers, capacity, D]."""

    def __init__(self, layers: int, capacity: int, dim: int, device: torch.device):
        def empty():
            return torch.empty(layers, capacity, dim, dtype=torch.int8, device=device)

        self.key_high, self.key_low, self.value_high, self.value_low = empty(), empty(), empty(), empty()
        self.key_scale = torch.empty(layers, capacity, device=device)
        self.length = 0  # tokens whose pass through all blocks is complete

    def append(self, layer: int, keys: Digits, values: Digits) -> int:
        """New tokens [q, D] behind the complete ones  ->  how many there are then."""
        end = self.length + len(keys.high)
        here = slice(self.length, end)
        self.key_high[layer, here], self.key_low[layer, here] = keys.high, keys.low
        self.key_scale[layer, here] = keys.scale[:, 0]
        self.value_high[layer, here], self.value_low[layer, here] = values.high, values.low
        return end

    def filled(self, layer: int, end: int, value_scale: Tensor) -> tuple[Digits, Digits]:
        """Views of keys and values of the first `end` tokens."""
        keys = Digits(self.key_high[layer, :end], self.key_low[layer, :end], self.key_scale[layer, :end])
        return keys, Digits(self.value_high[layer, :end], self.value_low[layer, :end], value_scale)


class IntegerAttention(nn.Module):
    """TopKAttention in digits, for the coder: one picture, every key visible. Equal scores at rank k are all kept.

    Values have fixed scales, because the sum over tokens needs one scale for all of them, those to come included. A
    normalised token has the length sqrt(D), so |W_v (gamma * token + beta)| cannot exceed the bound below.
    """

    def __init__(self, attention: TopKAttention, norm: nn.LayerNorm):
        super().__init__()
        self.heads, self.top_k, self.scale = attention.heads, attention.top_k, attention.scale
        self.qkv, self.out = IntegerLinear(attention.qkv.weight, None), IntegerLinear(attention.out.weight, None)
        D = attention.out.weight.size(0)
        values = attention.qkv.weight.detach().float()[2 * D :]
        gamma, beta = norm.weight.detach().float(), norm.bias.detach().float()
        w = digits(values * gamma)
        squares = (w.high.double() * 256 + w.low).square().sum(-1)  # integers: exact
        longest = squares.sqrt().mul(w.scale[:, 0].double()).mul(math.sqrt(D)).float()
        longest += IntegerLinear(values, None)(beta[None])[0].abs()
        self.register_buffer("value_scale", step_for(longest * 1.01))  # [D]
        blocks = torch.arange(D, device=values.device) // (D // self.heads)
        mask = blocks == torch.arange(self.heads, device=values.device)[:, None]
        self.register_buffer("head_mask", mask.to(torch.int8))  # [heads, D], 1 where a channel is of a head

    def cache(self, layers: int, batch: int, capacity: int) -> IntegerCache:
        """An empty cache for up to `capacity` tokens."""
        return IntegerCache(layers, capacity, self.head_mask.size(1), self.head_mask.device)

    def remember(self, x: Tensor, cache: IntegerCache, layer: int) -> None:
        """Keeps keys and values of tokens x: [1, q, D]."""
        _, k, v = self._project(x)
        cache.append(layer, k, v)

    def forward(self, x, sites, visible=None, relative=None, top_k=None, cache=None, layer=0, apart=False) -> Tensor:
        """As TopKAttention.forward, for B = 1 and without a mask.  x: [1, q, D]  ->  [1, q, D]"""
        if visible is not None or x.size(0) != 1:
            raise NotImplementedError("the coder takes one picture at a time and masks nothing")
        q, k, v = self._project(x)
        first, own = 0, None
        if cache is None:
            keys, values = k._replace(scale=k.scale[:, 0]), v
        else:
            first = cache.length
            own = (k, v) if apart else None
            end = cache.length if apart else cache.append(layer, k, v)
            keys, values = cache.filled(layer, end, self.value_scale)
        look = self._one if len(q.high) == 1 and own is None else self._many
        return self.out(look(q, keys, values, own, sites, first, relative, top_k or self.top_k))[None]

    def _project(self, x: Tensor) -> tuple[Digits, Digits, Digits]:
        q, k, v = self.qkv(x[0]).chunk(3, dim=-1)  # [q, D] each
        both = digits(torch.stack((q * self.scale, k)))
        q, k = (Digits(*parts) for parts in zip(*both, strict=True))
        return q, k, digits(v, self.value_scale)

    def _one(self, q, keys, values, own, sites, first, relative, top_k) -> Tensor:
        """A single query; the heads are the rows, each zero outside its own channels.  ->  [1, D]"""
        n, h, D = len(keys.high), self.heads, self.head_mask.size(1)
        rows = torch.cat((q.high * self.head_mask, q.low * self.head_mask))  # [2 heads, D]
        with_high, with_low = product(rows, keys.high.T), product(rows, keys.low.T)  # [2 heads, n]
        scores = joined(with_high[:h], with_high[h:] + with_low[:h]).mul_(q.scale * 256).mul_(keys.scale)
        if relative is not None:
            products = relative.products(q, h)
            scores = scores + relative.spread(products, sites[first : first + 1], sites[:n])[0, :, 0]
        high, low, total = chosen(scores, top_k)
        rows = torch.cat((high, low))  # [2 heads, n]
        with_high, with_low = product(rows, values.high), product(rows, values.low)  # [2 heads, D]
        out = joined(with_high[:h], with_high[h:] + with_low[:h]).div_(total)  # [heads, D], each head for all channels
        out = out.view(h, h, D // h).diagonal(dim1=0, dim2=1).T.reshape(1, D)
        return out * 256 * values.scale

    def _many(self, q, keys, values, own, sites, first, relative, top_k) -> Tensor:
        """All queries, head by head and tile by tile.  ->  [q, D]"""
        count, n, D = len(q.high), len(keys.high), self.head_mask.size(1)
        positions = None if relative is None else relative.products(q, self.heads)
        out = torch.empty(count, D, device=q.high.device)
        rows = max(64, TILE // max(n, 1))
        for head in range(self.heads):
            c = slice(head * D // self.heads, (head + 1) * D // self.heads)
            k_high, k_low = keys.high[:, c].contiguous(), keys.low[:, c].contiguous()
            k_cross = torch.cat((k_low, k_high), dim=1)  # [n, 2 d]
            v_high, v_low = values.high[:, c].contiguous(), values.low[:, c].contiguous()
            for i in (slice(j, min(j + rows, count)) for j in range(0, count, rows)):
                a, b = q.high[i, c].contiguous(), q.low[i, c].contiguous()
                scores = joined(product(a, k_high.T), product(torch.cat((a, b), dim=1), k_cross.T))
                scores.mul_(q.scale[i] * 256).mul_(keys.scale)
                if positions is not None:
                    mine = positions[:, head : head + 1, i]
                    scores += relative.spread(mine, sites[first + i.start : first + i.stop], sites[:n])[0, 0]
                if own is not None:
                    itself = self._own_score(a, b, q.scale[i], own[0], i, c)
                    if positions is not None:
                        itself = itself + mine[0, 0, :, relative.own_bucket][:, None]
                    scores = torch.cat((scores, itself), dim=1)
                high, low, total = chosen(scores, top_k)
                cross = product(high[:, :n], v_low) + product(low[:, :n], v_high)
                sums = joined(product(high[:, :n], v_high), cross)
                if own is not None:
                    share = (high[:, n:].float() * 256 + low[:, n:].float()) / 256  # exact: a multiple of 2^-8
                    sums += share * (own[1].high[i, c].float() * 256 + own[1].low[i, c].float())
                out[i, c] = sums / total
        return out * 256 * values.scale

    @staticmethod
    def _own_score(high: Tensor, low: Tensor, scale: Tensor, keys: Digits, i: slice, c: slice) -> Tensor:
        """Each query with its own key: [q, 1]. A sum of integers below 2^53."""
        query = high.double() * 256 + low.double()
        key = keys.high[i, c].double() * 256 + keys.low[i, c].double()
        return (query * key).sum(-1, keepdim=True).float() * scale * keys.scale[i]


def chosen(scores: Tensor, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the k largest scores of each row, as integers: weights in digits and their sum.

    scores: float32 [q, n]  ->  high, low: int8 [q, n] with zeros at the keys that are not chosen; total: float32 [q, 1]
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


# ---- a whole part of a model ----


def integer_copy(part: nn.Module | None) -> nn.Module | None:
    """A copy of h_s, a context model or the entropy parameters whose layers all compute in digits.

    Raises:
        ValueError: weights that are not finite numbers.
    """
    if part is None:
        return None
    if not all(parameter.isfinite().all() for parameter in part.parameters()):
        raise ValueError("the entropy model has weights that are not finite numbers")
    return _replaced(copy.deepcopy(part).eval().float().requires_grad_(False))


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return IntegerLinear(module.weight, module.bias)
    if isinstance(module, nn.LayerNorm):
        return IntegerLayerNorm(module)
    if isinstance(module, nn.Conv2d):
        return IntegerConv3x3(module)
    if isinstance(module, RelativePosition):
        return IntegerPosition(module)
    if isinstance(module, nn.GELU):
        return IntegerGELU()
    if isinstance(module, Block):
        module.attention = IntegerAttention(module.attention, module.norm1)
    for name, child in module.named_children():
        if not isinstance(child, IntegerAttention):
            setattr(module, name, _replaced(child))
    return module
