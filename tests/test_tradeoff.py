"""Rate against groups and decoding time: what is measured, what is compared, what is drawn."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MICRO, micro_model

from benchmarks import readme, tradeoff
from benchmarks.latency import STAGES
from entroformer_lib.codec import codec
from entroformer_lib.errors import StudyError
from entroformer_lib.models import config as model_config
from entroformer_lib.studies import ablation, same_transforms
from entroformer_lib.studies import results as saved_results
from entroformer_lib.studies.ablation_grids import GRIDS, Terms
from entroformer_lib.training.latents import write_latents
from entroformer_lib.views import rate_figures as views
from entroformer_lib.weights.zoo import save_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice
VARIANTS = {"few": dict(groups=(1, 1, 2)), "many": dict(groups=(2, 2, 2)), "parallel": {}, "hyperprior": {}}


def family(lmbdas: tuple[float, ...] = ()) -> dict:
    """Models with the same transforms, by name."""
    base, found = micro_model("parallel", lmbdas=lmbdas), {}
    for name, fields in VARIANTS.items():
        variant = name if name in ("parallel", "hyperprior") else "groupedmixer"
        model = micro_model(variant, seed=1, name=name, lmbdas=lmbdas, **fields)
        for part in ("g_a", "g_s", *(("gain",) if lmbdas else ())):
            getattr(model, part).load_state_dict(getattr(base, part).state_dict())
        found[name] = model
    return found


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory) -> dict[str, Path]:
    root, training = tmp_path_factory.mktemp("runs"), {"steps": 4, "lr": 0.1}
    for name, model in family().items():
        card = {"lmbda": 0.02, "training": {**training, "model": name, "seed": len(name)}}
        (root / name).mkdir()
        save_weights(model, root / name / "weights.safetensors", card)
    return {name: root / name for name in VARIANTS}


@pytest.fixture(scope="module")
def saved(run_folders, photo_folder, tmp_path_factory) -> dict:
    """The study from end to end, on one picture."""
    out = tmp_path_factory.mktemp("out") / "tradeoff.json"
    tradeoff.save(photo_folder, (), tuple(run_folders.values()), limit=1, repeats=1, out=out)
    return json.loads(out.read_text())


# ---- what is measured ----


def test_rows_are_of_real_files(saved, run_folders, photo_folder):
    assert [row["model"] for row in saved["rows"]] == list(VARIANTS)
    picture = codec.open_picture(photo_folder / f"{saved['rows'][0]['image']}.png")
    for row in saved["rows"]:
        model = tradeoff.model_at(run_folders[row["model"]], 0.02)
        data = codec.encode(model, picture)
        assert row["bytes"] == len(data)
        assert row["bpp"] == pytest.approx(8 * row["bytes"] / (picture.width * picture.height))
        stages = [row[f"{name.replace(' ', '_')}_s"] for name in STAGES]
        assert 0 < sum(stages) <= row["decode_s"]
        assert row["groups"] == {"few": 2, "many": 8}.get(row["model"])
    assert len({row["psnr_db"] for row in saved["rows"]}) == 1  # the same transforms
    assert len({row["bytes"] for row in saved["rows"]}) > 1
    assert saved["terms"]["runs"]["differences"] == []  # names and seeds may differ
    assert saved["settings"] == {"lmbda": 0.02, "pictures": 1, "repeats": 1}
    assert {"revision", "date", "threads"} <= set(saved["provenance"])


def test_shipped_models_code_at_the_lambda(tmp_path, photo, monkeypatch):
    monkeypatch.setenv("ENTROFORMER_WEIGHTS", str(tmp_path))
    save_weights(family((0.01, 0.02, 0.04))["parallel"], tmp_path / "rates.safetensors", {})
    model = tradeoff.model_at("rates", 0.04)
    assert model.name == "rates" and model.level == 2
    with pytest.raises(StudyError, match="rates cannot code there: .* outside"):
        tradeoff.model_at("rates", 0.5)


def test_what_cannot_be_compared_is_refused(run_folders, photo):
    models = family()
    with pytest.raises(StudyError, match="trained at lambda 0.02 and not at 0.01"):
        tradeoff.model_at(run_folders["few"], 0.01)
    with pytest.raises(StudyError, match="need one parallel model"):
        tradeoff.run({"runs": [models["few"]]}, [("photo", photo)])
    deeper = micro_model("parallel", name="deeper", card={"kind": "parallel-9"})
    assert tradeoff.kind_of(deeper) == "parallel-9"  # so it may stand beside the one that others are compared with
    tradeoff.run({"runs": [models["parallel"], deeper]}, [])
    other = micro_model("groupedmixer", seed=3, name="other")
    with pytest.raises(StudyError, match="other transforms"):
        tradeoff.run({"runs": [models["parallel"], other]}, [("photo", photo)])


def test_what_trainings_differ_in():
    models = [
        micro_model(variant, card={"training": {"steps": steps, "model": variant, "lr": 1}})
        for variant, steps in (("parallel", 3), ("hyperprior", 4))
    ]
    assert tradeoff.differences(models) == ["steps"]


# ---- what is drawn ----


def test_points_are_relative_to_the_parallel_model(saved):
    points = same_transforms.tradeoff_points(saved).set_index("model")
    rows = {row["model"]: row for row in saved["rows"]}
    for name in VARIANTS:
        assert points.loc[name, "percent"] == pytest.approx(100 * (rows[name]["bpp"] / rows["parallel"]["bpp"] - 1))
        assert points.loc[name, "context_s"] == pytest.approx(rows[name]["context_s"])
    without = {"rows": [row for row in saved["rows"] if row["variant"] != "parallel"]}
    with pytest.raises(StudyError, match="0 parallel models"):
        same_transforms.tradeoff_points(without)


def test_means_are_over_pictures_and_families_stay_apart(saved):
    """The same rows once more as another picture of twice the bits, and as another family of three times the bits."""
    more = [{**row, "image": "more", "bpp": 2 * row["bpp"], "decode_s": 3 * row["decode_s"]} for row in saved["rows"]]
    other = [{**row, "family": "shipped", "bpp": 3 * row["bpp"]} for row in saved["rows"]]
    one, all_of_them = (
        same_transforms.tradeoff_points({"rows": rows}) for rows in (saved["rows"], saved["rows"] + more + other)
    )
    mine = all_of_them[all_of_them["family"] == "runs"]
    assert np.allclose(mine["bpp"], 1.5 * one["bpp"]) and np.allclose(mine["decode_s"], 2 * one["decode_s"])
    for _, part in all_of_them.groupby("family"):
        assert np.allclose(part["percent"], one["percent"])


def test_the_front_is_what_none_beats_in_both(saved):
    points = same_transforms.tradeoff_points(saved)
    kept = set(same_transforms.front(points)["model"])
    for one in points.itertuples():
        beaten = any(
            other.decode_s <= one.decode_s and other.percent <= one.percent and other.model != one.model
            for other in points.itertuples()
        )
        assert beaten != (one.model in kept)


def test_each_model_is_drawn_in_each_panel_and_named(saved):
    points = same_transforms.tradeoff_points(saved)
    figure = views.tradeoff(points)
    assert len(figure.axes) == 2
    for ax, seconds in zip(figure.axes, ("decode_s", "context_s"), strict=True):
        marks = {tuple(point) for line in ax.lines if line.get_marker() != "None" for point in line.get_xydata()}
        assert marks == set(points[[seconds, "percent"]].itertuples(index=False, name=None))
        assert sorted(text.get_text() for text in ax.texts) == ["G = 2", "G = 8"]
        assert ax.get_xscale() == "log"
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names >= {"Entroformer, parallel", "GroupedMixer", "transformer hyperprior alone"}


def test_labels_of_points_close_together_keep_apart(saved):
    points = same_transforms.tradeoff_points(saved)
    near = np.array([1, 1, 1.03, 1.03])  # two at one place, two beside them
    points = points.assign(decode_s=near, context_s=near, percent=0.0)
    for ax in views.tradeoff(points).axes:
        boxes = [text.get_window_extent() for text in ax.texts]
        marks = ax.transData.transform(points[["decode_s", "percent"]].to_numpy())
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert not any(box.count_contains(marks) for box in boxes)


# ---- grids: rows made by the study itself, at the smallest size ----


@pytest.fixture(scope="module")
def grid_results(source, photo_folder, tmp_path_factory) -> Path:
    """ablation-groups.json, -groupedmixer.json and -table3.json, of a few rows each."""
    root = tmp_path_factory.mktemp("grids")
    latents = str(write_latents(source, str(photo_folder), root / "latents", crop=64, per_picture=2))
    terms = Terms(source, latents, str(photo_folder), str(photo_folder), steps=2, crop=64, limit=1, accelerator="cpu")
    chosen = {"groups": slice(0, 2), "groupedmixer": slice(0, 2), "table3": slice(1, 5, 2)}
    grids = [dataclasses.replace(GRIDS[name], entries=GRIDS[name].entries[part]) for name, part in chosen.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_config.SIZES, "tiny", MICRO)
        study = ablation.prepare(grids, terms, root / "runs", seeds=(0,))
        assert [outcome.error for outcome in study.go()] == [None] * 6
    (root / "data").mkdir()
    ablation.save(study, root / "data" / "results")
    return root / "data"


def test_the_groups_curve_draws_the_saved_rows(grid_results, monkeypatch):
    monkeypatch.setattr(saved_results, "data_folder", lambda: grid_results)
    rows = json.loads((grid_results / "results" / "ablation-groups.json").read_text())["rows"]
    rows = [row for row in rows if row["grid"] == "groups"]  # the others are learning curves
    data, lines = views.groups_data(), views.lines_beside()
    assert list(data["groups"]) == [2, 4] and list(data["bpp"]) == [row["bpp"] for row in rows]
    assert set(lines) == {"Entroformer, parallel", "transformer hyperprior alone"}
    ax = views.groups_curve(data, lines).axes[0]
    points, curve, *level = ax.lines
    assert np.array_equal(points.get_ydata(), data["bpp"]) and np.allclose(curve.get_ydata(), data["bpp"])
    assert {line.get_ydata()[0] for line in level} == set(lines.values())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2\n1 x 2", "4\n1 x 4"]


def test_lines_of_other_terms_are_left_out(grid_results, results_folder):
    for name in ("groups", "table3"):
        found = json.loads((grid_results / "results" / f"ablation-{name}.json").read_text())
        found["settings"]["steps"] += name == "table3"
        (results_folder / f"ablation-{name}.json").write_text(json.dumps(found))
    assert views.lines_beside() == {}


# ---- both systems side by side ----


def kodak_results(folder: Path, rows: list[dict], lmbda: float = 0.02, more: float = 0.0) -> None:
    """Results as published, at two lambdas, of which the second takes twice the bits; more: dB of the last model."""
    for row in rows:
        better = more * (row is rows[-1])
        image = {"image": row["image"], "psnr_db": row["psnr_db"] + better, "ms_ssim": 0.9}
        images = [{**image, "lmbda": at, "bpp": k * row["bpp"]} for at, k in ((0.01, 1), (lmbda, 2))]
        result = {"images": images, "transforms": same_transforms.FAMILY, "variant": row["variant"]}
        (folder / f"{row['model']}-kodak.json").write_text(json.dumps(result))


def published_rows(saved: dict) -> list[dict]:
    """Rows of the study as those of shipped models: a GroupedMixer, the parallel model and the hyperprior."""
    names = {"many": "tiny-grouped", "parallel": "tiny-parallel", "hyperprior": "tiny-hyper"}
    rows = [row for row in saved["rows"] if row["model"] in names]
    return [{**row, "family": "shipped", "model": names[row["model"]]} for row in rows]


def test_the_table_has_the_saved_numbers(saved, results_folder):
    rows = published_rows(saved)
    kodak_results(results_folder, rows)
    assert set(tradeoff.published()) == {row["model"] for row in rows}
    assert same_transforms.side_by_side()["decode_s"].isna().all()  # not measured yet
    assert "–" in readme.both_systems()
    (results_folder / "tradeoff.json").write_text(json.dumps({**saved, "rows": rows}))
    table = same_transforms.side_by_side().set_index("model")
    base = next(row for row in rows if row["variant"] == "parallel")
    for row in rows:
        percent = 100 * (row["bpp"] / base["bpp"] - 1)
        assert table.loc[row["model"], ["percent", "least", "most"]].tolist() == pytest.approx([percent] * 3)
        assert table.loc[row["model"], "decode_s"] == row["decode_s"]
        assert table.loc[row["model"], "context_s"] == row["context_s"]
    text = readme.both_systems()
    assert "GroupedMixer" in text and f"{base['decode_s']:.2f}" in text and "–" not in text


def test_other_qualities_and_lambdas_are_no_comparison(saved, results_folder):
    rows = published_rows(saved)
    for more in (0.1, -0.1):
        kodak_results(results_folder, rows, more=more)
        with pytest.raises(StudyError, match="another quality"):
            same_transforms.side_by_side()
    for more, refused in ((0.019, False), (0.021, True)):
        two = [{"model": name, "image": "x", "psnr_db": 30 + more * i} for i, name in enumerate("ab")]
        with pytest.raises(StudyError, match="other transforms") if refused else contextlib.nullcontext():
            tradeoff._check_quality(two)
    kodak_results(results_folder, rows)
    kodak_results(results_folder, rows[:1], lmbda=0.04)
    with pytest.raises(StudyError, match="other lambdas"):
        same_transforms.side_by_side()


def test_without_results_a_sentence(results_folder, photo_folder):
    for missing in (views.groups_data, same_transforms.side_by_side):
        with pytest.raises(saved_results.NoResult):
            missing()
    with pytest.raises(saved_results.NoResult, match="There is no tradeoff.json among the saved results."):
        saved_results.needed("tradeoff")
    with pytest.raises(StudyError, match="no shipped models"):
        tradeoff.save(photo_folder, out=results_folder / "tradeoff.json")
