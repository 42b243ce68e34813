"""Measuring on several cores and after a kill gives what one uninterrupted process gives."""

import dataclasses
import io
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import MICRO, micro_model
from PIL import Image

from entroformer_lib.cli import evaluate
from entroformer_lib.codec.quality import ms_ssim, psnr_db
from entroformer_lib.errors import StudyError, UserError
from entroformer_lib.models import config as model_config
from entroformer_lib.studies import ablation, attention, classical, position_masking
from entroformer_lib.studies.ablation_grids import GRIDS, Terms
from entroformer_lib.studies.measuring import Coding, finished_rows, means, measure, save, tasks_of
from entroformer_lib.studies.rate_distortion import measured, names_of, pictures_to_test
from entroformer_lib.weights.zoo import load_model, save_weights, weights_digest

TIMES = ("encode_s", "decode_s")


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    save_weights(micro_model(lmbdas=(0.01, 0.1)), path, {})
    return path


@pytest.fixture
def codings(weights, photo_folder):
    return [
        *tasks_of(str(weights), sorted(photo_folder.iterdir())[:2]),
        Coding("jpeg", 30, str(photo_folder / "astronaut.png")),
    ]


def test_codings_are_all_settings_on_all_pictures(weights):
    assert [(c.setting, c.picture) for c in tasks_of(str(weights), ["a", "b"])] == [
        (0.01, "a"), (0.01, "b"), (0.1, "a"), (0.1, "b"),
    ]  # fmt: skip
    assert [c.setting for c in tasks_of(f"{weights}@0.03", ["a"])] == [None]
    assert len(tasks_of("jpeg", ["a"])) == len(classical.CODECS["jpeg"][1])


def test_processes_do_not_change_the_result(codings, tmp_path, warm_workers):
    seen = []
    alone = measure(codings, tmp_path / "alone", jobs=1)
    together = measure(codings, tmp_path / "together", jobs=2, report=seen.append)
    assert without_times(together) == without_times(alone)
    assert seen == together  # in the order of the codings
    assert {(row["codec"].split("/")[-1], row["setting"]) for row in alone} == {
        ("micro.safetensors", 0.01), ("micro.safetensors", 0.1), ("jpeg", 30),
    }  # fmt: skip


def test_goes_on_where_it_was(codings, tmp_path):
    """Rows that are there stay as they are, with their times; the others are measured."""
    seen, broken = [], RuntimeError("the result cannot be written")
    with pytest.raises(RuntimeError), finished_rows(tmp_path / "result.json") as done:
        first = measure(codings[:2], done, jobs=1)
        raise broken
    with finished_rows(tmp_path / "result.json") as done:
        rows = measure(codings, done, jobs=1, report=seen.append)
        assert rows[:2] == first and len(rows) == len(codings) and seen == rows
        assert measure(codings, done, jobs=1) == rows
    assert not done.exists()


def test_means_are_of_each_codec_and_setting(codings, tmp_path):
    rows = measure(codings, tmp_path, jobs=1)
    low, high, jpeg = means(rows)
    assert low["setting"] == 0.01 and low["images"] == 2 and low["bpp"] < high["bpp"]
    assert low["bpp"] == pytest.approx((rows[0]["bpp"] + rows[1]["bpp"]) / 2)
    assert jpeg["codec"] == "jpeg" and jpeg["bpp"] == pytest.approx(rows[-1]["bpp"]) and jpeg["bpp_estimated"] is None


def test_one_that_cannot_be_coded_is_named_after_the_others_are_done(codings, tmp_path):
    done, broken, seen = tmp_path / "rows", tmp_path / "broken.png", []
    broken.write_bytes(b"no picture")
    with pytest.raises(StudyError, match="broken.png: (.|\n)*1 of 3 could not be measured"):
        measure([codings[0], Coding("jpeg", 30, str(broken)), codings[1]], done, jobs=1, report=seen.append)
    assert [row["image"] for row in seen] == ["astronaut", "chelsea"]
    assert all(coding.task().missing(done) == [] for coding in codings[:2])


# ---- names belong to the run, values to the bytes ----


def named(folder: Path, **pictures: Image.Image) -> Path:
    """A folder with a picture under each name."""
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
    return folder


def test_equal_pictures_are_measured_once_and_keep_their_names(photo, tmp_path):
    small = photo.crop((0, 0, 64, 64))
    folder = named(tmp_path / "photos", first=small, second=small, other=small.rotate(90))
    codings, done = [c for c in tasks_of("jpeg", pictures_to_test(folder)) if c.setting == 30], tmp_path / "done"
    rows = measure(codings, done, jobs=1)
    assert [row["image"] for row in rows] == ["first", "other", "second"] and len(list(done.iterdir())) == 2
    assert {**rows[0], "image": "second"} == rows[2]
    (folder / "other.png").rename(folder / "a.png")
    again = measure([c for c in tasks_of("jpeg", pictures_to_test(folder)) if c.setting == 30], done, jobs=1)
    assert again == [{**rows[1], "image": "a"}, rows[0], rows[2]] and len(list(done.iterdir())) == 2


def test_pictures_of_one_name_in_two_folders_are_told_apart(photo, tmp_path):
    small = photo.crop((0, 0, 64, 64))
    paths = pictures_to_test(named(tmp_path, **{"x/a": small, "y/a": small.rotate(90), "y/b": small}))
    assert names_of(paths) == ["x/a.png", "y/a.png", "b"]
    assert [coding.row({})["image"] for coding in tasks_of("jpeg", paths)[:3]] == ["x/a.png", "y/a.png", "b"]


def test_a_model_that_was_moved_is_called_by_its_new_place(weights, photo_folder, tmp_path):
    moved, picture = tmp_path / "micro.safetensors", str(photo_folder / "astronaut.png")
    moved.write_bytes(weights.read_bytes())
    (here,) = measure([Coding(str(weights), 0.1, picture)], tmp_path / "done", jobs=1)
    (there,) = measure([Coding(str(moved), 0.1, picture)], tmp_path / "done", jobs=1)
    assert there == {**here, "codec": str(moved)}


def test_another_encoder_another_level_or_a_new_file_is_another_run(weights, photo_folder, tmp_path):
    """The digest in a file covers what the decoder needs; a measured rate depends on the encoder too."""
    path, picture = tmp_path / "micro.safetensors", str(photo_folder / "astronaut.png")
    model = micro_model(lmbdas=(0.01, 0.1))
    with torch.no_grad():
        model.g_a[-1].weight.mul_(1.5)
    save_weights(model, path, {})
    assert weights_digest(load_model(path, "cpu")) == weights_digest(load_model(weights, "cpu"))
    assert Coding(str(path), 0.1, picture).task().name != Coding(str(weights), 0.1, picture).task().name
    usual = Coding(str(weights), None, picture).task().name
    assert Coding(str(weights), 0.1, picture).task().name != usual == Coding(str(weights), None, picture).task().name
    (before,) = measure([Coding(str(path), 0.1, picture)], tmp_path / "done", jobs=1)
    path.write_bytes(weights.read_bytes())
    (after,) = measure([Coding(str(path), 0.1, picture)], tmp_path / "done", jobs=1)
    assert before["bytes"] != after["bytes"]


def test_answers_that_hold_names_belong_to_these_pictures(source, photo, tmp_path, monkeypatch):
    """An ablation refuses a folder of other pictures, or its answers would be told of the wrong ones."""
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    folder = named(tmp_path / "photos", a=photo, b=photo.rotate(180))
    terms = Terms(source, str(tmp_path / "latents"), str(folder), str(folder), crop=64, accelerator="cpu")
    study = ablation.prepare([GRIDS["table1"]], terms, tmp_path / "runs", seeds=(0,))
    note = tmp_path / "runs" / study.tasks[0].name / "task.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(study.tasks[0].identity))
    ablation.prepare([GRIDS["table1"]], terms, tmp_path / "runs", seeds=(0,))
    (folder / "a.png").rename(folder / "c.png")
    with pytest.raises(StudyError, match="another test_pictures"):
        ablation.prepare([GRIDS["table1"]], terms, tmp_path / "runs", seeds=(0,))


def test_a_saved_attention_study_is_found_by_its_weights(photo_folder, tmp_path):
    """A model of your own that is called as a shipped one has no saved study."""
    save_weights(micro_model("parallel", seed=1), tmp_path / "tiny-parallel.safetensors", {})
    assert attention.saved_of(load_model(tmp_path / "tiny-parallel.safetensors", "cpu")) is None
    shipped = load_model("blocks-parallel", "cpu")
    assert attention.saved_of(shipped)["provenance"]["model"] == "blocks-parallel"
    shipped.level = 2.0  # another rate than that of the study
    assert attention.saved_of(shipped) is None


# ---- refused before any work ----


@pytest.mark.parametrize("options, sentence", [
    ({"limit": -1}, "limit must be at least 1; it is -1"),
    ({"limit": 0}, "limit must be at least 1"),
    ({"jobs": 0}, "jobs must be at least 1"),
    ({"json_file": "{}"}, "is a folder; the result must be a file"),
    ({"json_file": "{}/a.png/r.json"}, "cannot be made"),
    ({"data": "{}/nothing"}, "no folder"),
    ({"data": "{}/bad"}, "no picture in .* that can be read"),
])  # fmt: skip
def test_eval_refuses_before_any_work(options, sentence, photo, tmp_path):
    """The model, which is loaded next, does not exist."""
    named(tmp_path, a=photo)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no picture")
    paths = {key: Path(value.format(tmp_path)) for key, value in options.items() if isinstance(value, str)}
    with pytest.raises(UserError, match=sentence):
        evaluate("nosuch", **{"data": tmp_path, **options, **paths})
    assert not list(tmp_path.glob("*.rows"))


def test_studies_refuse_before_any_work(source, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    terms = Terms(source, str(tmp_path / "latents"), str(photo_folder), str(photo_folder), crop=64, accelerator="cpu")
    study = ablation.prepare([GRIDS["table1"]], terms, tmp_path / "runs", seeds=(0,))
    limited = dataclasses.replace(terms, limit=0)
    for call, sentence in (
        (lambda: study.go(workers=0), "workers must be at least 1"),
        (lambda: ablation.prepare([GRIDS["table1"]], limited, tmp_path, (0,)), "limit must be at least 1"),
        (lambda: ablation.prepare([GRIDS["table1"]], terms, tmp_path, (0, -1)), "seed must be at least 0"),
        (lambda: attention.main("nosuch", photo_folder, queries=0), "queries must be at least 1"),
        (lambda: attention.main("nosuch", photo_folder, seed=-1), "seed must be at least 0"),
        (lambda: attention.main("nosuch", photo_folder, out=tmp_path), "is a folder"),
        (lambda: position_masking.measure(tmp_path, photo_folder, crop=0), "crop must be at least 1"),
        (lambda: position_masking.train_models("nosuch", "", tmp_path, only=("x",)), "no variant 'x'; there are cnn"),
        (lambda: save((), photo_folder, tmp_path / "r.json"), "codecs must be at least 1"),
        (lambda: save(("jpeg",), photo_folder, tmp_path / "r.json", jobs=0), "jobs must be at least 1"),
    ):
        with pytest.raises(StudyError, match=sentence):
            call()
    assert list(tmp_path.iterdir()) == []


def test_other_weights_and_other_pictures_are_other_runs(tmp_path, weights, photo_folder):
    changed, moved = tmp_path / "astronaut.png", tmp_path / "moved" / "astronaut.png"
    changed.write_bytes((photo_folder / "chelsea.png").read_bytes())
    moved.parent.mkdir()
    moved.write_bytes((photo_folder / "astronaut.png").read_bytes())
    picture = str(photo_folder / "astronaut.png")
    task = Coding("jpeg", 30, picture).task()
    assert Coding("jpeg", 30, str(changed)).task().name != task.name == Coding("jpeg", 30, str(moved)).task().name
    other = tmp_path / "micro.safetensors"
    save_weights(micro_model(seed=1, lmbdas=(0.01, 0.1)), other, {})
    assert Coding(str(other), 0.01, picture).task().name != Coding(str(weights), 0.01, picture).task().name


def test_a_file_in_the_place_of_the_rows_is_refused(tmp_path):
    (tmp_path / "result.json.rows").write_text("something else\n")
    with pytest.raises(StudyError, match="remove it"), finished_rows(tmp_path / "result.json"):
        pass


def test_eval_killed_and_started_again(weights, photo_folder, tmp_path):
    """The command line, killed the hard way after its first row. Then pictures are renamed, and one is damaged: names
    are those of the second start, and what was measured stays."""
    out, folder = tmp_path / "result.json", shutil.copytree(photo_folder, tmp_path / "photos")
    words = ("eval", f"{weights}@0.1", "--data", folder, "--json", out, "--jobs", 1)
    rows = out.with_name("result.json.rows")
    first = warm.start(warm.entroformer, *words, output=tmp_path / "first.txt")
    while first.is_alive() and not list(rows.glob("*/answer.json")):
        time.sleep(0.01)
    first.kill()
    first.join()
    assert not out.exists()
    (kept, *_) = [json.loads(path.read_text())["answer"] for path in rows.glob("*/answer.json")]
    (folder / "astronaut.png").rename(folder / "z.png")
    (folder / "._a.png").write_bytes(b"no picture")
    code, said = warm.run(*words, output=tmp_path / "again.txt")
    assert code == 0 and "._a.png is left out: " in said and not rows.exists()
    images = {row["image"]: row for row in json.loads(out.read_text())["images"]}
    assert list(images) == ["chelsea", "coffee", "rocket", "z"] and said.count("\n") == 3 + len(images)
    assert images["z"] == {"image": "z", **kept}


@pytest.mark.parametrize("name", [name for name in classical.CODECS if classical.available(name)])
def test_classical_codecs_give_more_for_more(name, photo):
    low, high = classical.CODECS[name][1][0], classical.CODECS[name][1][-1]
    sizes = [len(classical.coded(photo, name, setting)) for setting in (low, high)]
    assert sizes[0] < sizes[1]
    assert Image.open(io.BytesIO(classical.coded(photo, name, high))).size == photo.size


def test_the_jpeg_of_a_size_is_the_smallest_that_has_it(photo):
    def size_at(quality: int) -> int:
        return len(classical.coded(photo, "jpeg", quality))

    data, quality = classical.jpeg_of_size(photo, 4000)
    assert size_at(quality - 1) < 4000 <= len(data) == size_at(quality)
    assert classical.jpeg_of_size(photo, 10**9)[1] == 95 and classical.jpeg_of_size(photo, 1)[1] == 1


def test_a_codec_that_is_not_there(photo):
    with pytest.raises(StudyError, match="no codec 'bpg'; it has jpeg"):
        classical.coded(photo, "bpg", 30)


def test_qualities_of_pictures_that_differ_by_a_known_amount():
    a, b = (Image.new("RGB", (8, 8), (100, 100, blue)) for blue in (100, 110))
    assert psnr_db(a, b) == pytest.approx(10 * math.log10(3 * 255**2 / 100)) and psnr_db(a, a) == math.inf
    flat, black = (Image.new("RGB", (176, 176), (v, v, v)) for v in (2, 0))
    luminance = 6.5025 / (2**2 + 6.5025)  # (0.01 * 255)^2; contrast and structure are 1
    assert ms_ssim(flat, black) == pytest.approx(luminance**0.1333, abs=1e-4)
    assert ms_ssim(flat, flat) == pytest.approx(1) and ms_ssim(flat.crop((0, 0, 160, 176)), black) is None


def test_another_effort_is_another_run(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    save_weights(micro_model(), tmp_path / "micro.safetensors", {"lmbda": 0.02})
    names = {
        Coding(str(tmp_path / "micro.safetensors"), None, str(tmp_path / "a.png"), effort=e).task().name
        for e in (0, 2, 8)
    }
    assert len(names) == 3


def test_seconds_belong_to_what_took_them(photo):
    row = measured(photo, lambda: time.sleep(0.2) or b"12", lambda data: photo)
    assert row["encode_s"] >= 0.2 > row["decode_s"] and row["bytes"] == 2
