"""Exact arithmetic: the same bits by any route, close to the functions it stands for, equal in both directions."""

import math
import operator

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LMBDAS, MICRO, VARIANTS, aware_model, micro_model
from torch import nn

from entroformer_lib.codec import codec
from entroformer_lib.errors import WeightsError
from entroformer_lib.exact import arithmetic, hyper_latents, loops, ranked
from entroformer_lib.exact.arithmetic import Exact, digits, rounded, step_for
from entroformer_lib.exact.coder import ExactCoder
from entroformer_lib.models.attention import Stack, UpToItself
from entroformer_lib.models.config import named_config
from entroformer_lib.models.gain import RateGain, RateKnowledge
from entroformer_lib.models.position import grid_sites
from entroformer_lib.models.primitives import dot_products, keep_top_k, weighted_sum
from entroformer_lib.models.priors import GaussianPrior
from entroformer_lib.rangecoder import scale_of


def many_sizes(*shape: int) -> torch.Tensor:
    """Numbers whose rows are of very different size, one of them zero."""
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., 0, :] = 0
    return x


ROUTES = {
    "loops and int8": {},
    "loops and float32": dict(int8=False),
    "tensors": dict(int8=False, loops=False),
    "two threads": dict(threads=2),
}


def take(route: str, patch: pytest.MonkeyPatch) -> None:
    """Makes one of ROUTES the only one."""
    ways = ROUTES[route]
    patch.setattr(loops, "int8_works", lambda: ways.get("int8", True))
    if not ways.get("int8", True):
        patch.setattr(torch, "_int_mm", None)  # nobody may call it
    if not ways.get("loops", True):
        patch.setattr(loops, "serve", lambda x: False)
    patch.setattr(torch, "get_num_threads", lambda: ways.get("threads", 1))


@pytest.fixture
def by(monkeypatch):
    """by(route, function): what the function gives inside Exact, by one of ROUTES."""

    def run(route, function):
        with monkeypatch.context() as patch:
            take(route, patch)
            with torch.inference_mode(), Exact():
                return function()

    return run


layer, norm, conv = nn.Linear(48, 20), nn.LayerNorm(48), nn.Conv2d(6, 8, 3, padding=1)
nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
FUNCTIONS = {
    "linear": (lambda x: layer(x), lambda: many_sizes(70, 48)),
    "linear, one row": (lambda x: layer(x), lambda: torch.randn(1, 48)),
    "linear without bias": (lambda x: F.linear(x, layer.weight), lambda: many_sizes(2, 35, 48)),
    "layer norm": (lambda x: norm(x), lambda: many_sizes(2, 9, 48)),
    "convolution": (lambda x: conv(x), lambda: torch.randn(1, 6, 5, 7)),
    "strided convolution": (
        lambda x: F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1),
        lambda: torch.randn(1, 6, 8, 6),
    ),
    "products": (lambda x: dot_products(x, x.flip(-1)), lambda: many_sizes(1, 3, 150, 16)),
    "few products": (lambda x: dot_products(x, x), lambda: many_sizes(2, 3, 10, 16)),
    "products of one query": (lambda x: dot_products(x[..., 3:4, :], x), lambda: many_sizes(1, 3, 40, 16)),
    "products with one table": (lambda x: dot_products(x, x[0, 0, :5]), lambda: many_sizes(1, 3, 40, 16)),
    "softmax": (lambda x: keep_top_k(x, 5).softmax(-1), lambda: torch.randn(2, 30, 40)),
    "dense softmax": (lambda x: keep_top_k(x, None).softmax(-1), lambda: torch.randn(2, 30, 40)),
    "weighted sum": (
        lambda x: weighted_sum(keep_top_k(x[..., :40], 5).softmax(-1), 8 * x[..., :40, :9].clamp(-1, 1)),
        lambda: torch.randn(1, 2, 60, 48),
    ),
    "weighted sums of windows": (
        lambda x: weighted_sum(x.softmax(-1), x[..., :12]), lambda: torch.randn(20, 2, 16, 16)
    ),
    "gelu": (F.gelu, lambda: torch.linspace(-6, 6, 1001)),
    "exp": (lambda x: x.exp(), lambda: torch.linspace(-20, 12, 2001)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_route_gives_the_same_bits_close_to_torch(name, by):
    function, numbers = FUNCTIONS[name]
    x = numbers()
    with torch.inference_mode():
        expected = function(x)
    first, *others = (by(route, lambda: function(x)) for route in ROUTES)
    for route, found in zip(list(ROUTES)[1:], others, strict=True):
        assert torch.equal(first, found), route
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    assert first.shape == expected.shape and ((first - expected).abs() / scale).max() < 1e-2


@pytest.mark.parametrize("route", ROUTES)
def test_a_row_does_not_depend_on_the_others(route, by):
    """So a serial encoder, which computes many rows at once, agrees with its decoder."""
    x, q = many_sizes(40, 48), many_sizes(1, 2, 40, 8)
    assert torch.equal(by(route, lambda: layer(x))[7:8], by(route, lambda: layer(x[7:8])))
    assert torch.equal(by(route, lambda: norm(x))[7:8], by(route, lambda: norm(x[7:8])))
    whole = by(route, lambda: dot_products(q, q))
    assert torch.equal(whole[:, :, 7:8, :9], by(route, lambda: dot_products(q[:, :, 7:8], q[:, :, :9])))
    probs = torch.zeros(1, 2, 3, 40)
    probs[..., :5] = torch.rand(1, 2, 3, 5)
    v = torch.randn(1, 2, 40, 6)
    assert torch.equal(
        by(route, lambda: weighted_sum(probs, v)), by(route, lambda: weighted_sum(probs[..., :5], v[:, :, :5]))
    )


@pytest.mark.parametrize("route", ROUTES)
def test_the_order_of_a_sum_does_not_matter(route, by):
    x, order = many_sizes(70, 48), torch.randperm(48)
    other = by(route, lambda: F.linear(x[:, order], layer.weight[:, order], layer.bias))
    assert torch.equal(by(route, lambda: layer(x)), other)


def test_integers_have_fifteen_bits_and_scales_are_powers_of_two():
    x = many_sizes(50, 30)
    integers, scale = rounded(x)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert (integers * scale - x).abs().le(scale / 2).all()
    assert integers[1:].abs().amax(-1).min() >= 2**13 - 1 and integers.abs().max() <= 2**14
    for peak in (1.0, 1.999, 2.0, 0.3, 7e5):
        assert float(step_for(torch.tensor(peak))) == 2.0 ** (math.floor(math.log2(peak)) - 13)
    extremes = torch.tensor([2.0**14, -(2**14), 127, 128, -128, -129])
    high, low = digits(extremes)
    assert torch.equal(high.float() * 256 + low, extremes)


@pytest.mark.parametrize("route", ROUTES)
def test_the_largest_sums_there_are(route, by):
    x, weight = torch.full((40, 1536), 2.0**14), torch.full((8, 1536), 2.0**14)
    weight[:4] = -(2.0**14)
    assert torch.equal(by(route, lambda: F.linear(x, weight)), F.linear(x.double(), weight.double()).float())


@pytest.mark.parametrize("route", ROUTES)
def test_equal_scores_at_rank_k_are_all_kept(route, by):
    scores = torch.tensor([[5.0, 3, 3, 3, 1, 0], [5.0, 4, 3, 2, 1, 0], [0.0, -0.0, -1, -1, -2, -3]])
    probs = by(route, lambda: keep_top_k(scores, 3).softmax(-1))
    assert (probs > 0).sum(1).tolist() == [4, 3, 4]
    order = torch.randperm(6)
    assert torch.equal(by(route, lambda: keep_top_k(scores[:, order], 3).softmax(-1)), probs[:, order])


@pytest.mark.parametrize("kind", ["diamond", "none"])
@pytest.mark.parametrize("sees", ["all", "up to itself", "closed memory"])
def test_ranking_in_groups_gives_the_bits_of_all_scores(sees, kind, monkeypatch):
    """Also where many scores are equal: half of the tokens are the same."""
    torch.manual_seed(2)
    c = named_config("tiny-parallel", **MICRO, position=kind)
    stack, sites = Stack(c, 2, 4, c.radius).eval(), grid_sites(18, 21)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    x = torch.randn(1, len(sites), c.dim)
    x[:, ::2] = x[0, 0]

    def run():
        with torch.inference_mode(), Exact():
            if sees != "closed memory":
                return stack(x, sites, visible=UpToItself(len(sites)) if sees == "up to itself" else None)
            cache = stack.cache(200)
            stack.remember(x[:, :200], sites[:200], cache)
            for part in cache:
                part.closed = True
            return stack(x[:, 200:], sites, cache=cache)

    calls, found = [], ranked.attend
    monkeypatch.setattr(ranked, "attend", lambda *args: calls.append(args) or found(*args))
    quick = run()
    assert calls
    monkeypatch.setattr(arithmetic, "ranks", lambda *args: False)
    assert torch.equal(run(), quick)


def test_what_has_no_exact_form_is_refused():
    x = torch.rand(1, 3, 3, 3)
    for function in (
        lambda: x @ x, lambda: x.sum(), lambda: x.mean(), lambda: torch.einsum("bijk->i", x), x.sin, lambda: 2**x,
        lambda: x**3, lambda: torch.sigmoid(x), lambda: F.softplus(x), lambda: F.rms_norm(x, (3,)),
        lambda: F.normalize(x), lambda: F.glu(torch.rand(1, 4)), lambda: torch.dot(x[0, 0, 0], x[0, 0, 1]),
        lambda: torch.linalg.norm(x), x.exp_, x.sigmoid_, lambda: operator.ipow(x, 3),
        lambda: nn.ConvTranspose2d(3, 3, 3)(x),
    ):  # fmt: skip
        with Exact(), pytest.raises(NotImplementedError, match="no exact form"):
            function()
    for function in (lambda: x.softmax(1), lambda: F.conv2d(torch.rand(2, 3, 3, 3), torch.rand(3, 3, 1, 1))):
        with Exact(), pytest.raises(NotImplementedError, match="has an exact form"):
            function()


def test_scores_that_are_no_numbers_read_no_foreign_memory():
    scores = torch.full((4, 1, 300), torch.inf)
    scores[1:] = torch.nan
    with Exact():
        scores.softmax(-1)
    assert loops._exp_of_negative(np.float32(np.nan)) == loops._exp_of_negative(np.float32(-1e9))


def test_scales_are_rounded_as_they_should_be():
    """And not as a C library, or numpy on this processor, does it: those differ in the last bit."""
    logs = [*np.random.default_rng(0).normal(0, 3, 300).astype(np.float32).tolist(), *(np.arange(-256, 385) / 32)]
    with mpmath.workdps(60):
        assert [scale_of(v) for v in logs] == [float(mpmath.exp(mpmath.mpf(v))) for v in logs]
    assert [scale_of(v) for v in (math.inf, -math.inf, 1e30, -1e30)] == [math.inf, 0, math.inf, 0]
    prior = GaussianPrior(3)
    prior.log_sigma.data[0, :, 0, 0] = torch.tensor([-1.3, 0.2, 2.7])
    _, scales = hyper_latents._gaussians(prior, (3, 2, 2))
    assert scales[:, 1, 1].tolist() == [scale_of(v) for v in prior.log_sigma.flatten().tolist()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(top_k=None),
        dict(position="none"),
        dict(position="relative_1d"),
        dict(position="absolute"),
        dict(activation="gelu"),
        dict(share_position=True),
    ],
)
def test_a_stack_computes_what_the_floating_one_computes(changes):
    torch.manual_seed(1)
    c = named_config("tiny-serial", **{**MICRO, **changes})
    stack = Stack(c, 2, c.top_k, c.radius).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    x, sites = torch.randn(1, 35, c.dim), grid_sites(5, 7)
    with torch.inference_mode():
        expected = stack(x, sites)
        with Exact():
            ours = stack(x, sites)
    assert (ours - expected).abs().mean() < 2e-3 * expected.abs().mean()


def steps_and_at_once(context, y_hat) -> tuple[torch.Tensor, torch.Tensor]:
    """Features site by site, as a serial decoder computes them, and all at once, as an encoder does: [D, n] each."""
    known, found = y_hat[0].flatten(1).T, []
    with torch.inference_mode(), Exact():
        steps, latents = context.steps(*y_hat.shape[2:]), None
        for i in range(len(known)):
            sites, feature = steps.send(latents)
            found.append(feature[0, :, 0, 0])
            latents = known[sites]
            assert sites.tolist() == [i]
        return torch.stack(found, 1), context(y_hat)[0].flatten(1)


@pytest.mark.parametrize("position", ["none", "absolute", "relative_1d", "relative_2d", "diamond"])
@pytest.mark.parametrize("variant", ["serial", "cnn"])
@pytest.mark.parametrize("flat", [False, True])
def test_all_features_at_once_are_the_bits_of_single_steps(variant, position, flat):
    """What a serial encoder computes is what a serial decoder does, also where flat regions make scores equal."""
    context = micro_model(variant, position=position, top_k=4).context_model
    for size in ((1, 1), (1, 5), (5, 5)):
        y_hat = torch.zeros(1, 24, *size) if flat else torch.randn(1, 24, *size).mul(3).round()
        y_hat[..., -1, -1] += 1
        single, at_once = steps_and_at_once(context, y_hat)
        assert torch.equal(single, at_once) and at_once.abs().max() > 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(activation="leaky_relu", attention_scale="width"),
        dict(activation="gelu"),
        dict(top_k=None, share_position=True),
        dict(search_window=2),
    ],
)
def test_a_token_in_one_loop_is_the_token_layer_by_layer(changes, monkeypatch):
    calls, loop = [], loops.one_token
    monkeypatch.setattr(loops, "one_token", lambda *args: calls.append(args) or loop(*args))
    model = micro_model("serial", **{"top_k": 4, **changes})
    with torch.no_grad():
        for parameter in model.context_model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    single, at_once = steps_and_at_once(ExactCoder(model).model.context, torch.randn(1, 24, 6, 7).mul(3).round())
    assert torch.equal(single, at_once) and len(calls) == (0 if "gelu" in changes.values() else 41 * 2)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("hyperprior", [False, True])
@pytest.mark.parametrize("variant", ["serial", "cnn"])
def test_an_encoder_that_takes_no_steps_writes_the_same_string(variant, hyperprior, told, flat_picture):
    model = (aware_model if told else micro_model)(variant, hyperprior=hyperprior, top_k=4)
    coder, level = ExactCoder(model), 1.3 if told else None
    rate = coder.rate(model, level)
    y_hat, z = model.latents(codec.to_tensor(flat_picture, model), level)
    z_hat = z if z is None else torch.round(z)
    at_once = coder.encode(y_hat, z_hat, rate)
    coder.model.one_by_one = False
    assert coder.encode(y_hat, z_hat, rate) == at_once
    assert torch.equal(coder.decode(at_once, z_hat, y_hat.shape[2:], rate), y_hat)


@pytest.mark.parametrize("route", list(ROUTES)[1:])
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_the_same_by_every_route(variant, route, flat_picture):
    with pytest.MonkeyPatch.context() as patch:
        take("loops and int8", patch)
        data = codec.encode(micro_model(variant, top_k=4), flat_picture)
    other = micro_model(variant, top_k=4)
    with pytest.MonkeyPatch.context() as patch:
        take(route, patch)
        assert codec.encode(other, flat_picture) == data
        assert codec.decode(data, other).size == flat_picture.size


def test_exact_gains_are_the_gains():
    gain = RateGain(LMBDAS, 5)
    knowledge = RateKnowledge(gain, 3, 8)
    for level in (0.0, 0.7, 2.0):
        rough = knowledge(gain, torch.tensor([level]))
        with torch.inference_mode(), Exact():
            exact = knowledge(gain, torch.tensor([level]))
        for a, b in zip(rough, exact, strict=True):
            assert torch.allclose(a, b, rtol=1e-5)


def test_a_changed_weight_is_noticed(photo):
    model = micro_model("parallel")
    before = codec.encode(model, photo)
    model.entropy_parameters.layers[2].bias.data.add_(0.1)  # past autograd's version counter
    after = codec.encode(model, photo)
    assert after != before
    assert codec.decode(after, model).size == photo.size


def test_weights_that_are_no_numbers(photo):
    model = micro_model("parallel")
    model.context_model.stack.blocks[0].attention.qkv.weight.data[0] = math.nan
    with pytest.raises(WeightsError, match="not finite"):
        codec.encode(model, photo)


def test_what_is_compiled_is_compiled_again_when_another_file_changes():
    """numba keeps it as long as the function's own file stays, and functions of others are compiled into it."""
    kept = ranked._attend._cache._cache_file
    assert kept._source_stamp[1] == loops._sources() and len(loops._sources()) == 64
