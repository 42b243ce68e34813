"""The arithmetic of arithmetic.py in compiled loops for the CPU: the same numbers, the same bits, in less time.

Whatever is summed is an integer, so it does not matter that these loops add in another order. What is not summed is the
same IEEE operation as there, one after the other. (`fastmath` stays off: the compiler may then neither reorder
floating-point sums nor fuse a product with a sum.)

Products of matrices of digits go to whichever of torch's is quicker on this processor: of int8, or of float32, in which
sums of so few products of 8-bit numbers are exact.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from entroformer_lib.exact.constants import FIXED_STEPS, LARGEST_VALUE, LOWEST_POWER, PEAK, POLYNOMIAL

try:
    import numba
except ImportError:  # then everything runs in tensor operations
    numba = None


def serve(x: Tensor) -> bool:
    """Whether the loops take a tensor."""
    return numba is not None and x.device.type == "cpu"


def loop(function, **more):
    """Compiles at the first call, and keeps the result on disk where that can be written.  more: options of numba"""
    if numba is None:
        return function
    options = dict(nogil=True, error_model="numpy", boundscheck=False, **more)
    try:
        compiled = numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(function, **options)
    # By itself numba looks at the function's own file alone, and functions of others are compiled in
    with contextlib.suppress(AttributeError):
        kept = compiled._cache._cache_file
        kept._source_stamp = kept._source_stamp, _sources()
    return compiled


@functools.cache
def _sources() -> str:
    """Checksum of this folder's files: what was compiled of others is compiled again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


f32, f64, i16, i32, i64 = np.float32, np.float64, np.int16, np.int32, np.int64
LOG2_E, LEAST_EXPONENT, EXPONENT = f32(math.log2(math.e)), i32(64 << 23), i32(0x7F800000)
POWERS = np.array([2.0**i for i in range(LOWEST_POWER, 1)], dtype=f32)
COEFFICIENTS = np.array(POLYNOMIAL, dtype=f32)
FEW_PAIRS = 2**12  # of queries and keys: so few are quicker one by one
EXACT_TERMS = 2**11  # products of a high digit, up to 2^6, and a low one, up to 2^7, have a sum up to 2^24
# In the place of what is not there:
NONE, NO_DIGITS = np.zeros(0, dtype=f32), np.zeros((0, 0), dtype=np.int8)
NO_POSITION = NO_DIGITS, NO_DIGITS, NONE, np.zeros((1, 1), dtype=i64)


def array(t: Tensor) -> np.ndarray:
    """A tensor as a numpy array: a view, where its rows lie behind each other."""
    return np.ascontiguousarray(t.detach().numpy())


def rows_of(t: Tensor) -> np.ndarray:
    """[..., n]  ->  [rows, n]"""
    return array(t.reshape(-1, t.size(-1)))


# ---- numbers to integers --------------------------------------------------------------------------------------------


@loop
def step_of(row):
    """arithmetic.step_for of the largest of a row. The bits of positive floats have the order of integers, and the
    compiler finds the largest of many integers at a time."""
    bits, most = row.view(np.int32), LEAST_EXPONENT
    for i in range(len(row)):
        most = max(most, bits[i] & EXPONENT)
    step = np.empty(1, dtype=i32)
    step[0] = most
    return step.view(np.float32)[0] * f32(2.0 / PEAK)


@loop
def _digits(x, high, low, scale):
    """Rows of numbers [q, K]  ->  high and low digits: int8 [q, K] each; scale: [q]"""
    for i in range(len(x)):
        s = step_of(x[i])
        per_step = f32(1) / s  # a power of two
        for c in range(x.shape[1]):
            v = i32(np.rint(x[i, c] * per_step))
            h = (v + i32(128)) >> i32(8)
            high[i, c] = h
            low[i, c] = v - i32(256) * h
        scale[i] = s


def digits(x: np.ndarray, swapped: bool = False) -> tuple[Tensor, Tensor, np.ndarray]:
    """x: float32 [q, K]  ->  high digits [q, K]; high beside low, or low beside high, [q, 2 K]; scale: [q]"""
    (q, K), kind = x.shape, np.int8 if int8_works() else f32
    high, both, scale = np.empty((q, K), kind), np.empty((q, 2 * K), kind), np.empty(q, f32)
    first, second = (both[:, K:], both[:, :K]) if swapped else (both[:, :K], both[:, K:])

    def work(i, j):
        _digits(x[i:j], high[i:j], second[i:j], scale[i:j])
        first[i:j] = high[i:j]

    in_threads(work, q)
    return torch.from_numpy(high), torch.from_numpy(both), scale


def for_products(digits: Tensor) -> Tensor:
    """Digits of a weight, int8, as `sums` takes them."""
    return digits if int8_works() else digits.float()


def sums(high: Tensor, both: Tensor, other_high: Tensor, other_both: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Sums of high by high digits, and of high by low and low by high: [q, N] each, whole numbers in int32, float32 or
    float64."""
    if high.size(1) == 1:  # of a single column torch's int8 product gives other numbers
        high, both, other_high, other_both = (t.float() for t in (high, both, other_high, other_both))
    if high.dtype == torch.int8:
        return torch._int_mm(high, other_high.T).numpy(), torch._int_mm(both, other_both.T).numpy()
    return _exact_product(high, other_high), _exact_product(both, other_both)


def _exact_product(a: Tensor, b: Tensor) -> np.ndarray:
    """Digits in float32, [q, K] and [N, K]  ->  [q, N], in float64 where float32 could not hold the sums"""
    if a.size(1) <= EXACT_TERMS:
        return (a @ b.T).numpy()
    parts = zip(a.split(EXACT_TERMS, dim=1), b.split(EXACT_TERMS, dim=1), strict=True)
    return sum((x @ y.T).double() for x, y in parts).numpy()


@functools.cache
def int8_works() -> bool:
    """Whether torch's int8 matrix product is there, exact at its extremes (older processors saturate), and quicker than
    that of float32. Either answer gives the same bits."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (512, 512), dtype=torch.int8, generator=draw)
    b = torch.randint(-128, 128, (256, 512), dtype=torch.int8, generator=draw).T
    a[:8], b[:, :8] = -128, -128
    a[8:16], b[:, 8:16] = 127, 127
    floats = a.float(), b.float()
    try:
        if not torch.equal(torch._int_mm(a, b).double(), floats[0].double() @ floats[1].double()):
            return False
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return _seconds(lambda: torch._int_mm(a, b)) < _seconds(lambda: floats[0] @ floats[1])


def _seconds(run) -> float:
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


# ---- sums -----------------------------------------------------------------------------------------------------------


@loop
def _joined(high, cross):
    """65536 high + 256 cross of sums of digits, rounded once."""
    return f32(f64(high) * 65536.0 + f64(cross) * 256.0)


@loop
def _scaled(high, cross, row_scale, scale, bias, out):
    """Sums of digits [q, N] to numbers.  row_scale: [q], scale: [N], bias: [N] or empty"""
    q, N = high.shape
    for i in range(q):
        s = row_scale[i]
        if len(bias):
            for n in range(N):
                out[i, n] = _joined(high[i, n], cross[i, n]) * (s * scale[n]) + bias[n]
        else:
            for n in range(N):
                out[i, n] = _joined(high[i, n], cross[i, n]) * (s * scale[n])


def linear(x: Tensor, high: Tensor, both: Tensor, scale: np.ndarray, bias: np.ndarray) -> Tensor:
    """x: [q, K]; the weight's digits `for_products`, high [N, K] and low beside high [N, 2 K]; scale: [N], bias: [N] or
    empty  ->  [q, N]"""
    rows = array(x)
    out = np.empty((len(rows), len(scale)), dtype=f32)
    *parts, row_scale = digits(rows)
    a, b = sums(*parts, high, both)
    in_threads(lambda i, j: _scaled(a[i:j], b[i:j], row_scale[i:j], scale, bias, out[i:j]), len(rows))
    return torch.from_numpy(out)


def linear_row(x: Tensor, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> Tensor:
    """`linear` of a single row, [1, ..., K]  ->  [1, ..., N]. Reading the weights takes the time, so they come as int16
    [N, K] and are read once."""
    row, out = array(x), np.empty(len(weight), dtype=f32)
    _linear_row(row.reshape(-1), weight, scale, bias, out)
    return torch.from_numpy(out.reshape(*row.shape[:-1], -1))


@loop
def _linear_row(x, weight, scale, bias, out):
    """x: [K], weight: [N, K]  ->  out: [N].  With x = 256 high + low and w = 256 w_high + w_low, all but low by low is
    256 (high w + low w_high); high is at most 64 and w 2^14, so for K < 2^11 sums fit into 32 bits."""
    N, K = weight.shape
    digits, step = np.empty((2, 1, K), dtype=np.int8), np.empty(1, dtype=f32)
    _digits(x.reshape(1, K), digits[0], digits[1], step)
    high, low = digits[0, 0].astype(np.int16), digits[1, 0].astype(np.int16)
    for n in range(N):
        a, b = i32(0), i32(0)
        for c in range(K):  # numba widens every sum and product to 64 bits; i32 and i16 take that back
            w = weight[n, c]
            w_high = i16(i16(w + i16(128)) >> i16(8))
            a = i32(a + i32(i32(high[c]) * i32(w)))
            b = i32(b + i32(i32(low[c]) * i32(w_high)))
        y = f32(f64(i64(a) + i64(b)) * 256.0) * (step[0] * scale[n])
        out[n] = y + bias[n] if len(bias) else y


@loop
def _pairs(q_high, q_low, q_scale, k_high, k_low, k_scale, out):
    """One query with keys, both in digits: [d], [n, d]  ->  out: [n]"""
    n, d = k_high.shape
    for j in range(n):
        high, cross = i32(0), i32(0)
        for c in range(d):  # numba widens every sum and product to 64 bits; i32 takes that back, twice as fast
            high = i32(high + i32(i32(q_high[c]) * i32(k_high[j, c])))
            cross = i32(cross + i32(i32(q_high[c]) * i32(k_low[j, c])))
            cross = i32(cross + i32(i32(q_low[c]) * i32(k_high[j, c])))
        out[j] = _joined(high, cross) * (q_scale * k_scale[j])


@loop
def _pairs_of_few(q, k, out):
    """Many pairs of small matrices.  q: [b, q, d], k: [b, n, d]  ->  out: [b, q, n]"""
    q_len, (n, d) = q.shape[1], k.shape[1:]
    q_high, q_low, q_scale = np.empty((q_len, d), np.int8), np.empty((q_len, d), np.int8), np.empty(q_len, f32)
    k_high, k_low, k_scale = np.empty((n, d), np.int8), np.empty((n, d), np.int8), np.empty(n, f32)
    for b in range(len(q)):
        _digits(q[b], q_high, q_low, q_scale)
        _digits(k[b], k_high, k_low, k_scale)
        for i in range(q_len):
            _pairs(q_high[i], q_low[i], q_scale[i], k_high, k_low, k_scale, out[b, i])


def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """q: [..., q, d], k: [..., n, d] or [n, d]  ->  [..., q, n]"""
    k = k.expand(*q.shape[:-2], *k.shape[-2:])
    queries, keys = (array(t.reshape(-1, *t.shape[-2:])) for t in (q, k))
    out = np.empty((len(queries), q.size(-2), k.size(-2)), dtype=f32)
    if out[0].size < FEW_PAIRS:
        in_threads(lambda i, j: _pairs_of_few(queries[i:j], keys[i:j], out[i:j]), len(out))
        return torch.from_numpy(out).view(*q.shape[:-1], k.size(-2))
    mine, theirs = digits(queries.reshape(-1, q.size(-1))), digits(keys.reshape(-1, k.size(-1)), swapped=True)
    mine, theirs = ([part.reshape(len(out), -1, *part.shape[1:]) for part in parts] for parts in (mine, theirs))
    for q_high, q_both, q_scale, k_high, k_both, k_scale, result in zip(*mine, *theirs, out, strict=True):
        a, b = sums(q_high, q_both, k_high, k_both)
        in_threads(
            lambda i, j, a=a, b=b, s=q_scale, t=k_scale, r=result: _scaled(a[i:j], b[i:j], s[i:j], t, NONE, r[i:j]),
            len(a),
        )
    return torch.from_numpy(out).view(*q.shape[:-1], k.size(-2))


@loop
def _fixed(v, limit, out):
    """Values as integers of one grid.  v: [n, d]  ->  out: float64 [n, d]"""
    for j in range(len(v)):
        for c in range(v.shape[1]):
            out[j, c] = min(max(f64(np.rint(v[j, c] * f32(FIXED_STEPS))), -limit), limit)


@loop
def _weighted_sum(probs, fixed, out):
    """probs: [q, n]; fixed: float64 [n, d]  ->  out: [q, d]"""
    n, d = fixed.shape
    total = np.empty(d, dtype=f64)
    for i in range(len(probs)):
        row = probs[i]
        s = step_of(row)
        total[:] = 0.0
        for j in range(n):
            if row[j] != 0:  # most keys are not among the k
                w = f64(np.rint(row[j] / s))
                for c in range(d):
                    total[c] += w * fixed[j, c]
        s = s / f32(FIXED_STEPS)
        for c in range(d):
            out[i, c] = f32(total[c]) * s


@loop
def _weighted_sums(probs, v, limit, out):
    """Many pairs of matrices.  probs: [b, q, n], v: [b, n, d]  ->  out: [b, q, d]"""
    fixed = np.empty(v.shape[1:], dtype=f64)
    for b in range(len(probs)):
        _fixed(v[b], limit, fixed)
        _weighted_sum(probs[b], fixed, out[b])


def weighted_sum(probs: Tensor, v: Tensor, limit: float) -> Tensor:
    """probs: [..., q, n], v: [..., n, d]  ->  [..., q, d]"""
    weights, values = (array(t.reshape(-1, *t.shape[-2:])) for t in (probs, v))
    out = np.empty((*weights.shape[:2], v.size(-1)), dtype=f32)
    if len(weights) >= 16:
        in_threads(lambda i, j: _weighted_sums(weights[i:j], values[i:j], limit, out[i:j]), len(weights))
    else:
        fixed = np.empty(values.shape[1:], dtype=f64)
        for w, x, r in zip(weights, values, out, strict=True):
            in_threads(lambda i, j, x=x: _fixed(x[i:j], limit, fixed[i:j]), len(x))
            in_threads(lambda i, j, w=w, r=r: _weighted_sum(w[i:j], fixed, r[i:j]), len(w))
    return torch.from_numpy(out).view(*probs.shape[:-1], v.size(-1))


@loop
def _layer_norm(x, weight, bias, eps, out):
    D = x.shape[1]
    for r in range(len(x)):
        scale = step_of(x[r])
        total, squares = i64(0), i64(0)
        for i in range(D):
            out[r, i] = np.rint(x[r, i] / scale)
            v = i64(out[r, i])
            total += v
            squares += v * v
        mean = f64(total) / D
        variance = f64(squares) / D - mean * mean
        factor = f32(1.0 / np.sqrt(variance + eps / (f64(scale) * f64(scale))))
        shift = f32(mean)
        for i in range(D):
            out[r, i] = (out[r, i] - shift) * factor * weight[i] + bias[i]


def layer_norm(x: Tensor, weight: np.ndarray, bias: np.ndarray, eps: float) -> Tensor:
    """x: [..., D]"""
    whole = array(x)
    out, rows = np.empty(whole.shape, dtype=f32), whole.reshape(-1, len(weight))
    result = out.reshape(rows.shape)
    in_threads(lambda i, j: _layer_norm(rows[i:j], weight, bias, eps, result[i:j]), len(rows))
    return torch.from_numpy(out)


# ---- softmax over the chosen ----------------------------------------------------------------------------------------


@loop
def _exp_of_negative(x):
    t = x * LOG2_E
    t = t if t > f32(LOWEST_POWER) else f32(LOWEST_POWER)  # also where it is no number
    whole = np.floor(t)
    part = t - whole
    p = COEFFICIENTS[-1]
    for i in range(len(COEFFICIENTS) - 2, -1, -1):
        p = p * part + COEFFICIENTS[i]
    return p * POWERS[i32(whole) - LOWEST_POWER]


@loop
def _softmax(scores, out):
    n = scores.shape[1]
    chosen = np.empty(n, dtype=i32)
    for i in range(len(scores)):
        row, result, count = scores[i], out[i], 0
        for j in range(n):  # without a branch; nearly all are -inf
            result[j] = 0
            chosen[count] = j
            count += i32(row[j] > f32(-np.inf))
        most = f32(-np.inf)
        for c in range(count):
            most = max(most, row[chosen[c]])
        total, before, weight = i64(0), f32(np.nan), f32(0)
        for c in range(count):
            score = row[chosen[c]]
            if score != before:  # flat parts of a picture give long rows of equal scores
                before, weight = score, np.rint(_exp_of_negative(score - most) * f32(PEAK))
            result[chosen[c]] = weight
            total += i64(weight)
        whole = f32(total)
        for c in range(count):
            result[chosen[c]] = result[chosen[c]] / whole


def softmax(scores: Tensor) -> Tensor:
    """scores: [..., n]"""
    rows = rows_of(scores)
    out = np.empty(rows.shape, dtype=f32)
    in_threads(lambda i, j: _softmax(rows[i:j], out[i:j]), len(rows))
    return torch.from_numpy(out).view(scores.shape)


@loop
def kth_largest(row, order, k):
    """A number that the k largest of a row reach, and no other that is not equal to one of them: a bisection over the
    order of floats, in which counting goes many at a time.  order: int32 [n], overwritten"""
    n, bits, found = len(row), row.view(np.int32), np.empty(1, dtype=i32)
    low, high = i32(2**31 - 1), i32(-(2**31))
    for j in range(n):  # integers in the order of the numbers; -0 counts as 0
        b = bits[j] if bits[j] != i32(-(2**31)) else i32(0)
        order[j] = b ^ i32((b >> i32(31)) & i32(0x7FFFFFFF))
        low, high = min(low, order[j]), max(high, order[j])
    while low < high:
        middle = i32(i64(low) + (i64(high) - i64(low) + 1) // 2)
        count = i32(0)
        for j in range(n):
            count = i32(count + i32(order[j] >= middle))
        if count < k:
            high = i32(middle - i32(1))
        else:
            low = middle
            if count == k:  # no number equals the one at rank k, so it does not matter what parts them
                break
    found[0] = low ^ i32((low >> i32(31)) & i32(0x7FFFFFFF))
    return found.view(np.float32)[0]


@loop
def _keep_top_k(scores, k, out):
    n = scores.shape[1]
    order = np.empty(n, dtype=i32)
    for i in range(len(scores)):
        kth = kth_largest(scores[i], order, k)
        for j in range(n):
            out[i, j] = scores[i, j] if scores[i, j] >= kth else f32(-np.inf)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """scores: [..., n]"""
    rows = rows_of(scores)
    out = np.empty(rows.shape, dtype=f32)
    in_threads(lambda i, j: _keep_top_k(rows[i:j], k, out[i:j]), len(rows))
    return torch.from_numpy(out).view(scores.shape)


# ---- a single token -------------------------------------------------------------------------------------------------


class BlockWeights(NamedTuple):
    """A transformer block.

    qkv, out, up, down: of a linear layer the weight in int16 [N, K], its scale [N] and its bias, [N] or empty.
    eps: what a norm adds to the variance. slope: of the activation below 0. scale: of the queries.
    """

    norm1_weight: np.ndarray
    norm1_bias: np.ndarray
    norm2_weight: np.ndarray
    norm2_bias: np.ndarray
    qkv: tuple
    out: tuple
    up: tuple
    down: tuple
    eps: float
    slope: np.float32
    scale: np.float32


def cache_of(heads: int, capacity: int, d: int) -> tuple[np.ndarray, ...]:
    """Room for keys in high and low digits, their scales, and values as integers."""
    shape = (heads, capacity, d)
    return np.empty(shape, np.int8), np.empty(shape, np.int8), np.empty(shape[:2], f32), np.empty(shape, f64)


@loop
def _remember(keys, values, first, high, low, scale, fixed):
    """keys, values: [heads, q, d], tokens from number `first` on; the others as in cache_of"""
    stop = first + keys.shape[1]
    for h in range(len(keys)):
        _digits(keys[h], high[h, first:stop], low[h, first:stop], scale[h, first:stop])
        _fixed(values[h], FIXED_STEPS * LARGEST_VALUE, fixed[h, first:stop])


@loop
def _attend_one(q, high, low, scale, fixed, n, p_high, p_low, p_scale, lookup, sites, top_k, window, out):
    """One query, head by head.  q: [heads, d]; high, low, fixed: [heads, capacity, d], scale: [heads, capacity], of n
    keys; p: position vectors [buckets, d], which of them belongs to an offset, and the keys' sites, the last of them
    the query's; or empty; window: how far the query looks, 0 for everywhere  ->  out: [heads, d]
    """
    heads, d = q.shape
    far = np.zeros(n, dtype=np.bool_)
    first, stop = 0, n
    if window:
        for j in range(n):
            far[j] = max(abs(sites[j, 0] - sites[n - 1, 0]), abs(sites[j, 1] - sites[n - 1, 1])) > window
        while far[first]:  # the rows above
            first += 1
    seen, n = slice(first, stop), n - first
    sites, far = sites[seen], far[seen]
    q_high, q_low, q_scale = np.empty((heads, d), np.int8), np.empty((heads, d), np.int8), np.empty(heads, f32)
    _digits(q, q_high, q_low, q_scale)
    scores, kept, probs = np.empty((1, n), dtype=f32), np.empty((1, n), dtype=f32), np.empty((1, n), dtype=f32)
    bucket, products, ring = np.empty(n, dtype=i64), np.empty(len(p_high), dtype=f32), len(lookup) // 2
    if len(p_high):
        for j in range(n):  # as RelativePosition.buckets
            row = min(max(sites[j, 0] - sites[n - 1, 0], -ring), ring) + ring
            column = min(max(sites[j, 1] - sites[n - 1, 1], -ring), ring) + ring
            bucket[j] = lookup[row, column]
    for h in range(heads):
        _pairs(q_high[h], q_low[h], q_scale[h], high[h, seen], low[h, seen], scale[h, seen], scores[0])
        if len(p_high):
            _pairs(q_high[h], q_low[h], q_scale[h], p_high, p_low, p_scale, products)
            for j in range(n):
                scores[0, j] = scores[0, j] + products[bucket[j]]
        for j in range(n):
            scores[0, j] = f32(-np.inf) if far[j] else scores[0, j]
        if top_k < n:
            _keep_top_k(scores, top_k, kept)
        else:
            kept[:] = scores
        _softmax(kept, probs)
        _weighted_sum(probs, fixed[h, seen], out[h : h + 1])


@loop
def _one_token(x, block, cache, position, sites, top_k, window, out):
    """models/attention.py's Block for the token of the last site.  x: [1, D], sites: [n, 2]  ->  out: [1, D]"""
    D, n = x.shape[1], len(sites)
    high, low, scale, fixed = cache
    heads, d = high.shape[0], high.shape[2]
    normed, qkv, mixed = np.empty((1, D), dtype=f32), np.empty(3 * D, dtype=f32), np.empty(D, dtype=f32)
    _layer_norm(x, block.norm1_weight, block.norm1_bias, block.eps, normed)
    _linear_row(normed[0], *block.qkv, qkv)
    _remember(qkv[D : 2 * D].reshape(heads, 1, d), qkv[2 * D :].reshape(heads, 1, d), n - 1, *cache)
    q, gathered = qkv[:D].reshape(heads, d) * block.scale, np.empty((heads, d), dtype=f32)
    _attend_one(q, high, low, scale, fixed, n, *position, sites, top_k, window, gathered)
    _linear_row(gathered.reshape(-1), *block.out, mixed)
    for i in range(D):
        out[0, i] = x[0, i] + mixed[i]
    _layer_norm(out, block.norm2_weight, block.norm2_bias, block.eps, normed)
    hidden = np.empty(len(block.up[0]), dtype=f32)
    _linear_row(normed[0], *block.up, hidden)
    for i in range(len(hidden)):
        hidden[i] = hidden[i] if hidden[i] > 0 else hidden[i] * block.slope
    _linear_row(hidden, *block.down, mixed)
    for i in range(D):
        out[0, i] += mixed[i]


def one_token(
    x: Tensor, block: BlockWeights, cache: tuple, position: tuple, sites: Tensor, top_k: int, window: int
) -> Tensor:
    """x: [1, 1, D], of the last of the sites [n, 2]; position: digits and scale of the vectors, lookup; window: how far
    the token looks, 0 for everywhere  ->  [1, 1, D]"""
    out = np.empty(x.shape, dtype=f32)
    _one_token(array(x)[0], block, cache, position, array(sites), top_k, window, out[0])
    return torch.from_numpy(out)


# ---- threads --------------------------------------------------------------------------------------------------------


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads)


def in_threads(work, count: int, least: int = 16) -> None:
    """work(start, stop) over parts of range(count), one for each of torch's threads, of at least so many each; the
    loops release Python's lock."""
    if count < 2 * least:
        return work(0, count)
    threads = max(1, min(torch.get_num_threads(), count // least))
    edges = [count * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(work, *part) for part in itertools.pairwise(edges[1:])] if threads > 1 else []
    work(0, edges[1])  # here, which saves waking a thread
    for other in others:
        other.result()
