"""The entropy model's layers in the integers of `integer.py`.

On a CPU a single row, which is what a serial decoder has, goes through the loops of `compiled.py`, and so does what
follows the products of attention: the same bits in less time.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

from entroformer_lib.models import compiled
from entroformer_lib.models.attention import TopKAttention, UpToItself
from entroformer_lib.models.integer import (
    Digits,
    chosen,
    digits,
    exp_of_negative,
    joined,
    product,
    step_for,
)
from entroformer_lib.models.position import RelativePosition

FEW_ROWS = 16  # up to here reading the weights takes the time, and each digit of them is read once
TILE = 2**20  # scores of one head held at a time


def array(t: Tensor) -> np.ndarray:
    """A tensor on the CPU as a numpy array: a view, where its rows lie behind each other."""
    return t.contiguous().numpy()


def digits_of_rows(x: Tensor) -> Digits:
    """`digits` with a scale for each row, in loops on a CPU.  x: float32 [q, K]"""
    if x.device.type != "cpu":
        return digits(x)
    rows, high, low = array(x), np.empty(x.shape, dtype=np.int8), np.empty(x.shape, dtype=np.int8)
    scale = np.empty(len(x), dtype=np.float32)
    compiled.in_threads(lambda i, j: compiled.digits_of_rows(rows[i:j], high[i:j], low[i:j], scale[i:j]), len(x))
    return Digits(*map(torch.from_numpy, (high, low, scale[:, None])))


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
        if len(rows) == 1 and x.device.type == "cpu":
            out = torch.empty(*x.shape[:-1], self.rows)
            compiled.linear(array(rows[0]), *self.arrays, array(out.view(-1)))
            return out
        return self.of_digits(digits_of_rows(rows)).view(*x.shape[:-1], self.rows)

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Weights, scales and bias for `compiled`."""
        return array(self.stacked), array(self.scale), compiled.NONE if self.bias is None else array(self.bias)

    def of_digits(self, a: Digits) -> Tensor:
        """a: [q, K]  ->  [q, N]"""
        q, N = a.high.size(0), self.rows
        if q <= FEW_ROWS:
            out = product(torch.cat((a.high, a.low)), self.stacked.T)  # [2 q, 2 N]
            high, cross = out[:q, :N], out[:q, N:] + out[q:, :N]
        else:
            high = product(a.high, self.stacked[:N].T)
            cross = product(torch.cat((a.high, a.low), dim=1), self.crossed.T)
        if high.device.type == "cpu" and a.scale.numel() == q:
            return self._scaled_sums(high, cross, a.scale)
        y = joined(high, cross).mul_(a.scale).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def _scaled_sums(self, high: Tensor, cross: Tensor, row_scale: Tensor) -> Tensor:
        """The lines above in one pass, on a CPU."""
        out = torch.empty(high.shape)
        a, b, steps, result = array(high), array(cross), array(row_scale.view(-1)), out.numpy()
        scale, bias = self.arrays[1:]
        compiled.in_threads(
            lambda i, j: compiled.scaled_sums(a[i:j], b[i:j], steps[i:j], scale, bias, result[i:j]), len(a)
        )
        return out


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

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return array(self.weight), array(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.size(-1) and x.device.type == "cpu":
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            compiled.layer_norm(array(x.view(-1)), *self.arrays, self.eps, array(out.view(-1)))
            return out
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
        self.of_pairs, self.own_bucket = relative.buckets, relative.own_bucket
        self.lookup = relative.lookup.cpu().to(torch.int16).numpy()

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return array(self.high.T), array(self.low.T), array(self.scale)

    def products(self, q: Digits, heads: int) -> Tensor:
        """q: [q, D]  ->  [heads, q, buckets]"""
        high, low = (x.reshape(len(x) * heads, -1) for x in (q.high, q.low))
        out = joined(product(high, self.high), product(high, self.low) + product(low, self.high))
        out = out.mul_(q.scale.repeat_interleave(heads, 0)).mul_(self.scale)
        return out.view(len(q.high), heads, -1).transpose(0, 1)

    def buckets(self, queries: Tensor, keys: Tensor) -> Tensor:
        """As RelativePosition.buckets: int16 [q, n]."""
        if queries.device.type != "cpu":
            return self.of_pairs(queries, keys).to(torch.int16)
        out = torch.empty(len(queries), len(keys), dtype=torch.int16)
        q, k, o = array(queries), array(keys), out.numpy()
        compiled.in_threads(lambda i, j: compiled.buckets(q[i:j], k, self.lookup, o[i:j]), len(q))
        return out


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


def value_scale(qkv: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Scales that no value of an attention behind a layer norm exceeds: [D]. A normalised token has the length sqrt(D),
    so |W_v (gamma * token + beta)| has a bound.  qkv: [3 D, D]"""
    D = qkv.size(1)
    values = qkv.detach().float()[2 * D :]
    gamma, beta = norm.weight.detach().float(), norm.bias.detach().float()
    w = digits(values * gamma)
    squares = (w.high.double() * 256 + w.low).square().sum(-1)  # integers: exact
    longest = squares.sqrt().mul(w.scale[:, 0].double()).mul(math.sqrt(D)).float()
    longest += IntegerLinear(values, None)(beta[None])[0].abs()
    return step_for(longest * 1.01)


class IntegerAttention(nn.Module):
    """TopKAttention in digits, for the coder: one picture; each token sees all keys, or those up to itself. Equal
    scores at rank k are all kept.

    Values have fixed scales, because the sum over tokens needs one scale for all of them, those to come included.
    """

    def __init__(self, attention: TopKAttention, norm: nn.LayerNorm):
        super().__init__()
        self.heads, self.top_k, self.scale = attention.heads, attention.top_k, attention.scale
        self.qkv, self.out = IntegerLinear(attention.qkv.weight, None), IntegerLinear(attention.out.weight, None)
        self.width = attention.out.weight.size(0)
        self.register_buffer("value_scale", value_scale(attention.qkv.weight, norm))  # [D]

    def cache(self, layers: int, batch: int, capacity: int) -> IntegerCache:
        """An empty cache for up to `capacity` tokens."""
        return IntegerCache(layers, capacity, self.width, self.value_scale.device)

    def remember(self, x: Tensor, cache: IntegerCache, layer: int) -> None:
        """Keeps keys and values of tokens x: [1, q, D]."""
        _, k, v = self._project(x)
        cache.append(layer, k, v)

    def forward(self, x, sites, visible=None, relative=None, top_k=None, cache=None, layer=0, apart=False) -> Tensor:
        """As TopKAttention.forward, for B = 1 and no mask but UpToItself.  x: [1, q, D]  ->  [1, q, D]"""
        causal = isinstance(visible, UpToItself)
        if not (visible is None or causal) or x.size(0) != 1:
            raise NotImplementedError("the coder takes one picture at a time and masks nothing but what is to come")
        if cache is not None and x.size(1) == 1 and not apart and x.device.type == "cpu":
            return self._one(x, sites, relative, top_k or self.top_k, cache, layer)
        q, k, v = self._project(x)
        first, own = 0, None
        if cache is None:
            keys, values = k._replace(scale=k.scale[:, 0]), v
        else:
            first = cache.length
            own = (k, v) if apart else None
            end = cache.length if apart else cache.append(layer, k, v)
            keys, values = cache.filled(layer, end, self.value_scale)
        return self.out(self._many(q, keys, values, own, sites, first, relative, top_k or self.top_k, causal))[None]

    def _project(self, x: Tensor) -> tuple[Digits, Digits, Digits]:
        q, k, v = self.qkv(x[0]).chunk(3, dim=-1)  # [q, D] each
        return digits_of_rows(q * self.scale), digits_of_rows(k), digits(v, self.value_scale)

    def _one(self, x, sites, relative, top_k, cache, layer) -> Tensor:
        """A single new token, from projection to projection.  x: [1, 1, D]  ->  [1, 1, D]"""
        n = cache.length + 1
        bucket, vectors = compiled.NO_BUCKETS[0], (compiled.NO_DIGITS, compiled.NO_DIGITS, compiled.NONE)
        if relative is not None:
            bucket, vectors = relative.buckets(sites[n - 1 : n], sites[:n])[0].numpy(), relative.arrays
        kept = (cache.key_high, cache.key_low, cache.key_scale, cache.value_high, cache.value_low)
        kept = (tensor[layer].numpy() for tensor in kept)
        weights = (*self.qkv.arrays[:2], *self.out.arrays[:2], self.value_scale.numpy())
        top_k = min(top_k or n, n)
        out = torch.empty_like(x)
        compiled.attend_one(
            array(x[0, 0]), *weights, self.scale, self.heads, top_k, *kept, n, bucket, *vectors, out[0, 0].numpy()
        )
        return out

    def _many(self, q, keys, values, own, sites, first, relative, top_k, causal) -> Tensor:
        """All queries, tile by tile and head by head.  ->  [q, D]

        Where it is causal, query i sees first + i + 1 keys; a tile takes as many as its last query sees.
        """
        count, n, d = len(q.high), len(keys.high), self.width // self.heads
        look = by_loops if q.high.device.type == "cpu" else by_tensors
        products = None if relative is None else relative.products(q, self.heads)  # [heads, q, buckets]
        out = torch.empty(count, self.width, device=q.high.device)
        rows = max(64, TILE // max(n, 1))
        for i in (slice(j, min(j + rows, count)) for j in range(0, count, rows)):
            seen = None
            if causal:
                seen = torch.arange(first + i.start + 1, first + i.stop + 1, dtype=torch.int32, device=out.device)
                n = first + i.stop
            places = None if relative is None else relative.buckets(sites[first:][i], sites[:n])  # [q, n]
            for head in range(self.heads):
                c = slice(head * d, (head + 1) * d)
                k_high, k_low = keys.high[:n, c].contiguous(), keys.low[:n, c].contiguous()
                k_cross = torch.cat((k_low, k_high), dim=1)  # [n, 2 d]
                a, b = q.high[i, c].contiguous(), q.low[i, c].contiguous()
                sums = product(a, k_high.T), product(torch.cat((a, b), dim=1), k_cross.T)  # [q, n] each
                position = None if relative is None else (places, products[head, i])
                itself = None
                if own is not None:
                    score = self._own_score(a, b, q.scale[i], own[0], i, c)
                    if relative is not None:
                        score = score + position[1][:, relative.own_bucket, None]
                    itself = score, own[1].high[i, c], own[1].low[i, c]
                v = values.high[:n, c].contiguous(), values.low[:n, c].contiguous()
                out[i, c] = look(sums, (q.scale[i], keys.scale[:n]), position, itself, seen, top_k, v)
        return out * 256 * values.scale

    @staticmethod
    def _own_score(high: Tensor, low: Tensor, scale: Tensor, keys: Digits, i: slice, c: slice) -> Tensor:
        """Each query with its own key: [q, 1]. A sum of integers below 2^53."""
        query = high.double() * 256 + low.double()
        key = keys.high[i, c].double() * 256 + keys.low[i, c].double()
        return (query * key).sum(-1, keepdim=True).float() * scale * keys.scale[i]


def by_tensors(sums, scales, position, own, seen, top_k, values) -> Tensor:
    """One head from sums of products to its result, in tensor operations: [q, d], in units of value_scale / 256.

    Args:
        sums: high by high and the cross terms of queries and keys: int32 [q, n] each.
        scales: of queries [q, 1] and keys [n].
        position: bucket of each pair, int16 [q, n], and products with the vectors [q, buckets]; or None.
        own: of queries that also see themselves: score [q, 1], digits of the value [q, d] each; or None.
        seen: how many of the keys each query sees, int32 [q]; or None, all. Not together with own.
        values: digits [n, d] each.
    """
    (v_high, v_low), n = values, len(values[0])
    scores = joined(*sums).mul_(scales[0] * 256).mul_(scales[1])
    if position is not None:
        scores += position[1].gather(1, position[0].long())
    if own is not None:
        scores = torch.cat((scores, own[0]), dim=1)
    if seen is not None:
        scores.masked_fill_(torch.arange(n, device=scores.device) >= seen[:, None], -math.inf)
    high, low, total = chosen(scores, top_k)
    cross = product(high[:, :n], v_low) + product(low[:, :n], v_high)
    result = joined(product(high[:, :n], v_high), cross)
    if own is not None:
        share = (high[:, n:].float() * 256 + low[:, n:].float()) / 256  # exact: a multiple of 2^-8
        result += share * (own[1].float() * 256 + own[2].float())
    return result / total


def by_loops(sums, scales, position, own, seen, top_k, values) -> Tensor:
    """The same bits on a CPU, a row at a time."""
    (high, cross), (q_scale, k_scale) = (t.numpy() for t in sums), (array(t.view(-1)) for t in scales)
    bucket, products = compiled.NO_BUCKETS, compiled.NO_PRODUCTS
    if position is not None:
        bucket, products = (array(t) for t in position)
    v_high, v_low = (t.numpy() for t in values)
    q, d = len(high), v_high.shape[1]
    itself = tuple(map(array, own)) if own else (compiled.NO_PRODUCTS, compiled.NO_DIGITS, compiled.NO_DIGITS)
    visible = compiled.ALL if seen is None else array(seen)
    out = np.empty((q, d), dtype=np.float32)

    def part(i, j):
        mine = (t[i:j] for t in itself)
        compiled.attend_rows(
            high[i:j], cross[i:j], q_scale[i:j], k_scale, bucket[i:j], products[i:j], visible[i:j], top_k or 2**31 - 1,
            v_high, v_low, *mine, out[i:j],
        )  # fmt: skip

    compiled.in_threads(part, q)
    return torch.from_numpy(out)
