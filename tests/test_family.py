"""The family is trained on equal terms, each kind with the learning rate that was best for it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import LMBDAS, aware_model

from benchmarks import family
from entroformer_lib.errors import StudyError
from entroformer_lib.studies.results import kept_in
from entroformer_lib.training.latents import freeze, write_latents
from entroformer_lib.training.loss import rates_of_latents
from entroformer_lib.views.ablation_figures import gains_data, gains_over_training
from entroformer_lib.weights.zoo import load_model, save_weights


@pytest.fixture
def small(tmp_path, photo_folder, monkeypatch):
    """Arguments of a family of a few steps."""
    monkeypatch.setattr(family, "CROP", 64)
    monkeypatch.setattr(family, "LAST_CROP", 128)
    listed = tmp_path / "held_out.txt"
    listed.write_text(sorted(photo_folder.iterdir())[0].name + "\n")
    monkeypatch.setattr(family, "HELD_OUT", listed)
    save_weights(aware_model("parallel"), tmp_path / "source.safetensors", {})
    return dict(
        transforms=str(tmp_path / "source.safetensors"),
        data=str(photo_folder),
        runs=tmp_path / "family",
        out=tmp_path / "result.json",
    )


def test_each_kind_goes_on_with_its_best_rate(small, tmp_path):
    kinds = ("parallel", "groupedmixer")
    family.train(**small, kinds=kinds, widths=(32,), lrs=(1e-6, 4e-3), steps=4)
    tried = family.write_result(small["runs"], small["out"])
    assert sorted(tried["kind"]) == sorted(2 * kinds) and set(tried["lr"]) == {1e-6, 4e-3}
    best = family.best_rates(tried, 4)
    for kind in kinds:
        scores = tried[tried["kind"] == kind].set_index("lr")["score"]
        assert best[kind, 32] == scores.idxmin() and scores.nunique() == 2
    for folder in small["runs"].glob("*-seed*"):  # what the result has is not repeated
        shutil.rmtree(folder)
    family.train(**small, kinds=kinds, widths=(32,), lrs=(1e-6, 4e-3), steps=4)
    assert not list(small["runs"].glob("*-seed*"))
    family.train(**small, kinds=kinds, widths=(32,), steps=6, best_of=4, seeds=(3,))
    longer = family.write_result(small["runs"], small["out"]).query("steps == 6").set_index("kind")
    assert longer["lr"].to_dict() == {kind: best[kind, 32] for kind in kinds} and set(longer["seed"]) == {3}
    source = load_model(small["transforms"], "cpu")
    for kind in kinds:
        model = load_model(small["runs"] / longer["run"][kind] / "weights.safetensors", "cpu")
        assert model.config.dim == 32 and model.config.rate_aware
        assert model.g_a[0].weight.equal(source.g_a[0].weight)
    saved = json.loads(small["out"].read_text())
    assert len(saved["rows"]) == 6
    assert set(saved["rows"][0]["held_out"][-1]) == {"step", *(f"{lmbda:g}" for lmbda in LMBDAS)}


def test_a_result_of_other_latents_is_refused(small):
    family.train(**small, kinds=("hyperprior",), widths=(32,), lrs=(1e-3,), steps=2)
    note = small["runs"] / "latents" / "latents.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "pictures_sha256": "another"}))
    with pytest.raises(StudyError, match="other latents"):
        family.write_result(small["runs"], small["out"])


def test_gains_over_the_training_of_kinds_that_learned_side_by_side(small, tmp_path):
    write_latents(small["transforms"], small["data"], tmp_path / "latents", crop=64, held_out=str(family.HELD_OUT))
    kinds = {"parallel": 1.10, "serial": 1.0}
    for seed, kind in enumerate(kinds):
        model = freeze(aware_model(kind, seed=seed), load_model(small["transforms"], "cpu"))
        save_weights(model, tmp_path / f"{kind}.safetensors", {"steps": 250})
    steps = (50, 100, 150, 200, 250)
    rates = [{kind: step / 100 * factor ** (step > 200) for kind, factor in kinds.items()} for step in steps]
    (tmp_path / "log.json").write_text(
        json.dumps([{"step": s, "seconds": 1, "bpp": r} for s, r in zip(steps, rates, strict=True)])
    )
    (tmp_path / "results").mkdir()
    out = tmp_path / "results" / "learning_curves.json"
    family.curves(tmp_path / "log.json", tmp_path, tmp_path / "latents", out, batch=18, lr=2e-3, device="a GPU")
    saved = json.loads(out.read_text())
    assert saved["settings"]["steps"] == 250
    with kept_in(tmp_path / "results"):
        data = gains_data({"two passes": ("parallel", "serial")})
    assert data["step"].to_list() == [100, 300] and np.allclose(data["percent"], [0, 10])
    ends = [[point["bpp"] for point in row["held_out"]] for row in saved["rows"]]
    assert np.allclose(data["held_out"], 100 * (sum(ends[0]) / sum(ends[1]) - 1))
    held_out = torch.from_numpy(np.load(tmp_path / "latents" / "held_out.npy")).float()
    model = load_model(tmp_path / "serial.safetensors", "cpu")
    assert saved["rows"][1]["held_out"] == rates_of_latents(model, held_out, LMBDAS)
    assert gains_over_training(data, data).axes[0].get_ylabel() == "rate saved, %"
