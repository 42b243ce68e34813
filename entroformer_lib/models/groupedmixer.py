"""GroupedMixer (Li et al. 2024): an entropy model that codes the latents in G groups, group after group.

The Entroformer paper leaves a question open (section 5): is there a hierarchy of steps between the serial model, which
takes one step a site, and two passes? GroupedMixer is an answer. The latents are cut along channels and,
like a checkerboard, in space:

    k_c channel slices  x  k_h k_w interleaved phases  =  G groups,  each of (h/k_h) x (w/k_w) sites with M/k_c channels

Everything inside a group is coded at once, from the groups before it. Attention between all tokens of all groups is
taken apart into two short ones that take turns: an **inner-group mixer** (a token and the others of its group) and a
**cross-group mixer** (a token and those at the same place in earlier groups). All groups share the mixers' weights.

The sequence is shifted by one: slot i holds the latents of group i - 1 and predicts group i, slot 0 holds a learned
start. So an inner mixer may look in all directions, and a cross mixer at slots up to its own:

    slot          0        1        2    ...  G - 1
    holds       start   group 0  group 1      group G - 2
    predicts   group 0  group 1  group 2      group G - 1

When coding, an inner mixer needs its own slot only, and a cross mixer also keys and values of earlier slots, which are
kept (the *context cache*). So G passes go over one slot each; without the cache they would go over 1, 2 ... G slots.

We have only the paper's abstract, so much here is our choice:

- Order: channel slice by channel slice, in each the diagonal phases first.
- One embedding and one head per channel slice: channels of y differ in meaning, and these are few weights. One learned
  vector per group, which tells a slot what it predicts.
- Hyper features of the sites that a slot predicts are added to its tokens, and concatenated again before the head.
- Inner mixer: windows or top-k, with diamond positions. Cross mixer: a bias for the distance in groups.
- One feed-forward for each pair of mixers.

Letters in shapes: B pictures, G groups (S of them at a time), n sites of a group, m = M / k_c rounded up, D width.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entroformer_lib.models.attention import KVCache, TopKAttention, attention_of, feed_forward, init_linear
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.context import Step, Steps
from entroformer_lib.models.position import RelativePosition, grid_sites
from entroformer_lib.models.primitives import dot_products, float_or_wider, weighted_sum

Counts = tuple[int, int, int]  # k_c, k_h, k_w


# ---- groups ----


def group_order(counts: Counts, order: str = "channels") -> list[tuple[int, int, int]]:
    """Channel slice, row phase and column phase of every group, as they are coded.

    Args:
        counts: k_c, k_h, k_w.
        order: "channels": slice by slice, in each the diagonal phases first; "raster": slice by slice, phases row by
            row; "sites": phase by phase, diagonal first, in each slice after slice.
    """
    k_c, k_h, k_w = counts
    phases = list(itertools.product(range(k_h), range(k_w)))
    if order != "raster":
        phases.sort(key=lambda p: ((p[1] - p[0]) % k_w, p[0]))  # 2 x 2: (0, 0), (1, 1), (0, 1), (1, 0)
    if order == "sites":
        return [(s, *p) for p in phases for s in range(k_c)]
    return [(s, *p) for s in range(k_c) for p in phases]


def channel_slices(M: int, k_c: int) -> list[slice]:
    """The channels of each slice: m of them, or one less in the last ones where k_c does not divide M."""
    ends = [0, *itertools.accumulate(M // k_c + (s < M % k_c) for s in range(k_c))]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def group_grid(height: int, width: int, counts: Counts) -> tuple[int, int]:
    """Rows and columns of a group of a [height, width] grid; where the phases do not divide it, it is filled up."""
    return -(-height // counts[1]), -(-width // counts[2])


def split(y: Tensor, counts: Counts, order: str = "channels") -> Tensor:
    """Latents into groups, in the order of coding; filled up with zeros where slices and phases do not divide y.

    y: [B, M, h, w]  ->  [B, G, n, m]
    """
    k_c, k_h, k_w = counts
    rows, columns = group_grid(*y.shape[2:], counts)
    slices = [y[:, s] for s in channel_slices(y.size(1), k_c)]
    m = slices[0].size(1)
    down, right = rows * k_h - y.size(2), columns * k_w - y.size(3)
    y = torch.stack([F.pad(part, (0, right, 0, down, 0, m - part.size(1))) for part in slices], dim=1)  # k_c slices
    y = y.view(len(y), k_c, m, rows, k_h, columns, k_w)  # from [B, k_c, m, rows k_h, columns k_w]
    y = y.permute(0, 1, 4, 6, 3, 5, 2).flatten(4, 5)  # [B, k_c, k_h, k_w, n, m], n = rows columns
    return torch.stack([y[:, s, i, j] for s, i, j in group_order(counts, order)], dim=1)


def merge(groups: Tensor, size: tuple[int, int, int], counts: Counts, order: str = "channels") -> Tensor:
    """Inverse of `split`.  groups: [B, G, n, m], size: (M, h, w)  ->  [B, M, h, w]"""
    k_c, k_h, k_w = counts
    (M, height, width), (rows, columns) = size, group_grid(*size[1:], counts)
    number = {key: g for g, key in enumerate(group_order(counts, order))}
    keys = itertools.product(range(k_c), range(k_h), range(k_w))
    y = torch.stack([groups[:, number[key]] for key in keys], dim=1).unflatten(1, (k_c, k_h, k_w))  # [.., n, m]
    y = y.unflatten(4, (rows, columns))  # [B, k_c, k_h, k_w, rows, columns, m]
    y = y.permute(0, 1, 6, 4, 2, 5, 3)  # [B, k_c, m, rows, k_h, columns, k_w]
    y = y.reshape(len(groups), k_c, -1, rows * k_h, columns * k_w)[..., :height, :width]  # [B, k_c, m, h, w]
    return torch.cat([y[:, i, : s.stop - s.start] for i, s in enumerate(channel_slices(M, k_c))], dim=1)


# ---- inner-group mixers ----


def windows(
    height: int, width: int, side: int, shift: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Windows of a grid, moved up and left by `shift`; at the border they are partly empty.

    ->  token in each place of each window, -1 where it is empty: [windows, side^2]; and the other way round, the place
    of each token in the flattened windows: [height * width]
    """
    down, right = -(height + shift) % side, -(width + shift) % side
    number = torch.arange(height * width, device=device).view(1, height, width)
    number = F.pad(number, (shift, right, shift, down), value=-1)[0]  # [rows, columns], with the border
    index = number.unfold(0, side, side).unfold(1, side, side).reshape(-1, side * side)  # [windows, side^2]
    across = number.size(1) // side  # windows side by side
    row, column = (grid_sites(height, width, device) + shift).unbind(1)  # [height * width] each
    place = ((row // side * across + column // side) * side + row % side) * side + column % side
    return index, place


class WindowAttention(TopKAttention):
    """Inner-group mixer: a token sees the tokens of its window, in all directions, with diamond relative positions.

    In every second layer the windows are moved by half a side, so that tokens on both sides of a border meet.

    Hook points as TopKAttention's, [B S windows, heads, side^2, side^2].

    x: [B, S, n, D]  ->  [B, S, n, D]
    """

    def __init__(self, c: EntroformerConfig, layer: int):
        super().__init__(c.dim, c.heads, None, "head")
        self.side, self.shift = c.window, c.window // 2 * (layer % 2)
        self.relative = RelativePosition("diamond", c.radius, c.dim // c.heads)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """grid: rows and columns of a group."""
        B, S, n, D = x.shape
        index, place = windows(*grid, self.side, self.shift, x.device)
        q, k, v = (
            part[:, :, index.clamp(min=0)].transpose(1, 2).flatten(0, 1)  # [B S windows, heads, side^2, d] each
            for part in self.project(x.flatten(0, 1))  # [B S, heads, n, d] each
        )
        sites = grid_sites(self.side, self.side, x.device)
        filled = (index >= 0).repeat(B * S, 1)[:, None, None]  # [B S windows, 1, 1, side^2]
        out = attention_of(q, k, v, self, sites, sites, filled, self.relative, None)
        out = out.transpose(1, 2).reshape(B * S, -1, D)[:, place]  # [B S, n, D]
        return self.out(out).view(B, S, n, D)


class TopKMixer(nn.Module):
    """Inner-group mixer: Entroformer's top-k attention with diamond positions over the whole group.

    x: [B, S, n, D]  ->  [B, S, n, D]
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.attention = TopKAttention(c.dim, c.heads, c.top_k, c.attention_scale)
        self.relative = RelativePosition("diamond", c.radius, c.dim // c.heads)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        sites = grid_sites(*grid, x.device)
        return self.attention(x.flatten(0, 1), sites, relative=self.relative).view(x.shape)


# ---- cross-group mixer ----


class CrossAttention(nn.Module):
    """Cross-group mixer: a token sees the tokens at its own place in the slots up to its own.

    Hook points, [B n, heads, S, slots]: `scores` (-inf where not visible) and `probs`.

    x: [B, S, n, D]  ->  [B, S, n, D]
    """

    def __init__(self, c: EntroformerConfig, groups: int):
        super().__init__()
        self.heads, self.scale = c.heads, 1 / math.sqrt(c.dim // c.heads)
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.out = nn.Linear(c.dim, c.dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(c.heads, groups))  # of the distance in groups
        self.scores, self.probs = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """With a cache (the paper's context cache), x is the next slot, S = 1, and the earlier ones come from there."""
        B, S, n, D = x.shape
        qkv = self.qkv(x.transpose(1, 2)).unflatten(3, (3, self.heads, -1))  # [B, n, S, 3, heads, d]
        q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)  # [B n, heads, S, d]
        if cache is not None:
            k, v = cache(k, v)  # [B n, heads, slots, d]
        with torch.autocast(x.device.type, enabled=False):
            scores = dot_products(float_or_wider(q) * self.scale, float_or_wider(k))  # [B n, heads, S, slots]
            probs = self.probs(self.scores(scores + self._by_distance(S, k.size(2))).softmax(-1)).to(v.dtype)
        out = weighted_sum(probs, v).permute(0, 2, 1, 3).reshape(B, n, S, D)
        return self.out(out).transpose(1, 2)

    def _by_distance(self, S: int, slots: int) -> Tensor:
        """The bias of the last S slots with all: [heads, S, slots], -inf for later slots."""
        at = torch.arange(slots, device=self.bias.device)
        distance = at[slots - S :, None] - at
        return self.bias[:, distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)


# ---- the entropy model ----


class MixerPair(nn.Module):
    """Inner-group mixer, cross-group mixer, feed-forward; each on normalised tokens and added to its input.

    x: [B, S, n, D]  ->  [B, S, n, D]
    """

    def __init__(self, c: EntroformerConfig, layer: int, groups: int):
        super().__init__()
        self.inner = self.cross = None
        if c.inner != "none":
            self.norm1 = nn.LayerNorm(c.dim)
            self.inner = WindowAttention(c, layer) if c.inner == "window" else TopKMixer(c)
        if c.cross:
            self.norm2 = nn.LayerNorm(c.dim)
            self.cross = CrossAttention(c, groups)
        self.norm3 = nn.LayerNorm(c.dim)
        self.feed_forward = feed_forward(c)

    def forward(self, x: Tensor, grid: tuple[int, int], cache: KVCache | None = None) -> Tensor:
        if self.inner is not None:
            x = x + self.inner(self.norm1(x), grid)
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), cache)
        return x + self.feed_forward(self.norm3(x))


class GroupedMixer(nn.Module):
    """The entropy model behind h_s: from the latents and the hyperprior feature to the Gaussian of every latent.

    y_hat: [B, M, h, w], hyper: [B, D, h, w]  ->  means, logarithms of scales: [B, M, h, w]
    """

    def __init__(self, c: EntroformerConfig):
        super().__init__()
        self.counts, self.order_name = c.groups, c.group_order
        self.order = group_order(c.groups, c.group_order)
        self.slices = channel_slices(c.M, c.groups[0])
        m = self.slices[0].stop  # the first slice begins at 0, and none is wider
        self.embed = nn.ModuleList(nn.Linear(m, c.dim) for _ in range(c.groups[0]))  # of each channel slice
        self.start = nn.Parameter(torch.zeros(c.dim))
        self.target = nn.Parameter(torch.zeros(len(self.order), c.dim))  # which group a slot predicts
        self.hyper = nn.Linear(c.dim, c.dim)
        self.pairs = nn.ModuleList(MixerPair(c, layer, len(self.order)) for layer in range(c.context_layers))
        self.join = nn.Sequential(nn.Linear(2 * c.dim, 2 * c.dim), nn.LeakyReLU(0.2))
        self.head = nn.ModuleList(nn.Linear(2 * c.dim, 2 * m) for _ in range(c.groups[0]))  # of each channel slice
        init_linear(self)
        for parameter in (self.start, self.target):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, y_hat: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor]:
        size = y_hat.shape[1:]
        groups = split(y_hat, self.counts, self.order_name)  # [B, G, n, m]
        at_target = self._of_groups(hyper)  # hyper features of the sites that each slot predicts: [B, G, n, D]
        held = [self._held(i, groups[:, i - 1] if i else None, at_target[:, i]) for i in range(len(self.order))]
        x = self._tokens(torch.stack(held, dim=1), at_target, range(len(self.order)))  # [B, G, n, D]
        for pair in self.pairs:
            x = pair(x, group_grid(*size[1:], self.counts))
        out = self._gaussians(x, at_target, range(len(self.order)))
        return tuple(merge(part, size, self.counts, self.order_name) for part in out)

    def steps(self, height: int, width: int, hyper: Tensor, cached: bool = True) -> Steps:
        """Group after group, and is sent its latents, [s, m or m - 1].  hyper: [1, D, h, w]

        cached: False computes all earlier slots again for every group, to see what the cache saves. The numbers are the
            same up to rounding, and the same bits inside `Exact()`.
        """
        grid = group_grid(height, width, self.counts)
        at_target = self._of_groups(hyper)  # [1, G, n, D]
        caches = [KVCache(len(self.order)) if cached else None for _ in self.pairs]
        # Sites are numbered from 1, because `split` fills up with 0.
        number = torch.arange(1, height * width + 1, device=hyper.device).view(1, 1, height, width)
        number = self._of_groups(number)[0, :, :, 0] - 1  # [G, n], -1: outside
        coded, held = None, []
        for i, (part, _, _) in enumerate(self.order):
            held.append(self._held(i, coded, at_target[:, i]))
            slots = range(i, i + 1) if cached else range(i + 1)
            here = at_target[:, slots.start : slots.stop]
            x = self._tokens(torch.stack(held[slots.start :], dim=1), here, slots)  # [1, S, n, D]
            for pair, cache in zip(self.pairs, caches, strict=True):
                x = pair(x, grid, cache)
            means, log_scales = (v[0, 0] for v in self._gaussians(x[:, -1:], here[:, -1:], range(i, i + 1)))  # [n, m]
            sites, channels = number[i], self.slices[part]
            inside, count = sites >= 0, channels.stop - channels.start
            latents = yield Step(channels, sites[inside], means[inside, :count], log_scales[inside, :count])
            coded = means.new_zeros(1, *means.shape)
            coded[0, inside, :count] = latents

    def _of_groups(self, v: Tensor) -> Tensor:
        """What stands at the sites of each group, with all channels.  [B, C, h, w]  ->  [B, G, n, C]"""
        _, k_h, k_w = self.counts
        phases = split(v, (1, k_h, k_w), "raster")  # [B, k_h k_w, n, C]
        return torch.stack([phases[:, row * k_w + column] for _, row, column in self.order], dim=1)

    def _held(self, slot: int, before: Tensor | None, like: Tensor) -> Tensor:
        """What a slot holds: the embedded latents of the group before it [B, n, m], or the start  ->  [B, n, D]"""
        if slot == 0:
            return self.start.to(like.dtype).expand(like.shape)
        return self.embed[self.order[slot - 1][0]](before)

    def _tokens(self, held: Tensor, at_target: Tensor, slots: range) -> Tensor:
        """held, at_target: [B, S, n, D]  ->  tokens: [B, S, n, D]"""
        return held + self.target[slots.start : slots.stop, None] + self.hyper(at_target)

    def _gaussians(self, x: Tensor, at_target: Tensor, slots: range) -> tuple[Tensor, Tensor]:
        """x, at_target: [B, S, n, D]  ->  means and logarithms of scales: [B, S, n, m]"""
        joined = self.join(torch.cat((x, at_target), dim=-1))  # [B, S, n, 2 D]
        out = [self.head[self.order[slot][0]](joined[:, i]) for i, slot in enumerate(slots)]
        log_scales, means = float_or_wider(torch.stack(out, dim=1)).chunk(2, dim=-1)
        return means, log_scales
