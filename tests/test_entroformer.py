"""CompressAI's contract, on every variant."""

import pytest
import torch
from compressai.losses import RateDistortionLoss
from compressai.models import CompressionModel
from compressai.registry import MODELS
from conftest import LMBDAS, VARIANTS, aware_model, micro_model

from entroformer_lib.codec import codec
from entroformer_lib.entroformer import Entroformer
from entroformer_lib.errors import ConfigError, WeightsError
from entroformer_lib.training.initial import begin_at_channels


def test_is_a_registered_compression_model():
    assert MODELS["entroformer"] is Entroformer
    assert isinstance(MODELS["entroformer"]("tiny-parallel", dim=24, heads=2), CompressionModel)


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compressai_loss_trains_every_parameter(variant, metric, preset):
    model = micro_model(variant, preset).train()
    x = torch.rand(2, 3, 192, 192)
    out = model(x)
    loss = RateDistortionLoss(lmbda=0.01, metric=metric)(out, x)["loss"] + model.aux_loss()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_shapes(any_variant):
    x = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        out = any_variant(x)
    assert out["x_hat"].shape == x.shape
    assert out["likelihoods"]["y"].shape == (2, 24, 4, 8)
    assert ("z" in out["likelihoods"]) == any_variant.config.hyperprior
    if any_variant.config.hyperprior:
        assert out["likelihoods"]["z"].shape == (2, 12, 1, 2)


def test_compress_and_decompress(any_variant):
    x = torch.rand(2, 3, 128, 192)
    with torch.no_grad():
        expected = any_variant(x)["x_hat"].clamp(0, 1)
    coded = any_variant.compress(x)
    assert len(coded["strings"]) == 1 + any_variant.config.hyperprior
    assert all(len(strings) == 2 and isinstance(strings[0], bytes) for strings in coded["strings"])
    decoded = any_variant.decompress(**coded)["x_hat"]
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)


def test_batch_equals_single(any_variant):
    model = any_variant.double()
    x = torch.rand(3, 3, 64, 128, dtype=torch.float64)
    with torch.no_grad():
        together = model(x)["likelihoods"]["y"]
        alone = torch.cat([model(x[i : i + 1])["likelihoods"]["y"] for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_strings_do_not_depend_on_the_batch(any_variant):
    x = torch.rand(3, 3, 64, 128)
    together = any_variant.compress(x)["strings"]
    alone = [any_variant.compress(x[i : i + 1])["strings"] for i in range(3)]
    assert together == [[strings[kind][0] for strings in alone] for kind in range(len(together))]


def test_no_update_needed_after_training():
    model = micro_model("parallel")
    x = torch.rand(1, 3, 64, 64)
    model.decompress(**model.compress(x))  # builds tables
    model.train()
    with torch.no_grad():  # a step of training moves p(z)
        model.z_prior.quantiles.add_(0.4)
        model.z_prior.matrices[0].add_(0.7)
    model.eval()
    coded = model.compress(x)
    used = model.z_prior.quantized_cdf.clone()
    model.update(force=True)
    assert torch.equal(used, model.z_prior.quantized_cdf)
    with torch.no_grad():
        torch.testing.assert_close(model.decompress(**coded)["x_hat"], model(x)["x_hat"].clamp(0, 1), atol=1e-5, rtol=0)


def test_from_state_dict_restores_architecture_and_weights(any_variant):
    x = torch.rand(1, 3, 64, 64)
    twin = Entroformer.from_state_dict(any_variant.state_dict())
    assert twin.config == any_variant.config and not twin.training
    with torch.no_grad():
        assert torch.equal(twin(x)["x_hat"], any_variant(x)["x_hat"])
    assert twin.compress(x) == any_variant.compress(x)


def test_wrong_weights_are_refused_in_a_sentence():
    state = micro_model("parallel").state_dict()
    with pytest.raises(WeightsError, match="context"):
        micro_model("serial").load_state_dict(state)
    with pytest.raises(WeightsError, match="which architecture"):
        Entroformer.from_state_dict({k: v for k, v in state.items() if k != "_extra_state"})
    with pytest.raises(WeightsError, match="g_a.0.bias"):
        Entroformer.from_state_dict({k: v for k, v in state.items() if k != "g_a.0.bias"})


def test_wrong_sizes_are_refused():
    model = micro_model("parallel")
    for shape in [(1, 3, 64, 65), (1, 1, 64, 64), (3, 64, 64)]:
        with pytest.raises(ValueError, match="multiples of 64"):
            model(torch.rand(shape))
    with torch.no_grad():
        micro_model("context")(torch.rand(1, 3, 16, 48))  # without hyperprior 16 is enough
    with pytest.raises(TypeError):
        Entroformer(model.config, top_k=3)
    with pytest.raises(ConfigError):
        Entroformer("tiny-parallel", topk=3)


def test_given_noise_is_used():
    model = micro_model("parallel").train()
    x = torch.rand(1, 3, 64, 64)
    noise = {"y": torch.full((1, 24, 4, 4), 0.25), "z": torch.full((1, 12, 1, 1), -0.25)}
    first, second = model(x, noise=noise), model(x, noise=noise)
    assert torch.equal(first["likelihoods"]["y"], second["likelihoods"]["y"])
    assert torch.equal(first["likelihoods"]["z"], second["likelihoods"]["z"])
    for part, given in (("y", "z"), ("z", "y")):  # what is not given is drawn
        other = model(x, noise={given: noise[given]})["likelihoods"]
        assert torch.equal(other[given], first["likelihoods"][given]) and not torch.equal(
            other[part], first["likelihoods"][part]
        )


@pytest.mark.parametrize("build", [micro_model, aware_model])
def test_an_analysis_of_rounded_latents_sees_nothing_that_rounding_removes(build, photo):
    models = {name: build("parallel", hyper_input=name) for name in ("y", "rounded")}
    x = codec.to_tensor(photo, models["y"])
    y = models["y"].scaled(models["y"].g_a(x))
    other = torch.floor(y + 0.5) + 0.4 * (2 * torch.rand_like(y) - 1)
    for name, model in models.items():
        z, z_other = (model.hyper_analysis(v, model.rate()) for v in (y, other))
        assert torch.allclose(z, z_other, atol=1e-4) == (name == "rounded")
        picture = codec.decode(codec.encode(model, photo), model)
        assert picture.size == photo.size
    x.requires_grad_()  # and g_a still learns what to write into y
    models["rounded"].train()(x)["likelihoods"]["z"].log().sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_entropy_model_can_begin_with_each_channels_gaussian(variant, told):
    """Where its last layers say nothing more, the Gaussians are those of the channels, scaled by the gain."""
    slices = {"groups": (3, 2, 2)} if variant == "groupedmixer" else {}  # of 4, 3 and 3 channels
    model = micro_model(variant, M=10, lmbdas=LMBDAS, rate_aware=told, **slices)
    spread = torch.linspace(0.5, 3, 10).view(10, 1, 1)
    y = torch.randn(4, 10, 8, 8) * spread + spread.flip(0)
    begin_at_channels(model, y)
    for name, parameter in model.named_parameters():
        if name.startswith(("entropy_parameters.layers.2.weight", "context_model.head")) and parameter.dim() > 1:
            parameter.data.zero_()
    for level in (0, 1, 2):
        gain = model.gains(level)[0][0] if told else 1.0  # of a rate in the middle where it is told nothing
        rate, hyper = model.rate(level), torch.randn(1, model.config.dim, 8, 8) if model.config.hyperprior else None
        means, scales = model.distributions(torch.round(y[:1]), hyper, rate=rate)
        torch.testing.assert_close(means[0], (y.mean(dim=(0, 2, 3)).view(10, 1, 1) * gain).expand(10, 8, 8))
        torch.testing.assert_close(scales[0], (y.std(dim=(0, 2, 3)).view(10, 1, 1) * gain).expand(10, 8, 8))
