"""Integer arithmetic: exact in any order and by any route, close to the layers it stands for, equal in both modes."""

import copy
import math

import pytest
import torch
from conftest import MICRO, VARIANTS, aware_model, micro_model
from torch import nn

from entroformer_lib.coding import codec
from entroformer_lib.models import context, integer
from entroformer_lib.models.attention import Block, Stack
from entroformer_lib.models.config import named_config
from entroformer_lib.models.exact import ExactEntropyModel
from entroformer_lib.models.integer import chosen, digits, exp_of_negative, largest, product, step_for
from entroformer_lib.models.integer_copy import integer_copy
from entroformer_lib.models.integer_layers import (
    IntegerConv3x3,
    IntegerGELU,
    IntegerLayerNorm,
    IntegerLinear,
)
from entroformer_lib.models.position import grid_sites


def value(d) -> torch.Tensor:
    return (d.high.double() * 256 + d.low) * d.scale


def test_digits_round_to_fifteen_bits_with_powers_of_two():
    x = torch.randn(50, 30) * torch.logspace(-6, 6, 50)[:, None]
    d = digits(x)
    assert torch.equal(d.scale.log2(), d.scale.log2().round())
    assert (value(d) - x).abs().le(d.scale / 2).all()
    peaks = (d.high.int() * 256 + d.low).abs().amax(-1)
    assert peaks.min() >= 2**13 - 1 and peaks.max() <= 2**14
    assert digits(torch.zeros(2, 5)).high.eq(0).all()
    extremes = digits(torch.tensor([[2**14, -(2**14), 127.0, 128, -128, -129]]), torch.ones(1))
    assert value(extremes).tolist() == [[2**14, -(2**14), 127, 128, -128, -129]]


def test_step_is_the_power_of_two_below():
    for peak in (1.0, 1.999, 2.0, 0.3, 7e5):
        assert float(step_for(torch.tensor(peak))) == 2.0 ** (math.floor(math.log2(peak)) - 13)


@pytest.mark.parametrize("shape", [(1, 7, 3), (33, 700, 40), (5, 2000, 9)])
def test_both_routes_of_the_product_are_exact(shape, monkeypatch):
    m, k, n = shape
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (k, n), dtype=torch.int8)
    exact = a.long() @ b.long()
    assert torch.equal(product(a, b).long(), exact)
    monkeypatch.setattr(integer, "_int8_works", lambda device: False)
    assert torch.equal(product(a, b).long(), exact)
    a.fill_(-128), b.fill_(-128)  # the largest sums there are
    assert torch.equal(product(a, b).long(), a.long() @ b.long())


def test_linear_keeps_fifteen_bits_and_does_not_depend_on_the_batch():
    layer, x = nn.Linear(48, 20), torch.randn(70, 48)
    ours = IntegerLinear(layer.weight, layer.bias)
    assert (ours(x) - layer(x)).abs().max() < 2e-3 * layer(x).abs().max()
    assert torch.equal(ours(x)[:5], ours(x[:5]))  # few rows go another way
    order = torch.randperm(48)  # sums in another order
    assert torch.equal(IntegerLinear(layer.weight[:, order], layer.bias)(x[:, order]), ours(x))


def test_convolution_norm_and_activation_are_those_of_torch():
    x = torch.randn(1, 12, 5, 7)
    conv = nn.Conv2d(12, 8, 3, padding=1)
    assert torch.allclose(IntegerConv3x3(conv)(x), conv(x), atol=1e-3)
    norm = nn.LayerNorm(24)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    rows = 3 * torch.randn(9, 24) + 1
    assert torch.allclose(IntegerLayerNorm(norm)(rows), norm(rows), atol=3e-3)
    wide = torch.linspace(-6, 6, 1001)
    assert torch.allclose(IntegerGELU()(wide), nn.GELU()(wide), atol=1e-5)


def test_exp():
    x = -torch.linspace(0, 20, 4001)
    assert torch.allclose(exp_of_negative(x), x.exp(), rtol=3e-6, atol=0)
    assert exp_of_negative(torch.tensor([0.0, -1e30])).tolist() == [1.0, 2.0**-40]


@pytest.mark.parametrize("n", [40, 64, 101, 1000])
def test_largest_is_topk(n):
    scores = torch.randn(20, n)
    values, index = largest(scores, 6)
    expected = scores.topk(6)
    assert torch.equal(values, expected.values) and torch.equal(index, expected.indices)


def test_equal_scores_at_rank_k_are_all_kept():
    scores = torch.tensor([[5.0, 3, 3, 3, 1, 0], [5.0, 4, 3, 2, 1, 0]])
    high, low, total = chosen(scores, 3)
    weights = high.int() * 256 + low
    assert (weights[0] > 0).tolist() == [True, True, True, True, False, False]
    assert (weights[1] > 0).tolist() == [True, True, True, False, False, False]
    assert torch.equal(weights.sum(1, keepdim=True).float(), total)
    assert torch.allclose(weights[0, :4] / total[0], scores[0, :4].softmax(0), atol=1e-4)
    order = torch.randperm(6)
    again = chosen(scores[:, order], 3)
    assert torch.equal(again[0], high[:, order]) and torch.equal(again[1], low[:, order])


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
        expected, ours = stack(x, sites), integer_copy(stack)(x, sites)
    assert (ours - expected).abs().mean() < 2e-3 * expected.abs().mean()


def test_cached_steps_equal_each_other_bit_by_bit():
    """A serial decoder's single steps against several tokens at once that see the same keys."""
    c = named_config("tiny-serial", **MICRO)
    stack = integer_copy(Stack(c, 2, c.top_k, c.radius))
    x, sites = torch.randn(1, 30, c.dim), grid_sites(5, 6)
    with torch.inference_mode():
        one = stack.cache(1, 30)
        for i in range(29):
            stack(x[:, i : i + 1], sites[: i + 1], cache=one)
        last = stack(x[:, 29:], sites, cache=one)
        apart = stack.cache(1, 30)
        for i in range(29):
            stack(x[:, i : i + 1], sites[: i + 1], cache=apart)
        two = torch.cat((x[:, 29:], torch.randn(1, 1, c.dim)), dim=1)
        many = stack(two, torch.cat((sites, sites[-1:])), cache=apart, apart=True)
    # `apart` sums a query's own value outside of the digits, so it is a rounding away; the same keys are chosen
    assert torch.allclose(many[:, :1], last, atol=1e-4)


@pytest.mark.parametrize("position", ["none", "absolute", "relative_1d", "relative_2d", "diamond"])
@pytest.mark.parametrize("variant", ["serial", "cnn"])
@pytest.mark.parametrize("flat", [False, True])
def test_all_features_at_once_are_the_bits_of_single_steps(variant, position, flat, monkeypatch):
    """What a serial encoder computes is what a serial decoder does, also where flat regions make scores equal."""
    monkeypatch.setattr(context, "PART", 12)
    model = micro_model(variant, position=position, top_k=4)
    exact = integer_copy(model.context_model)
    for size in ((1, 1), (1, 5), (5, 5)):  # 25 tokens: parts of 12, 12 and a single one
        y_hat = torch.zeros(1, 24, *size) if flat else torch.randn(1, 24, *size).mul(3).round()
        y_hat[..., -1, -1] += 1
        steps = torch.zeros(1, model.config.dim, size[0] * size[1])

        def exchange(sites, feature, steps=steps, y_hat=y_hat):
            steps[:, :, sites] = feature[..., 0]
            return y_hat[0].flatten(1).T[sites]

        with torch.inference_mode():
            exact.code(*size, exchange)
            at_once = exact.features(y_hat)
        assert torch.equal(at_once.flatten(2), steps) and steps.abs().max() > 0


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("hyperprior", [False, True])
@pytest.mark.parametrize("variant", ["serial", "cnn"])
def test_an_encoder_that_takes_no_steps_writes_the_same_string(variant, hyperprior, told, flat_picture):
    model = (aware_model if told else micro_model)(variant, hyperprior=hyperprior, top_k=4)
    exact, rate = ExactEntropyModel(model), model.rate(1.3 if told else None, exact=True)
    y_hat, z = model.latents(codec.to_tensor(flat_picture, model), 1.3 if told else None)
    z_hat = z if z is None else torch.round(z)
    at_once = exact.encode(y_hat, z_hat, rate)
    exact.site_by_site = False
    assert exact.encode(y_hat, z_hat, rate) == at_once
    assert torch.equal(exact.decode(at_once, z_hat, y_hat.shape[2:], rate), y_hat)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_the_same_without_an_int8_unit(variant, flat_picture, monkeypatch):
    model = micro_model(variant, top_k=4)
    data = codec.encode(model, flat_picture)
    monkeypatch.setattr(integer, "_int8_works", lambda device: False)
    assert codec.encode(copy.deepcopy(model), flat_picture) == data
    assert codec.decode(data, model).size == flat_picture.size


def test_a_changed_weight_is_noticed(photo):
    model = micro_model("parallel")
    before = codec.encode(model, photo)
    model.entropy_parameters.layers[2].bias.data.add_(0.1)  # past autograd's version counter
    after = codec.encode(model, photo)
    assert after != before
    assert codec.decode(after, model).size == photo.size


def test_weights_that_are_no_numbers():
    block = Stack(named_config("tiny-serial", **MICRO), 1, 4, 3)
    block.blocks[0].norm1.weight.data[0] = math.nan
    assert isinstance(block.blocks[0], Block)
    with pytest.raises(ValueError, match="not finite"):
        integer_copy(block)
