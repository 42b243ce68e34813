"""What k per picture saves, and squares of several sizes: numbers that were computed by hand or by the model itself."""

import json

import pandas as pd
import pytest
import torch
from conftest import LMBDAS, aware_model

from benchmarks import picture_k, picture_size
from entroformer_lib.codec import codec
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import WeightsError
from entroformer_lib.views import ablation_figures
from entroformer_lib.weights.zoo import load_model, save_weights


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        sample_picture(name).crop((0, 0, 192, 128)).save(folder / f"{name}.png")
    return folder


def kept(model, path) -> str:
    save_weights(model, path, {})
    return str(path)


def test_a_choice_is_compared_with_the_best_single_k_and_pays_the_byte_of_another_one():
    bits = {"a": {16: 1000, 32: 990, 64: 1200}, "b": {16: 1000, 32: 1020, 64: 900}, "c": {16: 1000, 32: 1010, 64: 1300}}
    rows = [
        {"model": "m", "lmbda": 0.1, "image": image, "k": k, "own": 16, "bits": b}
        for image, ks in bits.items()
        for k, b in ks.items()
    ]
    (row,) = picture_k.saved(pd.DataFrame(rows)).to_dict("records")
    assert row["fixed"] == 16 and row["others"] == 2
    assert row["percent"] == pytest.approx(100 * ((990 + 8 + 900 + 8 + 1000) / 3000 - 1))


def test_bits_with_every_k(pictures, tmp_path):
    name, out = kept(aware_model("serial", top_k=4), tmp_path / "serial.safetensors"), tmp_path / "k.json"
    model = load_model(name, "cpu")
    picture_k.measure(str(pictures), str(out), models=(name,), lmbdas=LMBDAS[:1], ks=(2, 4, 0))
    rows = pd.DataFrame(json.loads(out.read_text())["rows"])
    x = codec.to_tensor(sample_picture("coffee").crop((0, 0, 192, 128)), model)
    own = float(model.estimated_bits(model.scaled(model.g_a(x), 0.0), 0.0)["y"].sum())
    found = rows[rows["image"].str.contains("coffee")].set_index("k")["bits"]
    assert found[4] == pytest.approx(own, rel=1e-6) and found.nunique() == 3


def test_squares_are_coded_alone_and_cover_the_same_pixels(pictures, tmp_path):
    models = [aware_model(variant) for variant in ("serial", "parallel")]
    for part in ("g_a", "g_s", "gain"):
        getattr(models[1], part).load_state_dict(getattr(models[0], part).state_dict())
    names = [kept(model, tmp_path / f"{i}.safetensors") for i, model in enumerate(models)]
    models, out = [load_model(name, "cpu") for name in names], tmp_path / "size.json"
    picture_size.measure(str(pictures), str(out), models=tuple(names), limit=1, lmbdas=LMBDAS[:1], sides=(64, 128))
    rows = pd.DataFrame(json.loads(out.read_text())["rows"]).set_index(["model", "side"])["bpp"]
    x = codec.to_tensor(sample_picture("chelsea").crop((0, 0, 192, 128)), models[0])
    with torch.no_grad():
        y = models[0].scaled(models[0].g_a(x), 0.0)[..., 2:10]  # 128 x 128 pixels in the middle
        squares = [y[..., i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
        for model, name in zip(models, names, strict=True):
            whole, parts = (
                sum(float(b.sum()) for part in cut for b in model.estimated_bits(part, 0.0).values()) / 128**2
                for cut in ([y], squares)
            )
            assert rows[name, 128] == pytest.approx(whole, rel=1e-5) and rows[name, 64] == pytest.approx(
                parts, rel=1e-5
            )
            assert whole != pytest.approx(parts, rel=1e-3)


def test_gains_by_size_are_those_of_the_mean_rates(results_folder):
    rows = [
        dict(model=model, lmbda=lmbda, side=side, image=image, bpp=bpp * share)
        for image, bpp in (("a", 1.0), ("b", 3.0))
        for lmbda in LMBDAS[:2]
        for side, saved in ((64, 0.1), (256, 0.2))
        for model, share in (("it", 1 - saved * (image == "b")), ("base", 1))
    ]
    (results_folder / "picture_size.json").write_text(json.dumps(dict(rows=rows)))
    data = ablation_figures.gains_by_size_data({"label": ("it", "base")})
    assert list(data["side"]) == [64, 256] and (data["half_width"] > 0).all()
    assert list(data["saving_percent"]) == pytest.approx([7.5, 15])  # b has three quarters of the bits
    (line,) = [bars.lines[0] for bars in ablation_figures.gains_by_size(data).axes[0].containers]
    assert list(line.get_ydata()) == pytest.approx([7.5, 15])


def test_models_with_other_transforms_are_not_compared(pictures, tmp_path):
    names = [kept(aware_model("serial", seed=seed), tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    with pytest.raises(WeightsError, match="other transforms"):
        picture_size.measure(str(pictures), str(tmp_path / "out.json"), models=tuple(names))
