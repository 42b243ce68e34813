"""Attention a few heads and queries at a time, so that memory grows with the number of tokens and not with its square.

with Tiles():
    model(x)
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from entroformer_lib.models.attention import UpToItself, attend

ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # scores held at a time; a few MiB stay in a CPU's cache


def in_tiles(
    q: Tensor, k: Tensor, v: Tensor, layer, numbers: Tensor, sites, visible, relative, top_k, own=None, trim=False
) -> Tensor:
    """`attend`, tile by tile. trim: where tokens see only those before them, with the keys that the tile can see."""
    B, heads, q_len, _ = q.shape
    limit = ELEMENTS.get(q.device.type, 2**23) // (B * max(k.size(2), 1))
    queries = min(q_len, max(64, limit))  # few heads rather than few queries: keys are prepared once a tile
    some = min(heads, max(1, limit // queries))
    out = torch.empty_like(q, dtype=v.dtype)
    for h in (slice(i, i + some) for i in range(0, heads, some)):
        for i in (slice(j, j + queries) for j in range(0, q_len, queries)):
            n = int(numbers[i][-1]) + 1 if trim and isinstance(visible, UpToItself) else k.size(2)
            mine = own and tuple(t[:, h, i] for t in own)
            out[:, h, i] = attend.__wrapped__(
                q[:, h, i], k[:, h, :n], v[:, h, :n], layer, numbers[i], sites, visible, relative, top_k, mine
            )
    return out


class Tiles(TorchFunctionMode):
    """Inside the block attention goes by tiles, where no gradient is wanted."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is attend and not torch.is_grad_enabled():
            return in_tiles(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))
