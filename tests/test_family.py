"""The family is trained on equal terms, each kind with the learning rate that was best for it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LMBDAS, aware_model

from benchmarks import family
from entroformer_lib.errors import StudyError
from entroformer_lib.studies.results import NoResult, kept_in
from entroformer_lib.views.ablation_figures import gains_data, gains_over_training
from entroformer_lib.weights.zoo import load_model, save_weights

RATES = (1e-6, 4e-3, 0.5)


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
    family.train(**small, kinds=kinds, widths=(32,), lrs=RATES, steps=4)
    tried = family.write_result(small["runs"], small["out"])
    assert sorted(tried["kind"]) == sorted(3 * kinds) and set(tried["lr"]) == set(RATES)
    best = family.best_rates(tried, 4)
    for kind in kinds:
        scores = tried[tried["kind"] == kind].set_index("lr")["score"]
        assert best[kind, 32] == scores.idxmin() == 4e-3 and scores.nunique() == 3
    for folder in small["runs"].glob("*-seed*"):  # what the result has is not repeated
        shutil.rmtree(folder)
    family.train(**small, kinds=kinds, widths=(32,), lrs=RATES, steps=4)
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
    assert len(saved["rows"]) == 8
    assert set(saved["rows"][0]["held_out"][-1]) == {"step", *(f"{lmbda:g}" for lmbda in LMBDAS)}


def test_a_kind_goes_on_from_its_weights(small, tmp_path):
    arguments = dict(kinds=("parallel",), widths=(32,), lrs=(1e-9,), steps=2)
    family.train(**small, **arguments | dict(lrs=(1e-3,)))
    [run] = family.write_result(small["runs"], small["out"])["run"]
    (small["runs"] / run / "weights.safetensors").rename(tmp_path / "first-parallel.safetensors")
    shutil.rmtree(small["runs"] / run)
    more = {**small, "out": tmp_path / "more.json"}
    family.train(**more, **arguments, init=str(tmp_path / "first-{kind}.safetensors"))
    [run] = family.write_result(more["runs"], more["out"])["run"]
    first = load_model(tmp_path / "first-parallel.safetensors", "cpu").state_dict()
    longer = load_model(small["runs"] / run / "weights.safetensors", "cpu").state_dict()
    assert all(torch.allclose(first[name], tensor, atol=1e-6) for name, tensor in longer.items())


def test_a_best_rate_at_the_end_of_those_tried_is_refused():
    rows = [dict(kind="cnn", width=96, steps=4, lr=lr, score=score) for lr, score in ((1, 0.3), (2, 0.2), (4, 0.1))]
    with pytest.raises(StudyError, match="cnn, 4, is at the end"):
        family.best_rates(pd.DataFrame(rows), 4)


def test_a_result_of_other_latents_is_refused(small):
    family.train(**small, kinds=("hyperprior",), widths=(32,), lrs=(1e-3,), steps=2)
    note = small["runs"] / "latents" / "latents.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "pictures_sha256": "another"}))
    with pytest.raises(StudyError, match="other latents"):
        family.write_result(small["runs"], small["out"])


def test_gains_over_the_training(tmp_path):
    """Of each seed that both kinds have, as the mean over the lambdas; shorter runs do not count."""

    def row(kind, seed, factor, steps=8):
        held_out = [{"step": s, "0.01": factor * 8 / s, "0.02": factor**3 * 8 / s} for s in (4, 8)]
        return {"kind": kind, "seed": seed, "steps": steps, "held_out": held_out}

    rows = [row("serial", 0, 1.0), row("serial", 1, 2.0), row("parallel", 0, 1.1), row("parallel", 1, 2.0)]
    (tmp_path / "family.json").write_text(json.dumps({"rows": [*rows, row("cnn", 0, 1.0), row("parallel", 0, 9, 4)]}))
    with kept_in(tmp_path):
        data = gains_data({"two passes": ("parallel", "serial"), "cnn": ("cnn", "serial")})
        with pytest.raises(NoResult, match="minnen"):
            gains_data({"two passes": ("parallel", "serial"), "another": ("minnen", "serial")})
    two = data[data["label"] == "two passes"].set_index(["seed", "step"])["percent"]
    assert np.allclose(two[0], 100 * (1.1**2 - 1)) and np.allclose(two[1], 0) and len(two) == 4
    assert set(data[data["label"] == "cnn"]["seed"]) == {0}
    figure = gains_over_training(data, data)
    assert [ax.get_ylabel() for ax in figure.axes] == ["rate saved, %", "rate above the serial model, %"]
    saved, cost = (ax.lines[0].get_ydata() for ax in figure.axes)  # of two passes, which need 21% more with seed 0
    assert np.allclose(saved, -10.5) and np.allclose(cost, 10.5)
