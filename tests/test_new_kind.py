"""A context model of a new kind takes one class: here the latent to the left, through a 1x1 convolution."""

import numpy as np
import pytest
import torch
from conftest import MICRO
from torch import nn

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.exact.coder import ExactCoder
from entroformer_lib.models import network
from entroformer_lib.models.config import named_config
from entroformer_lib.models.context import NO_GAPS
from entroformer_lib.models.entropy_model import EntropyParameters, PerSite


class LeftContext(nn.Module):
    """The feature of a site from the latent left of it; columns are coded one after the other."""

    one_by_one = False

    def __init__(self, c):
        super().__init__()
        self.M, self.layer = c.M, nn.Linear(c.M, c.dim)

    def forward(self, y_hat, gaps=NO_GAPS):
        left = torch.cat((torch.zeros_like(y_hat[..., :1]), y_hat[..., :-1]), dim=-1)
        return self.layer(left.movedim(1, -1)).movedim(-1, 1)

    def steps(self, height, width):
        latents, number = torch.zeros(height, self.M), torch.arange(height * width).view(height, width)
        for column in range(width):
            latents = yield number[:, column], self.layer(latents).T[None, :, :, None]


@pytest.fixture
def model(monkeypatch) -> Entroformer:
    monkeypatch.setitem(network.KINDS, "cnn", (LeftContext, EntropyParameters, PerSite))
    torch.manual_seed(0)
    made = Entroformer(named_config("tiny-cnn", **MICRO)).eval()
    made.g_a[-1].weight.data.mul_(40)
    return made


def test_files_of_a_new_kind_decode_to_the_picture(model, photo):
    data, x = codec.encode(model, photo), codec.to_tensor(photo, model)
    with torch.no_grad():
        expected = codec.to_picture(codec.unpad(model(x)["x_hat"].clamp(0, 1), photo.height, photo.width))
    assert np.abs(np.asarray(codec.decode(data, model)).astype(int) - np.asarray(expected)).max() <= 1


def test_its_steps_take_a_column_at_a_time(model, photo):
    y_hat, z = model.latents(codec.to_tensor(photo, model))
    asked = []

    def symbols_of(channels, sites, means, scales):
        asked.append(len(sites))
        return y_hat[0].flatten(1)[:, sites].T

    ExactCoder(model)._code(y_hat.shape[2:], model.z_prior.quantize_z(z), None, symbols_of)
    assert asked == [y_hat.size(2)] * y_hat.size(3)
