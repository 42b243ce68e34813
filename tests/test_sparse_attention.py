"""sparse_attention.py: the numbers and gradients of plain attention, which runs where it does not serve."""

import pytest
import torch
from conftest import micro_model

from entroformer_lib import sparse_attention
from entroformer_lib.inspection.capture import capture
from entroformer_lib.models.attention import TopKAttention, attend
from entroformer_lib.models.position import RelativePosition, grid_sites
from entroformer_lib.sparse_attention import SparseAttention, _TopK

B, HEADS, D, SIDE = 2, 3, 8, 6
N = SIDE * SIDE
SITES, NUMBER = grid_sites(SIDE, SIDE), torch.arange(N)


def causal(i):
    return i[:, None] >= NUMBER


def gaps(i):
    """Another set of hidden keys in each picture; each query sees itself."""
    there = torch.rand(B, 1, 1, N, generator=torch.Generator().manual_seed(2)) < 0.6
    return there | (i[:, None] == NUMBER)


def inputs(relative, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(B, HEADS, N, D, generator=draw).to(dtype).requires_grad_() for _ in range(4)]
    tables = [] if relative is None else list(relative.parameters())
    for table in tables:
        table.data.normal_(generator=draw)
    return tensors, tables


def with_gradients(q, k, v, grad, tables, layer, visible, relative, top_k):
    out = attend(q, k, v, layer, SITES, visible, relative, top_k, None)
    return out, *torch.autograd.grad(out, [q, k, v, *tables], grad)


@pytest.mark.parametrize("visible", [None, causal, gaps])
@pytest.mark.parametrize("kind", [None, "diamond", "relative_2d", "relative_1d"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("radius", [2, 12])  # with more vectors than there are keys
def test_the_same_numbers_and_gradients(visible, kind, window, radius):
    relative = kind and RelativePosition(kind, radius, D)
    (*qkv, grad), tables = inputs(relative)
    layer = TopKAttention(HEADS * D, HEADS, 5, "head")
    layer.window = window
    plain = with_gradients(*qkv, grad, tables, layer, visible, relative, 5)
    with SparseAttention():
        quick = with_gradients(*qkv, grad, tables, layer, visible, relative, 5)
    assert type(quick[0].grad_fn) is not type(plain[0].grad_fn)  # it was another way
    for a, b in zip(plain, quick, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("visible", [None, causal, gaps])
def test_without_gradients_where_all_scores_may_be_held(visible, monkeypatch):
    relative = RelativePosition("diamond", 2, D)
    (q, k, v, _), _ = inputs(relative)
    layer, calls, forward = TopKAttention(HEADS * D, HEADS, 5, "head"), [], _TopK.forward
    monkeypatch.setattr(_TopK, "forward", staticmethod(lambda *a: calls.append(1) or forward(*a)))
    with torch.no_grad():
        plain = attend(q, k, v, layer, SITES, visible, relative, 5, None)
        for pairs, count in ((B * N * N, 1), (B * N * N - 1, 0)):
            calls.clear()
            monkeypatch.setattr(sparse_attention, "PAIRS", pairs)
            with SparseAttention():
                quick = attend(q, k, v, layer, SITES, visible, relative, 5, None)
            assert len(calls) == count
            torch.testing.assert_close(plain, quick, rtol=1e-5, atol=1e-5)


def test_all_equal_scores_are_kept():
    """More of them than there was room for."""
    (q, k, v, grad), _ = inputs(None)
    k = k.detach()[:, :, :1].expand_as(k).clone().requires_grad_()
    layer = TopKAttention(HEADS * D, HEADS, 2, "head")
    with SparseAttention():
        out, *_, dv = with_gradients(q, k, v, grad, [], layer, None, None, 2)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(dv, grad.mean(2, keepdim=True).expand_as(dv))


def test_bfloat16_keeps_its_type():
    (q, k, v, grad), _ = inputs(None, torch.bfloat16)
    layer = TopKAttention(HEADS * D, HEADS, 5, "head")
    with SparseAttention():
        quick = with_gradients(q, k, v, grad, [], layer, causal, None, 5)
    plain = with_gradients(*(t.detach().float().requires_grad_() for t in (q, k, v, grad)), [], layer, causal, None, 5)
    for a, b in zip(plain, quick, strict=True):
        assert b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.float(), rtol=0.02, atol=0.02)


def test_threads_change_nothing():
    (q, k, v, grad), _ = inputs(None)
    layer, threads, results = TopKAttention(HEADS * D, HEADS, 5, "head"), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        with SparseAttention():
            results.append(with_gradients(q, k, v, grad, [], layer, causal, None, 5))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_is_no_number_ends(value):
    (q, k, v, grad), _ = inputs(None)
    q.data[0, 0, 3:30:9] = value
    k.data[0, 1, 7] = value
    layer = TopKAttention(HEADS * D, HEADS, 5, "head")
    with SparseAttention():
        out, *_ = with_gradients(q, k, v, grad, [], layer, causal, None, 5)
    assert not out[0, 0, 3].isfinite().any() and out[1].isfinite().all()


@pytest.mark.parametrize("context", ["serial", "parallel"])
def test_a_model_learns_the_same(context, monkeypatch):
    model = micro_model(context, top_k=4).train()
    y, calls = 3 * torch.randn(2, model.config.M, 8, 8, generator=torch.Generator().manual_seed(0)), []
    forward = _TopK.forward
    monkeypatch.setattr(_TopK, "forward", staticmethod(lambda *a: calls.append(1) or forward(*a)))

    def gradients():
        model.zero_grad()
        noise = {"y": torch.zeros_like(y), "z": torch.zeros(2, model.config.Z, 2, 2)}
        likelihoods, _ = model.likelihoods(y, noise)
        (-sum(p.log().sum() for p in likelihoods.values())).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert not calls
    with SparseAttention():
        quick = gradients()
    assert len(calls) >= model.config.context_layers and plain.keys() == quick.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], quick[name], rtol=2e-3, atol=2e-4 * plain[name].abs().max().item())


def test_who_looks_at_attention_sees_it_all():
    model = micro_model("serial", top_k=4)
    y = torch.randn(1, model.config.M, 8, 8, generator=torch.Generator().manual_seed(0))
    with SparseAttention(), capture(model, "context.0.probs") as maps:
        model.likelihoods(y)
    assert maps["context.0.probs"].shape[-2:] == (64, 64)
