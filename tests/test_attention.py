import pytest
import torch
from conftest import MICRO

from entroformer_lib import tiles
from entroformer_lib.exact.quick import QuickTopK
from entroformer_lib.models.attention import Stack, TopKAttention, UpToItself
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.position import RelativePosition, grid_sites
from entroformer_lib.models.primitives import keep_top_k
from entroformer_lib.tiles import Tiles


def naive_attention(layer: TopKAttention, x, sites, relative, visible):
    """Eq. 4, 6 and 7 with loops, for one picture: x [n, D]."""
    n, D = x.shape
    d = D // layer.heads
    q, k, v = layer.qkv(x).view(n, 3, layer.heads, d).unbind(1)
    out = torch.zeros(n, layer.heads, d, dtype=x.dtype)
    buckets = relative.buckets(sites, sites)
    for head in range(layer.heads):
        for i in range(n):
            keys = [j for j in range(n) if visible[i, j]]
            e = {j: float(q[i, head] @ (k[j, head] + relative.table()[buckets[i, j]])) * layer.scale for j in keys}
            best = sorted(keys, key=lambda j: -e[j])[: layer.top_k]
            weights = torch.softmax(torch.tensor([e[j] for j in best], dtype=x.dtype), 0)
            out[i, head] = sum(w * v[j, head] for w, j in zip(weights, best, strict=True))
    return layer.out(out.reshape(n, D))


@pytest.mark.parametrize("scale", ["head", "width"])
def test_equals_the_naive_formula(scale):
    layer = TopKAttention(12, heads=2, top_k=3, scale=scale).double()
    relative = RelativePosition("diamond", 2, 6).double()
    sites = grid_sites(3, 5)
    x = torch.randn(1, 15, 12, dtype=torch.float64)
    visible = torch.ones(15, 15).tril().bool()
    with torch.no_grad():
        fast = layer(x, sites, visible=lambda i: visible[i], relative=relative)[0]
        torch.testing.assert_close(fast, naive_attention(layer, x[0], sites, relative, visible))


def test_k_of_all_keys_is_dense_attention():
    dense = TopKAttention(12, 2, None, "head")
    x, sites = torch.randn(2, 20, 12), grid_sites(4, 5)
    assert torch.equal(dense(x, sites, top_k=20), dense(x, sites))
    assert torch.equal(dense(x, sites, top_k=99), dense(x, sites))
    assert not torch.allclose(dense(x, sites, top_k=5), dense(x, sites))


def test_the_loop_keeps_the_same_scores():
    """Ties, too few visible keys and rows without any among them; with gradients the loop is not asked."""
    scores = torch.randn(2, 3, 40, 30).mul(4).round()
    scores[..., 20:, 3:] = -torch.inf
    scores[..., 30:, :] = -torch.inf
    for k in (1, 5, 29, 30, None):
        with torch.no_grad():
            usual = keep_top_k(scores, k)
            with QuickTopK():
                assert torch.equal(keep_top_k(scores, k), usual)
    with QuickTopK():
        assert keep_top_k(scores.requires_grad_(), 5).grad_fn is not None


def test_keep_top_k_keeps_the_largest():
    scores = torch.randn(3, 4, 50)
    kept = keep_top_k(scores, 7)
    assert (kept > -torch.inf).sum(-1).eq(7).all()
    assert kept.amax(-1).equal(scores.amax(-1))
    assert kept.masked_fill(kept == -torch.inf, 9).amin(-1).equal(scores.sort(-1, descending=True).values[..., 6])


def test_scores_equal_to_the_last_chosen_are_kept():
    scores = torch.tensor([0.5, 1.0, 1.0, 1.0, 0.2, 1.0])
    assert (keep_top_k(scores, 2) > -9).tolist() == [False, True, True, True, False, True]


def test_fewer_visible_keys_than_k():
    scores = torch.full((6,), -torch.inf, dtype=torch.float64)
    scores[3] = 0.1
    assert keep_top_k(scores, 4).softmax(-1).tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("position", ["none", "absolute", "relative_1d", "relative_2d", "diamond"])
@pytest.mark.parametrize("share", [True, False])
def test_cached_steps_equal_one_pass(position, share):
    config = EntroformerConfig(**MICRO, position=position, share_position=share)
    stack = Stack(config, layers=3, top_k=4, radius=2).double().eval()
    sites = grid_sites(3, 5)
    x = torch.randn(1, 15, 24, dtype=torch.float64)
    number = torch.arange(15)
    with torch.no_grad():
        whole = stack(x, sites, visible=lambda i: number <= i[:, None])
        cache = stack.cache(15)
        steps = [stack(x[:, i : i + 1], sites[: i + 1], cache=cache) for i in range(15)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_tokens_apart_see_what_is_remembered_and_themselves():
    config = EntroformerConfig(**MICRO)
    stack = Stack(config, layers=2, top_k=None, radius=2).double().eval()
    sites, x = grid_sites(3, 5), torch.randn(1, 15, 24, dtype=torch.float64)
    visible = torch.zeros(15, 15, dtype=torch.bool)
    visible[:, :9] = True
    visible |= torch.eye(15, dtype=torch.bool)
    with torch.no_grad():
        whole = stack(x, sites, visible=lambda i: visible[i])
        cache = stack.cache(9)
        stack(x[:, :9], sites[:9], cache=cache)
        for part in cache:
            part.closed = True
        late = [
            stack(x[:, some], torch.cat((sites[:9], sites[some])), cache=cache) for some in ([9, 10, 11], [12, 13, 14])
        ]
    torch.testing.assert_close(torch.cat(late, 1), whole[:, 9:])


@pytest.mark.parametrize("elements", [1, 500, 5000])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_change_nothing(monkeypatch, elements, causal):
    config = EntroformerConfig(**MICRO)
    stack = Stack(config, layers=2, top_k=4, radius=3).double().eval()
    x, sites = torch.randn(2, 160, 24, dtype=torch.float64), grid_sites(10, 16)
    visible, sizes = UpToItself(160) if causal else None, []
    stack.blocks[0].attention.scores.register_forward_hook(lambda m, a, out: sizes.append(out.numel()))
    with torch.no_grad():
        whole = stack(x, sites, visible)
        monkeypatch.setitem(tiles.ELEMENTS, "cpu", elements)
        sizes.clear()
        with Tiles():
            torch.testing.assert_close(stack(x, sites, visible), whole)
    assert len(sizes) > 1 and max(sizes) <= max(elements, 2 * 64 * 160)


def test_jitter_draws_k_only_while_training():
    config = EntroformerConfig(**MICRO, top_k_jitter=True)
    stack = Stack(config, layers=1, top_k=8, radius=3)
    seen = set()
    stack.blocks[0].attention.selected.register_forward_hook(
        lambda module, args, out: seen.add(int((out > -torch.inf).sum(-1).max()))
    )
    x, sites = torch.randn(1, 24, 24), grid_sites(4, 6)
    for _ in range(60):
        stack(x, sites)
    assert seen <= set(range(4, 16)) and len(seen) > 4
    seen.clear()
    stack.eval()(x, sites)
    assert seen == {8}


def test_points_to_look_at_have_their_shapes():
    layer = TopKAttention(12, 2, 3, "head")
    relative = RelativePosition("diamond", 2, 6)
    shapes = {}
    for name in ("content", "position", "scores", "selected", "probs"):
        getattr(layer, name).register_forward_hook(lambda m, a, out, name=name: shapes.update({name: tuple(out.shape)}))
    layer(torch.randn(2, 20, 12), grid_sites(4, 5), relative=relative)
    assert shapes == {n: (2, 2, 20, 20) for n in ("content", "position", "scores", "selected", "probs")}
