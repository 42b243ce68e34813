"""Relative position encodings (section 3.2): the diamond, and what Table 1 compares it with.

Equation 4 adds a learned vector p_ij to every key, chosen by where key j lies relative to query i. Written out for
all pairs that is an [n, n, d] tensor, 604 MB for one Kodak picture. But there are only a few *distinct* vectors (26 in
the diamond of h = 3), so we multiply the query with those and look the products up:

    q . (k_j + p_ij)  =  q . k_j  +  (q . table)[bucket(i, j)]
"""

import torch
from torch import Tensor, nn

from entroformer_lib.models.primitives import dot_products, replaceable


def grid_sites(height: int, width: int, device=None) -> Tensor:
    """(row, column) of every site of a grid in raster order: [height * width, 2]."""
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device).expand(height, width)
    return torch.stack((rows, columns), dim=-1).flatten(0, 1)


FEW_QUERIES = 4  # up to here looking up every pair is quicker than finding neighbours


class RelativePosition(nn.Module):
    """Position part of the attention scores, q . p_ij, for one kind of relative encoding.

    Kinds (h = radius, (dy, dx) = key - query, as released; eq. 5 has the opposite sign, which turns the table round):
        relative_1d  p = row vector[dy] + column vector[dx], both offsets clipped to [-h, h] ("1D + 1D")
        relative_2d  one vector per (dy, dx), both offsets clipped to [-h, h]: a square
        diamond      one vector per (dy, dx) with |dy| + |dx| <= h, one for everything outside (eq. 5)

    Eq. 5 sends everything outside to the vector of (h, h), the released code to that of (-h, -h). Neither offset lies
    inside the diamond, so both are the same thing: one vector more. We store just the 2h(h+1) + 2 vectors in use.
    """

    def __init__(self, kind: str, radius: int, head_dim: int):
        super().__init__()
        self.kind, self.radius = kind, radius
        side = 2 * radius + 1
        if kind == "relative_1d":
            self.rows = nn.Parameter(torch.empty(side, head_dim))
            self.columns = nn.Parameter(torch.empty(side, head_dim))
        else:
            count = side * side if kind == "relative_2d" else 2 * radius * (radius + 1) + 2
            self.vectors = nn.Parameter(torch.empty(count, head_dim))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)
        # Bucket of each offset after clipping to [-h-1, h+1]; the ring at h+1 stands for everything farther away.
        self.register_buffer("lookup", _bucket_of_offset(kind, radius), persistent=False)

    def table(self) -> Tensor:
        """All distinct vectors, which the heads share: [buckets, d]."""
        if self.kind == "relative_1d":
            return (self.rows[:, None] + self.columns[None, :]).flatten(0, 1)
        return self.vectors

    def buckets(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Index into `table` for each pair. queries: [q, 2], keys: [n, 2] (row, column)  ->  [q, n]."""
        ring = self.radius + 1
        offset = (keys[None] - queries[:, None]).clamp(-ring, ring) + ring  # [q, n, 2]
        return self.lookup[offset[..., 0], offset[..., 1]]

    @property
    def own_bucket(self) -> int:
        """The bucket of offset (0, 0): a query itself as key."""
        return int(self.lookup[self.radius + 1, self.radius + 1])

    def own(self, q: Tensor) -> Tensor:
        """Product of each query with the vector of offset (0, 0).  q: [B, heads, q, d]  ->  [B, heads, q, 1]"""
        return dot_products(q, self.table().to(q.dtype)[self.own_bucket, None])

    def forward(self, q: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """q: [B, heads, q, d], queries: [q, 2], keys: [n, 2]  ->  q . p_ij: [B, heads, q, n]."""
        return self.spread(dot_products(q, self.table().to(q.dtype)), queries, keys)

    def spread(self, products: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Products with every distinct vector: [B, heads, q, buckets]  ->  those of every pair: [B, heads, q, n]."""
        if self.kind == "diamond" and len(queries) > FEW_QUERIES and len(self.vectors) < len(keys):
            return self._diamond(products, queries, keys)
        index = self.buckets(queries, keys).expand(*products.shape[:2], -1, -1)  # a view, no copy
        return products.gather(-1, index)

    def _diamond(self, products: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """The same numbers, found the other way round: nearly all keys lie outside of the diamond, so every key gets
        the product of outside, and then the 2h(h+1) + 1 neighbours of each query get theirs."""
        n, near = len(keys), self.near(queries, keys)
        near = torch.where(near >= 0, near, n).expand(*products.shape[:2], -1, -1)  # [B, heads, q, 2h(h+1) + 1]
        everywhere = products[..., -1:].expand(*products.shape[:3], n + 1)  # one column more for "none"
        return everywhere.scatter(-1, near, products[..., :-1])[..., :n]

    def near(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Number of the key at each offset inside the diamond, in the order of buckets; -1 where there is none.
        queries: [q, 2], keys: [n, 2]  ->  [q, 2h(h+1) + 1]"""
        h = self.radius
        # Which key is at a site, with a border of h around the grid.
        height, width = (int(i) + 1 + 2 * h for i in torch.maximum(keys.amax(0), queries.amax(0)))
        number = torch.full((height, width), -1, device=keys.device)  # [rows + 2h, columns + 2h]
        number[keys[:, 0] + h, keys[:, 1] + h] = torch.arange(len(keys), device=keys.device)
        # Offset o has the index o + h + 1 in `lookup`, and site r the index r + h in `number`: one less.
        inside = (self.lookup < self.lookup.amax()).nonzero() - 1  # [2h(h+1) + 1, 2]
        near = queries[:, None] + inside  # [q, 2h(h+1) + 1, 2]
        return number[near[..., 0], near[..., 1]]


def _bucket_of_offset(kind: str, radius: int) -> Tensor:
    """[2h+3, 2h+3] table of bucket numbers for offsets in [-h-1, h+1]."""
    offsets = torch.arange(-radius - 1, radius + 2)
    if kind == "diamond":
        inside = offsets.abs()[:, None] + offsets.abs()[None, :] <= radius
        lookup = torch.full(inside.shape, int(inside.sum()))  # the last bucket: outside
        lookup[inside] = torch.arange(int(inside.sum()))  # row by row through the diamond
        return lookup
    clipped = offsets.clamp(-radius, radius) + radius
    return clipped[:, None] * (2 * radius + 1) + clipped[None, :]


@replaceable
def sinusoidal_positions(sites: Tensor, dim: int) -> Tensor:
    """Absolute encoding: half of the width for the row, half for the column, sines and cosines as in Vaswani 2017.

    The paper does not say which absolute encoding it used; fixed sines need no largest picture size (our choice).

    sites: [n, 2]  ->  [n, dim], float32
    """
    i = torch.arange(0, dim // 2, 2, dtype=torch.float64, device=sites.device)
    angles = sites[..., None] * 10000 ** (-i / (dim // 2))  # [n, 2, dim / 4]
    return torch.stack((angles.sin(), angles.cos()), dim=-2).flatten(1).float()  # from [n, 2, 2, dim / 4]
