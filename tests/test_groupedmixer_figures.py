"""How GroupedMixer is shown: groups, film, windows, attention, bits, the cache's saving."""

import itertools

import numpy as np
import pytest
import torch
from conftest import micro_model
from torch import nn

from entroformer_lib.codec import codec
from entroformer_lib.errors import AttentionError
from entroformer_lib.inspection.capture import capture
from entroformer_lib.inspection.group_server import GroupServer
from entroformer_lib.models.config import EntroformerConfig
from entroformer_lib.models.groupedmixer import WindowAttention, group_order, split
from entroformer_lib.views import grouped_animation
from entroformer_lib.views import grouped_figures as figures
from entroformer_lib.views.style import TWO_COLUMNS

ALL_COUNTS = [(3, 2, 2), (1, 1, 2), (2, 4, 1)]


def by_split(counts, order, size) -> np.ndarray:
    """The group of each latent, by what `split` puts into it: [k_c, rows, columns]"""
    channels = counts[0]
    y = torch.arange(channels * size[0] * size[1]).view(1, channels, *size).float()
    numbers = np.empty(y.numel(), dtype=int)
    for g, group in enumerate(split(y, counts, order)[0]):
        numbers[group.flatten().long().numpy()] = g
    return numbers.reshape(channels, *size)


# ---- groups ----


@pytest.mark.parametrize("order", figures.ORDERS)
@pytest.mark.parametrize("counts", ALL_COUNTS)
def test_the_tiling_is_what_the_model_splits(counts, order):
    size = (2 * counts[1], 2 * counts[2])
    expected = by_split(counts, order, size)
    figure = figures.tiling(counts, [order])
    for part, ax in zip(expected, figure.axes, strict=False):
        drawn = {tuple(map(int, reversed(t.get_position()))): int(t.get_text()) for t in ax.texts}
        assert drawn == dict(np.ndenumerate(part))
        assert np.array_equal(ax.images[0].get_array(), part)
    assert figure.get_figwidth() == TWO_COLUMNS


@pytest.mark.parametrize("counts", ALL_COUNTS)
def test_the_film_decodes_each_group_once_and_after_those_before_it(counts):
    size, orders = (4, 8), list(figures.ORDERS)
    film = grouped_animation.decoding(counts, orders, size)
    G = len(group_order(counts))
    assert [frame.name for frame in film.frames] == [*map(str, range(G)), "all"]
    assert [list(step.args[0]) for step in film.layout.sliders[0].steps] == [[frame.name] for frame in film.frames]
    for panel, order in enumerate(orders):
        expected = by_split(counts, order, size)
        for g, frame in enumerate(film.frames):
            lines = [line for line in frame.data[panel].z if not np.isnan(line[0])]
            states = np.array(lines, dtype=int).reshape(expected.shape)
            assert np.array_equal(states == 1, expected == g)
            assert np.array_equal(states == 2, expected < g)
    np.testing.assert_array_equal(film.data[0].z, film.frames[0].data[0].z)
    assert {trace.name for trace in film.data if trace.type == "scatter"} == {
        name for name, _ in grouped_animation.STATES
    }


# ---- windows ----


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1), (1, 2)])
@pytest.mark.parametrize("place", [(0, 0), (3, 4), (5, 8)])
def test_what_reaches_a_token_is_what_its_output_depends_on(layers, place):
    torch.manual_seed(0)
    c, grid = EntroformerConfig(context="grouped", dim=8, heads=2, window=4, M=320, radius=1), (6, 9)
    x = torch.randn(1, 1, 54, 8, requires_grad=True)
    out = x
    for layer in layers:
        attention = WindowAttention(c, layer)
        for parameter in attention.parameters():
            nn.init.normal_(parameter, std=0.3)
        out = out + attention(out, grid)
    out[0, 0, place[0] * 9 + place[1]].sum().backward()
    depends = (x.grad[0, 0].abs().sum(-1) > 0).view(grid).numpy()
    assert np.array_equal(figures.seen_in_windows(grid, 4, place, layers), depends)


def test_the_figure_of_windows_shows_them():
    grid, place = (6, 9), (3, 4)
    figure = figures.inner_windows(grid, 4, place)
    for ax, layers in zip(figure.axes, ((0,), (1,), (0, 1)), strict=True):
        shown = ax.images[0].get_array()
        assert shown[place] == 2 and (shown == 2).sum() == 1
        assert np.array_equal(shown > 0, figures.seen_in_windows(grid, 4, place, layers))


# ---- attention of a model ----


def mixer(**fields):
    return micro_model("groupedmixer", window=4, groups=(2, 2, 2), **fields)


@pytest.mark.parametrize("order", figures.ORDERS)
def test_cross_maps_are_triangles_of_shares(order, photo):
    maps = GroupServer(mixer(group_order=order), photo)
    cross = maps.cross.mean(0)
    assert cross.shape == (2, 2, 8, 8)
    assert np.allclose(cross.sum(-1), 1, atol=1e-5) and not np.triu(cross, 1).any()
    figure = figures.cross_maps(cross)
    for (layer, head), ax in zip(np.ndindex(2, 2), figure.axes, strict=False):
        drawn = ax.images[0].get_array()
        assert np.array_equal(drawn.mask, np.triu(np.ones((8, 8), bool), 1))
        assert np.array_equal(drawn.filled(0), cross[layer, head])


def test_inner_maps_are_those_of_the_layer(photo):
    """Put back on the grid, they are the numbers inside the layer, place by place."""
    model, side = mixer(), 4
    maps = GroupServer(model, photo)
    rows, columns = maps.grid
    with torch.no_grad(), capture(model, "inner.*.probs") as raw:
        model(codec.to_tensor(photo, model))
    for layer, slot, place in itertools.product((0, 1), (0, 5), ((0, 0), (2, 4))):
        shift = layer * side // 2
        across = -(-(columns + shift) // side)
        home = [(p + shift) // side for p in place]
        number = slot * (-(-(rows + shift) // side) * across) + home[0] * across + home[1]
        inside = [(p + shift) % side for p in place]
        probs = raw[f"inner.{layer}.probs"][number, :, inside[0] * side + inside[1]]
        expected = np.zeros((2, rows, columns))
        for row, column in np.ndindex(rows, columns):
            if [(row + shift) // side, (column + shift) // side] == home:
                expected[:, row, column] = probs[:, (row + shift) % side * side + (column + shift) % side]
        found = maps.inner(layer, slot, place)
        assert np.allclose(found, expected, atol=1e-3) and np.allclose(found.sum((1, 2)), 1, atol=1e-5)


def test_the_top_k_mixer_has_maps_too(photo):
    maps = GroupServer(mixer(inner="top_k", top_k=3), photo)
    found = maps.inner(1, 2, (1, 1))
    assert np.allclose(found.sum((1, 2)), 1, atol=1e-5) and (found > 0).sum() >= 2 * 3


def test_bits_of_groups_are_all_bits(photo):
    model = mixer(group_order="raster")
    maps = GroupServer(model, photo)
    with torch.inference_mode():
        y = model.g_a(codec.to_tensor(photo, model))
        bits = -model.likelihoods(y)[0]["y"].double().log2()
    expected = [float(group.sum()) for group in split(bits, (2, 2, 2), "raster")[0]]
    found = maps.bits_of_groups()
    assert found == pytest.approx(expected, rel=1e-4)  # float64 beside float32
    assert found.sum() == pytest.approx(float(model.estimated_bits(y)["y"].sum()), rel=1e-4)
    assert maps.latents_of_a_group * len(found) == y.numel()


def test_shares_add_up_and_know_a_phase():
    order = group_order((2, 2, 2))
    cross = np.zeros((1, 2, 8, 8))
    for slot in range(8):
        cross[0, 0, slot, slot - 3 if slot >= 4 else slot] = 1  # the same phase of the first slice
    cross[0, 1] = figures.even_attention(cross)[0, 1]
    shares = figures.cross_shares(cross, order)
    assert np.allclose(shares.sum(1), 100)
    assert shares.loc[(0, 0), "same phase"] == pytest.approx(100 * 4 / 6)
    assert shares.loc[(0, 0), "last group"] == pytest.approx(100 * 2 / 6)
    assert (shares.loc[(0, 1)] > 0).all()


def test_what_has_no_mixers_is_refused(photo):
    with pytest.raises(AttentionError, match="parallel Entroformer; only GroupedMixers have mixers"):
        GroupServer(micro_model("parallel"), photo)
    with pytest.raises(AttentionError, match="no inner-group mixers"):
        GroupServer(mixer(inner="none"), photo).inner(0, 0, (0, 0))
    with pytest.raises(AttentionError, match="no slot 8; there are 0 to 7"):
        GroupServer(mixer(), photo).inner(0, 8, (0, 0))
    assert GroupServer(mixer(cross=False), photo).cross is None
