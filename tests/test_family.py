"""The family is trained on equal terms, each kind with the learning rate that was best for it."""

import json

import pytest
from conftest import LMBDAS, aware_model

from benchmarks import family
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
    return dict(transforms=str(tmp_path / "source.safetensors"), data=str(photo_folder), runs=tmp_path / "family")


def test_each_kind_goes_on_with_its_best_rate(small, tmp_path):
    kinds = ("parallel", "groupedmixer")
    family.train(**small, kinds=kinds, widths=(32,), lrs=(1e-6, 4e-3), steps=4)
    tried = family.table(small["runs"])
    assert sorted(tried["kind"]) == sorted(2 * kinds) and set(tried["lr"]) == {1e-6, 4e-3}
    best = family.best_rates(tried, 4)
    for kind in kinds:
        scores = tried[tried["kind"] == kind].set_index("lr")["score"]
        assert best[kind, 32] == scores.idxmin() and scores.nunique() == 2
    family.train(**small, kinds=kinds, widths=(32,), steps=6, best_of=4, seeds=(3,))
    longer = family.table(small["runs"]).query("steps == 6").set_index("kind")
    assert longer["lr"].to_dict() == {kind: best[kind, 32] for kind in kinds} and set(longer["seed"]) == {3}
    source = load_model(small["transforms"], "cpu")
    for kind in kinds:
        model = load_model(small["runs"] / longer["run"][kind] / "weights.safetensors", "cpu")
        assert model.config.dim == 32 and model.config.rate_aware
        assert model.g_a[0].weight.equal(source.g_a[0].weight)
    family.result(small["runs"], tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert len(saved["rows"]) == 6
    assert set(saved["rows"][0]["held_out"][-1]) == {"step", *(f"{lmbda:g}" for lmbda in LMBDAS)}
