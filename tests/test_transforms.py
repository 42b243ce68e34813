import pytest
import torch

from entroformer_lib.models import transforms
from entroformer_lib.models.transforms import Analysis, Synthesis


def test_shapes_and_ranges():
    g_a, g_s = Analysis(8, 12), Synthesis(8, 12)
    x = torch.rand(2, 3, 64, 96)
    y = g_a(x)
    assert y.shape == (2, 12, 4, 6) and g_s(y).shape == x.shape
    assert torch.equal(y, torch.nn.Sequential.forward(g_a, 2 * x - 1))  # the layers see [-1, 1]
    assert torch.equal(g_s(y), torch.nn.Sequential.forward(g_s, y) / 2 + 0.5)


@pytest.mark.parametrize("elements", [1, 3000, 20_000])
@pytest.mark.parametrize("size", [(64, 64), (192, 128)])
def test_strips_change_nothing(monkeypatch, elements, size):
    g_a, g_s = Analysis(8, 12).double(), Synthesis(8, 12).double()
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        y = g_a(x)
        x_hat = g_s(y)
        monkeypatch.setattr(transforms, "STRIP_ELEMENTS", elements)
        torch.testing.assert_close(g_a(x), y)
        torch.testing.assert_close(g_s(y), x_hat)


def test_strips_bound_what_a_layer_reads_and_writes(monkeypatch):
    """The last layer of g_s writes three channels and reads N: strips by its output alone would be as large as ever."""
    g_s, y, limit, seen = Synthesis(64, 12), torch.rand(1, 12, 8, 8), 2**15, []
    monkeypatch.setattr(transforms, "STRIP_ELEMENTS", limit)
    for layer in list(g_s)[::2]:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(max(inputs[0].numel(), out.numel())))
    with torch.no_grad():
        g_s(y)
    assert len(seen) > 8 and max(seen) <= 1.5 * limit  # and the neighbouring rows
