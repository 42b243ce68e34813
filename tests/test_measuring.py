"""Measuring on several cores and after a kill gives what one uninterrupted process gives."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import micro_model
from PIL import Image

from entroformer_lib.errors import StudyError
from entroformer_lib.studies import classical, measuring
from entroformer_lib.studies.measuring import Task, measure, tasks_of
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
def tasks(weights, photo_folder):
    return [
        *tasks_of(str(weights), sorted(photo_folder.iterdir())[:2]),
        Task("jpeg", 30, str(photo_folder / "astronaut.png")),
    ]


def test_tasks_are_all_settings_on_all_pictures(weights):
    assert [(t.setting, t.picture) for t in tasks_of(str(weights), ["a", "b"])] == [
        (0.01, "a"), (0.01, "b"), (0.1, "a"), (0.1, "b"),
    ]  # fmt: skip
    assert [t.setting for t in tasks_of(f"{weights}@0.03", ["a"])] == [None]
    assert len(tasks_of("jpeg", ["a"])) == len(classical.CODECS["jpeg"][1])


def test_processes_do_not_change_the_result(tasks):
    seen = []
    alone = measure(tasks, jobs=1)
    together = measure(tasks, jobs=2, report=seen.append)
    assert without_times(together) == without_times(alone)
    assert seen == together  # in the order of the tasks
    assert {(row["codec"].split("/")[-1], row["setting"]) for row in alone} == {
        ("micro.safetensors", 0.01), ("micro.safetensors", 0.1), ("jpeg", 30),
    }  # fmt: skip


def test_goes_on_after_a_line_was_cut_short(tasks, tmp_path, monkeypatch):
    done = tmp_path / "rows"
    whole = measure(tasks, done, jobs=1)
    lines = done.read_text().splitlines(keepends=True)
    assert len(lines) == len(tasks)
    done.write_text("".join(lines[:2]) + lines[2][:40])
    row, measured = Task.row, []
    monkeypatch.setattr(Task, "row", lambda task: measured.append(task) or row(task))
    assert without_times(measure(tasks, done, jobs=1)) == without_times(whole)
    assert measured == tasks[2:]
    assert measure(tasks, done, jobs=1)[:2] == whole[:2]  # times too: nothing is measured twice
    assert measured == tasks[2:]


def test_other_weights_and_other_pictures_are_other_tasks(tasks, tmp_path, weights, photo_folder):
    renamed = tmp_path / "astronaut.png"
    renamed.write_bytes((photo_folder / "chelsea.png").read_bytes())
    moved = tmp_path / "moved.png"
    moved.write_bytes((photo_folder / "astronaut.png").read_bytes())
    key = Task("jpeg", 30, str(photo_folder / "astronaut.png")).key()
    assert Task("jpeg", 30, str(renamed)).key() != key == Task("jpeg", 30, str(moved)).key()
    other = tmp_path / "micro.safetensors"
    save_weights(micro_model(seed=1, lmbdas=(0.01, 0.1)), other, {})
    picture = str(photo_folder / "astronaut.png")
    assert Task(str(other), 0.01, picture).key() != Task(str(weights), 0.01, picture).key()


def test_a_file_that_holds_something_else_is_refused(tasks, tmp_path):
    done = tmp_path / "rows"
    done.write_text("something\nelse\n")
    with pytest.raises(StudyError, match="remove it"):
        measure(tasks, done, jobs=1)


def test_eval_killed_and_started_again(weights, photo_folder, tmp_path):
    """The command line, killed the hard way after its first row."""
    out = tmp_path / "result.json"
    words = [sys.executable, "-m", "entroformer_lib", "eval", f"{weights}@0.1", "--data", photo_folder, "--json", out]
    rows = out.with_name("result.json.rows")
    first = subprocess.Popen(list(map(str, words + ["--jobs", "1"])), stdout=subprocess.DEVNULL)
    while first.poll() is None and not (rows.exists() and rows.read_text().count("\n")):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not out.exists() and rows.read_text()
    kept = rows.read_text().splitlines()[0]
    again = subprocess.run(list(map(str, words + ["--jobs", "2"])), capture_output=True, text=True, check=True)
    assert again.stdout.count("\n") == 2 + len(os.listdir(photo_folder)) and not rows.exists()
    assert str(measuring.json.loads(kept)["row"]["encode_s"]) in out.read_text()


@pytest.mark.parametrize("name", [name for name in classical.CODECS if classical.available(name)])
def test_classical_codecs_give_more_for_more(name, photo):
    low, high = classical.CODECS[name][1][0], classical.CODECS[name][1][-1]
    sizes = [len(classical.coded(photo, name, setting)) for setting in (low, high)]
    assert sizes[0] < sizes[1]
    assert Image.open(io.BytesIO(classical.coded(photo, name, high))).size == photo.size


def test_a_codec_that_is_not_there(photo):
    with pytest.raises(StudyError, match="no codec 'bpg'; it has jpeg"):
        classical.coded(photo, "bpg", 30)
