"""The same network with the same bits on every machine.

    with Exact():
        h_s(z_hat)

A floating-point sum depends on its order, and the order depends on vector width, threads, library and device. Inside
the block the few functions that sum, or that no standard fixes, are computed by others; layers and attention stay what
models/ says they are.

1. **Sums are sums of integers.** A row of numbers is rounded to 15 bits times a power of two. Products of such integers
   and their sums stay below 2^53, where float64 is exact in any order. Matrix products of 8-bit digits, in int8 or
   float32, give the same numbers in less time:

       a . b  =  65536 high.high + 256 (high.low + low.high) + low.low

   The last term lies below the rounding and is left out everywhere.
2. **Everything else is elementwise.** IEEE 754 fixes the result of +, -, *, /, sqrt, rounding and comparison of single
   numbers. exp is not among them, so `exp` builds it from those that are. No step may be fused into
   multiply-and-add, which rounds once instead of twice: nothing here may be compiled by torch.

What is said here in tensor operations, `loops.py` says once more for the CPU where that is worth it: the same bits.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entroformer_lib.errors import WeightsError
from entroformer_lib.exact import loops, positions, ranked
from entroformer_lib.exact.constants import FIXED_STEPS, LARGEST_VALUE, LOWEST_POWER, PEAK, POLYNOMIAL
from entroformer_lib.models import attention, position, primitives
from entroformer_lib.models.position import RelativePosition
from entroformer_lib.tiles import in_tiles, queries_with_keys


class Exact(TorchFunctionMode):
    """Inside the block, sums are exact. Float32 tensors, no gradients, weights that nobody changes meanwhile."""

    def __init__(self):
        super().__init__()
        self._kept: dict[tuple, tuple] = {}  # by form and id; what has the id is kept too, so that it stays its own

    def __torch_function__(self, function, types, args=(), kwargs=None):
        ours = EXACT.get(function)
        if ours is not None:
            return ours(self, *args, **(kwargs or {}))
        if function in NOT_FIXED and any(torch.is_tensor(a) and a.is_floating_point() for a in args):
            raise NotImplementedError(
                f"{function.__name__} has no exact form: write it by the functions of models/primitives.py, or by "
                "operations that IEEE 754 fixes"
            )
        return function(*args, **(kwargs or {}))

    def kept(self, form, part):
        """form(part), made at its first use."""
        key = form.__name__, id(part)
        if key not in self._kept:
            self._kept[key] = part, form(part)
        return self._kept[key][1]

    def weight(self, weight: Tensor) -> "Weight":
        """A layer's weight in integers."""
        return self.kept(Weight, weight) if isinstance(weight, nn.Parameter) else Weight(weight)

    def array(self, parameter: Tensor | None) -> np.ndarray:
        """A layer's bias, or a norm's weights, as the loops take them."""
        if not isinstance(parameter, nn.Parameter):
            return loops.NONE if parameter is None else loops.array(parameter)
        return self.kept(_finite_array, parameter)

    def through(self, block: attention.Block, x, sites, visible=None, relative=None, top_k=None, cache=None) -> Tensor:
        """`Block.forward`. The tokens of a serial decoder come one by one, and each goes through in a single loop."""
        single = cache is not None and not cache.closed and visible is None and x.shape[:2] == (1, 1)
        weights = self.kept(self._block, block) if single and loops.serve(x) else None
        if weights is None:
            return type(block).forward(block, x, sites, visible=visible, relative=relative, top_k=top_k, cache=cache)
        layer = block.attention
        if cache.length == 0:
            cache.kept = loops.cache_of(layer.heads, cache.capacity, x.size(2) // layer.heads)
        cache.length += 1
        k, window = min(top_k or layer.top_k or cache.length, cache.length), layer.window or 0
        return loops.one_token(x, weights, cache.kept, self.kept(self._position, relative), sites, k, window)

    def _block(self, block: attention.Block) -> loops.BlockWeights | None:
        """A transformer block as `loops.one_token` takes it; None where it takes none like it."""
        up, activation, down = block.feed_forward
        slope = {nn.ReLU: 0.0, nn.LeakyReLU: getattr(activation, "negative_slope", None)}.get(type(activation))
        if slope is None or down.in_features >= loops.EXACT_TERMS:
            return None
        norms = (self.array(v) for norm in (block.norm1, block.norm2) for v in (norm.weight, norm.bias))
        layers = (block.attention.qkv, block.attention.out, up, down)
        rows = ((*self.weight(layer.weight).for_row, self.array(layer.bias)) for layer in layers)
        scalars = block.norm1.eps, np.float32(slope), np.float32(block.attention.scale)
        return loops.BlockWeights(*norms, *rows, *scalars)

    def _position(self, relative: RelativePosition | None) -> tuple:
        """Position vectors as `loops.one_token` takes them."""
        if relative is None:
            return loops.NO_POSITION
        return *self.weight(relative.table()).for_keys, loops.array(relative.lookup)


class Weight:
    """A matrix [N, K, ...] as integers of 15 bits with a scale for each of the N outputs."""

    def __init__(self, weight: Tensor):
        values = finite(weight).detach().float().flatten(1)
        self.integers, scale = rounded(values)  # [N, K], [N, 1]
        self.scale = scale[:, 0].contiguous()
        if loops.serve(weight):
            high, low, scale = *digits(self.integers), self.scale.numpy()
            both = torch.cat((low, high), dim=1)  # [N, 2 K]
            self.for_rows = loops.for_products(high), loops.for_products(both), scale
            self.for_row = self.integers.to(torch.int16).numpy(), scale
            self.for_keys = high.numpy(), low.numpy(), scale


def finite(weight: Tensor) -> Tensor:
    """The weight, if it is one that can be summed."""
    if not weight.isfinite().all():
        raise WeightsError("The entropy model has weights that are not finite numbers.")
    return weight


def _finite_array(parameter: Tensor) -> np.ndarray:
    return loops.array(finite(parameter))


# ---- numbers to integers --------------------------------------------------------------------------------------------


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = integers * scale, rounded to 15 bits.  x: float32 [..., K]  ->  integers, as float32; scale: [..., 1]"""
    scale = step_for(x.abs().amax(-1, keepdim=True))
    return (x / scale).round_(), scale  # dividing by a power of two is exact


def step_for(peak: Tensor) -> Tensor:
    """The power of two s with peak / s in [2^13, 2^14): the exponent bits of a float32 are just that power."""
    exponent = peak.contiguous().view(torch.int32) & 0x7F800000
    return exponent.clamp(min=64 << 23).view(torch.float32) * (2.0 / PEAK)


def digits(integers: Tensor) -> tuple[Tensor, Tensor]:
    """Integers up to 2^14 as 256 high + low, int8 both."""
    v = integers.to(torch.int16)
    return ((v + 128) >> 8).to(torch.int8), v.to(torch.int8)  # the conversion keeps the low byte, as a signed number


# ---- sums -----------------------------------------------------------------------------------------------------------


def products(a: Tensor, b: Tensor) -> Tensor:
    """Integers [..., q, K] times integers [..., N, K], but for low by low digits, which lie below the rounding."""
    whole, low = (v[0] @ v[1].transpose(-1, -2) for v in ((a.double(), b.double()), (lows(a), lows(b))))
    return (whole - low).float()


def lows(integers: Tensor) -> Tensor:
    """The low digits, in float64."""
    return digits(integers)[1].double()


def linear(exact: Exact, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear"""
    w, K = exact.weight(weight), x.size(-1)
    if loops.serve(x) and x.numel() == K < 2**11:
        return loops.linear_row(x, *w.for_row, exact.array(bias))
    rows = x.reshape(-1, K)
    if loops.serve(x):
        out = loops.linear(rows, *w.for_rows, exact.array(bias))
    else:
        integers, scale = rounded(rows)
        out = products(integers, w.integers) * (scale * w.scale)
        out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], -1)


def conv2d(exact: Exact, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> Tensor:
    """Of one picture: a linear layer over the patches."""
    if groups != 1 or len(x) != 1:
        raise NotImplementedError("conv2d has an exact form for one picture and one group of channels")
    patches = F.unfold(x, weight.shape[2:], dilation, padding, stride)[0].T.contiguous()  # [sites, C k k]
    out = linear(exact, patches, weight, bias)
    step, border = (v if isinstance(v, int) else v[0] for v in (stride, padding))
    height = (x.size(2) + 2 * border - weight.size(2)) // step + 1
    return out.T.reshape(1, len(weight), height, -1)


def dot_products(exact: Exact, q: Tensor, k: Tensor) -> Tensor:
    """Both sides rounded row by row, so that a product does not depend on which others are computed with it."""
    if loops.serve(q):
        return loops.dot_products(q, k)
    (a, a_scale), (b, b_scale) = rounded(q), rounded(k)
    return products(a, b) * (a_scale * b_scale.transpose(-1, -2))


def weighted_sum(exact: Exact, probs: Tensor, v: Tensor) -> Tensor:
    """Values are rounded to one grid for all, so that a sum does not depend on which others take part with weight 0."""
    limit = FIXED_STEPS * LARGEST_VALUE
    if loops.serve(probs):
        return loops.weighted_sum(probs, v, limit)
    v = (v * FIXED_STEPS).round_().double().clamp_(-limit, limit)
    a, scale = rounded(probs)
    return (a.double() @ v).float() * (scale / FIXED_STEPS)


def layer_norm(exact: Exact, x: Tensor, shape, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """torch.nn.functional.layer_norm over the last axis"""
    if loops.serve(x):
        return loops.layer_norm(x, exact.array(weight), exact.array(bias), eps)
    integers, scale = rounded(x)
    wide = integers.double()
    count = wide.new_tensor(x.size(-1))  # by a number CUDA would multiply with its inverse, which is not the same
    mean = wide.sum(-1, keepdim=True) / count
    variance = wide.square().sum(-1, keepdim=True) / count - mean.square()
    factor = 1 / (variance + eps / scale.double().square()).sqrt()
    return integers.sub_(mean.float()).mul_(factor.float()).mul_(weight).add_(bias)


def attend(exact: Exact, q, k, v, layer, sites, visible, relative, top_k, own) -> Tensor:
    """Not a sum, but made of some."""
    if loops.serve(q) and ranks(q, visible, relative, top_k):
        return attend_ranked(exact, q, k, v, layer, sites, visible, relative, top_k, own)
    with exact:
        return in_tiles(q, k, v, layer, sites, visible, relative, top_k, own, trim=True)


def ranks(q: Tensor, visible, relative, top_k: int | None) -> bool:
    """Whether `ranked.attend` takes this attention."""
    simple = visible is None or isinstance(visible, attention.UpToItself)
    known = relative is None or relative.kind == "diamond"
    return bool(top_k) and simple and known and len(q) == 1 and q.size(3) <= ranked.WIDEST


def attend_ranked(exact: Exact, q, k, v, layer, sites, visible, relative, top_k, own) -> Tensor:
    """`attend` by ranked.py."""
    q, n = q[0] * layer.scale, k.size(2)  # [heads, q, d]
    heads, q_len, _ = q.shape
    numbers, places = torch.arange(len(sites) - q_len, len(sites)), torch.arange(n)
    position = np.zeros((heads, q_len, 1), dtype=np.float32)
    with exact:
        if relative is not None:
            position = loops.array(primitives.dot_products(q, relative.table()))
        if own is not None:
            scores = primitives.dot_products(q[..., None, :], own[0][0, ..., None, :])[..., 0]
            scores = scores if relative is None else scores + relative.own(q)
            own = loops.array(scores[..., 0]), loops.array(own[1][0])
    causal = isinstance(visible, attention.UpToItself)

    def pieces():
        for i, keys in queries_with_keys(sites, numbers, n, max(64, 2**18 // n), 2**23, causal, layer.window):
            mine, seen = numbers[i], places[keys]
            limits = torch.searchsorted(seen, mine, right=True) if causal else torch.full_like(mine, len(seen))
            near = mine.new_zeros(len(mine), 0) if relative is None else relative.near(sites[mine], sites[seen])
            yield ranked.Piece(i, keys, *map(loops.array, (seen, limits, near, sites[mine], sites[seen].T)))

    limit = FIXED_STEPS * LARGEST_VALUE
    return ranked.attend(q, k[0], v[0], pieces(), position, own, top_k, layer.window or 0, limit)[None]


# ---- softmax over the chosen ----------------------------------------------------------------------------------------


def keep_top_k(exact: Exact, scores: Tensor, top_k: int | None) -> Tensor:
    """Nothing is summed here; the loops are just quicker."""
    if top_k is None or top_k >= scores.size(-1) or not loops.serve(scores):
        return primitives.keep_top_k(scores, top_k)
    return loops.keep_top_k(scores, top_k)


def softmax(exact: Exact, scores: Tensor, dim: int = -1) -> Tensor:
    """Tensor.softmax over the last axis: exp in steps of 2^-14, and their sum."""
    if dim not in (-1, scores.dim() - 1):
        raise NotImplementedError("softmax has an exact form over the last axis alone")
    if loops.serve(scores):
        return loops.softmax(scores)
    weights = exp(exact, scores - scores.amax(-1, keepdim=True)).mul_(PEAK).round_()
    weights = torch.where(scores == -torch.inf, 0.0, weights)
    return weights / weights.double().sum(-1, keepdim=True).float()


def exp(exact: Exact, x: Tensor) -> Tensor:
    """exp(x) of float32 numbers below 80, from operations that IEEE 754 fixes; below -27 it is about 2^-40."""
    t = (x * 1.4426950408889634).clamp_(min=LOWEST_POWER)
    whole = torch.floor(t)
    part = t - whole
    p = torch.full_like(part, POLYNOMIAL[-1])
    for c in reversed(POLYNOMIAL[:-1]):
        p = p.mul_(part).add_(c)  # two roundings, never one
    power = ((whole.clamp_(max=128).int() + 127) << 23).view(torch.float32)  # 2^whole by its exponent bits
    return p.mul_(power)


def gelu(exact: Exact, x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x) with erf after Abramowitz and Stegun 7.1.26, whose error of 1.5e-7 nobody sees."""
    z = (x * math.sqrt(0.5)).abs()
    t = 1 / (z * 0.3275911 + 1)
    p = torch.full_like(t, 1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0):
        p = p.mul_(t).add_(c)
    tail = p.mul_(exp(exact, -(z * z))).mul_(0.5)  # 1 - Phi(|x|)
    return x * torch.where(x < 0, tail, 1 - tail)


EXACT = {
    F.linear: linear,
    torch.conv2d: conv2d,
    F.layer_norm: layer_norm,
    Tensor.softmax: softmax,
    F.gelu: gelu,
    Tensor.exp: exp,
    attention.attend: attend,
    position.sinusoidal_positions: lambda exact, sites, dim: positions.sinusoidal_positions(sites, dim),
    primitives.dot_products: dot_products,
    primitives.keep_top_k: keep_top_k,
    primitives.weighted_sum: weighted_sum,
}
# Sums, and functions whose last bits no standard fixes
NAMES = """matmul __matmul__ mm bmm addmm baddbmm einsum tensordot dot vdot mv inner outer addmv addbmm addr
    chain_matmul mean nanmean sum nansum trace prod cumsum cumprod var std var_mean std_mean cov corrcoef norm dist
    cdist softmax softmin log_softmax logsumexp layer_norm rms_norm group_norm batch_norm instance_norm
    local_response_norm normalize cosine_similarity bilinear mse_loss conv1d conv3d conv_transpose2d avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d interpolate scaled_dot_product_attention lerp addcmul
    addcdiv exp exp2 expm1 log log2 log10 log1p logaddexp pow __pow__ __rpow__ float_power ldexp rsqrt sin cos tan sinh
    cosh tanh asin acos atan atan2 sigmoid logsigmoid softplus silu mish elu selu celu glu erf erfc erfinv"""
NOT_FIXED = {
    *(
        getattr(place, form)
        for name in NAMES.split()
        for form in (name, f"{name}_", name.replace("__", "__i", 1))  # in place too: exp_, __ipow__
        for place in (torch, Tensor, F)
        if hasattr(place, form)
    ),
    *(function for function in vars(torch.linalg).values() if callable(function)),
} - set(EXACT)
