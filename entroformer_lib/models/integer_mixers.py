"""GroupedMixer's mixers in the integers of `integer.py`.

Windows and cross-group attention are the same thing to a query: a short list of keys. So both can end in one function,
`attend_lists`: in compiled loops on a CPU, in tensor operations elsewhere, with the same bits. The tokens of a window
share their list, so on a CPU `attend_windows` multiplies whole windows instead, which is faster: the same bits again.
"""

import torch
from torch import Tensor, nn

from entroformer_lib.models import compiled
from entroformer_lib.models.groupedmixer import ContextCache, CrossAttention, TopKMixer, WindowAttention, windows
from entroformer_lib.models.integer import Digits, chosen, digits, joined
from entroformer_lib.models.integer_layers import (
    IntegerAttention,
    IntegerLinear,
    IntegerPosition,
    array,
    value_scale,
)
from entroformer_lib.models.position import grid_sites

QUERIES = 1024  # that the tensor operations take at a time
MOST_TOKENS = 512  # of a window, for exact sums in float32


def attend_lists(q: Digits, k: Digits, v: tuple[Tensor, Tensor], listed: Tensor, extra: Tensor) -> Tensor:
    """Attention of each query over its own list of keys.

    Args:
        q: queries [q, D], already scaled. k: keys [n, D], scale [n, 1] as of `digits`. v: digits of values [n, D].
        listed: numbers of keys, -1 for none: int32 [q, L].
        extra: added to the scores: [heads, q, L].

    Returns:
        [q, D], in units of value_scale / 256.
    """
    look = _by_loops if listed.device.type == "cpu" else by_tensors
    return look(q, k, v, listed, extra)


def _by_loops(q, k, v, listed, extra) -> Tensor:
    out = torch.empty(q.high.shape)
    keys = (*(array(t) for t in (k.high, k.low, k.scale[:, 0], *v)),)
    query, lists, more, result = (
        [array(t) for t in (q.high, q.low, q.scale[:, 0])],
        array(listed),
        array(extra),
        out.numpy(),
    )

    def part(i, j):
        compiled.attend_listed(*(t[i:j] for t in query), *keys, lists[i:j], more[:, i:j], result[i:j])

    compiled.in_threads(part, len(listed))
    return out


def by_tensors(q, k, v, listed, extra) -> Tensor:
    """The same bits in tensor operations. Sums of products of digits over a head or a list stay far below 2^24, so
    float32 has them exactly."""
    heads, D = len(extra), q.high.size(1)
    out = torch.empty(q.high.shape, device=q.high.device)
    for i in (slice(j, j + QUERIES) for j in range(0, len(listed), QUERIES)):
        here = listed[i].clamp(min=0).long()  # [q, L]
        q_high, q_low = (t[i].float().view(-1, heads, 1, D // heads) for t in q[:2])
        k_high, k_low, v_high, v_low = (
            t[here].float().unflatten(2, (heads, -1)).transpose(1, 2) for t in (*k[:2], *v)
        )  # [q, heads, L, d]
        high = q_high @ k_high.transpose(2, 3)
        cross = q_high @ k_low.transpose(2, 3) + q_low @ k_high.transpose(2, 3)
        scores = joined(high, cross)[:, :, 0].mul_(q.scale[i, :, None] * 256).mul_(k.scale[:, 0][here][:, None])
        scores = scores + extra[:, i].transpose(0, 1)  # [q, heads, L]
        scores = scores.masked_fill(listed[i, None] < 0, -torch.inf)
        w_high, w_low, total = chosen(scores.flatten(0, 1), None)  # [q heads, L], [q heads, 1]
        w_high, w_low = (t.float().view(-1, heads, 1, t.size(1)) for t in (w_high, w_low))
        result = joined(w_high @ v_high, w_high @ v_low + w_low @ v_high)[:, :, 0]  # [q, heads, d]
        out[i] = (result / total.view(-1, heads, 1)).flatten(1)
    return out


def attend_windows(q: Digits, k: Digits, v: tuple[Tensor, Tensor], index: Tensor, bucket, products) -> Tensor:
    """`attend_lists` where tokens share their lists, on a CPU: products of whole windows, in float32, where sums of
    products of digits over a head or a window of up to MOST_TOKENS are exact.

    Args:
        q, k, v: as for `attend_lists`, of the same n tokens.
        index: numbers of a window's tokens, -1 for none: [W, s].
        bucket, products: relative positions, [s, s] and [heads, n, buckets].

    Returns:
        [W s, D], in units of value_scale / 256; places without a token hold nothing of meaning.
    """
    heads, (W, s) = len(products), index.shape
    here, d = index.clamp(min=0), q.high.size(1) // heads

    def windowed(first: Tensor, second: Tensor) -> Tensor:  # [n, D] each  ->  [W, heads, s, 2, d], in their own bytes
        return torch.stack((first, second), dim=1)[here].unflatten(3, (heads, d)).permute(0, 3, 1, 2, 4)

    with torch.autocast("cpu", enabled=False):
        queries = torch.empty(W, heads, s, 2, d).copy_(windowed(*q[:2])).flatten(3)  # high beside low
        keys = torch.empty(W, heads, s, 2, d).copy_(windowed(k.low, k.high)).flatten(3).transpose(2, 3)
        values = torch.empty(W, heads, 2, s, d).copy_(windowed(*v[::-1]).transpose(2, 3)).flatten(2, 3)  # low on high
        high, cross = queries[..., :d] @ keys[:, :, d:], queries @ keys  # [W, heads, s, s]
        weights, total = torch.empty(W, heads, s, 2 * s), torch.empty(W, heads, s)  # high beside low
        of_window, result = [array(t) for t in (high, cross, index)], (weights.numpy(), total.numpy())
        of_tokens = [array(t) for t in (q.scale[:, 0], k.scale[:, 0])], [array(bucket), array(products)]

        def part(i, j):
            a, b, numbers = (t[i:j] for t in of_window)
            scales, positions = of_tokens
            compiled.weights_of_windows(a, b, *scales, numbers, *positions, *(t[i:j] for t in result))

        compiled.in_threads(part, W, least=4)
        out = (weights[..., :s] @ values[:, :, s:]).mul_(256).add_(weights @ values).div_(total[..., None])
    return out.transpose(1, 2).reshape(W * s, -1)


class _Mixer(nn.Module):
    """What both have: projections in digits."""

    def __init__(self, mixer: WindowAttention | CrossAttention, norm: nn.LayerNorm):
        super().__init__()
        self.heads, self.scale = mixer.heads, mixer.scale
        self.qkv, self.out = IntegerLinear(mixer.qkv.weight, None), IntegerLinear(mixer.out.weight, None)
        self.register_buffer("value_scale", value_scale(mixer.qkv.weight, norm))

    def project(self, x: Tensor) -> tuple[Digits, Digits, Digits]:
        """Queries, keys and values of tokens [q, D]."""
        joint = self.qkv(x)
        if x.device.type != "cpu":
            q, k, v = joint.chunk(3, dim=-1)
            return digits(q * self.scale), digits(k), digits(v, self.value_scale)
        n, D = x.shape
        parts = [torch.empty(n, D, dtype=torch.int8) for _ in range(6)]
        q_high, q_low, k_high, k_low, v_high, v_low = parts
        q_scale, k_scale, value_scale = torch.empty(n, 1), torch.empty(n, 1), array(self.value_scale)
        filled = [t.numpy() for t in (q_high, q_low, q_scale[:, 0], k_high, k_low, k_scale[:, 0], v_high, v_low)]
        rows = array(joint)

        def part(i, j):
            compiled.split_projection(rows[i:j], self.scale, value_scale, *(t[i:j] for t in filled))

        compiled.in_threads(part, n)
        return Digits(q_high, q_low, q_scale), Digits(k_high, k_low, k_scale), Digits(v_high, v_low, self.value_scale)

    def result(self, looked: Tensor) -> Tensor:
        """What `attend_lists` returned, through the last projection: [q, D]"""
        return self.out(looked * 256 * self.value_scale)


class IntegerWindow(_Mixer):
    """WindowAttention in digits, for one picture.  x: [1, S, n, D]  ->  [1, S, n, D]"""

    def __init__(self, mixer: WindowAttention, norm: nn.LayerNorm):
        super().__init__(mixer, norm)
        self.side, self.shift = mixer.side, mixer.shift
        self.relative = IntegerPosition(mixer.relative)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        _, S, n, D = x.shape
        index, place = (t.to(x.device) for t in windows(*grid, self.side, self.shift))
        first = torch.arange(S, device=x.device)[:, None, None]
        index = torch.where(index < 0, index, index + first * n)  # [S, windows, side^2], numbers among all S n tokens
        place = (place + first[:, 0] * index[0].numel()).flatten()  # [S n]
        q, k, v = self.project(x.reshape(S * n, D))
        products = self.relative.products(q, self.heads)  # [heads, S n, buckets]
        sites = grid_sites(self.side, self.side, x.device)
        bucket, index = self.relative.buckets(sites, sites), index.flatten(0, 1)  # [side^2, side^2], [W, side^2]
        full = index.numel() <= 1.5 * S * n  # shifted windows of a small picture are half empty
        if x.device.type == "cpu" and full and self.side**2 <= MOST_TOKENS:
            looked = attend_windows(q, k, v[:2], index, bucket, products)[place]
        else:
            listed = index[place // self.side**2].to(torch.int32)  # [S n, side^2]
            buckets = bucket[place % self.side**2].long()  # [S n, side^2]
            extra = products.gather(2, buckets.expand(self.heads, -1, -1))
            looked = attend_lists(q, k, v[:2], listed, extra)
        return self.result(looked).view(1, S, n, D)


class IntegerCross(_Mixer):
    """CrossAttention in digits, for one picture.  x: [1, S, n, D]  ->  [1, S, n, D]"""

    def __init__(self, mixer: CrossAttention, norm: nn.LayerNorm):
        super().__init__(mixer, norm)
        self.register_buffer("bias", mixer.bias.detach().float())

    def forward(self, x: Tensor, cache: ContextCache | None = None, layer: int = 0) -> Tensor:
        _, S, n, D = x.shape
        q, k, v = self.project(x.reshape(S * n, D))
        slots, next_slot, next_place = S, n, 1  # how far apart tokens are in the memory of keys
        kept = (*k, *v[:2])
        if cache is not None:
            slots, next_slot, next_place = cache.length + 1, 1, cache.slots
            kept = (t.flatten(0, 1) for t in cache.append(layer, *kept))  # [n all slots, D]
        k_high, k_low, k_scale, *v = kept
        at = torch.arange(slots, device=x.device)
        distance = at[slots - S :, None] - at  # [S, slots]
        listed = at * next_slot + torch.arange(n, device=x.device)[:, None] * next_place  # [n, slots]
        listed = torch.where(distance[:, None] < 0, -1, listed).flatten(0, 1).to(torch.int32)  # [S n, slots]
        extra = self.bias[:, distance.clamp(min=0)].repeat_interleave(n, 1)  # [heads, S n, slots]
        return self.result(attend_lists(q, Digits(k_high, k_low, k_scale), tuple(v), listed, extra)).view(1, S, n, D)


class IntegerTopK(nn.Module):
    """TopKMixer in digits, for one picture.  x: [1, S, n, D]  ->  [1, S, n, D]"""

    def __init__(self, mixer: TopKMixer, norm: nn.LayerNorm):
        super().__init__()
        self.attention = IntegerAttention(mixer.attention, norm)
        self.relative = IntegerPosition(mixer.relative)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        sites = grid_sites(*grid, x.device)
        return torch.stack([self.attention(slot[None], sites, relative=self.relative) for slot in x[0]], dim=1)


def integer_inner(mixer: WindowAttention | TopKMixer, norm: nn.LayerNorm) -> nn.Module:
    """An inner-group mixer in digits."""
    return (IntegerWindow if isinstance(mixer, WindowAttention) else IntegerTopK)(mixer, norm)
