"""GroupedMixer: groups, mixers, causality over groups, the cache, exact coding."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import context_cache
from entroformer_lib.codec import codec
from entroformer_lib.entroformer import build_model
from entroformer_lib.errors import AttentionError, ConfigError, StudyError, TrainingError
from entroformer_lib.exact.arithmetic import Exact
from entroformer_lib.inspection.capture import capture
from entroformer_lib.inspection.missing_context import scene_of
from entroformer_lib.inspection.row_server import RowServer
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.models.context import Gaps
from entroformer_lib.models.groupedmixer import (
    CrossAttention,
    WindowAttention,
    group_grid,
    group_order,
    merge,
    split,
    windows,
)
from entroformer_lib.training.config import TrainConfig
from entroformer_lib.training.loop import train

ORDERS = ("channels", "raster", "sites")
UNEVEN = (5, 2, 2)  # slices of 3, 3, 2, 2 and 2 of 12 channels
SMALL = dict(N=8, M=12, Z=8, dim=16, heads=2, context_layers=2, top_k=4, hyper_top_k=(4, 4, 4), window=2)


def small(**fields):
    """A GroupedMixer with biases and targets that matter."""
    torch.manual_seed(0)
    model = build_model("tiny-groupedmixer", **{**SMALL, **fields}).eval()
    for parameter in model.context_model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def steps(mixer, y, hyper, cached):
    """Means and logarithms of scales, in the coder's steps: [2, M, h, w]"""
    known, found = y[0].flatten(1), torch.full((2, *y[0].flatten(1).shape), torch.nan)
    asked, latents = mixer.steps(*hyper.shape[2:], hyper, cached), None
    with contextlib.suppress(StopIteration):
        while True:
            channels, sites, *parameters = asked.send(latents)
            for part, values in zip(found, parameters, strict=True):
                part[channels, sites] = values.T
            latents = known[channels][:, sites].T
    return found.view(2, *y.shape[1:])


def some_latents(h: int = 8, w: int = 12, M: int = 12):
    torch.manual_seed(1)
    return torch.randn(1, M, h, w).mul(2).round(), torch.randn(1, 16, h, w)


# ---- groups ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 2, 2), (2, 1, 2), (6, 4, 2), (1, 3, 3)])
@pytest.mark.parametrize("size", [(4, 8), (5, 7), (1, 1), (2, 9)])
@pytest.mark.parametrize("channels", [6, 8])
def test_merge_is_the_inverse_of_split(order, counts, size, channels):
    y = torch.randn(2, channels, *size)
    groups = split(y, counts, order)
    rows, columns = group_grid(*size, counts)
    assert groups.shape == (2, counts[0] * counts[1] * counts[2], rows * columns, -(-channels // counts[0]))
    assert torch.equal(merge(groups, y.shape[1:], counts, order), y)


@pytest.mark.parametrize("order", ORDERS)
def test_a_group_holds_its_slice_and_phase(order):
    counts, y = (3, 2, 2), torch.randn(1, 6, 8, 10)
    groups = split(y, counts, order)
    for g, (part, row, column) in enumerate(group_order(counts, order)):
        expected = y[0, 2 * part : 2 * part + 2, row::2, column::2].flatten(1).T
        assert torch.equal(groups[0, g], expected)


def test_orders():
    diagonal_first = [(0, 0), (1, 1), (0, 1), (1, 0)]
    assert group_order((2, 2, 2)) == [(s, *p) for s in (0, 1) for p in diagonal_first]
    assert group_order((2, 2, 2), "sites") == [(s, *p) for p in diagonal_first for s in (0, 1)]
    assert group_order((1, 2, 2), "raster") == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    thirds = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1)]  # files depend on it
    assert group_order((1, 3, 3)) == [(0, *p) for p in thirds]
    assert group_order((1, 2, 4)) == [(0, i % 2, (i // 2 + i % 2) % 4) for i in range(8)]
    for counts, order in itertools.product([(3, 4, 2), (1, 3, 3)], ORDERS):
        assert len(set(group_order(counts, order))) == counts[0] * counts[1] * counts[2]


# ---- mixers against plain loops ----


@pytest.mark.parametrize("grid,side,shift", [((4, 6), 2, 0), ((5, 3), 4, 2), ((1, 1), 8, 4), ((9, 8), 8, 4)])
def test_windows(grid, side, shift):
    index, place = windows(*grid, side, shift)
    height, width = grid
    assert torch.equal(index.flatten()[place], torch.arange(height * width))
    assert (index >= 0).sum() == height * width
    for token in range(height * width):
        row, column = divmod(token, width)
        mine = index[place[token] // side**2]
        same = [
            other
            for other in range(height * width)
            if (other // width + shift) // side == (row + shift) // side
            and (other % width + shift) // side == (column + shift) // side
        ]
        assert sorted(mine[mine >= 0].tolist()) == same


@pytest.mark.parametrize("layer", [0, 1])
def test_window_attention_is_attention_inside_each_window(layer):
    torch.manual_seed(0)
    c = EntroformerConfig(context="grouped", dim=16, heads=2, window=4, M=320)
    attention, (height, width) = WindowAttention(c, layer), (6, 9)
    x = torch.randn(1, 2, height * width, 16)
    out = attention(x, (height, width))
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    shift, table = 2 * layer, attention.relative
    for slot, i, head in itertools.product(range(2), (0, 13, 53), range(2)):
        row, column = divmod(i, width)
        d, scores, values = slice(8 * head, 8 * head + 8), [], []
        for j in range(height * width):
            r, s = divmod(j, width)
            if (r + shift) // 4 == (row + shift) // 4 and (s + shift) // 4 == (column + shift) // 4:
                p = table.table()[table.buckets(torch.tensor([[row, column]]), torch.tensor([[r, s]]))[0, 0]]
                scores.append(q[0, slot, i, d] @ (k[0, slot, j, d] + p) / 8**0.5)
                values.append(v[0, slot, j, d])
        expected = torch.stack(scores).softmax(0) @ torch.stack(values)
        with capture_input(attention.out) as seen:
            attention(x, (height, width))
        assert torch.allclose(seen[0].view(2, -1, 16)[slot, i, d], expected, atol=1e-5)
    assert out.shape == x.shape


class capture_input:
    """The input of a layer while it runs."""

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        seen = []
        self.hook = self.layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        return seen

    def __exit__(self, *_):
        self.hook.remove()


def test_cross_attention_sees_its_own_place_in_earlier_slots():
    torch.manual_seed(0)
    attention = CrossAttention(EntroformerConfig(context="grouped", dim=16, heads=2, M=320), groups=5)
    nn.init.normal_(attention.bias)
    x = torch.randn(1, 5, 7, 16)
    with capture_input(attention.out) as seen:
        attention(x)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    for slot, site, head in itertools.product(range(5), range(7), range(2)):
        d = slice(8 * head, 8 * head + 8)
        scores = [
            q[0, slot, site, d] @ k[0, s, site, d] / 8**0.5 + attention.bias[head, slot - s] for s in range(slot + 1)
        ]
        expected = torch.stack(scores).softmax(0) @ v[0, : slot + 1, site, d]
        assert torch.allclose(seen[0].view(7, 5, 16)[site, slot, d], expected, atol=1e-5)


# ---- the model ----


@pytest.mark.parametrize(
    "fields", [{}, {"inner": "top_k"}, {"group_order": "sites"}, {"groups": (2, 1, 2)}, {"groups": UNEVEN}]
)
def test_no_latent_of_a_group_or_later_reaches_its_parameters(fields):
    model = small(**fields)
    counts, order = model.config.groups, model.config.group_order
    y, hyper = some_latents()
    with torch.no_grad():
        before = [split(t, counts, order) for t in model.context_model(y, hyper)]
        groups = split(y, counts, order)
        for g in range(groups.size(1)):
            changed = groups.clone()
            changed[:, g, -1] += 5  # one site of the group, every channel
            after = [
                split(t, counts, order) for t in model.context_model(merge(changed, y.shape[1:], counts, order), hyper)
            ]
            for a, b in zip(before, after, strict=True):
                assert torch.equal(a[:, : g + 1], b[:, : g + 1])
                if g + 1 < groups.size(1):
                    assert not torch.equal(a[:, g + 1], b[:, g + 1])


@pytest.mark.parametrize("fields", [{}, {"inner": "top_k"}, {"inner": "none"}, {"cross": False}, {"groups": UNEVEN}])
@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_steps_give_what_forward_gives(fields, size):
    """The float path, step by step with and without the cache, against all groups at once."""
    model = small(**fields)
    y, hyper = some_latents(*size)
    with torch.no_grad():
        expected = torch.cat(model.context_model(y, hyper))
        for cached in (True, False):
            assert torch.allclose(steps(model.context_model, y, hyper, cached), expected, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"inner": "top_k"}, {"inner": "none"}, {"cross": False}, {"groups": UNEVEN}])
def test_exact_steps_with_and_without_cache_are_equal_and_near_the_floats(fields):
    model = small(**fields)
    y, hyper = some_latents()
    with torch.inference_mode():
        expected = model.context_model(y, hyper)[0][0]
        with Exact():
            ours = [steps(model.context_model, y, hyper, cached) for cached in (True, False)]
    assert torch.equal(*ours)
    # Not the largest difference: where two scores nearly tie, rounding may choose another key.
    assert (ours[0][0] - expected).abs().mean() < 0.002 * expected.abs().amax()


def test_gaps_are_refused_in_words():
    with pytest.raises(NotImplementedError, match="no gaps"):
        small().distributions(*some_latents(), Gaps(missing=torch.zeros(1, 1, 8, 12, dtype=torch.bool)))


@pytest.mark.parametrize("fields", [{}, {"inner": "top_k"}, {"groups": UNEVEN, "lmbdas": (0.01, 0.02)}])
def test_a_picture_comes_back(fields, photo):
    model = small(**fields)
    picture = photo.crop((0, 0, 150, 100))
    data = codec.encode(model, picture)
    again = codec.decode(data, model)
    x = codec.to_tensor(picture, model)
    with torch.inference_mode():
        y_hat, _ = model.latents(x)
        expected = codec.to_picture(codec.unpad(model.reconstruct(y_hat), picture.height, picture.width))
    assert np.array_equal(np.asarray(again), np.asarray(expected))


@pytest.mark.parametrize("groups", [(3, 2, 2), UNEVEN])
def test_training_reaches_every_weight(groups):
    context_model = small(groups=groups).context_model
    means, log_scales = context_model(*some_latents())
    (means.square().sum() + log_scales.square().sum()).backward()
    for name, parameter in context_model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_points_of_the_mixers():
    model = small()
    y, hyper = some_latents()
    with torch.no_grad(), capture(model, "inner.*.probs", "cross.1.*") as maps:
        model.context_model(y, hyper)
    assert set(maps) == {"inner.0.probs", "inner.1.probs", "cross.1.scores", "cross.1.probs"}
    G, n = 12, 24
    assert maps["cross.1.probs"].shape == (n, 2, G, G)
    assert maps["cross.1.probs"].triu(1).abs().sum() == 0
    assert torch.allclose(maps["inner.0.probs"].sum(-1), torch.ones(()))


# ---- names and bad input ----


def test_sizes():
    assert named_config("base-groupedmixer").groups == (5, 2, 2)
    assert named_config("base-groupedmixer").M == 320
    assert named_config("base-groupedmixer-large").groups == (10, 2, 2)
    for size, kind in itertools.product(("base", "study", "tiny"), ("", "-fast", "-large")):
        c = named_config(f"{size}-groupedmixer{kind}")
        assert EntroformerConfig.from_json(c.to_json()) == c
    assert "groups" not in named_config("tiny-parallel").to_json()  # digests of earlier weights stay


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="too few for 200 slices"):
        named_config("tiny-groupedmixer", groups=(200, 2, 2))
    with pytest.raises(ConfigError, match="needs one"):
        named_config("tiny-groupedmixer", hyperprior=False)
    model = small()
    with pytest.raises(AttentionError, match="GroupedMixer"):
        RowServer(model, torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    with pytest.raises(StudyError, match="GroupedMixer"):
        scene_of(model, None)
    config = TrainConfig(data="x", out=str(tmp_path), model="tiny-groupedmixer", pretrain=0.5, accelerator="cpu")
    with pytest.raises(TrainingError, match="GroupedMixer has none"):
        train(config, progress=False)


def test_the_study_of_the_cache():
    row = context_cache.run(("tiny-groupedmixer",), width=128, height=128, repeats=1).iloc[0]
    assert row["equal"] and row["groups"] == 12
    assert row["ratio"] == pytest.approx(row["uncached_s"] / row["cached_s"])
