"""Sweeps survive: finished runs stay, killed ones go on, failed ones stop nobody, and no run has two answers."""

import dataclasses
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MICRO, small_disk

from entroformer_lib import cluster as clusters
from entroformer_lib.errors import ClusterError, Stopped, StudyError
from entroformer_lib.models import config as model_config
from entroformer_lib.studies.engine import Outcome, Task, complete, perform, sweep, training_task
from entroformer_lib.training.config import TrainConfig


@dataclass(frozen=True)
class Count:
    """Work that counts with a checkpoint after each step, as a training does."""

    steps: int = 3
    seconds: float = 0.0  # for a step

    def __call__(self, folder: Path, answer: str) -> dict:
        note(folder / "begun", os.getpid())
        checkpoint = folder / "checkpoint"
        first = int(checkpoint.read_text()) if checkpoint.exists() else 0
        for step in range(first, self.steps):
            time.sleep(self.seconds)
            note(folder / "counted", step)
            checkpoint.with_suffix(".new").write_text(str(step + 1))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
        note(folder / "ended", time.monotonic())
        return {"steps": self.steps, "answer": answer}


def note(path: Path, what) -> None:
    with open(path, "a") as file:
        file.write(f"{what}\n")


def notes(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def fail(folder: Path, answer: str) -> None:
    raise StudyError("This one cannot be done.")


def stumble(folder: Path, answer: str) -> float:
    return 1 / 0


def stop(folder: Path, answer: str) -> None:
    raise Stopped("Stopped by a signal.")


def tasks(count: int = 3, **options) -> list[Task]:
    return [Task(f"run-{i}", Count(**options), identity={"steps": 3}) for i in range(count)]


def test_a_finished_run_is_not_repeated(tmp_path):
    seen = []
    assert [outcome.error for outcome in sweep(tasks(), tmp_path, report=seen.append)] == [None] * 3
    assert [outcome.name for outcome in seen] == ["run-0", "run-1", "run-2"]
    assert sweep(tasks(), tmp_path) == []
    assert all(len(notes(tmp_path / f"run-{i}" / "begun")) == 1 for i in range(3))
    assert tasks()[0].answer(tmp_path, "answer") == {"steps": 3, "answer": "answer"}


def test_an_answer_that_is_asked_for_later_is_all_that_is_done(tmp_path):
    sweep(tasks(1), tmp_path)
    more = [Task("run-0", Count(), ("answer", "another"), {"steps": 3})]
    assert more[0].missing(tmp_path) == ["another"]
    sweep(more, tmp_path)
    assert more[0].answer(tmp_path, "another")["answer"] == "another"
    assert notes(tmp_path / "run-0" / "counted") == ["0", "1", "2"]


def test_a_failed_run_stops_nobody_and_is_tried_again(tmp_path):
    first, second, third = tasks()
    broken = [Task("run-0", fail), Task("run-1", stumble), third]
    outcomes = {outcome.name: outcome.error for outcome in sweep(broken, tmp_path)}
    assert outcomes["run-0"] == "This one cannot be done." and "ZeroDivisionError" in outcomes["run-1"]
    assert outcomes["run-2"] is None
    again = sweep([Task("run-0", Count()), Task("run-1", Count()), third], tmp_path)
    assert [(o.name, o.error) for o in again] == [("run-0", None), ("run-1", None)]


def test_a_signal_stops_the_sweep(tmp_path):
    with pytest.raises(Stopped):
        sweep([Task("stopped", stop), *tasks()], tmp_path)
    assert not (tmp_path / "run-0").exists()


def test_a_folder_of_other_runs_is_refused(tmp_path):
    sweep(tasks(), tmp_path)
    other = [Task("new", Count()), Task("run-1", Count(), identity={"steps": 4})]
    with pytest.raises(StudyError, match="another steps"):
        sweep(other, tmp_path)
    assert not (tmp_path / "new").exists()  # nothing was started


def test_one_run_has_one_answer_however_many_work_at_it(tmp_path):
    """Four at once at the same run: one works, the others wait and find the answer."""
    task = tasks(1, seconds=0.05)[0]
    found: list[Outcome] = []
    threads = [threading.Thread(target=lambda: found.append(perform(task, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.error for outcome in found] == [None] * 4
    assert len(notes(tmp_path / "run-0" / "begun")) == 1


def test_a_run_that_somebody_is_at_comes_last(tmp_path):
    slow = Task("run-0", Count(seconds=0.3), identity={"steps": 3})
    other = threading.Thread(target=perform, args=(slow, tmp_path))
    other.start()
    while other.is_alive() and not notes(tmp_path / "run-0" / "begun"):
        time.sleep(0.01)
    assert [outcome.name for outcome in sweep(tasks(), tmp_path)] == ["run-1", "run-2", "run-0"]
    other.join()
    assert len(notes(tmp_path / "run-0" / "begun")) == 1


# ---- on dask ----


def kill_a_worker_in_the_middle(root: Path) -> None:
    """SIGKILL for the process that works at run-0, once it has counted to five."""
    while len(notes(root / "run-0" / "counted")) < 5:
        time.sleep(0.01)
    os.kill(int(notes(root / "run-0" / "begun")[0]), signal.SIGKILL)


def test_a_worker_is_killed_in_the_middle(tmp_path, warm_workers):
    """Two processes, six runs, one of the processes killed: nothing lost, nothing done twice."""
    killer = threading.Thread(target=kill_a_worker_in_the_middle, args=(tmp_path,))
    killer.start()
    todo = tasks(6, steps=20, seconds=0.05)
    outcomes = sweep(todo, tmp_path, workers=2)
    killer.join()
    assert sorted((o.name, o.error) for o in outcomes) == [(f"run-{i}", None) for i in range(6)]
    begun = [notes(tmp_path / f"run-{i}" / "begun") for i in range(6)]
    assert len(begun[0]) == 2 and begun[0][0] != begun[0][1]  # killed, and taken up by another process
    assert [len(b) for b in begun[1:]] == [1] * 5
    assert str(os.getpid()) not in sum(begun, []) and len(set(sum(begun, []))) >= 2
    for i in range(6):
        counted = notes(tmp_path / f"run-{i}" / "counted")
        assert set(counted) == {str(step) for step in range(20)}
        assert len(counted) <= 21  # at most the step whose checkpoint was not written yet
        assert len(notes(tmp_path / f"run-{i}" / "ended")) == 1
        assert todo[i].answer(tmp_path, "answer") == {"steps": 20, "answer": "answer"}
    assert sweep(todo, tmp_path, workers=2) == []


@pytest.fixture
def cluster():
    """A scheduler that answers, with two workers, one of which has a GPU by its word."""
    from distributed import Scheduler, SpecCluster, Worker

    options = [{"nthreads": 2, "dashboard": False, "name": name} for name in ("without", "with")]
    options[1]["resources"] = {"GPU": 1}
    workers = {number: {"cls": Worker, "options": each} for number, each in enumerate(options)}
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0"}}
    with SpecCluster(workers, scheduler) as cluster:
        cluster.wait_for_workers(2)
        yield cluster


def where(folder: Path, answer: str) -> str:
    from distributed import get_worker

    return get_worker().name


def test_on_a_running_scheduler_a_run_takes_a_gpu(cluster, tmp_path):
    todo = [Task(f"run-{i}", where) for i in range(4)]
    assert [outcome.error for outcome in sweep(todo, tmp_path, scheduler=cluster.scheduler_address)] == [None] * 4
    assert [task.answer(tmp_path) for task in todo] == ["with"] * 4


def test_a_failure_on_dask_is_an_outcome(cluster, tmp_path):
    outcomes = sweep([Task("bad", fail), *tasks(1)], tmp_path, scheduler=cluster.scheduler_address)
    assert {o.name: o.error for o in outcomes} == {"bad": "This one cannot be done.", "run-0": None}


def test_two_sweeps_on_one_scheduler_share_the_runs(cluster, tmp_path):
    address, found = cluster.scheduler_address, []
    threads = [
        threading.Thread(target=lambda: found.extend(sweep(tasks(2, seconds=0.1), tmp_path, scheduler=address)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {o.error for o in found} == {None}
    assert [len(notes(tmp_path / f"run-{i}" / "begun")) for i in range(2)] == [1, 1]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense", "http://"])
def test_a_scheduler_that_does_not_answer(address, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "PATIENCE", 1.0)
    with pytest.raises(ClusterError, match="does not answer"):
        sweep(tasks(), tmp_path, scheduler=address)
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_without_workers(tmp_path):
    from distributed import Scheduler, SpecCluster

    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0"}}
    with SpecCluster({}, scheduler) as cluster, pytest.raises(ClusterError, match="no workers"):
        sweep(tasks(), tmp_path, scheduler=cluster.scheduler_address)
    assert list(tmp_path.iterdir()) == []


def test_answers_are_whole_or_not_there(tmp_path):
    """What cannot be written as JSON leaves nothing that looks like an answer."""
    outcome = perform(Task("odd", lambda folder, answer: {1, 2}), tmp_path)
    assert "TypeError" in outcome.error
    assert sorted(path.name for path in (tmp_path / "odd").iterdir()) == ["lock", "task.json", "worker"]
    assert json.loads((tmp_path / "odd" / "task.json").read_text()) == {}


# ---- trainings ----


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice
def test_a_training_is_a_run(source, photo_folder, tmp_path, monkeypatch):
    """Its answer tells what it took. Other steps are another run, another place of the data is not."""
    monkeypatch.setitem(model_config.SIZES, "tiny", MICRO)
    out = str(tmp_path / "runs" / "one")
    config = TrainConfig(str(photo_folder), out, steps=1, batch=1, crop=64, accelerator="cpu", devices=1)
    task, root = training_task(config), tmp_path / "runs"
    complete([task], root)
    assert task.answer(root, "weights")["steps"] == 1 and (root / "one" / "weights.safetensors").exists()
    stamp = (root / "one" / "weights.safetensors").stat().st_mtime_ns
    complete([training_task(dataclasses.replace(config, data="elsewhere"))], root)
    assert (root / "one" / "weights.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(StudyError, match="another steps"):
        complete([training_task(dataclasses.replace(config, steps=2))], root)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_sweep_without_workers_is_refused(workers, tmp_path):
    with pytest.raises(StudyError, match="workers must be at least 1"):
        sweep(tasks(), tmp_path, workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_the_first_failure_ends_what_must_be_complete(tmp_path):
    with pytest.raises(StudyError, match="cannot be done"):
        complete([Task("bad", fail), *tasks()], tmp_path)
    assert not (tmp_path / "run-0").exists()


def test_another_identity_is_another_folder(tmp_path):
    one, other = (Task.by_identity("run", Count(), {"weights": weights}) for weights in ("a", "b"))
    complete([one, other, one], tmp_path)
    assert one.name != other.name and one.answer(tmp_path) == other.answer(tmp_path)
    assert len(notes(tmp_path / one.name / "begun")) == 1


def test_a_full_disk_leaves_no_half_answer(tmp_path):
    task = Task("run", lambda folder, answer: "x" * 1000)
    assert small_disk(lambda: perform(task, tmp_path)).error is not None
    assert task.missing(tmp_path) == ["answer"] and perform(task, tmp_path).error is None
