"""A model that gets another's hyperprior reads from it what is nearest to what it read before."""

import copy

import pytest
import torch
from conftest import LMBDAS, aware_model

from benchmarks.swap_hyperprior import features, linear_map, main, readers, swapped
from entroformer_lib.errors import WeightsError
from entroformer_lib.training.latents import LatentCrops, freeze, write_latents
from entroformer_lib.weights.zoo import load_model, save_weights

VARIANTS = ("serial", "groupedmixer", "cnn")


@pytest.fixture
def models(photo_folder, tmp_path):
    """models(variant): one of that kind and a parallel one behind its transforms; and latents."""

    def make(variant):
        model = aware_model(variant)
        save_weights(model, tmp_path / "model.safetensors", {})
        write_latents(str(tmp_path / "model.safetensors"), str(photo_folder), tmp_path / "latents", crop=64)
        model = load_model(tmp_path / "model.safetensors", "cpu")
        other = freeze(aware_model("parallel", seed=1), model).eval()
        return model, other, LatentCrops(tmp_path / "latents", model, 64)

    return make


def test_the_map_is_found():
    x, weight, bias = torch.randn(4000, 6), torch.randn(5, 6), torch.randn(5)
    found, shift, explained = linear_map(x, x @ weight.T + bias)
    torch.testing.assert_close(found, weight, atol=0.01, rtol=0.01)
    torch.testing.assert_close(shift, bias, atol=0.01, rtol=0.01)
    assert explained > 0.999
    assert linear_map(x, torch.randn(4000, 5))[2] < 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_own_hyperprior_changes_next_to_nothing(variant, models):
    model, _, latents = models(variant)
    before = copy.deepcopy(model)
    model, explained = swapped(model, copy.deepcopy(model), latents)
    y = next(latents.batches([range(1)]))
    assert explained > 0.99
    for level in range(len(LMBDAS)):
        bits = [float(m.estimated_bits(m.scaled(y, level), level)["y"].sum()) for m in (before, model)]
        assert bits[1] == pytest.approx(bits[0], rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_reads_the_nearest_from_another_hyperprior(variant, models):
    model, other, latents = models(variant)
    before = copy.deepcopy(model)
    model, explained = swapped(model, other, latents)
    assert explained < 0.99 and torch.equal(model.h_s.embed.weight, other.h_s.embed.weight)
    near = far = 0
    for y in latents.batches([range(i, i + 1) for i in range(8)]):
        old, new = features(before, y, 1.0), features(model, y, 1.0)
        torch.testing.assert_close(new, features(other, y, 1.0))
        for (layer, inputs), (known, _) in zip(readers(model), readers(before), strict=True):
            wanted = old @ known.weight[:, inputs].T + known.bias
            near += (new @ layer.weight[:, inputs].T + layer.bias - wanted).square().sum()
            far += (new @ known.weight[:, inputs].T + known.bias - wanted).square().sum()
    assert near < 0.8 * far


def test_the_command(models, tmp_path):
    model, other, _ = models("serial")
    save_weights(other, tmp_path / "other.safetensors", {})
    weights, theirs, out = (tmp_path / f"{name}.safetensors" for name in ("model", "other", "new"))
    main(weights, str(theirs), tmp_path / "latents", out, crop=64)
    new = load_model(tmp_path / "new.safetensors", "cpu")
    assert torch.equal(new.h_a.embed.weight, other.h_a.embed.weight)
    assert torch.equal(new.context_model.embed.weight, model.context_model.embed.weight)


def test_another_size_is_refused(models):
    model, _, latents = models("serial")
    with pytest.raises(WeightsError, match="one size, behind the same transforms"):
        swapped(model, freeze(aware_model("parallel", Z=6), model), latents)
    with pytest.raises(WeightsError, match="one size, behind the same transforms"):
        swapped(model, aware_model("parallel", seed=3), latents)
