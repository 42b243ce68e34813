"""Top-k attention of many queries on the CPU: the same bits as arithmetic.py's functions one after the other, in a part
of the time.

A query's scores are one row, which stays in cache. Of groups of its keys the largest score is taken, and only groups
whose largest is among the k largest are looked at again. So the choice, the softmax and the sum have about k keys to go
through and not n.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.exact.constants import FIXED_STEPS
from entroformer_lib.exact.loops import (
    NONE,
    _fixed,
    _softmax,
    array,
    digits,
    f32,
    f64,
    i32,
    in_threads,
    kth_largest,
    loop,
    step_of,
    sums,
)

LARGEST_GROUP = 16
WIDEST = 2**10  # a head that is no wider has sums below 2^31, as `_scores` adds them up


NO_VALUES = np.zeros((0, 0), dtype=f32)


class Piece(NamedTuple):
    """Queries, and the keys of which they see some."""

    queries: slice | Tensor
    keys: slice | Tensor
    numbers: np.ndarray  # of the keys, and the others as in `_attend`
    limits: np.ndarray
    near: np.ndarray
    sites: np.ndarray
    key_sites: np.ndarray


@loop
def _scores(high, cross, scale, k_scale, position, out):
    """Scores of one query, [n], from sums of digits: 65536 high + 256 cross, rounded once, times both scales, plus what
    the position gives."""
    for j in range(len(out)):
        whole = i32(i32(i32(high[j]) * i32(256)) + i32(cross[j]))
        out[j] = f32(whole) * f32(256) * (scale * k_scale[j]) + position


@loop
def _hide(rows, columns, row, column, window, scores):
    """Sets the scores of keys beyond the window to -inf."""
    for j in range(len(scores)):
        inside = abs(rows[j] - row) <= window and abs(columns[j] - column) <= window
        scores[j] = scores[j] if inside else f32(-np.inf)


@loop
def _largest(scores, found):
    """The larger of two, for each group."""
    for g in range(len(scores)):
        found[g] = scores[g] if scores[g] > found[g] else found[g]


@loop
def _add(w, x, y, z, t, total):
    """Four values [d] by their weights: four at a time, because the sum has to be read and written again each time."""
    for c in range(len(total)):
        total[c] += w[0] * x[c] + w[1] * y[c] + w[2] * z[c] + w[3] * t[c]


@loop
def _attend(
    high, cross, scale, position, own, own_v, limits, near, sites, k_scale, numbers, key_sites, fixed, k, window, out
):
    """Some queries, one after the other.

    Args:
        high, cross: sums of digits of all queries and keys, [q, n].
        scale, k_scale: of the queries [q] and the keys [n].
        position: each query times the position vectors, [q, buckets], the last for "outside".
        own, own_v: score and value of each query's own key, [q] and [q, d], or empty.
        limits: how many of the keys a query sees, [q].
        near: which key lies in each of the other buckets, [q, buckets - 1], -1 for none.
        sites, key_sites: [q, 2] and [2, n]; looked at where there is a window.
        numbers: of the keys among the values, [n].
        fixed: values in fixed point, [all, d].
        window: how far a query looks; 0 for no window.
        out: [q, d].
    """
    n, d = len(numbers), fixed.shape[1]
    row, largest, order = np.empty(n, f32), np.empty(n, f32), np.empty(n + 1, i32)
    which, scores, probs = np.empty(n + 3, i32), np.empty((1, n + 1), f32), np.empty((1, n + 1), f32)
    weights, total = np.empty(n + 3, f64), np.empty(d, f64)
    for i in range(len(high)):
        seen = limits[i]
        _scores(high[i], cross[i], scale[i], k_scale, position[i, -1], row[:seen])
        for c in range(near.shape[1]):
            j = near[i, c]
            if 0 <= j < seen:  # as `_scores`
                whole = i32(i32(i32(high[i, j]) * i32(256)) + i32(cross[i, j]))
                row[j] = f32(whole) * f32(256) * (scale[i] * k_scale[j]) + position[i, c]
        if window:
            _hide(key_sites[0], key_sites[1], sites[i, 0], sites[i, 1], window, row[:seen])
        # At least k scores reach the k-th largest of the groups' maxima.
        depth = max(1, min(LARGEST_GROUP, seen // (4 * k)))
        groups = (seen + depth - 1) // depth
        largest[:groups] = f32(-np.inf)
        for r in range(depth):
            _largest(row[r * groups : min((r + 1) * groups, seen)], largest)
        threshold = f32(-3e38)
        if groups > k:
            threshold = max(threshold, kth_largest(largest[:groups], order, k))
        count, found = 0, 0
        for g in range(groups):  # here and below without a branch, which nobody could foresee
            order[found] = g
            found += int(largest[g] >= threshold)
        for c in range(found):
            for j in range(order[c], seen, groups):
                which[count] = j
                count += int(row[j] >= threshold)
        for c in range(count):
            scores[0, c] = row[which[c]]
        listed = count
        if len(own):
            scores[0, count] = own[i]
            count += 1
        if count > k:
            threshold = kth_largest(scores[0, :count], order, k)
            for c in range(count):
                if scores[0, c] < threshold:
                    scores[0, c] = f32(-np.inf)
        _softmax(scores[:, :count], probs)
        # As weighted_sum, and the query's own value by itself.
        step = step_of(probs[0, :listed])
        total[:] = 0.0
        used = 0
        for c in range(listed):
            weights[used], which[used] = np.rint(probs[0, c] / step), numbers[which[c]]
            used += i32(probs[0, c] != 0)
        weights[used : used + 3] = 0
        which[used : used + 3] = 0
        for c in range(0, used, 4):
            x, y, z, t = which[c], which[c + 1], which[c + 2], which[c + 3]
            _add(weights[c : c + 4], fixed[x], fixed[y], fixed[z], fixed[t], total)
        step = step / f32(FIXED_STEPS)
        for c in range(d):
            out[i, c] = f32(total[c]) * step
            if len(own):
                out[i, c] = out[i, c] + probs[0, listed] * own_v[i, c]


def _digits_of(x: Tensor, swapped: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x: [n, d]; as `digits`, all tensors"""
    high, both, scale = digits(array(x), swapped)
    return high, both, torch.from_numpy(scale)


def _rows(x: Tensor, which: slice | Tensor) -> Tensor:
    """x[which], in a tenth of the time"""
    return x[which] if isinstance(which, slice) else x.index_select(0, which)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Iterable[Piece],
    position: np.ndarray,
    own: tuple[np.ndarray, np.ndarray] | None,
    top_k: int,
    window: int,
    limit: float,
) -> Tensor:
    """q: [heads, q, d], scaled; k, v: [heads, n, d]; position: q times the position vectors, [heads, q, buckets]; own:
    scores [heads, q] and values [heads, q, d] of the queries' own keys; window: 0 for none; limit: of values
    ->  [heads, q, d]"""
    out, heads = np.empty(q.shape, dtype=f32), range(len(q))
    of_queries, of_keys = [_digits_of(t) for t in q], [_digits_of(t, swapped=True) for t in k]
    values, fixed = array(v), np.empty(v.shape, dtype=f64)
    for h in heads:
        in_threads(lambda i, j, h=h: _fixed(values[h, i:j], limit, fixed[h, i:j]), values.shape[1])
    for (queries, keys, *seen), h in ((piece, h) for piece in pieces for h in heads):  # one piece at a time
        q_high, q_both, scale = (_rows(part, queries) for part in of_queries[h])
        k_high, k_both, k_scale = (_rows(part, keys) for part in of_keys[h])
        scale, k_scale = scale.numpy(), k_scale.numpy()
        high, cross = sums(q_high, q_both, k_high, k_both)
        here = queries if isinstance(queries, slice) else queries.numpy()
        mine = (NONE, NO_VALUES) if own is None else (own[0][h, here], own[1][h, here])
        rows, found = (high, cross, scale, position[h, here], *mine), np.empty((len(high), q.size(2)), dtype=f32)

        def work(i, j, rows=rows, k_scale=k_scale, seen=seen, found=found, h=h):
            numbers, limits, near, sites, key_sites = seen
            part = [row[i:j] for row in (*rows, limits, near, sites)]
            _attend(*part, k_scale, numbers, key_sites, fixed[h], top_k, window, found[i:j])

        in_threads(work, len(high))
        out[h, here] = found
    return torch.from_numpy(out)
