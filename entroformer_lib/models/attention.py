"""Top-k self-attention and the transformer block (sections 3.1 and 3.3).

Bottom up: choosing the k largest scores, attention, feed-forward, block, a stack of blocks. Each quantity a reader may
want to look at passes through a module that does nothing (`nn.Identity`): a hook on it sees the tensor, and without a
hook it costs nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from entroformer_lib.models.clock import tell
from entroformer_lib.models.integer import largest
from entroformer_lib.models.position import RelativePosition, sinusoidal_positions

# Which keys may a query see? Maps query numbers [q] to a mask, True = visible: [q, n] or [B, 1, q, n].
Visible = Callable[[Tensor], Tensor]


class UpToItself(NamedTuple):
    """Each of n tokens sees those before it and itself; a `Visible` that integer attention knows too."""

    n: int

    def __call__(self, i: Tensor) -> Tensor:
        """i: [q]  ->  bool [q, n]"""
        return torch.arange(self.n, device=i.device) <= i[:, None]


# Scores held at a time when no gradient is wanted; 2 MiB of float32 stay in a CPU's cache.
TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


def keep_top_k(scores: Tensor, k: int | None) -> Tensor:
    """f_k of eq. 7: keeps the k largest scores of each row and what equals the k-th, sets the rest to -inf.

    Flat parts of a picture give many *mathematically* equal scores, and then rounding noise chooses among them, here
    and in the released code. The coder cannot live with that: see `integer.py`.

    scores: [..., n] with -inf where a key is not visible  ->  the same shape
    """
    if k is None or k >= scores.size(-1):
        return scores
    return scores.masked_fill(scores.detach() < kth_largest(scores.detach(), k), -torch.inf)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, equal ones counted each: [..., n]  ->  [..., 1].

    On a CPU selection is slow and maxima are quick, so long rows are searched in groups (`integer.largest`).
    """
    n = scores.size(-1)
    groups = 1 if scores.device.type != "cpu" or n < 12 * k else 4 if n < 32 * k else 8  # the quickest where measured
    if groups == 1:
        return scores.topk(k).values[..., -1:]
    return largest(scores.flatten(0, -2), k, groups)[0][:, -1:].view(*scores.shape[:-1], 1)


class KeyValueCache:
    """Keys and values of the tokens coded so far, one pair of buffers per block: nothing is computed twice."""

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, head_dim: int, like: Tensor):
        shape = (layers, batch, heads, capacity, head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0  # tokens whose pass through all blocks is complete

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [B, heads, q, d] of new tokens  ->  all keys and values of this layer: [B, heads, length + q, d]."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.filled(layer, end)

    def filled(self, layer: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Views of the keys and values of the first `end` tokens; by default of all complete ones."""
        end = self.length if end is None else end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class TopKAttention(nn.Module):
    """Multi-head attention over the k best keys, with relative positions: eq. 4 and eq. 6.

        softmax(f_k(Q (K + P)^T / sqrt(d_k))) V

    Points to look at, each [B, heads, q, n]: `content` = Q K^T / sqrt(d_k) and `position` = Q P^T / sqrt(d_k),
    their sum `scores` (-inf where not visible), `selected` (after f_k) and `probs`.
    """

    def __init__(self, dim: int, heads: int, top_k: int | None, scale: str):
        super().__init__()
        self.heads, self.top_k = heads, top_k
        self.scale = (dim if scale == "width" else dim // heads) ** -0.5
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
        cache: KeyValueCache | None = None,
        layer: int = 0,
        apart: bool = False,
    ) -> Tensor:
        """x: [B, q, D] new tokens, sites: [n, 2] of all tokens including earlier, cached ones  ->  [B, q, D].

        With a cache, new tokens see the cached ones and each other, and join the cache; when they are `apart`, each
        sees the cached ones and itself, and the cache stays as it is.
        """
        B, q_len, D = x.shape
        q, k, v = self.project(x)
        first, own = 0, None
        if cache is not None:
            first = cache.length
            if apart:
                own = (k, v)
            k, v = cache.filled(layer) if apart else cache.append(layer, k, v)
        look = functools.partial(self._attend, sites=sites, visible=visible, relative=relative, top_k=top_k)
        numbers = torch.arange(first, first + q_len, device=x.device)
        if torch.is_grad_enabled():
            out = look(q, k, v, own, numbers)
        else:  # in tiles of heads and queries, so that memory grows with n and not with n^2
            out = torch.empty_like(q, dtype=v.dtype)
            heads, queries = self._tile(B, q_len, k.size(2), x.device.type)
            for h in (slice(i, i + heads) for i in range(0, self.heads, heads)):
                for i in (slice(j, j + queries) for j in range(0, q_len, queries)):
                    mine = own and (own[0][:, h, i], own[1][:, h, i])
                    out[:, h, i] = look(q[:, h, i], k[:, h], v[:, h], mine, numbers[i])
        return self.out(out.transpose(1, 2).reshape(B, q_len, D))

    def cache(self, layers: int, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for up to `capacity` tokens."""
        like = self.out.weight.detach()
        return KeyValueCache(layers, batch, self.heads, capacity, len(like) // self.heads, like)

    def remember(self, x: Tensor, cache: KeyValueCache, layer: int) -> None:
        """Keeps keys and values of tokens x: [B, q, D]."""
        _, k, v = self.project(x)
        cache.append(layer, k, v)

    def _tile(self, B: int, q_len: int, n: int, device: str) -> tuple[int, int]:
        """Heads and queries at a time: few scores, but enough queries for a matrix product to pay."""
        limit = TILE_ELEMENTS.get(device, 2**23) // (B * max(n, 1))
        queries = min(q_len, max(64, limit // self.heads))
        return min(self.heads, max(1, limit // queries)), queries

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values.  x: [B, q, D]  ->  [3, B, heads, q, d]"""
        B, q_len, D = x.shape
        return self.qkv(x).view(B, q_len, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

    def _attend(self, q, k, v, own, numbers, *, sites, visible, relative, top_k) -> Tensor:
        """q: [B, heads, q, d], k and v: [B, heads, n, d], own: two [B, heads, q, d] or None  ->  [B, heads, q, d]."""
        n = k.size(2)
        # The ranking needs more digits than bfloat16 has, so the scores leave autocast.
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = q.to(wide) * self.scale, k.to(wide)
            scores = self.content(q @ k.transpose(-1, -2))
            if relative is not None:
                scores = scores + self.position(relative(q, sites[numbers], sites[:n]))
            if own is not None:  # each query's own key as one column more
                self_scores = (q * own[0].to(wide)).sum(-1, keepdim=True)
                scores = torch.cat((scores, self_scores if relative is None else self_scores + relative.own(q)), dim=-1)
            if visible is not None:
                scores = scores + torch.where(visible(numbers), 0.0, -torch.inf)  # quicker than masked_fill
            scores = self.selected(keep_top_k(self.scores(scores), top_k or self.top_k))
            probs = self.probs(scores.softmax(dim=-1))
        probs = probs.to(v.dtype)
        return probs @ v if own is None else probs[..., :n] @ v + probs[..., n:] * own[1]


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": lambda: nn.LeakyReLU(0.2)}


class Block(nn.Module):
    """One pre-norm transformer block: x + Attention(LN(x)), then x + FeedForward(LN(x)).

    x: [B, q, D]  ->  [B, q, D]
    """

    def __init__(self, dim: int, heads: int, top_k: int | None, ffn_ratio: int, scale: str, activation: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = TopKAttention(dim, heads, top_k, scale)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, ffn_ratio * dim), ACTIVATIONS[activation](), nn.Linear(ffn_ratio * dim, dim)
        )

    def forward(self, x: Tensor, sites: Tensor, **attention) -> Tensor:
        x = x + self.attention(self.norm1(x), sites, **attention)
        return x + self.feed_forward(self.norm2(x))


class Stack(nn.Module):
    """Blocks in a row with their position encoding; the context model has one, each stage of the hyperprior too.

    Args:
        config: an EntroformerConfig; widths, heads and switches come from it.
        layers, top_k, radius: what differs between the stacks of one model.
    """

    def __init__(self, config, layers: int, top_k: int | None, radius: int):
        super().__init__()
        c = config
        self.top_k, self.jitter, self.heads = top_k, c.top_k_jitter, c.heads
        self.absolute = c.position == "absolute"
        self.blocks = nn.ModuleList(
            Block(c.dim, c.heads, top_k, c.ffn_ratio, c.attention_scale, c.activation) for _ in range(layers)
        )
        tables = 0 if c.position in ("none", "absolute") else 1 if c.share_position else layers
        self.positions = nn.ModuleList(RelativePosition(c.position, radius, c.dim // c.heads) for _ in range(tables))
        for module in self.modules():  # truncated normal, appendix A.5; 0.02 as in BERT and ViT
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for up to `capacity` tokens."""
        return self.blocks[0].attention.cache(len(self.blocks), batch, capacity)

    def fill(self, x: Tensor, sites: Tensor, cache: KeyValueCache, visible: Visible | None = None) -> None:
        """Runs tokens, which see the cached ones and each other, and only keeps what later ones need: of the last block
        its keys and values.  x: [B, q, D] new tokens, sites: [n, 2] of all tokens including cached ones"""
        x = self._embed_positions(x, sites)
        options = dict(visible=visible, top_k=self.top_k, cache=cache)
        for layer, block in enumerate(self.blocks[:-1]):
            x = block(x, sites, relative=self._relative(layer), layer=layer, **options)
            tell("blocks", layer + 1, len(self.blocks))
        last = self.blocks[-1]
        last.attention.remember(last.norm1(x), cache, len(self.blocks) - 1)
        cache.length += x.size(1)

    def forward(
        self,
        x: Tensor,
        sites: Tensor,
        visible: Visible | None = None,
        cache: KeyValueCache | None = None,
        apart: bool = False,
    ) -> Tensor:
        """x: [B, q, D] (with a cache: only the new tokens, see TopKAttention), sites: [n, 2]  ->  [B, q, D]."""
        x = self._embed_positions(x, sites)
        top_k = self.top_k
        if self.jitter and self.training and top_k is not None:
            top_k = int(torch.randint(max(2, top_k // 2), 2 * top_k, ()))
        options = dict(visible=visible, top_k=top_k, cache=cache, apart=apart)
        for layer, block in enumerate(self.blocks):
            x = block(x, sites, relative=self._relative(layer), layer=layer, **options)
            if cache is None or apart:  # else whoever feeds the tokens knows how many are to come
                tell("blocks", layer + 1, len(self.blocks))
        if cache is not None and not apart:
            cache.length += x.size(1)
        return x

    def _relative(self, layer: int) -> RelativePosition | None:
        return self.positions[min(layer, len(self.positions) - 1)] if len(self.positions) else None

    def _embed_positions(self, x: Tensor, sites: Tensor) -> Tensor:
        if not self.absolute:
            return x
        new = sites[sites.size(0) - x.size(1) :]
        return x + sinusoidal_positions(new, x.size(-1)).to(x.dtype)
