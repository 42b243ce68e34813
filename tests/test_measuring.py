"""Measuring on several cores and after a kill gives what one uninterrupted process gives."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import micro_model
from PIL import Image

from entroformer_lib.errors import StudyError
from entroformer_lib.studies import classical
from entroformer_lib.studies.measuring import Coding, finished_rows, means, measure, tasks_of
from entroformer_lib.weights.zoo import save_weights

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


def test_processes_do_not_change_the_result(codings, tmp_path):
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


def test_one_that_cannot_be_coded_ends_it_and_the_finished_stay(codings, tmp_path):
    done, broken = tmp_path / "rows", tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(StudyError, match="broken.png"):
        measure([codings[0], Coding("jpeg", 30, str(broken)), codings[1]], done, jobs=1)
    assert codings[0].task().missing(done) == [] and codings[1].task().missing(done)


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
    words = [sys.executable, "-m", "entroformer_lib", "eval", f"{weights}@0.1", "--data", folder, "--json", out]
    rows = out.with_name("result.json.rows")
    first = subprocess.Popen(list(map(str, words + ["--jobs", "1"])), stdout=subprocess.DEVNULL)
    while first.poll() is None and not list(rows.glob("*/answer.json")):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not out.exists()
    (kept, *_) = [json.loads(path.read_text())["answer"] for path in rows.glob("*/answer.json")]
    (folder / "astronaut.png").rename(folder / "z.png")
    (folder / "._a.png").write_bytes(b"no picture")
    again = subprocess.run(list(map(str, words + ["--jobs", "2"])), capture_output=True, text=True, check=True)
    assert "._a.png is left out: " in again.stderr and not rows.exists()
    images = {row["image"]: row for row in json.loads(out.read_text())["images"]}
    assert list(images) == ["chelsea", "coffee", "rocket", "z"] and again.stdout.count("\n") == 2 + len(images)
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
