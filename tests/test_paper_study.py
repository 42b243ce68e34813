"""`entroformer study paper`: what the paper's figures need of one model, in a folder of its own."""

import json

import pandas as pd
import pytest
from conftest import micro_model
from released import CASES, released, save

from entroformer_lib.cli import study_paper
from entroformer_lib.errors import UserError
from entroformer_lib.files import data_folder
from entroformer_lib.studies import results
from entroformer_lib.studies.paper import Paper
from entroformer_lib.views import paper
from entroformer_lib.weights.official import import_official
from entroformer_lib.weights.zoo import save_weights


@pytest.fixture(scope="module")
def study(photo_folder, tmp_path_factory):
    def made(variant: str) -> Paper:
        folder = tmp_path_factory.mktemp(variant)
        save_weights(micro_model(variant), folder / "own.safetensors", {})
        return Paper(str(folder / "own.safetensors"), photo_folder, folder / "out", limit=1, jobs=1)

    return made


def test_a_plan_measures_one_picture_and_writes_nothing(study):
    parallel, grouped = study("parallel"), study("groupedmixer")
    plan = parallel.plan()
    assert list(plan["runs"] > 0) == [True] * 3 and (plan["seconds"] > 0).all()
    assert not parallel.out.exists()
    notes = list(grouped.plan()["note"])
    assert notes[0] == "" and "no positions" in notes[1]


def test_results_and_figures_of_one_model_lie_in_its_folder(study):
    own, said = study("parallel"), []
    own.measure(said.append)
    assert len(said) == 3
    before = results.kodak()
    with results.kept_in(own.out / "results"):
        drawn = paper.regenerate(own.out / "figures", page=False)
        assert set(results.kodak()["codec"]) == {"own"}
    of_one_model = {"figure05_rate_distortion", "figure11_psnr_kodak", "figure12_ms_ssim_kodak"}
    of_one_model |= {"figure03_position_masking", "figure08_attention_points", "figure09_attention_heads"}
    assert of_one_model | {"figure10_attention_k"} <= set(drawn)
    assert not {"figure05_variants", "table1_position_encoding"} & set(drawn)
    assert "own" in set(drawn["figure05_rate_distortion"]["codec"])
    assert set(drawn["figure03_missing"]["model"]) == {"own"}
    saved = json.loads((own.out / "results" / "own-kodak.json").read_text())
    assert len(saved["images"]) == 1 and saved["provenance"]["weights_sha256"]
    pd.testing.assert_frame_equal(results.kodak(), before)  # data/results is as it was


def test_an_imported_checkpoint_has_all_of_a_models_figures(photo_folder, tmp_path):
    save(released(CASES["serial"]), tmp_path / "theirs.pth")
    import_official(tmp_path / "theirs.pth", tmp_path / "theirs.safetensors")
    study = Paper(str(tmp_path / "theirs.safetensors"), photo_folder, tmp_path / "out", limit=1, jobs=1)
    study.measure(lambda words: None)
    with results.kept_in(study.out / "results"):
        drawn = paper.regenerate(study.out / "figures", page=False)
    assert {int(name[6:8]) for name in drawn if name.startswith("figure")} == {3, 5, 8, 9, 10, 11, 12}


def test_the_repositorys_own_figures_are_not_replaced(photo_folder):
    with pytest.raises(UserError, match="has figures of its own"):
        study_paper("nosuch", photo_folder, data_folder().parent)
