"""Variable rate: gains, levels, files of any rate, and rate control."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import LMBDAS, VARIANTS, aware_model, micro_model

from entroformer_lib.codec import codec
from entroformer_lib.codec.container import Container
from entroformer_lib.errors import BitstreamError, ConfigError, RateError
from entroformer_lib.exact.coder import ExactCoder
from entroformer_lib.models.gain import RateGain
from entroformer_lib.training.initial import MS_SSIM_OVER_MSE, begin_gain
from entroformer_lib.weights.zoo import list_models, load_model, save_weights


@pytest.fixture
def model():
    return micro_model("parallel", lmbdas=LMBDAS)


def test_gains_start_at_the_square_root_and_undo_each_other():
    gain, inverse = RateGain(LMBDAS, 5, reference=0.04)(torch.tensor([0.0, 1.0, 2.0, 1.5]))
    assert gain.shape == inverse.shape == (4, 5, 1, 1)
    assert torch.allclose(gain[:, 0, 0, 0], torch.tensor([0.5, 1.0, 2.0, 2**0.5]))  # geometric between levels
    assert torch.allclose(gain * inverse, torch.ones_like(gain))


def test_levels_of_lambdas():
    gain = RateGain(LMBDAS, 2)
    assert [gain.level_of(v) for v in LMBDAS] == [0, 1, 2]
    assert gain.level_of(0.02) == pytest.approx(0.5)
    for lmbda in (*LMBDAS, 0.013, 0.1):
        assert gain.lmbda_of(gain.level_of(lmbda)) == pytest.approx(lmbda)
    with pytest.raises(ValueError, match="0.01 to 0.16"):
        gain.level_of(0.2)


def test_each_picture_of_a_batch_has_its_own_rate(model, photo):
    x = codec.to_tensor(photo, model)
    both = model(torch.cat((x, x)), level=torch.tensor([0, 1.7]))
    for i, level in enumerate((0, 1.7)):
        alone = model(x, level=torch.tensor([level]))
        assert torch.allclose(both["x_hat"][i], alone["x_hat"][0], atol=1e-5)
        assert torch.allclose(both["likelihoods"]["y"][i], alone["likelihoods"]["y"][0], atol=1e-4)


@pytest.mark.parametrize("level", [0, 0.3, 2])
def test_files_of_any_level_come_back(model, photo, level):
    model.level = level
    data = codec.encode(model, photo)
    assert Container.unpack(data).level == pytest.approx(level, abs=1 / 512)
    model.level = 1  # the file knows its level; the model's does not matter
    decoded = np.asarray(codec.decode(data, model)).astype(int)
    exact = Container.unpack(data).level
    y_hat, _ = model.latents(codec.to_tensor(photo, model), exact)
    expected = codec.unpad(model.reconstruct(y_hat, exact), photo.height, photo.width)
    assert np.abs(decoded - np.asarray(codec.to_picture(expected))).max() <= 1
    wrong = codec.unpad(model.reconstruct(y_hat, 1.5), photo.height, photo.width)
    assert np.abs(decoded - np.asarray(codec.to_picture(wrong))).max() > 1


def test_a_level_the_model_does_not_have(model, photo):
    container = Container.unpack(codec.encode(model, photo))
    for level in (2.5, None):
        with pytest.raises(BitstreamError, match="rate"):
            codec.decode(dataclasses.replace(container, level=level).pack(), model)
    fixed = micro_model("parallel")
    container = Container.unpack(codec.encode(fixed, photo))
    with pytest.raises(BitstreamError, match="rate"):
        codec.decode(dataclasses.replace(container, level=1.0).pack(), fixed)


@pytest.mark.parametrize("level", [-0.5, 2.5, 1e6, float("nan")])
def test_a_level_that_no_file_can_have_is_refused_before_coding(level, model, photo):
    model.level = level
    with pytest.raises(RateError, match="go from 0 to 2"):
        codec.encode(model, photo)


def test_rate_control_gives_the_largest_file_that_fits(model, photo):
    pixels = photo.width * photo.height
    sizes = []
    for level in (0, 2):
        model.level = level
        sizes.append(8 * len(codec.encode(model, photo)) / pixels)
    assert sizes[0] < sizes[1]
    for bpp in np.linspace(*sizes, 4) + 1e-9:
        got = 8 * len(codec.encode(model, photo, bpp=bpp)) / pixels
        assert bpp * 0.8 < got <= bpp  # an untrained model estimates badly
    assert codec.encode(model, photo, bpp=100) == codec.encode(model, photo)  # the highest level, set above
    with pytest.raises(RateError, match="at least"):
        codec.encode(model, photo, bpp=0.01)
    with pytest.raises(RateError, match="single rate"):
        codec.encode(micro_model("parallel"), photo, bpp=1)


def test_names_with_a_lambda(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    save_weights(model, tmp_path / "several.safetensors", {"kodak": {"0.04": {"bpp": 0.5, "psnr_db": 30.0}}})
    save_weights(micro_model("parallel"), tmp_path / "one.safetensors", {"lmbda": 0.3})
    rows = {row["name"]: row for row in list_models() if row["path"].startswith(str(tmp_path))}
    assert list(rows) == ["one", "several@0.01", "several@0.04", "several@0.16"]
    assert rows["several@0.04"]["kodak_bpp"] == 0.5 and rows["several@0.16"]["kodak_bpp"] is None
    assert rows["one"]["lmbda"] == 0.3
    assert load_model("several@0.08", "cpu").level == pytest.approx(1.5)
    assert load_model("several", "cpu").level == 1
    assert load_model("several@0.16", "cpu").name == "several"
    for name, sentence in (("several@1", "outside"), ("several@x", "could not"), ("one@0.3", "one rate")):
        with pytest.raises(RateError, match=sentence):
            load_model(name, "cpu")


def test_digests_of_models_of_one_rate_are_as_before_there_were_gains():
    assert "lmbdas" not in micro_model("parallel").config.to_json()
    assert "lmbdas" in micro_model("parallel", lmbdas=LMBDAS).config.to_json()


def test_gains_at_other_lambdas_begin_between_those_that_are_known():
    known, new = RateGain((0.01, 0.04, 0.16), 2), RateGain((0.005, 0.01, 0.02, 0.16, 0.32), 2)
    torch.nn.init.normal_(known.log_gain), torch.nn.init.normal_(known.log_inverse)
    begin_gain(new, known)
    gain = known.log_gain
    assert torch.allclose(new.log_gain[[1, 3]], gain[[0, 2]], atol=1e-6)
    assert torch.allclose(new.log_gain[2], (gain[0] + gain[1]) / 2, atol=1e-6)
    assert torch.allclose(new.log_gain[4], gain[2] + (gain[2] - gain[1]) / 2, atol=1e-6)
    assert torch.allclose(new.log_inverse[0], known.log_inverse[0] * 1.5 - known.log_inverse[1] / 2, atol=1e-6)


def test_gains_begin_at_the_same_rates_where_the_distortion_is_another():
    known, new = RateGain((0.01, 0.04), 2), RateGain((12.9, 51.6), 2)
    torch.nn.init.normal_(known.log_gain)
    begin_gain(new, known, MS_SSIM_OVER_MSE)
    assert torch.allclose(new.log_gain, known.log_gain, atol=1e-5)


# ---- an entropy model that is told the rate ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_knows_the_rate_brings_pictures_back_at_any_rate(variant, photo):
    model, sizes = aware_model(variant), []
    for level in (0.0, 0.3, 2.0):
        model.level = level
        data = codec.encode(model, photo)
        model.level = 1.0  # the file says its own
        decoded = np.asarray(codec.decode(data, model)).astype(int)
        with torch.no_grad():
            x_hat = model(codec.to_tensor(photo, model), level=Container.unpack(data).level)["x_hat"].clamp(0, 1)
        expected = np.asarray(codec.to_picture(codec.unpad(x_hat, photo.height, photo.width)))
        assert np.abs(decoded - expected).max() <= 1
        sizes.append(len(data))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_coder_is_told_the_same_rate_as_forward(variant, photo):
    model = aware_model(variant)
    coder = ExactCoder(model)
    for level in (0.0, 1.5):
        y_hat, z = model.latents(codec.to_tensor(photo, model), level)
        with torch.inference_mode():
            z_hat = None if z is None else model.z_prior.quantize_z(z)
            hyper = None if z is None else model.hyper_synthesis(z_hat, model.rate(level))
            expected, wrong = (
                model.distributions(y_hat, hyper, rate=model.rate(told))[0][0].flatten(1) for told in (level, 0.7)
            )
            known, found = y_hat[0].flatten(1), torch.zeros_like(expected)  # [M, n]

            def spy(channels, sites, means, scales, known=known, found=found):
                found[channels, sites] = torch.from_numpy(means).float().T
                return known[channels][:, sites].T

            coder._code(y_hat.shape[2:], z_hat, coder.rate(model, level), spy)
        # Where two scores nearly tie, rounding may choose another key: so not the largest difference.
        assert (found - expected).abs().median() < 0.005
        assert 3 * (found - expected).abs().median() < (found - wrong).abs().median()


def test_a_model_of_one_rate_cannot_know_it():
    with pytest.raises(ConfigError, match="variable rate"):
        micro_model("parallel", rate_aware=True)
    assert "rate_aware" not in micro_model("parallel", lmbdas=LMBDAS).config.to_json()
