"""Top-k self-attention and the transformer block (sections 3.1 and 3.3).

Bottom up: cache of keys and values, attention, a block of attention and feed-forward, a stack of blocks. Each quantity
a reader may want to look at passes through a module that does nothing (`nn.Identity`): a hook on it sees the tensor,
and without a hook it costs nothing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.position import RelativePosition, sinusoidal_positions
from entroformer_lib.models.primitives import dot_products, float_or_wider, keep_top_k, replaceable, weighted_sum

# The mask: which keys may a query see? Query numbers [q] -> True where visible, [q, n] or [B, 1, q, n].
Visible = Callable[[Tensor], Tensor]


class UpToItself(NamedTuple):
    """Each of n tokens sees those before it and itself; a `Visible`, and a class so that fast paths recognise it."""

    n: int

    def __call__(self, i: Tensor) -> Tensor:
        """i: [q]  ->  bool [q, n]"""
        return torch.arange(self.n, device=i.device) <= i[:, None]


class KVCache:
    """Keys and values of the tokens seen so far, of one attention layer: nothing is computed twice.

    Called with those of new tokens, [B, heads, q, d], it keeps them and returns all it has. The tokens of the second
    slice (Figure 4) see the whole first slice and themselves, but not each other. For them the cache is `closed`: it
    keeps nothing more and returns the first slice's, and `attend` gets each token's own key and value as `own`.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length, self.closed = capacity, 0, False
        self.keys = self.values = None

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """->  keys and values, [B, heads, n, d] each"""
        if self.keys is None:
            self.keys, self.values = (t.new_empty(*t.shape[:2], self.capacity, t.size(3)) for t in (k, v))
        if not self.closed:
            here = slice(self.length, self.length + k.size(2))
            self.keys[:, :, here], self.values[:, :, here] = k, v
            self.length = here.stop
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class TopKAttention(nn.Module):
    """Multi-head attention over the k best keys, with relative positions: eq. 6, whose P is p_ij of eq. 4.

        softmax(f_k(Q (K + P)^T / sqrt(d_k))) V

    f_k is `keep_top_k` (eq. 7). With `top_k=None` and without positions this is eq. 3.

    Args:
        top_k: None is dense attention.
        scale: "head" divides by sqrt(d_k), the width of a head, as in eq. 3; "width" by sqrt(dim), as released, which
            the authors call a mistake.
        window: how many rows and columns away a query looks (ours); None: everywhere.

    Hook points, each [B, heads, q, n]: `content` = Q K^T / sqrt(d_k) and `position` = Q P^T / sqrt(d_k),
    their sum `scores` (-inf where not visible), `selected` (after f_k) and `probs`. (With a closed cache the last three
    have one column more, for each query's own key.)
    """

    def __init__(self, dim: int, heads: int, top_k: int | None, scale: str, window: int | None = None):
        super().__init__()
        self.heads, self.top_k, self.window = heads, top_k, window
        self.scale = 1 / math.sqrt(dim if scale == "width" else dim // heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.content, self.position, self.scores = nn.Identity(), nn.Identity(), nn.Identity()
        self.selected, self.probs = nn.Identity(), nn.Identity()

    def forward(
        self,
        x: Tensor,
        sites: Tensor,
        visible: Visible | None = None,
        relative: RelativePosition | None = None,
        top_k: int | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x: [B, q, D]; sites: [t, 2] of all t tokens, those of the cache first and x's last; visible: the mask, None:
        every query sees every key; top_k: replaces the layer's own in this pass  ->  [B, q, D]"""
        q, k, v = self.project(x)
        own = (k, v) if cache is not None and cache.closed else None
        if cache is not None:
            k, v = cache(k, v)
        out = attend(q, k, v, self, sites, visible, relative, top_k or self.top_k, own)  # [B, heads, q, d]
        return self.out(out.transpose(1, 2).flatten(2))  # heads joined: [B, q, D]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values.  x: [B, q, D]  ->  [B, heads, q, d] each"""
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1)  # [B, q, 3, heads, d]
        return qkv.permute(2, 0, 3, 1, 4).unbind()


@replaceable
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: TopKAttention,
    sites: Tensor,
    visible: Visible | None,
    relative: RelativePosition | None,
    top_k: int | None,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of the last q of t tokens to the first n; `replaceable`, so that it can be done in other ways.

    q: [B, heads, q, d]; k, v: [B, heads, n, d]; sites: [t, 2]; own: key and value of each query itself,
    [B, heads, q, d] each, where they are not in k and v (a closed cache)  ->  [B, heads, q, d]
    """
    numbers = torch.arange(len(sites) - q.size(2), len(sites), device=q.device)
    seen = None if visible is None else visible(numbers)
    return attention_of(q, k, v, layer, sites[numbers], sites[: k.size(2)], seen, relative, top_k, own)


def attention_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: TopKAttention,
    query_sites: Tensor,
    key_sites: Tensor,
    seen: Tensor | None,
    relative: RelativePosition | None,
    top_k: int | None,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Equation 6, each query independent of the others, so that `attend` may be done for a part of the queries.

    q: [B, heads, q, d]; k, v: [B, heads, n, d]; query_sites: [q, 2]; key_sites: [n, 2]; seen: bool [q, n] or
    [B, 1, q, n], None: all; own: as in `attend`, and then `seen` has a last column for it  ->  [B, heads, q, d]
    """
    n = k.size(2)
    if layer.window is not None:
        near = (query_sites[:, None] - key_sites).abs().amax(-1) <= layer.window  # [q, n]
        near = near if own is None else torch.cat((near, near.new_ones(len(near), 1)), dim=-1)
        seen = near if seen is None else seen & near
    # The ranking needs more digits than bfloat16 has, so the scores leave autocast.
    with torch.autocast(q.device.type, enabled=False):
        q = float_or_wider(q) * layer.scale
        scores = layer.content(dot_products(q, float_or_wider(k)))  # Q K^T of eq. 6: [B, heads, q, n]
        if relative is not None:
            scores = scores + layer.position(relative(q, query_sites, key_sites))  # Q P^T of eq. 6, P = p_ij of eq. 4
        if own is not None:  # each query's own key as one column more
            # [B, heads, q, 1, d] each  ->  [B, heads, q, 1]
            mine = dot_products(q[..., None, :], float_or_wider(own[0])[..., None, :])[..., 0]
            scores = torch.cat((scores, mine if relative is None else mine + relative.own(q)), dim=-1)
        if seen is not None:
            scores = scores + torch.where(seen, 0.0, -torch.inf)  # quicker than masked_fill
        # f_k and softmax of eq. 6
        probs = layer.probs(layer.selected(keep_top_k(layer.scores(scores), top_k)).softmax(dim=-1))
    probs = probs.to(v.dtype)
    return weighted_sum(probs, v) if own is None else weighted_sum(probs[..., :n], v) + probs[..., n:] * own[1]


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": lambda: nn.LeakyReLU(0.2)}


def feed_forward(c: EntroformerConfig) -> nn.Sequential:
    """The two linear layers of a block.  [..., D]  ->  [..., D]"""
    inner = c.ffn_ratio * c.dim
    return nn.Sequential(nn.Linear(c.dim, inner), ACTIVATIONS[c.activation](), nn.Linear(inner, c.dim))


class Block(nn.Module):
    """One transformer block: x + Attention(LN(x)), then x + FeedForward(LN(x)).

    Pre-norm, as in the released code; Vaswani et al. have post-norm.

    x: [B, q, D]  ->  [B, q, D]
    """

    def __init__(self, c: EntroformerConfig, top_k: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim)
        self.attention = TopKAttention(c.dim, c.heads, top_k, c.attention_scale, c.search_window)
        self.norm2 = nn.LayerNorm(c.dim)
        self.feed_forward = feed_forward(c)

    def forward(self, x: Tensor, sites: Tensor, **attention) -> Tensor:
        x = x + self.attention(self.norm1(x), sites, **attention)
        return x + self.feed_forward(self.norm2(x))


class Stack(nn.Module):
    """Blocks in a row with their position encoding; the context model has one, each stage of the hyperprior too.

    The encoder and decoder layers of section 3.1 are both these blocks of self-attention; a decoder has a mask. There
    is no cross-attention: features of context and hyperprior are concatenated in `EntropyParameters`.

    Args:
        c: widths, heads and switches come from it.
        layers, top_k, radius: what differs between the stacks of one model.
    """

    def __init__(self, c: EntroformerConfig, layers: int, top_k: int | None, radius: int):
        super().__init__()
        self.dim, self.jitter, self.absolute = c.dim, c.top_k_jitter, c.position == "absolute"
        self.share_position = c.share_position
        self.blocks = nn.ModuleList(Block(c, top_k) for _ in range(layers))
        tables = 0 if c.position in ("none", "absolute") else 1 if c.share_position else layers
        self.positions = nn.ModuleList(RelativePosition(c.position, radius, c.dim // c.heads) for _ in range(tables))
        init_linear(self)

    def cache(self, capacity: int) -> list[KVCache]:
        """An empty cache for each block."""
        return [KVCache(capacity) for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        sites: Tensor,
        visible: Visible | None = None,
        cache: list[KVCache] | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """x: [B, q, D]; sites: [t, 2] of all t tokens, those of the cache first and x's last; visible: the mask;
        layers: those to go through, by default all  ->  [B, q, D]"""
        layers = range(len(self.blocks)) if layers is None else layers
        top_k = None  # each block's own
        if self.absolute and layers.start == 0:
            x = x + sinusoidal_positions(sites[sites.size(0) - x.size(1) :], self.dim).to(x.dtype)
        if self.jitter and self.training and (k := self.blocks[0].attention.top_k) is not None:
            top_k = int(torch.randint(max(2, k // 2), 2 * k, ()))
        for i in layers:
            relative = self.positions[0 if self.share_position else i] if len(self.positions) else None
            x = self.blocks[i](x, sites, visible=visible, relative=relative, top_k=top_k, cache=cache and cache[i])
        return x

    def remember(self, x: Tensor, sites: Tensor, cache: list[KVCache]) -> None:
        """Fills the cache with tokens whose outputs nobody needs, so the last block computes keys and values only.

        x: [B, q, D]; sites: [t, 2], as in `forward`
        """
        last = self.blocks[-1]
        x = self.forward(x, sites, cache=cache, layers=range(len(self.blocks) - 1))
        cache[-1](*last.attention.project(last.norm1(x))[1:])


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of the linear layers inside (appendix A.5; 0.02 as in BERT and ViT), biases zero. Layers
    outside of `Stack` and `GroupedMixer` begin as torch's."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
