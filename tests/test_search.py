"""Coding with effort: other latents than the nearest integers."""

import numpy as np
import pytest
import torch
from conftest import aware_model, micro_model
from PIL import Image

from entroformer_lib.codec import codec, search
from entroformer_lib.codec.pictures import to_tensor, unpad
from entroformer_lib.datasets import sample_picture
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError
from entroformer_lib.studies.rate_distortion import evaluate_picture
from entroformer_lib.weights.zoo import load_model

CARD = {"lmbda": 0.02}
WITH_CONTEXT = ("serial", "parallel", "cnn", "groupedmixer", "context", "hyperprior")


def cost_of(model: Entroformer, picture: Image.Image, data: bytes, lmbda: float) -> float:
    """R + lambda D in bits per pixel, of the file and the picture that comes out of it."""
    decoded = codec.decode(data, model)
    error = np.square(np.asarray(decoded, float) - np.asarray(picture, float)).mean()
    return 8 * len(data) / (picture.width * picture.height) + lmbda * error


@pytest.mark.parametrize("variant", WITH_CONTEXT)
def test_any_entropy_model_gains(variant, photo):
    model, picture = micro_model(variant, card=CARD), photo.resize((128, 96))
    costs = [cost_of(model, picture, codec.encode(model, picture, effort=e), CARD["lmbda"]) for e in (0, 6)]
    assert costs[1] < costs[0]


def test_the_shipped_model_gains_what_is_said(photo):
    model, picture = load_model("blocks-parallel@0.014", "cpu"), photo.resize((256, 192))
    plain, searched = (codec.encode(model, picture, effort=e) for e in (0, 8))
    saved = cost_of(model, picture, plain, 0.014) - cost_of(model, picture, searched, 0.014)
    assert saved > 0.04 * 8 * len(plain) / (256 * 192)


def test_a_level_between_two_is_searched_for_its_own_lambda(photo):
    model, picture = aware_model(), photo.resize((128, 128))
    model.level = 0.5
    costs = [cost_of(model, picture, codec.encode(model, picture, effort=e), 0.02) for e in (0, 6)]
    assert costs[1] < costs[0]


def test_errors_in_the_padding_do_not_count(photo):
    model, picture = micro_model("hyperprior", card=CARD), photo.resize((70, 100))
    x = to_tensor(picture, model)  # padded on all four sides
    y_hat, z = model.latents(x)
    cost = search._Cost(model, x, picture.size, z, None)
    assert torch.equal(unpad(cost.inside, 100, 70), torch.ones(1, 1, 100, 70)) and cost.inside.sum() == 7000
    assert cost.of(y_hat).cost.shape == (1, 1, 8, 8)
    error = cost._error(x + 1)[0, 0]
    assert (error > 0).sum() == 7000 and torch.equal(error > 0, cost.inside[0, 0] > 0)


def test_all_of_a_picture_gains_whatever_its_size(photo):
    """The last rows and columns too: their error may not grow while the rest of the picture gets better."""
    model, picture = load_model("blocks-parallel@0.014", "cpu"), photo.resize((200, 100))
    wanted = np.asarray(picture, dtype=float)
    errors = []
    for effort in (0, 6):
        found = np.asarray(codec.decode(codec.encode(model, picture, effort=effort), model), dtype=float)
        errors.append(np.square(found - wanted))
    plain, searched = errors
    assert searched[-14:].mean() < 1.1 * plain[-14:].mean() and searched.mean() < 1.1 * plain.mean()


@pytest.mark.parametrize("linear_path", ["none", "dct"])
def test_what_a_step_is_predicted_to_change(linear_path, photo):
    """Against single steps, each measured by itself, with a g_s that is linear: distributions stay, as without
    context."""
    blocks = dict(transforms="blocks", stages=((8, 8, 1),)) if linear_path == "dct" else {}
    model = micro_model("hyperprior", card=CARD, linear_path=linear_path, **blocks).double()
    if linear_path == "dct":
        for parameter in model.g_s.network.parameters():
            torch.nn.init.zeros_(parameter)
    else:
        model.g_s = torch.nn.ConvTranspose2d(model.config.M, 3, 16, 16).double().requires_grad_(False)
    x = to_tensor(photo.resize((128, 128)), model).double()
    with torch.no_grad():
        y = model.analysis(x)
        y_hat, z = torch.floor(y + 0.5), model.hyper_analysis(y, None)
        cost = search._Cost(model, x, (128, 128), z, None)
        tried, before = cost.of(y_hat), cost.whole(y_hat)
        assert before == pytest.approx(float(tried.cost.sum()), rel=1e-6)
        # without the curvature, whose mean over sites is an estimate
        slope = tried.change - cost.curvature
        for channel in range(0, model.config.M, 5):
            step = torch.zeros_like(y_hat)
            step[0, channel, 3, 2] = tried.step[0, channel, 3, 2]
            column = model.g_s(step) - model.g_s(torch.zeros_like(step))
            curvature = float(cost.weight * column.square().sum())
            found = cost.whole(y_hat + step) - before
            assert found == pytest.approx(float(slope[0, channel, 3, 2]) + curvature, rel=1e-3, abs=1e-3)
            assert float(cost.curvature[0, channel]) == pytest.approx(curvature, rel=0.5)


def test_a_search_that_finds_nothing_leaves_the_latents(photo):
    model = micro_model("parallel", card={"lmbda": 1e9})  # nothing but the error counts, and g_s knows nothing yet
    torch.nn.init.zeros_(model.g_s[0].weight)
    x = to_tensor(photo.resize((64, 64)), model)
    y_hat, z = model.latents(x)
    assert torch.equal(search.searched(model, x, (64, 64), y_hat, z, 3, None), y_hat)


def test_the_whole_is_judged_once_more(photo, monkeypatch):
    """What each site finds better by itself is taken only if all of it together is."""
    model = micro_model("parallel", card=CARD)
    x = to_tensor(photo.resize((64, 64)), model)
    given = (x, (64, 64), *model.latents(x), 2, None)
    assert not torch.equal(search.searched(model, *given), given[2])
    monkeypatch.setattr(search._Cost, "whole", lambda self, y_hat: float("inf"))
    assert torch.equal(search.searched(model, *given), given[2])


def test_no_effort_is_rounding(photo):
    model = micro_model("parallel", card=CARD)
    assert codec.encode(model, photo, effort=0) == codec.encode(model, photo)


def test_the_model_is_left_as_it_was(photo):
    model = micro_model("parallel", card=CARD)
    before = [p.requires_grad for p in model.parameters()]
    codec.encode(model, photo.resize((64, 64)), effort=2)
    assert before == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())


def test_rows_of_eval_say_nothing_of_estimates(tmp_path, photo):
    path = tmp_path / "photo.png"
    photo.resize((64, 64)).save(path)
    row = evaluate_picture(micro_model("parallel", card=CARD), path, effort=2)
    assert row["bpp_estimated"] is None and row["bytes"] > 0


@pytest.mark.parametrize(
    "card, effort, words",
    [
        ({"lmbda": 0.02}, -1, "from 0 on"),
        ({"lmbda": 0.02, "metric": "ms-ssim"}, 1, "mean squared error"),
        ({}, 1, "for which lambda"),
    ],
)
def test_what_cannot_be_searched_is_refused(card, effort, words, photo):
    with pytest.raises(ConfigError, match=words):
        codec.encode(micro_model("parallel", card=card), photo, effort=effort)


def test_a_wanted_size_is_kept_with_effort():
    model, picture = load_model("blocks-parallel", "cpu"), sample_picture().crop((0, 0, 128, 128))
    data = codec.encode(model, picture, bpp=0.5, effort=2)
    assert 8 * len(data) <= 0.5 * 128 * 128
