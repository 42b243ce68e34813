"""The compiled loops give the bits of the tensor operations they stand for."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from entroformer_lib.models import compiled
from entroformer_lib.models.attention import TopKAttention
from entroformer_lib.models.integer import digits, exp_of_negative, joined, product
from entroformer_lib.models.integer_layers import (
    IntegerAttention,
    IntegerLayerNorm,
    IntegerLinear,
    IntegerPosition,
    by_loops,
    by_tensors,
    digits_of_rows,
)
from entroformer_lib.models.position import RelativePosition, grid_sites


def rows_of_many_sizes(count: int, width: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(count, width) * torch.logspace(-6, 6, count)[:, None]
    x[0] = 0
    return x


@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_one_row(bias):
    x, layer = rows_of_many_sizes(40, 70), nn.Linear(70, 33, bias)
    layer = IntegerLinear(layer.weight, layer.bias)
    together = layer.of_digits(digits(x))
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_of_many_rows(bias, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, layer = rows_of_many_sizes(40, 70), nn.Linear(70, 33, bias)
    layer = IntegerLinear(layer.weight, layer.bias)
    for ours, expected in zip(digits_of_rows(x), digits(x), strict=True):
        assert torch.equal(ours, expected)
    high, cross = (product(a, b) for a, b in ((digits(x).high, layer.stacked[:33].T), both_orders(x, layer)))
    expected = joined(high, cross).mul_(digits(x).scale).mul_(layer.scale)
    assert torch.equal(layer(x), expected if layer.bias is None else expected.add_(layer.bias))


def both_orders(x, layer):
    a = digits(x)
    return torch.cat((a.high, a.low), dim=1), layer.crossed.T


def test_layer_norm_of_one_row():
    x, norm = rows_of_many_sizes(40, 70), nn.LayerNorm(70)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm = IntegerLayerNorm(norm)
    assert torch.equal(torch.cat([norm(row[None]) for row in x]), norm(x))


def test_exp():
    x = -torch.cat((torch.logspace(-8, 2, 500), torch.zeros(1)))
    assert [compiled.exp_of_negative(np.float32(v)) for v in x.tolist()] == exp_of_negative(x).tolist()


def test_threshold_is_the_score_at_rank_k():
    torch.manual_seed(0)
    for scores in (torch.randn(300), torch.randn(300).round(), torch.zeros(300), torch.tensor([0.0, -0.0, 1.0] * 9)):
        for k in (1, 2, 7, len(scores) - 1, len(scores), 2**31 - 1):
            values = scores.numpy().copy()
            keys = np.empty(len(values), dtype=np.int32)
            compiled.order_of(values, keys)
            least = scores.topk(min(k, len(scores))).values[-1]
            assert torch.equal(torch.from_numpy(keys >= compiled.threshold(keys, k)), scores >= least)


@contextmanager
def threads_of_torch(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def some_scores(flat: bool, q: int = 37, n: int = 90, d: int = 16, buckets: int = 9):
    """What comes before the softmax; `flat` gives few distinct scores, so that many equal the one at rank k."""
    torch.manual_seed(0)
    a, b = (torch.randint(-60, 60, (2, size, d), dtype=torch.int8) for size in (q, n))
    if flat:
        a, b = a * 0 + 3, b.sign()
        b[:, :, 1:] = 1
    sums = product(a[0], b[0].T), product(torch.cat((a[0], a[1]), 1), torch.cat((b[1], b[0]), 1).T)
    scales = torch.full((q, 1), 2.0**-18), torch.full((n,), 2.0**-10)  # scores of about 1
    position = torch.randint(0, buckets, (q, n), dtype=torch.int16), torch.randn(q, buckets) * (not flat)
    own = torch.randn(q, 1), *torch.randint(-60, 60, (2, q, d), dtype=torch.int8)
    values = tuple(torch.randint(-60, 60, (2, n, d), dtype=torch.int8))
    return sums, scales, position, own, values


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("with_position", [False, True])
@pytest.mark.parametrize("with_own", [False, True])
@pytest.mark.parametrize("top_k", [2, 16, None])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_by_loops_and_by_tensors(flat, with_position, with_own, top_k, threads):
    sums, scales, position, own, values = some_scores(flat)
    position, own = position if with_position else None, own if with_own else None
    with threads_of_torch(threads):
        loops = by_loops(sums, scales, position, own, None, top_k, values)
    tensors = by_tensors(sums, scales, position, own, None, top_k, values)
    assert torch.equal(loops, tensors) and loops.abs().max() > 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("top_k", [2, 16, None])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("look", [by_loops, by_tensors])
def test_keys_that_a_query_does_not_see_are_as_if_not_there(flat, top_k, threads, look):
    sums, scales, position, _, values = some_scores(flat)
    seen = torch.randint(1, 91, (37,), dtype=torch.int32)
    with threads_of_torch(threads):
        all_rows = look(sums, scales, position, None, seen, top_k, values)
    for i, m in enumerate(seen.tolist()):
        row = slice(i, i + 1)
        few = [s[row, :m].contiguous() for s in sums], (scales[0][row], scales[1][:m])
        place, own_values = (position[0][row, :m].contiguous(), position[1][row]), tuple(v[:m] for v in values)
        assert torch.equal(all_rows[row], by_tensors(*few, place, None, None, top_k, own_values))


@pytest.mark.parametrize("kind", ["diamond", "relative_1d", "relative_2d", None])
def test_attention_of_one_token_is_that_of_many(kind):
    """Tokens one by one through the compiled step, and the last of them with all before it through the tiles."""
    torch.manual_seed(0)
    attention, norm = TopKAttention(24, 3, 5, "head"), nn.LayerNorm(24)
    for parameter in (*attention.parameters(), *norm.parameters()):
        nn.init.normal_(parameter)
    attention = IntegerAttention(attention, norm)
    relative = kind and RelativePosition(kind, 2, 8)
    if kind:
        for parameter in relative.parameters():
            nn.init.normal_(parameter)
        relative = IntegerPosition(relative)
    sites, x = grid_sites(4, 6), torch.randn(1, 24, 24)
    one, many = attention.cache(1, 1, 24), attention.cache(1, 1, 24)
    for i in range(24):
        stepwise = attention(x[:, i : i + 1], sites[: i + 1], relative=relative, cache=one)
        one.length += 1
    attention.remember(x[:, :22], many, 0)
    many.length = 22
    at_once = attention(x[:, 22:], sites, relative=relative, cache=many)
    assert torch.equal(at_once[:, 1], stepwise[:, 0])
    assert all(torch.equal(getattr(one, name), getattr(many, name)) for name in ("key_high", "key_low", "value_low"))


@pytest.mark.parametrize("kind", ["diamond", "relative_1d", "relative_2d"])
def test_buckets(kind):
    relative = RelativePosition(kind, 2, 8)
    sites = grid_sites(7, 9)
    assert torch.equal(
        IntegerPosition(relative).buckets(sites[3:20], sites).long(), relative.buckets(sites[3:20], sites)
    )
