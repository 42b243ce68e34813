"""The coder's arithmetic of `integer.py` once more, in compiled loops for the CPU: the same numbers, the same bits.

A serial decoder computes one token at a time. In tensor operations that is 1,500 small calls per token, each of which
costs more in Python and memory than in arithmetic; here it is a handful. Whatever is summed is an integer, so it does
not matter that these loops add in another order than a matrix unit does. What is not summed is the same IEEE operation
as there, one after the other. (`fastmath` stays off: the compiler may then neither reorder floating-point sums nor fuse
a product with a sum.)

Arrays are numpy's. Digits (see `integer.digits`): int8 high and low with x = (256 high + low) * scale.
"""

import concurrent.futures
import functools
import itertools
import math

import numba
import numpy as np
import torch

from entroformer_lib.models.integer import LOWEST_POWER, PEAK, POLYNOMIAL


def loop(function):
    """Compiles at the first call, and keeps the result on disk where that can be written."""
    options = dict(nogil=True, error_model="numpy", boundscheck=False)
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(function, **options)


f32, i32 = np.float32, np.int32
LOG2_E, LEAST_EXPONENT, EXPONENT = f32(math.log2(math.e)), i32(64 << 23), i32(0x7F800000)
POWERS = np.array([2.0**i for i in range(LOWEST_POWER, 1)], dtype=f32)
COEFFICIENTS = np.array(POLYNOMIAL, dtype=f32)
# In the place of what is not there: a bias, positions, a query's own key.
NONE, NO_PRODUCTS = np.zeros(0, dtype=f32), np.zeros((0, 0), dtype=f32)
ALL = np.zeros(0, dtype=np.int32)  # how many keys are seen
NO_DIGITS, NO_BUCKETS = np.zeros((0, 0), dtype=np.int8), np.zeros((1, 0), dtype=np.int16)


@loop
def step_for(peak):
    """integer.step_for of one number."""
    bits = np.empty(1, dtype=f32)
    bits[0] = peak
    exponent = bits.view(np.int32)
    exponent[0] = max(exponent[0] & EXPONENT, LEAST_EXPONENT)
    return bits[0] * f32(2.0 / PEAK)


@loop
def digits(x, high, low):
    """integer.digits of one row [K] into high and low  ->  its scale."""
    peak = f32(0)
    for i in range(len(x)):
        peak = max(peak, abs(x[i]))
    scale = step_for(peak)
    for i in range(len(x)):
        v = i32(np.rint(x[i] / scale))
        high[i] = (v + i32(128)) >> i32(8)
        low[i] = v - i32(256) * i32(high[i])
    return scale


@loop
def digits_by(x, scale, high, low):
    """integer.digits of one row [K] with given scales, [K]."""
    for i in range(len(x)):
        v = i32(min(max(np.rint(x[i] / scale[i]), f32(-PEAK)), f32(PEAK)))
        high[i] = (v + i32(128)) >> i32(8)
        low[i] = v - i32(256) * i32(high[i])


@loop
def digits_of_rows(x, high, low, scale):
    """integer.digits of rows.  x: [q, K]  ->  high, low: int8 [q, K], scale: [q]"""
    for i in range(len(x)):
        scale[i] = digits(x[i], high[i], low[i])


@loop
def scaled_sums(high, cross, row_scale, scale, bias, out):
    """What follows the products in integer.IntegerLinear.  high, cross: int32 [q, N], row_scale: [q], scale: [N], bias:
    [N] or empty  ->  out: [q, N]"""
    rows, N = high.shape
    for i in range(rows):
        step = row_scale[i]
        if len(bias):
            for n in range(N):
                out[i, n] = joined(high[i, n], cross[i, n]) * step * scale[n] + bias[n]
        else:
            for n in range(N):
                out[i, n] = joined(high[i, n], cross[i, n]) * step * scale[n]


@loop
def dot(a_high, a_low, b_high, b_low):
    """Of two rows of digits [K]: the sum of high by high, and that of high by low and low by high, as int32."""
    high, cross = i32(0), i32(0)
    for i in range(len(a_high)):  # numba widens every sum and product to 64 bits; i32 takes that back, twice as fast
        high = i32(high + i32(i32(a_high[i]) * i32(b_high[i])))
        cross = i32(cross + i32(i32(a_high[i]) * i32(b_low[i])))
        cross = i32(cross + i32(i32(a_low[i]) * i32(b_high[i])))
    return high, cross


@loop
def joined(high, cross):
    """integer.joined"""
    return f32(high) * f32(256) + f32(cross)


@loop
def linear(x, stacked, scale, bias, out):
    """integer.IntegerLinear of one row.  x: [K], stacked: [2 N, K] high above low, scale and bias: [N]  ->  out: [N]"""
    N, K = len(out), len(x)
    high, low = np.empty(K, dtype=np.int8), np.empty(K, dtype=np.int8)
    step = digits(x, high, low)
    for n in range(N):
        a, b = dot(high, low, stacked[n], stacked[N + n])
        y = joined(a, b) * step * scale[n]
        out[n] = y + bias[n] if len(bias) else y


@loop
def layer_norm(x, weight, bias, eps, out):
    """integer.IntegerLayerNorm of one row [D]."""
    D = len(x)
    peak = f32(0)
    for i in range(D):
        peak = max(peak, abs(x[i]))
    scale = step_for(peak)
    total, squares = np.int64(0), np.int64(0)
    for i in range(D):
        out[i] = np.rint(x[i] / scale)
        v = np.int64(out[i])
        total += v
        squares += v * v
    mean = np.float64(total) / D
    variance = np.float64(squares) / D - mean * mean
    wide = np.float64(scale)
    factor = f32(1.0 / np.sqrt(variance + eps / (wide * wide)))
    shift = f32(mean)
    for i in range(D):
        out[i] = (out[i] - shift) * factor * weight[i] + bias[i]


@loop
def exp_of_negative(x):
    """integer.exp_of_negative of one number."""
    t = max(x * LOG2_E, f32(LOWEST_POWER))
    whole = np.floor(t)
    part = t - whole
    p = COEFFICIENTS[-1]
    for i in range(len(COEFFICIENTS) - 2, -1, -1):
        p = p * part + COEFFICIENTS[i]
    return p * POWERS[i32(whole) - LOWEST_POWER]


@loop
def order_of(scores, keys):
    """Integers in the order of the scores [n]; equal scores have equal ones, 0 and -0 too  ->  keys: int32 [n]"""
    for j in range(len(scores)):
        scores[j] = scores[j] + f32(0)  # makes 0 of -0
    bits = scores.view(np.int32)
    for j in range(len(scores)):
        keys[j] = bits[j] ^ i32((bits[j] >> i32(31)) & i32(0x7FFFFFFF))


@loop
def threshold(keys, k):
    """The largest t for which at least k of the keys [n] reach t, by bisection: counting goes many keys at a time."""
    low, high = i32(2**31 - 1), i32(-(2**31))
    for j in range(len(keys)):
        low, high = min(low, keys[j]), max(high, keys[j])
    if k >= len(keys):
        return low
    while low < high:
        middle = i32(np.int64(low) + (np.int64(high) - np.int64(low) + 1) // 2)
        count = i32(0)
        for j in range(len(keys)):
            count = i32(count + i32(keys[j] >= middle))
        if count < k:
            high = i32(middle - i32(1))
        else:
            low = middle
            if count == k:  # no key equals the one at rank k, so it does not matter which t parts them
                break
    return low


@loop
def weighted(scores, top_k, v_high, v_low, own_high, own_low, out, keys, high, cross):
    """Softmax over the k best scores, and the mean of their values: the tail of IntegerAttention.

    scores: [n], or [n + 1] with the query's own at the end; v: digits [n, d]; own: digits [d] or empty
    ->  out: [d], in units of value_scale / 256. keys: int32, as many as scores, high and cross: int32 [d] are scratch.
    """
    n, d = v_high.shape
    order_of(scores, keys)
    least = threshold(keys, top_k)
    top = i32(-(2**31))
    for j in range(len(keys)):
        top = max(top, keys[j])
    most = f32(0)
    for j in range(len(keys)):
        if keys[j] == top:
            most = scores[j]
            break
    total = np.int64(0)
    own = i32(0)
    for c in range(d):
        high[c] = 0
        cross[c] = 0
    for j in range(len(scores)):
        if keys[j] >= least:
            w = i32(np.rint(exp_of_negative(scores[j] - most) * f32(PEAK)))
            total += w
            w_high = i32((w + i32(128)) >> i32(8))
            w_low = i32(w - i32(256) * w_high)
            if j == n:
                own = i32(i32(256) * w_high + w_low)
            else:
                for c in range(d):
                    high[c] = i32(high[c] + i32(w_high * i32(v_high[j, c])))
                    cross[c] = i32(cross[c] + i32(w_high * i32(v_low[j, c])))
                    cross[c] = i32(cross[c] + i32(w_low * i32(v_high[j, c])))
    for c in range(d):
        y = joined(high[c], cross[c])
        if len(own_high):
            share = f32(own) / f32(256)
            y = y + share * (f32(own_high[c]) * f32(256) + f32(own_low[c]))
        out[c] = y / f32(total)


@loop
def buckets(queries, keys, lookup, out):
    """RelativePosition.buckets.  queries: int64 [q, 2], keys: [n, 2]  ->  out: int16 [q, n]"""
    ring = len(lookup) // 2
    for i in range(len(queries)):
        for j in range(len(keys)):
            row = min(max(keys[j, 0] - queries[i, 0], -ring), ring) + ring
            column = min(max(keys[j, 1] - queries[i, 1], -ring), ring) + ring
            out[i, j] = lookup[row, column]


@loop
def attend_one(
    x, qkv, qkv_scale, out_weight, out_scale, value_scale, scale, heads, top_k, k_high, k_low, k_scale, v_high, v_low,
    n, bucket, p_high, p_low, p_scale, out,
):  # fmt: skip
    """integer_layers.IntegerAttention of a single new token, which joins the cache as number n - 1.

    x: [D]; qkv, out_weight: stacked digits; k, v: digits [capacity, D]; bucket: int16 [n] or empty; p: digits
    [buckets, d] of the position vectors  ->  out: [D]
    """
    D = len(x)
    d = D // heads
    projected = np.empty(3 * D, dtype=f32)
    linear(x, qkv, qkv_scale, NONE, projected)
    for c in range(D):
        projected[c] *= f32(scale)
    q_high, q_low = np.empty(D, dtype=np.int8), np.empty(D, dtype=np.int8)
    q_scale = digits(projected[:D], q_high, q_low)
    k_scale[n - 1] = digits(projected[D : 2 * D], k_high[n - 1], k_low[n - 1])
    digits_by(projected[2 * D :], value_scale, v_high[n - 1], v_low[n - 1])

    scores, looked = np.empty(n, dtype=f32), np.empty(D, dtype=f32)
    products = np.empty(len(p_high), dtype=f32)
    keys, high, cross = np.empty(n, dtype=i32), np.empty(d, dtype=i32), np.empty(d, dtype=i32)
    for h in range(heads):
        c = h * d
        for j in range(n):
            a, b = dot(q_high[c : c + d], q_low[c : c + d], k_high[j, c : c + d], k_low[j, c : c + d])
            scores[j] = joined(a, b) * (q_scale * f32(256)) * k_scale[j]
        if len(bucket):
            for i in range(len(products)):
                a, b = dot(q_high[c : c + d], q_low[c : c + d], p_high[i], p_low[i])
                products[i] = joined(a, b) * q_scale * p_scale[i]
            for j in range(n):
                scores[j] += products[bucket[j]]
        mine = looked[c : c + d]
        weighted(
            scores, top_k, v_high[:n, c : c + d], v_low[:n, c : c + d], q_high[:0], q_low[:0], mine, keys, high, cross
        )
    for c in range(D):
        looked[c] = looked[c] * f32(256) * value_scale[c]
    linear(looked, out_weight, out_scale, NONE, out)


@loop
def attend_rows(
    high, cross, q_scale, k_scale, bucket, products, seen, top_k, v_high, v_low, own_score, own_high, own_low, out
):
    """Scores of one head to its result, for some queries.

    high, cross: int32 [q, n] of queries and keys; q_scale: [q], k_scale: [n]; bucket: int16 [q, n] and products:
    [q, buckets], or empty; seen: int32 [q], the query sees so many of the keys, or empty; own_score: [q, 1] or empty,
    and then all are seen; v: digits [n, d]; own: digits [q, d]  ->  out: [q, d]
    """
    rows, n = high.shape
    d = v_high.shape[1]
    extra = 1 if len(own_score) else 0
    scores = np.empty(n + extra, dtype=f32)
    keys, a, b = np.empty(n + extra, dtype=i32), np.empty(d, dtype=i32), np.empty(d, dtype=i32)
    for i in range(rows):
        factor = q_scale[i] * f32(256)
        m = seen[i] if len(seen) else n
        for j in range(m):
            scores[j] = joined(high[i, j], cross[i, j]) * factor * k_scale[j]
        if products.size:
            for j in range(m):
                scores[j] += products[i, bucket[i, j]]
        if extra:
            scores[n] = own_score[i, 0]
            weighted(scores, top_k, v_high, v_low, own_high[i], own_low[i], out[i], keys, a, b)
        else:
            none = v_high[0, :0]
            weighted(scores[:m], top_k, v_high[:m], v_low[:m], none, none, out[i], keys[:m], a, b)


@loop
def attend_listed(q_high, q_low, q_scale, k_high, k_low, k_scale, v_high, v_low, listed, extra, out):
    """Attention of some queries over a short list of keys each, all heads.

    q: digits [q, D], scale [q]; k: digits [n, D], scale [n]; v: digits [n, D]; listed: int32 [q, L], numbers of keys,
    -1 for none; extra: [heads, q, L], added to the scores  ->  out: [q, D], in units of value_scale / 256
    """
    rows, L = listed.shape
    heads = len(extra)
    d = q_high.shape[1] // heads
    scores, keys = np.empty(L, dtype=f32), np.empty(L, dtype=i32)
    high, cross = np.empty(d, dtype=i32), np.empty(d, dtype=i32)
    for i in range(rows):
        factor = q_scale[i] * f32(256)
        for h in range(heads):
            first = h * d
            mine_high, mine_low = q_high[i, first : first + d], q_low[i, first : first + d]
            count = 0
            most = f32(-np.inf)
            for j in range(L):
                t = listed[i, j]
                if t >= 0:
                    a, b = dot(mine_high, mine_low, k_high[t, first : first + d], k_low[t, first : first + d])
                    scores[count] = joined(a, b) * factor * k_scale[t] + extra[h, i, j]
                    most = max(most, scores[count])
                    keys[count] = t
                    count += 1
            total = np.int64(0)
            high[:] = 0
            cross[:] = 0
            for j in range(count):
                w = i32(np.rint(exp_of_negative(scores[j] - most) * f32(PEAK)))
                if w:  # many weigh nothing
                    total += w
                    w_high = i32((w + i32(128)) >> i32(8))
                    w_low = i32(w - i32(256) * w_high)
                    a_high, a_low = v_high[keys[j], first : first + d], v_low[keys[j], first : first + d]
                    for c in range(d):
                        high[c] = i32(high[c] + i32(w_high * i32(a_high[c])))
                        cross[c] = i32(cross[c] + i32(w_high * i32(a_low[c])))
                        cross[c] = i32(cross[c] + i32(w_low * i32(a_high[c])))
            for c in range(d):
                out[i, first + c] = joined(high[c], cross[c]) / f32(total)


@loop
def split_projection(x, scale, value_scale, q_high, q_low, q_scale, k_high, k_low, k_scale, v_high, v_low):
    """Digits of queries, keys and values that lie beside each other in rows [n, 3 D]. The queries are scaled in place;
    values have scales of their own, [D]."""
    D = len(value_scale)
    for i in range(len(x)):
        for c in range(D):
            x[i, c] *= f32(scale)
        q_scale[i] = digits(x[i, :D], q_high[i], q_low[i])
        k_scale[i] = digits(x[i, D : 2 * D], k_high[i], k_low[i])
        digits_by(x[i, 2 * D :], value_scale, v_high[i], v_low[i])


@loop
def weights_of_windows(high, cross, q_scale, k_scale, index, bucket, products, weights, total):
    """Sums of digits to softmax weights, for all pairs of a window's tokens, all heads.

    high, cross: float32 [W, heads, s, s], integers; q_scale, k_scale: [n]; index: int64 [W, s], numbers of tokens, -1
    for none; bucket: int16 [s, s] and products: [heads, n, buckets]  ->  weights: float32 [W, heads, s, 2 s],
    their high digits beside the low ones; total: float32 [W, heads, s]
    """
    W, heads, s, _ = high.shape
    scores = np.empty(s, dtype=f32)
    for i in range(W):
        for h in range(heads):
            for a in range(s):
                t = index[i, a]
                if t < 0:
                    weights[i, h, a, :] = f32(0)
                    total[i, h, a] = f32(1)
                    continue
                factor = q_scale[t] * f32(256)
                most = f32(-np.inf)
                for b in range(s):
                    u = index[i, b]
                    scores[b] = f32(-np.inf)
                    if u >= 0:
                        joint = high[i, h, a, b] * f32(256) + cross[i, h, a, b]
                        scores[b] = joint * factor * k_scale[u] + products[h, t, bucket[a, b]]
                    most = max(most, scores[b])
                sum_of_weights = i32(0)
                for b in range(s):
                    w = i32(np.rint(exp_of_negative(scores[b] - most) * f32(PEAK)))  # 0 where there is no token
                    sum_of_weights = i32(sum_of_weights + w)
                    upper = i32((w + i32(128)) >> i32(8))
                    weights[i, h, a, b] = f32(upper)
                    weights[i, h, a, s + b] = f32(i32(w - i32(256) * upper))
                total[i, h, a] = f32(sum_of_weights)


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads)


def in_threads(work, count: int, least: int = 16) -> None:
    """work(start, stop) over parts of range(count), one for each of torch's threads, of at least so many each; the
    loops release Python's lock."""
    threads = max(1, min(torch.get_num_threads(), count // least))
    if threads == 1:
        return work(0, count)
    edges = [count * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(work, *part) for part in itertools.pairwise(edges[1:])]
    work(0, edges[1])  # here, which saves waking a thread
    for other in others:
        other.result()
    return None
