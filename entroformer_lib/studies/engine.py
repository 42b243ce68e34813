"""The experiment engine: many runs that survive, each in a folder, one after the other or on dask.distributed.

A task is one run. It has a name, an identity (what its answers depend on) and work that gives its answers. Each answer
is kept as a JSON file in the run's folder, written whole or not at all. From that follows the rest:

- A finished run is never repeated: its answers are there.
- A killed sweep goes on: the same call again does what is missing, and a training goes on from its checkpoint.
- A failed run is reported and does not stop the others.
- One run has one answer: its folder is locked while somebody works in it. The lock is the operating system's, so that
  of a killed process is free at once. Whoever comes second waits, and finds the answer there.

A study says only what its runs are, how one is performed, and which table comes out.

On dask every run is one task (cluster.py); where workers have GPUs (`dask worker --resources "GPU=1"`), each run takes
one.
"""

import dataclasses
import functools
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from entroformer_lib.cluster import over, processes
from entroformer_lib.errors import Stopped, StudyError, in_words
from entroformer_lib.files import read_json, remove_parts, write_bytes
from entroformer_lib.studies.commands import at_least
from entroformer_lib.training.config import RUNTIME_FIELDS, TrainConfig

Work = Callable[[Path, str], Any]


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    name: of its folder. work: called with the folder and the name of an answer that is missing, returns it (anything
    JSON), and goes on where a killed one stopped; dask sends it to other processes. answers: what the run gives, in
    this order. identity: what the answers depend on (JSON); a folder in which something else began is refused.
    """

    name: str
    work: Work
    answers: tuple[str, ...] = ("answer",)
    identity: dict = field(default_factory=dict)

    @classmethod
    def by_identity(cls, label: str, work: Work, identity: dict) -> "Task":
        """A run of one answer whose folder is named after its identity: what depends on something else has another
        folder beside it.

        label: begins the folder's name; what may be renamed is no label, or the run would be another one then
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return cls(f"{label[:60]}-{digest[:16]}", work, identity=identity)

    def missing(self, root: Path) -> list[str]:
        """Answers that are not there yet."""
        return [name for name in self.answers if not (root / self.name / f"{name}.json").exists()]

    def answer(self, root: Path, name: str = "answer") -> Any:
        """An answer that is there."""
        return self._saved(root, name)["answer"]

    def seconds(self, root: Path, name: str = "answer") -> float:
        """What an answer took."""
        return self._saved(root, name)["seconds"]

    def _saved(self, root: Path, name: str) -> dict:
        return read_json(root / self.name / f"{name}.json")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.  error: a sentence, or None where all answers are there. seconds: of this attempt."""

    name: str
    error: str | None
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.error or 'done'} ({self.seconds:.0f} s)"


Report = Callable[[Outcome], None]


def check(tasks: Iterable[Task], root: Path) -> None:
    """Refuses a sweep in whose folder runs of another kind have begun.

    Raises:
        StudyError: names the run and what differs.
    """
    for task in tasks:
        note = root / task.name / "task.json"
        found = read_json(note) if note.exists() else task.identity
        for key in sorted({*found, *task.identity}):
            was, is_now = str(found.get(key))[:60], str(task.identity.get(key))[:60]
            if found.get(key) != task.identity.get(key):
                raise StudyError(
                    f"The folder {note.parent} holds a run with another {key} ({was}, and not {is_now}); choose "
                    "another folder."
                )


def sweep(
    tasks: list[Task],
    root: Path,
    scheduler: str | None = None,
    workers: int = 1,
    report: Report = lambda outcome: None,
    own_gpu: bool = True,
) -> list[Outcome]:
    """Does what is missing of all tasks.

    Args:
        tasks: the runs, in the order in which they begin.
        root: the folder of their folders.
        scheduler: address of a running dask scheduler, such as tcp://host:8786.
        workers: without a scheduler: 1 works here, one run after the other; more are processes of a local cluster.
        report: called with each outcome as soon as it is there. What it raises ends the sweep.
        own_gpu: on a machine with GPUs each process of the local cluster has one to itself.

    Returns:
        Outcomes of the runs that were not finished before.

    Raises:
        StudyError: workers below 1, or runs of another kind lie in `root`.
        ClusterError: the scheduler does not answer or has no workers.
        Stopped: a signal stopped a training in this process.
    """
    at_least(1, workers=workers)
    check(tasks, root)
    left = list({task.name: task for task in tasks if task.missing(root)}.values())
    outcomes = []
    with processes(scheduler, min(workers, len(left)), own_gpu) as client:
        for wait in (False, True):  # runs that somebody else is at come last
            work, put_off = functools.partial(perform, root=root.resolve(), wait=wait), []
            for number, outcome in over(work, left, client, lambda task, error: Outcome(task.name, error, 0.0)):
                if outcome is None:
                    put_off.append(left[number])
                else:
                    outcomes.append(outcome)
                    report(outcome)
            left = put_off
    return outcomes


def complete(tasks: list[Task], root: Path, report: Report = lambda outcome: None, **how) -> None:
    """`sweep` where every run is needed: it ends with the first run that fails.

    Args:
        how: scheduler, workers, own_gpu, as `sweep` takes them.

    Raises:
        StudyError: the error of that run. What is finished stays.
    """

    def refuse(outcome: Outcome) -> None:
        if outcome.error is not None:
            raise StudyError(outcome.error)
        report(outcome)

    sweep(tasks, root, report=refuse, **how)


def perform(task: Task, root: Path, wait: bool = True) -> Outcome | None:
    """Does what is missing of one run, alone in its folder.

    Args:
        wait: for somebody else who works in the folder; without it None is returned at once.
    """
    folder, begin = root / task.name, time.monotonic()
    error = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=-1 if wait else 0):
            remove_parts(folder)
            (folder / "worker").write_text(f"{socket.gethostname()} {os.getpid()}\n")  # for people: who works here
            check([task], root)
            write_bytes(folder / "task.json", json.dumps(task.identity, indent=1).encode())
            for name in task.missing(root):
                start = time.monotonic()
                answer = task.work(folder, name)
                saved = {"answer": answer, "seconds": round(time.monotonic() - start, 2)}
                write_bytes(folder / f"{name}.json", json.dumps(saved).encode())
    except Timeout:
        return None
    except Stopped:
        raise
    except Exception as problem:
        error = in_words(problem)
    return Outcome(task.name, error, round(time.monotonic() - begin, 2))


# ---- runs that are trainings ----


def training_task(config: TrainConfig, progress: bool = False) -> Task:
    """A training as a run of one answer, `weights`; its folder is config.out.  progress: show a bar"""

    def work(folder: Path, answer: str) -> dict:
        return trained(config, progress)

    return Task(Path(config.out).name, work, ("weights",), identity_of(config))


def identity_of(config: TrainConfig) -> dict:
    """What a training depends on: all fields but those that may differ when a run is continued."""
    fields = dataclasses.asdict(config)
    return json.loads(json.dumps({k: v for k, v in fields.items() if k not in {*RUNTIME_FIELDS, "init"}}))


def trained(config: TrainConfig, progress: bool = False, watch: Callable | None = None) -> dict:
    """Trains, or goes on where a killed run stopped.

    Args:
        config: the run.
        progress, watch: see `training.loop.train`.

    Returns:
        train_seconds, steps, device, weights_sha256; the weights lie in the run's folder.
    """
    from entroformer_lib.training.loop import train
    from entroformer_lib.weights.zoo import load_model, weights_digest

    model = load_model(train(config, progress=progress, watch=watch))
    return {
        "train_seconds": model.card["train_seconds"],
        "steps": config.steps,
        "device": model.card["device"],
        "weights_sha256": weights_digest(model).hex(),
    }
