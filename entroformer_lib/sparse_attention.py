"""Top-k attention on a CPU: what `attend` computes, and its gradients, from the k chosen keys alone.

In tensor operations each of some twenty passes, forward and backward, goes through all n scores of a query. Here a
query's scores are one row, which stays in cache while the k best are found; the softmax, the sum and every gradient
then have about k keys to go through. A training step of an entropy model alone takes a fifth to a third less time
(benchmarks/training_attention.py), and the likelihoods of a whole picture far less.

    with SparseAttention():
        loss = model(x)
    loss.backward()
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from entroformer_lib.exact import loops
from entroformer_lib.exact.loops import array, f32, i32, in_threads
from entroformer_lib.models.attention import TopKAttention, Visible, attend
from entroformer_lib.models.position import RelativePosition

PAIRS = 2**23  # of queries and keys: those of 860 x 860 pixels


def loop(function):
    """A compiled loop. Unlike those of the coder, these may add in any order."""
    return loops.loop(function, fastmath={"contract", "reassoc", "nsz"})


class SparseAttention(TorchFunctionMode):
    """Inside the block top-k attention runs in these loops, where they serve."""

    def __init__(self):
        super().__init__()
        self.indices = {}  # the layers of a stack share theirs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is attend and not kwargs and _serves(*args):
            return self.attend(*args)
        return function(*args, **(kwargs or {}))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: TopKAttention,
        sites: Tensor,
        visible: Visible | None,
        relative: RelativePosition | None,
        top_k: int,
        own: None,
    ) -> Tensor:
        """As `attend`.  q, k, v: [B, heads, n, d]  ->  [B, heads, n, d]"""
        kind = None if relative is None else (relative.kind, relative.radius)
        key = id(sites), id(visible), kind, layer.window
        if key not in self.indices:  # with what it was made of, so that nothing else gets their ids
            self.indices[key] = (*_index(sites, visible, relative, layer.window), sites, visible)
        index, seen, end, used, *_ = self.indices[key]
        with torch.autocast("cpu", enabled=False):
            q, k, wide = q.float() * layer.scale, k.float(), v.float()
            products = q.new_zeros(*q.shape[:3], 1) if relative is None else q @ relative.table()[used].float().T
            products = F.pad(products, (0, 1), value=-torch.inf)
            units = [t.flatten(0, 1) for t in (q, k, wide, products)]
            return _TopK.apply(*units, index, seen, end, top_k).view(v.shape).to(v.dtype)


def _serves(q, k, v, layer, sites, visible, relative, top_k, own=None, *rest) -> bool:
    """Whether there is something to gain: on a CPU, with a choice of keys that nobody looks at, and without gradients
    only where the scores of all pairs may be held at once."""
    return (
        loops.serve(q)
        and q.dtype in (torch.float32, torch.bfloat16)
        and (torch.is_grad_enabled() or len(q) * q.size(2) * k.size(2) <= PAIRS)
        and top_k is not None
        and top_k < k.size(2)
        and own is None
        and q.size(2) == k.size(2)
        and not rest
        and not any(point._forward_hooks for point in layer.children())
    )


def _index(
    sites: Tensor, visible: Visible | None, relative: RelativePosition | None, window: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, slice | Tensor]:
    """Which of the position vectors belongs to each pair, or one number more where the key is hidden: int32
    [B or 1, n, n]; how many keys each query sees, and behind the last of them: [B or 1, n] each; which of the vectors
    are numbered so: all, or of a table with more than n those that a pair has"""
    n, vectors = len(sites), 1 if relative is None else len(relative.table())
    bucket = torch.zeros(n, n, dtype=torch.long) if relative is None else relative.buckets(sites, sites)
    hidden = torch.zeros(1, n, n, dtype=torch.bool)
    if visible is not None:
        hidden = ~visible(torch.arange(n)).view(-1, n, n)
    if window is not None:
        hidden = hidden | ((sites[:, None] - sites).abs().amax(-1) > window)
    behind = n - (~hidden).flip(-1).int().argmax(-1)
    used = slice(None)
    if vectors > n:
        used = bucket.expand_as(hidden)[~hidden].unique()
        bucket, vectors = torch.searchsorted(used, bucket).clamp(max=len(used) - 1), len(used)
    return array(bucket.masked_fill(hidden, vectors).int()), array((~hidden).sum(-1)), array(behind), used


class _TopK(torch.autograd.Function):
    """softmax(f_k(q k^T + position)) v of units, each a head of a picture.

    q (already scaled), k, v: [U, n, d]; products: of the queries and the position vectors, [U, n, vectors + 1], the
    last -inf; index, seen, end: as from `_index`  ->  [U, n, d]
    """

    @staticmethod
    def forward(ctx, q, k, v, products, index, seen, end, top_k):
        content, values, position = array(torch.bmm(q, k.mT)), array(v), array(products)
        of_unit = np.arange(len(q)) // (len(q) // len(index))  # which index
        out, parts = np.empty(values.shape, f32), []

        def work(i, j):
            mine = of_unit[i:j]
            chosen = _forward(content[i:j], values[i:j], position[i:j], index, seen, end, mine, top_k, out[i:j])
            parts.append((i, j, *chosen))

        in_threads(work, len(q), least=1)
        ctx.save_for_backward(q, k, v)
        ctx.parts, ctx.index, ctx.of_unit, ctx.vectors = parts, index, of_unit, products.size(2)
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v = (array(t) for t in ctx.saved_tensors)
        g, (U, n, _) = array(grad), q.shape
        dq, dk, dv, dp = (np.zeros(shape, f32) for shape in (q.shape, k.shape, v.shape, (U, n, ctx.vectors)))

        def work(first, last):
            for i, j, which, probs, start in ctx.parts[first:last]:
                given = [part[i:j] for part in (q, k, v, g, dq, dk, dv, dp)]
                _backward(ctx.index, ctx.of_unit[i:j], which, probs, start, *given)

        in_threads(work, len(ctx.parts), least=1)
        return *(torch.from_numpy(part) for part in (dq, dk, dv, dp)), None, None, None, None


LOG2_E = f32(1.4426950408889634)
POWERS = np.array([2.0**-i for i in range(128)], dtype=f32)
TWO_TO = np.array([1, 0.69314718, 0.24022651, 0.05550411, 0.00961813, 0.00133336, 0.00015404], dtype=f32)  # Taylor's
FAR = f32(1e30)  # no score is below -FAR but that of a hidden key


@loop
def _exp_of_negative(x):
    t = x * LOG2_E
    t = t if t > f32(-126) else f32(-126)  # and what is no number
    t = t if t < f32(0) else f32(0)
    whole = np.floor(t)
    part = t - whole
    y = TWO_TO[6]
    for i in range(5, -1, -1):
        y = y * part + TWO_TO[i]
    return y * POWERS[-i32(whole)]


@loop
def _largest(bits):
    """Of a row of floats given as integers; the compiler finds the largest of many integers at a time."""
    most = i32(-(2**31))
    for j in range(len(bits)):
        most = max(most, i32(bits[j] ^ i32((bits[j] >> i32(31)) & i32(0x7FFFFFFF))))
    return i32(most ^ i32((most >> i32(31)) & i32(0x7FFFFFFF)))


@loop
def _reach(row, x):
    count = i32(0)
    for j in range(len(row)):
        count = i32(count + i32(row[j] >= x))
    return count


@loop
def _threshold(row, k, high):
    """A number that the k largest of a row reach, and no other that is not equal to one of them. high: the largest of
    all, of which more than k are above -FAR"""
    step = f32(1)
    low = f32(high - step)
    count = _reach(row, low)
    while count < k and step < FAR:
        high, step = low, f32(step + step)
        low = f32(low - step)
        count = _reach(row, low)
    while count != k:
        middle = f32(f32(0.5) * low + f32(0.5) * high)
        if not (low < middle and middle < high):  # equal ones, or no numbers
            return high if _reach(row, high) >= k else low
        count = _reach(row, middle)
        if count < k:
            high = middle
        else:
            low = middle
    return low


@loop
def _forward(content, values, position, index, seen, end, of_unit, top_k, out):
    """Units one after the other, a query at a time.  ->  which keys were chosen and their weights, those of all queries
    behind each other, and where those of each query start"""
    U, n, _ = content.shape
    room, at = U * n * (top_k + 4) + n, 0
    which, probs, start = np.empty(room, i32), np.empty(room, f32), np.zeros(U * n + 1, np.int64)
    whole, largest = np.empty(n, f32), np.empty(1, f32)
    whole_bits, largest_bits = whole.view(np.int32), largest.view(np.int32)
    for u in range(U):
        for i in range(n):
            scores, given, where, last = content[u, i], position[u, i], index[of_unit[u], i], end[of_unit[u], i]
            row, bits = whole[:last], whole_bits[:last]
            for j in range(last):
                row[j] = scores[j] + given[where[j]]
            limit = -FAR
            if seen[of_unit[u], i] > top_k:
                largest_bits[0] = _largest(bits)
                limit = _threshold(row, top_k, largest[0])
            if at + n > room:  # many equal scores
                room, more, heavier = 2 * room, np.empty(2 * room, i32), np.empty(2 * room, f32)
                more[:at], heavier[:at] = which[:at], probs[:at]
                which, probs = more, heavier
            count, chosen, p = 0, which[at : at + n], probs[at : at + n]
            for j in range(last):
                chosen[count] = j
                count += i32(row[j] >= limit)
            most, total = -FAR, f32(0)
            for t in range(count):
                p[t] = row[chosen[t]]
                most = max(most, p[t])
            for t in range(count):
                p[t] = _exp_of_negative(p[t] - most)
                total += p[t]
            for c in range(out.shape[2]):  # as plain attention, where no score is a number
                out[u, i, c] = 0 if count > 0 and most < FAR else np.nan
            for t in range(count):
                p[t] /= total
                for c in range(out.shape[2]):
                    out[u, i, c] += p[t] * values[u, chosen[t], c]
            at += count
            start[u * n + i + 1] = at
    return which[:at].copy(), probs[:at].copy(), start


@loop
def _backward(index, of_unit, which, probs, start, q, k, v, grad, dq, dk, dv, dp):
    """Adds to the gradients dq, dk, dv and dp, that of `products`."""
    U, n, d = q.shape
    slopes = np.empty(n, f32)
    for u in range(U):
        for i in range(n):
            first, count, mean = start[u * n + i], start[u * n + i + 1] - start[u * n + i], f32(0)
            g, mine, where = grad[u, i], q[u, i], index[of_unit[u], i]
            for t in range(count):
                p, value, dvalue = probs[first + t], v[u, which[first + t]], dv[u, which[first + t]]
                slope = f32(0)
                for c in range(d):
                    slope += g[c] * value[c]
                    dvalue[c] += p * g[c]
                slopes[t] = slope
                mean += p * slope
            for t in range(count):
                j = which[first + t]
                slope, key, dkey = probs[first + t] * (slopes[t] - mean), k[u, j], dk[u, j]
                for c in range(d):
                    dq[u, i, c] += slope * key[c]
                    dkey[c] += slope * mine[c]
                dp[u, i, where[j]] += slope
