"""A larger model that begins as the smaller one."""

import pytest
import torch
from conftest import LMBDAS, micro_model

from entroformer_lib.errors import TrainingError
from entroformer_lib.training.growth import grown

SMALL = dict(transforms="blocks", stages=((4, 6, 1), (8, 10, 2)), linear_path="dct", lmbdas=LMBDAS, rate_aware=True)


@pytest.fixture
def small():
    model = micro_model(**SMALL).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "stages",
    [((4, 6, 1), (8, 14, 2)), ((4, 6, 3), (8, 10, 2)), ((4, 9, 2), (8, 12, 5)), ((4, 6, 1), (8, 10, 2))],
    ids=["channels", "blocks", "both", "nothing"],
)
def test_outputs_stay(small, stages):
    large = grown(small, dict(stages=stages)).double()
    assert large.config.stages == stages
    x = torch.rand(2, 3, 64, 128, dtype=torch.float64)
    with torch.no_grad():
        before, after = (model.eval()(x, level=torch.tensor([0.0, 1.5])) for model in (small, large))
    torch.testing.assert_close(after["x_hat"], before["x_hat"], atol=1e-6, rtol=0)
    for name in ("y", "z"):
        torch.testing.assert_close(after["likelihoods"][name], before["likelihoods"][name], atol=1e-6, rtol=1e-5)


def test_what_is_new_learns(small):
    """Every new weight has a gradient after one step, or it would stay what it is."""
    model = grown(small, dict(stages=((4, 9, 2), (8, 12, 3)))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.rand(2, 3, 64, 64)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x)["x_hat"] - x).square().sum().backward()
        optimizer.step()
    for part in (model.g_a.network, model.g_s.network):
        for name, weight in part.named_parameters():
            assert (weight.grad != 0).any(), name
            if weight.dim() == 4:
                assert (weight.grad.flatten(1).abs().sum(1) > 0).float().mean() > 0.5, name


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(M=32), "not in M"),
        (dict(Z=16), "not in Z"),
        (dict(stages=((4, 6, 1), (8, 8, 2))), "cannot become"),
        (dict(stages=((8, 16, 2),)), "same grids"),
    ],
)
def test_what_cannot_grow_is_refused(small, fields, sentence):
    with pytest.raises(TrainingError, match=sentence):
        grown(small, fields)
