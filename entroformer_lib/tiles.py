"""Attention a few heads and queries at a time, and transforms a strip of rows at a time, so that memory grows with the
number of tokens and pixels: attention's scores would grow with the square of the number of tokens, and GDN holds four
copies of its input, 1.6 GB each for a picture of 3840x2160 pixels and 192 channels.

    with Tiles():
        model(x)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entroformer_lib.models.attention import UpToItself, attend, attention_of
from entroformer_lib.models.transforms import ConvBlock, block_of, convolved

ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # scores held at a time; a few MiB stay in a CPU's cache
STRIP_ELEMENTS = 2**24  # of a layer's input or output at a time: 64 MiB in float32


class Tiles(TorchFunctionMode):
    """Inside the block attention goes by tiles and transforms go by strips, where no gradient is wanted."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        ours = {attend: in_tiles, convolved: convolved_in_strips, block_of: block_in_strips}.get(function, function)
        return (function if torch.is_grad_enabled() else ours)(*args, **(kwargs or {}))


def in_tiles(
    q: Tensor, k: Tensor, v: Tensor, layer, sites: Tensor, visible, relative, top_k, own=None, trim=False
) -> Tensor:
    """`attend`, tile by tile. trim: where a token sees only those up to itself, leave out the keys that
    no query of the tile can see."""
    B, heads, q_len, _ = q.shape
    limit = ELEMENTS.get(q.device.type, 2**23) // (B * max(k.size(2), 1))
    queries = min(q_len, max(64, limit))  # few heads rather than few queries: keys are prepared once a tile
    some = min(heads, max(1, limit // queries))
    out = torch.empty_like(q, dtype=v.dtype)
    numbers = torch.arange(len(sites) - q_len, len(sites), device=q.device)
    causal = trim and isinstance(visible, UpToItself)
    watched = any(point._forward_hooks for point in layer.children())  # who looks at maps wants all keys, in order
    window = None if watched else layer.window
    for h in (slice(i, i + some) for i in range(0, heads, some)):
        for i, keys in queries_with_keys(sites, numbers, k.size(2), queries, queries * k.size(2), causal, window):
            mine, at = own and tuple(t[:, h, i] for t in own), sites[numbers[i]]
            if isinstance(keys, slice):
                theirs = k[:, h, keys], v[:, h, keys]
            else:  # quicker than by brackets
                theirs = k[:, h].index_select(2, keys), v[:, h].index_select(2, keys)
            seen = None if visible is None else visible(numbers[i])
            if seen is not None and own is None:
                seen = seen[..., keys]
            elif seen is not None:  # in the last column a query's own key
                seen = torch.cat((seen[..., :-1][..., keys], seen[..., -1:]), dim=-1)
            out[:, h, i] = attention_of(q[:, h, i], *theirs, layer, at, sites[keys], seen, relative, top_k, mine)
    return out


def queries_with_keys(
    sites: Tensor, numbers: Tensor, n: int, queries: int, pairs: int, causal: bool, window: int | None
) -> Iterator[tuple[slice, slice] | tuple[Tensor, Tensor]]:
    """Some queries at a time, and the keys of which they see some, in rising order.

    sites: of all tokens, [.., 2]; numbers: of the queries among them, [q]; n: so many of them, the first, are keys;
    queries: how many at a time where there is no window; pairs: of queries and keys, about how many at a time with a
    window; causal: a query sees the keys up to itself; window: how far it looks.
    """
    if window is None:
        for i in (slice(j, j + queries) for j in range(0, len(numbers), queries)):
            yield i, slice(0, min(int(numbers[i][-1]) + 1, n) if causal else n)
        return
    side, (height, width) = max(8, window // 2), (sites.amax(0) + 1).tolist()
    query, key = (torch.full((height, width), -1, device=sites.device) for _ in range(2))
    for grid, which in ((query, sites[numbers]), (key, sites[:n])):
        grid[which[:, 0], which[:, 1]] = torch.arange(len(which), device=sites.device)
    for row in range(0, height, side):
        rows = slice(max(0, row - window), row + side + (0 if causal else window))
        for column in range(0, width, side):
            i = query[row : row + side, column : column + side]
            keys = key[rows, max(0, column - window) : column + side + window]
            i, keys = i[i >= 0], keys[keys >= 0].sort().values
            for part in i.split(max(64, pairs // max(len(keys), 1))) if len(i) else ():
                yield part, keys


def convolved_in_strips(x: Tensor, convolution: nn.Module, norm: nn.Module | None) -> Tensor:
    """`convolved`, a strip of rows at a time."""
    B, _, H, W = x.shape
    shrinks = isinstance(convolution, nn.Conv2d)
    height, width = ((H + 1) // 2, (W + 1) // 2) if shrinks else (2 * H, 2 * W)
    # A row of the output, or the share of the input that it reads: the last layer of g_s reads far more than it writes.
    widest = max(convolution.out_channels * width, convolution.in_channels * W * H // height)
    out = (B, convolution.out_channels, height, width)
    # Output row r reads the input rows 2r-2 ... 2r+2 of a 5x5 convolution, r/2-1 ... r/2+1 of a transposed one.
    ratio, reach = ((2, 1), 2) if shrinks else ((1, 2), 1)
    return in_strips(lambda strip: convolved.__wrapped__(strip, convolution, norm), x, out, B * widest, ratio, reach)


def block_in_strips(x: Tensor, block: ConvBlock) -> Tensor:
    """`block_of`, a strip of rows at a time; the gates are the widest, and the 3x3 kernel reaches one row."""
    return in_strips(lambda strip: block_of.__wrapped__(strip, block), x, x.shape, 2 * x[:, :, 0].numel(), (1, 1), 1)


def in_strips(
    run: Callable[[Tensor], Tensor], x: Tensor, shape: tuple, row: int, ratio: tuple[int, int], reach: int
) -> Tensor:
    """run(x), of the given shape, a few rows of the output at a time.

    Args:
        row: numbers that a row of the output takes; as many rows as fit into STRIP_ELEMENTS are a strip.
        ratio: rows of the input for rows of the output, such as (2, 1).
        reach: rows of the input beyond its own that a strip reads on both sides.
    """
    read, written = ratio
    rows = max(2, STRIP_ELEMENTS // row // 2 * 2)  # even, so that a strip keeps the phase of a stride of 2
    if rows >= shape[2]:
        return run(x)
    out = x.new_empty(shape)
    for start in range(0, shape[2], rows):
        stop = min(start + rows, shape[2])
        first = max(start * read // written - reach, 0)
        skip = start - first * written // read
        strip = run(x[:, :, first : -(-stop * read // written) + reach])
        out[:, :, start:stop] = strip[:, :, skip : skip + stop - start]
    return out
