"""The masking study against one mask at a time, and what it refuses."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from compressai.layers import MaskedConv2d
from conftest import MICRO, aware_model, micro_model

from entroformer_lib.codec import codec
from entroformer_lib.datasets import sample_picture
from entroformer_lib.errors import StudyError
from entroformer_lib.inspection import missing_context as mc
from entroformer_lib.inspection.scene import Scene
from entroformer_lib.models import config as model_config
from entroformer_lib.models.context import Gaps, first_slice
from entroformer_lib.studies import position_masking as pm
from entroformer_lib.training.latents import write_latents
from entroformer_lib.views import context_figures
from entroformer_lib.views.explore_positions import interactive
from entroformer_lib.weights.zoo import load_model, save_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice

CONTEXTS = ("serial", "parallel", "context", "cnn")


@pytest.fixture(scope="module")
def picture():
    return sample_picture("astronaut").crop((100, 0, 228, 128))  # 8 x 8 latents


def naive(model, picture, offset: tuple[int, int], spacing: int) -> tuple[int, float, float]:
    """Sites, bits with all context, bits without the position: one site, one mask."""
    with torch.inference_mode():
        latents = model.scaled(model.g_a(codec.to_tensor(picture, model)))
    (h, w), (dy, dx) = latents.shape[-2:], offset
    predicted = ~first_slice(h, w) if model.config.context == "parallel" else torch.ones(h, w, dtype=torch.bool)
    rows, columns = (sites.tolist() for sites in predicted.nonzero(as_tuple=True))
    sites = [
        (row, column) for row, column in zip(rows, columns, strict=True) if 0 <= row + dy < h and 0 <= column + dx < w
    ]
    missing = torch.zeros(len(sites), 1, h, w, dtype=torch.bool)
    for i, (row, column) in enumerate(sites):
        missing[i, :, (row + dy) % spacing :: spacing, (column + dx) % spacing :: spacing] = True
    with torch.inference_mode():
        likelihoods, _ = model.likelihoods(latents.expand(len(sites), -1, -1, -1), gaps=Gaps(missing=missing))
        full, _ = model.likelihoods(latents)
    whole = -sum(float(full["y"][0, :, row, column].double().log2().sum()) for row, column in sites)
    masked = -sum(float(likelihoods["y"][i, :, *site].double().log2().sum()) for i, site in enumerate(sites))
    return len(sites), whole, masked


@pytest.mark.parametrize("spacing", [3, 8])  # 8: one gap in the whole picture
@pytest.mark.parametrize("variant", CONTEXTS)
def test_equals_one_mask_at_a_time(variant, spacing, picture):
    model = micro_model(variant)
    scene, offsets = mc.scene_of(model, picture), mc.neighbourhood(model, 3)
    for row in mc.mask_positions(scene, offsets, spacing):
        count, whole, masked = naive(model, picture, (row["dy"], row["dx"]), spacing)
        assert row["sites"] == count
        assert row["bpp_all"] == pytest.approx(whole / count / 256, rel=1e-5)
        assert row["ratio"] == pytest.approx(masked / whole, rel=1e-5)


@pytest.mark.parametrize("variant", CONTEXTS)
def test_a_model_that_is_told_the_rate(variant, picture):
    """The rate with nothing missing is the model's own at its level, whole and patch by patch."""
    model = aware_model(variant)
    model.level = 0.5
    scene = mc.scene_of(model, picture)
    with torch.inference_mode():
        y = model.scaled(model.g_a(codec.to_tensor(picture, model)))
    bits = mc.site_bits(scene)[0]
    assert torch.allclose(bits, model.estimated_bits(y)["y"][0], rtol=1e-3, atol=1e-2)
    (row,) = mc.mask_beyond(scene, radii=(2,), stride=3)
    sites = mc.has_context(scene)
    sites &= (torch.arange(scene.height)[:, None] % 3 == 0) & (torch.arange(scene.width) % 3 == 1)
    assert row["sites"] == sites.sum()
    assert row["bpp_all"] == pytest.approx(float(bits[sites].mean()) / 256)
    assert row["ratio"] != 1


@pytest.mark.parametrize("position", ["none", "diamond"])
def test_a_patch_with_everything_says_what_the_picture_says(position, picture):
    """But not in the first column, whose sites the serial model predicts from the end of the row above."""
    scene = mc.scene_of(micro_model("serial", position=position, top_k=None), picture)
    sites = torch.tensor([(row, column) for row in (0, 3, 7) for column in (1, 4, 7)])
    side = 2 * max(scene.height, scene.width) - 1
    bits = mc.bits_in_patches(scene, sites, torch.ones(side, side, dtype=torch.bool))
    assert torch.allclose(bits, mc.site_bits(scene)[0][sites[:, 0], sites[:, 1]], rtol=1e-5)
    first = torch.tensor([(3, 0)])
    alone = mc.bits_in_patches(scene, first, torch.ones(side, side, dtype=torch.bool))
    assert not torch.allclose(alone, mc.site_bits(scene)[0, 3, 0], rtol=1e-5)


@pytest.mark.parametrize("variant", CONTEXTS)
def test_a_missing_latent_has_no_influence(variant, picture):
    """Its value changes no feature of any site, its own included; and it is missed: known, it would matter."""
    scene = mc.scene_of(micro_model(variant), picture)
    missing = torch.zeros(1, 1, *scene.y_hat.shape[-2:], dtype=torch.bool)
    missing[..., 3, 4] = True  # first slice of the checkerboard
    assert first_slice(*scene.y_hat.shape[-2:])[3, 4]
    changed = scene.y_hat.clone()
    changed[..., 3, 4] += 7
    context = scene.model.context_model
    with torch.inference_mode():
        assert torch.equal(context(scene.y_hat, Gaps(missing=missing)), context(changed, Gaps(missing=missing)))
        assert not torch.allclose(context(scene.y_hat), context(changed))
        assert not torch.allclose(context(scene.y_hat), context(scene.y_hat, Gaps(missing=missing)))
        nothing = torch.zeros_like(missing)
        assert torch.equal(context(scene.y_hat), context(scene.y_hat, Gaps(missing=nothing)))


def diamond(radius: int) -> torch.Tensor:
    """Sites of a patch up to an L1 distance from its middle."""
    line = torch.arange(-radius, radius + 1).abs()
    return line[:, None] + line <= radius


@pytest.mark.parametrize("variant", CONTEXTS)
@pytest.mark.parametrize("position", ["none", "diamond"])
def test_beyond_distance(variant, position, picture):
    """A patch as large as the picture sees what the picture sees; and what lies beyond has no influence."""
    model = micro_model(variant, position=position, top_k=None)
    scene = mc.scene_of(model, picture)
    centre = torch.tensor([[4, 4]])
    far = scene.y_hat.clone()
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    distance = (rows - 4).abs() + (columns - 4).abs()
    far[..., distance > 2] += 5
    other = copy.copy(scene)
    other.y_hat = far
    near = mc.bits_in_patches(scene, centre, diamond(2))
    assert torch.equal(mc.bits_in_patches(other, centre, diamond(2)), near)
    if variant == "cnn":
        wide = Scene(model, picture, torch.float64)
        whole = mc.site_bits(wide)[0]
        torch.testing.assert_close(mc.bits_in_patches(wide, centre, diamond(4)), whole[4:5, 4])
    elif variant != "parallel":  # all of the picture but what the square patch of radius 4 cuts off
        missing = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        missing[..., distance <= 4] = False
        whole = mc.site_bits(scene, missing)[:, 4, 4]
        torch.testing.assert_close(mc.bits_in_patches(scene, centre, diamond(4)), whole, rtol=1e-3, atol=1e-3)


def test_cnn_is_compressais_masked_convolution(picture):
    scene = mc.scene_of(micro_model("cnn"), picture)
    context, M = scene.model.context_model, scene.y_hat.size(1)
    masked = MaskedConv2d(M, context.taps.out_features, kernel_size=5, padding=2)
    with torch.no_grad():
        masked.weight.flatten(2)[:, :, :12] = context.taps.weight.view(-1, M, 12)
        masked.bias.copy_(context.taps.bias)
        torch.testing.assert_close(context(scene.y_hat), masked(scene.y_hat))


def test_rows_of_the_table(picture):
    models = [micro_model("serial", name="one"), micro_model("parallel", name="two")]
    table = pm.run(models, [("a", picture), ("b", picture.rotate(90))], side=5)
    assert list(table.columns) == ["model", "image", "dy", "dx", "sites", "bpp_all", "bpp_masked", "ratio"]
    assert len(table) == 2 * (12 + 12)
    serial = table[table.model == "one"]
    assert ((serial.dy < 0) | ((serial.dy == 0) & (serial.dx < 0))).all()
    assert ((table[table.model == "two"][["dy", "dx"]].abs().sum(axis=1) % 2) == 1).all()
    assert np.allclose(table.ratio, table.bpp_masked / table.bpp_all)


def made_up(rate) -> pd.DataFrame:
    offsets = [(dy, dx) for dy in range(-3, 1) for dx in range(-3, 4) if (dy, dx) < (0, 0)]
    rates = [{"dy": y, "dx": x, "bpp_all": 1.0, "bpp_masked": 1 + rate(y, x)} for y, x in offsets]
    return pd.DataFrame(rates).assign(model="m", image="i")


def test_the_fit_finds_the_distance():
    for norm, distance in pm.NORMS.items():
        fits = pm.distance_fits(made_up(lambda dy, dx, d=distance: 0.1 * np.exp(-d(dy, dx) / 1.5))).set_index("norm")
        assert fits["r2"].idxmax() == norm and fits.loc[norm, "r2"] > 0.999
        assert fits.loc[norm, "b"] == pytest.approx(1.5, rel=1e-3) and fits.loc[norm, "a"] == pytest.approx(
            10, rel=1e-3
        )
        assert fits.loc[norm, "spearman"] == pytest.approx(-1)


def test_bad_questions_are_answered_in_a_sentence(picture):
    serial, parallel = micro_model("serial"), micro_model("parallel")
    with pytest.raises(StudyError, match="no context"):
        pm.run([micro_model("hyperprior")], [("a", picture)])
    with pytest.raises(StudyError, match="larger than the latents"):
        pm.run([serial], [("a", picture)], side=9)
    with pytest.raises(StudyError, match="larger than the latents"):
        pm.run_alone([serial], [("a", picture)], side=9)
    with pytest.raises(StudyError, match="odd side"):
        pm.run([serial], [("a", picture)], side=4)
    scene = mc.scene_of(serial, picture)
    for measure in (mc.mask_positions, mc.only_positions):
        with pytest.raises(StudyError, match="outside of latents"):
            measure(scene, [(-8, 0)])
        with pytest.raises(StudyError, match="no context of the model"):
            measure(scene, [(0, 1)])
        with pytest.raises(StudyError, match="no position"):
            measure(scene, [])
    with pytest.raises(StudyError, match="no context of the model"):
        mc.mask_positions(mc.scene_of(parallel, picture), [(-1, -1)])
    with pytest.raises(StudyError, match="too close"):
        mc.mask_positions(scene, [(-3, 0)], spacing=2)
    with pytest.raises(StudyError, match="larger than latents"):
        mc.mask_beyond(scene, (8,))
    with pytest.raises(StudyError, match="0 or more"):
        mc.mask_beyond(scene, (-1, 2))
    with pytest.raises(StudyError, match=r"No site that is looked at has the position \(-7, 0\)"):
        mc.only_positions(scene, [(-7, 0)], stride=6)


def test_the_command_line_answers_in_a_sentence(tmp_path, monkeypatch):
    command = ["position_masking", "measure", "--runs", str(tmp_path), "--kodak", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"There is no finished run in .*\.$"):
        pm.main()


@pytest.mark.parametrize("variant", CONTEXTS)
def test_one_position_alone(variant, picture):
    """The same as masking all others in the whole picture, where no token but the query's own is left."""
    scene = mc.scene_of(micro_model(variant, position="diamond", top_k=None), picture)
    for row in mc.only_positions(scene, [(-1, 0), (0, -1)], stride=4):
        bits = {"bpp_none": 0.0, "bpp_only": 0.0}
        for y in (0, 4):
            for x in (0, 4):
                if y + row["dy"] >= 0 and x + row["dx"] >= 0:
                    missing = torch.ones(1, 1, *scene.y_hat.shape[-2:], dtype=torch.bool)
                    bits["bpp_none"] += float(mc.site_bits(scene, missing)[0, y, x])
                    missing[..., y + row["dy"], x + row["dx"]] = False
                    bits["bpp_only"] += float(mc.site_bits(scene, missing)[0, y, x])
        for key, value in bits.items():
            assert row[key] == pytest.approx(value / row["sites"] / 256, rel=1e-4)


def test_measured_models_are_kept(picture, tmp_path, results_folder):
    """More models join the saved result, wherever they were trained; none is measured twice."""
    (tmp_path / "kodak").mkdir()
    picture.save(tmp_path / "kodak" / "a.png")

    def measured(runs: str, name: str, seed: int) -> dict:
        save_weights(micro_model("serial", seed=seed), tmp_path / runs / name / "weights.safetensors", {})
        pm.measure(tmp_path / runs, tmp_path / "kodak", side=3, crop=128)
        return json.loads((results_folder / "position_masking.json").read_text())

    first = measured("runs", "none", seed=0)
    saved = measured("runs", "cnn", seed=1)
    assert list(saved["models"]) == ["cnn", "none"]  # in the order of VARIANTS
    assert saved["models"]["none"] == first["models"]["none"]  # with the date of its measurement
    assert len(saved["rows"]) == len(saved["alone"]) == 8 and len(saved["beyond"]) == 2 * len(mc.RADII)
    assert len(saved["fits"]) == len(saved["alone_fits"]) == 6
    assert saved["models"]["cnn"]["weights_sha256"] and "revision" in saved["provenance"]
    assert saved["models"]["cnn"]["position"] == "diamond"
    more = measured("elsewhere", "mine", seed=2)
    assert list(more["models"]) == ["cnn", "none", "mine"]
    assert more["rows"][:8] == saved["rows"]
    rates = micro_model("serial", lmbdas=(0.01, 0.1))
    save_weights(rates, tmp_path / "rates.safetensors", {})
    asked = tuple(f"{tmp_path / 'rates.safetensors'}@{lmbda}" for lmbda in (0.01, 0.1))
    pm.measure(tmp_path / "elsewhere", tmp_path / "kodak", side=3, crop=128, models=asked)
    told = json.loads((results_folder / "position_masking.json").read_text())
    bits = [{row["bpp_all"] for row in told["rows"] if row["model"] == f"rates@{lmbda}"} for lmbda in (0.01, 0.1)]
    assert bits[0] and bits[1] and bits[0] != bits[1]  # a rate is not taken for another
    save_weights(rates, tmp_path / "runs of rates/mine/weights.safetensors", {})
    pm.measure(tmp_path / "runs of rates", tmp_path / "kodak", side=3, crop=128, lmbda=0.1)
    asked = json.loads((results_folder / "position_masking.json").read_text())
    assert {row["bpp_all"] for row in asked["rows"] if row["model"] == "mine"} == bits[1]
    assert asked["models"]["mine"]["lmbda"] == pytest.approx(0.1) and asked["models"]["cnn"]["lmbda"] is None
    again = measured("elsewhere", "none", seed=3)  # other weights take the place of the first
    assert again["models"]["none"] != first["models"]["none"] and len(again["rows"]) == 20


def test_models_of_the_study_are_trained_once(source, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    write_latents(source, str(photo_folder), tmp_path / "latents", crop=256, per_picture=1)
    for only in (("none",), ("none", "hyper-parallel-none")):
        pm.train_models(source, str(tmp_path / "latents"), tmp_path / "runs", steps=1, only=only)
    runs = {path.parent.name: load_model(path, "cpu") for path in (tmp_path / "runs").glob("*/weights.safetensors")}
    assert {name: (m.config.context, m.config.position) for name, m in runs.items()} == {
        "none": ("serial", "none"), "hyper-parallel-none": ("parallel", "none"),
    }  # fmt: skip
    assert all(model.card["training"]["missing"] == pm.MISSING for model in runs.values())
    rates = micro_model("parallel", lmbdas=(0.01, 0.1))
    save_weights(rates, tmp_path / "rates.safetensors", {})
    write_latents(str(tmp_path / "rates.safetensors"), str(photo_folder), tmp_path / "more", crop=256, per_picture=1)
    files = str(tmp_path / "rates.safetensors"), str(tmp_path / "more")
    pm.train_models(*files, tmp_path / "told", steps=1, only=("none",))
    told = load_model(tmp_path / "told/none/weights.safetensors", "cpu").config
    assert told.rate_aware and told.lmbdas == rates.config.lmbdas and not runs["none"].config.rate_aware
    with pytest.raises(StudyError, match="another steps"):
        pm.train_models(source, str(tmp_path / "latents"), tmp_path / "runs", steps=2, only=("none",))


def test_interactive_map_has_every_model_and_picture(picture):
    from entroformer_lib.views.explore_positions import ALL, interactive

    models = [micro_model("serial", name="one"), micro_model("cnn", name="two")]
    table = pm.run(models, [("a", picture), ("b", picture.rotate(90))], side=3)
    figure = interactive(table)
    by_model, by_image = figure.layout.updatemenus
    assert [b.label for b in by_model.buttons] == ["one", "two"]
    assert [b.label for b in by_image.buttons] == [ALL, "a", "b"]
    assert [trace.visible for trace in figure.data[:3]] == [True, False, False]
    texts = by_model.buttons[1].args[0]["text"]
    row = table[(table.model == "two") & (table.image == "b")].iloc[0]
    assert f"rate {row.bpp_all:.4f} to {row.bpp_masked:.4f} bpp" in texts[2][0] and "rank" in texts[2][0]


def test_percent_is_what_is_lost_without_and_what_is_saved_alone():
    rows = pd.DataFrame([{"model": "m", "image": i, "dy": 0, "dx": -1} for i in "ab"])
    missing = rows.assign(bpp_all=1.0, bpp_masked=[1.1, 1.3], ratio=[1.1, 1.3])
    alone = rows.assign(bpp_none=1.0, bpp_only=[0.9, 0.7], ratio=[0.9, 0.7])
    (lost,), (saved,) = (pm.over_pictures(table).to_dict("records") for table in (missing, alone))
    for row in (lost, saved):
        assert (row["percent"], row["pictures"]) == (pytest.approx(20), 2)
        assert row["spread"] == pytest.approx(200**0.5)


def test_figure_3_has_each_position_at_its_place():
    rows = [
        ("none", "missing", -1, 0, 5.0),
        ("none", "missing", 0, -1, 2.0),
        ("none", "alone", -1, 0, 30.0),
        ("none", "alone", 0, -1, 40.0),
    ]
    data = pd.DataFrame(rows, columns=["model", "measure", "dy", "dx", "percent"])
    figure = context_figures.two_measures(data)
    for ax, (name, label) in zip(figure.axes, context_figures.LABELS.items(), strict=False):
        grid = ax.images[0].get_array()
        assert ax.get_title() == label
        for row in data[data["measure"] == name].itertuples():
            assert grid[row.dy + 1, row.dx + 1] == row.percent


def test_the_interactive_map_has_rows_below_each_other():
    table = pd.DataFrame([dict(model="m", image="a", dy=-2, dx=1, bpp_all=1.0, bpp_masked=1.5, ratio=1.5)])
    (heat, *_) = interactive(table).data
    assert (list(heat.x), list(heat.y)) == ([1], [-2])
