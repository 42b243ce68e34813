"""g_a and g_s: the paper's, those of blocks, and the linear path beside either."""

import pytest
import torch
from conftest import micro_model

from entroformer_lib import tiles
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError, WeightsError
from entroformer_lib.models import transforms
from entroformer_lib.models.config import EntroformerConfig, named_config
from entroformer_lib.models.transforms import Analysis, Synthesis, build_transforms, dct_basis
from entroformer_lib.tiles import Tiles
from entroformer_lib.training.latents import fold_gain

STAGES = ((4, 6, 1), (8, 10, 2))
KINDS = {
    "gdn": dict(N=8, M=12),
    "gdn and dct": dict(N=8, M=12, linear_path="dct"),
    "blocks": dict(M=12, transforms="blocks", stages=STAGES),
    "blocks and dct": dict(M=12, transforms="blocks", stages=STAGES, linear_path="dct"),
    "blocks at 1/16 too": dict(M=12, transforms="blocks", stages=(*STAGES, (16, 14, 1))),
}


def built(kind: str):
    return build_transforms(EntroformerConfig(**KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_latent_stands_for_16_pixels(kind):
    g_a, g_s = built(kind)
    x = torch.rand(2, 3, 64, 96)
    y = g_a(x)
    assert y.shape == (2, 12, 4, 6) and g_s(y).shape == x.shape


def test_the_layers_of_the_paper_see_pixels_from_minus_one_to_one():
    g_a, g_s = Analysis(8, 12), Synthesis(8, 12)
    x = torch.rand(1, 3, 64, 64)
    y = g_a(x)
    assert torch.equal(y, torch.nn.Sequential.forward(g_a, 2 * x - 1))
    assert torch.equal(g_s(y), torch.nn.Sequential.forward(g_s, y) / 2 + 0.5)


@pytest.mark.parametrize("elements", [1, 3000, 20_000])
@pytest.mark.parametrize("size", [(64, 64), (192, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_strips_change_nothing(monkeypatch, elements, size, kind):
    g_a, g_s = (part.double() for part in built(kind))
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    whole_y = g_a(x)  # with gradients nothing is cut
    whole_x = g_s(whole_y)
    monkeypatch.setattr(tiles, "STRIP_ELEMENTS", elements)
    with torch.no_grad(), Tiles():
        torch.testing.assert_close(g_a(x), whole_y)
        torch.testing.assert_close(g_s(whole_y), whole_x)


def test_strips_bound_what_a_layer_reads_and_writes(monkeypatch):
    """The last layer of g_s writes three channels and reads N: strips by its output alone would be as large as ever."""
    g_s, y, limit, seen = Synthesis(64, 12), torch.rand(1, 12, 8, 8), 2**15, []
    monkeypatch.setattr(tiles, "STRIP_ELEMENTS", limit)
    for layer in list(g_s)[::2]:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(max(inputs[0].numel(), out.numel())))
    with torch.no_grad(), Tiles():
        g_s(y)
    assert len(seen) > 8 and max(seen) <= 1.5 * limit  # and the neighbouring rows


def test_strips_bound_the_gates_of_a_block(monkeypatch):
    block, x, limit, seen = transforms.ConvBlock(8), torch.rand(1, 8, 64, 32), 2**12, []
    monkeypatch.setattr(tiles, "STRIP_ELEMENTS", limit)
    block.gates.register_forward_hook(lambda _, inputs, out: seen.append(out.numel()))
    with torch.no_grad(), Tiles():
        block(x)
    assert len(seen) > 4 and max(seen) <= limit + 2 * 16 * 32  # and one row more on each side


def test_a_block_is_what_its_formula_says():
    block, x = transforms.ConvBlock(4).double(), 40 * torch.randn(1, 4, 5, 6, dtype=torch.float64)

    def pointwise(layer, v):
        return torch.einsum("oi,bihw->bohw", layer.weight[..., 0, 0], v) + layer.bias[:, None, None]

    inner = pointwise(block.enter, x)
    inner = torch.where(inner > 0, inner, 0.1 * inner)
    padded = torch.nn.functional.pad(inner, (1, 1, 1, 1))
    seen = sum(
        block.depthwise.weight[:, 0, i, j, None, None] * padded[..., i : i + 5, j : j + 6]
        for i in range(3)
        for j in range(3)
    )
    between = x + pointwise(block.leave, seen + block.depthwise.bias[:, None, None])
    gates = pointwise(block.gates, between)
    product = gates[:, :4].clamp(0, 6) * gates[:, 4:].clamp(-3, 3)
    assert product.abs().max() == 18  # the limits are met
    torch.testing.assert_close(block(x), between + pointwise(block.mix, product))


def test_large_inputs_grow_no_faster_than_themselves():
    """Ten times the input gives about ten times the output and not its square, block after block."""
    blocks = torch.nn.Sequential(*(transforms.ConvBlock(8) for _ in range(8))).double()
    x = 1e6 * torch.rand(1, 8, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert blocks(10 * x).abs().max() < 11 * blocks(x).abs().max()


def test_gates_multiply_nothing_without_limit():
    """With gates of any weights, a block adds a bounded number to what its linear half gives."""
    block, x = transforms.ConvBlock(8).double(), 1e6 * torch.randn(1, 8, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        block.gates.weight.mul_(1e3)
        linear = x + block.leave(block.depthwise(torch.nn.functional.leaky_relu(block.enter(x), 0.1)))
        most = 18 * block.mix.weight.abs().sum(1).max() + block.mix.bias.abs().max()
        assert (block(x) - linear).abs().max() <= most * (1 + 1e-9)


def test_dct_is_orthonormal_and_begins_with_the_means_of_brightness_and_colours():
    basis = dct_basis(768).flatten(1).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(768, dtype=torch.float64), atol=1e-6, rtol=0)
    first = dct_basis(3)
    assert torch.allclose(first, first[:, :, :1, :1].expand_as(first))  # flat
    assert torch.allclose(first[0, 0], first[0, 1]) and torch.allclose(
        first[1:].sum(1), torch.zeros(2, 16, 16), atol=1e-6
    )


def test_the_linear_path_begins_as_a_transform_and_its_inverse():
    """With all 768 numbers of a block nothing is lost, and with fewer the coarse picture stays."""
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (64, 64), mode="bilinear")
    for M, error in ((768, 1e-9), (64, 2e-3)):
        g_a, g_s = build_transforms(EntroformerConfig(N=4, M=M, linear_path="dct"))
        x_hat = g_s.linear(g_a.linear(x)) + 0.5  # the network beside it brings the grey
        assert (x_hat - x).square().mean() < error


@pytest.mark.parametrize("kind", KINDS)
def test_a_gain_can_be_worked_into_the_kernels(kind):
    g_a, g_s = (part.double() for part in built(kind))
    x, gain = torch.rand(1, 3, 64, 64).double(), (0.5 + torch.rand(12)).double()
    with torch.no_grad():
        y = g_a(x) * gain[:, None, None]
        x_hat = g_s(y / gain[:, None, None])
        fold_gain(g_a, g_s, gain, 1 / gain)
        torch.testing.assert_close(g_a(x), y)
        torch.testing.assert_close(g_s(y), x_hat)


def test_configs_of_transforms():
    config = named_config("tiny-parallel", transforms="blocks", stages=[[8, 32, 2]], linear_path="dct")
    assert EntroformerConfig.from_json(config.to_json()) == config
    plain = named_config("base-serial").to_json()
    assert not any(word in plain for word in ("stages", "linear_path", "transforms"))  # weights of before stay known
    for wrong, sentence in (
        (dict(transforms="blocks"), "have stages"),
        (dict(stages=((8, 32, 2),)), "have none"),
        (dict(transforms="blocks", stages=((8, 32, 2), (4, 32, 2))), "fine to coarse"),
        (dict(transforms="blocks", stages=((6, 32, 2),)), "fine to coarse"),
        (dict(transforms="blocks", stages=((8, 0, 2),)), "at least 1"),
        (dict(linear_path="pca"), "'linear_path' cannot be"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            named_config("tiny-parallel", **wrong)


@pytest.mark.parametrize(
    "change", [dict(linear_path="dct"), dict(transforms="blocks", stages=((8, 16, 1),))], ids=lambda c: next(iter(c))
)
def test_weights_of_other_transforms_are_refused_by_the_fields_name(change):
    other = Entroformer(micro_model().config.replaced(**change))
    with pytest.raises(WeightsError, match=f"with {next(iter(change))} = "):
        micro_model().load_state_dict(other.state_dict())
