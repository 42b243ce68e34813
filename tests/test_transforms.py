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
