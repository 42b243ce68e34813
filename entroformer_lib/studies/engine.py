"""The experiment engine: many runs that survive, each in a folder, one after the other or on dask.distributed.

A task is one run. It has a name, an identity (what its answers depend on) and work that gives its answers. Each answer
is kept as a JSON file in the run's folder, written whole or not at all. From that follows the rest:

- A finished run is never repeated: its answers are there.
- A killed sweep goes on: the same call again does what is missing, and a training goes on from its checkpoint.
- A failed run is reported and does not stop the others.
- One run has one answer: its folder is locked while somebody works in it. The lock is the operating system's, so that
  of a killed process is free at once. Whoever comes second waits, and finds the answer there.

A study says only what its runs are, how one is performed, and which table comes out.

On dask every run is one task; where workers have GPUs (`dask worker --resources "GPU=1"`), each run takes one. Workers
on other machines need this library and the same folder under the same path.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from entroformer_lib.errors import Stopped, StudyError, UserError
from entroformer_lib.files import remove_parts, write_bytes
from entroformer_lib.studies.commands import at_least
from entroformer_lib.training.config import RUNTIME_FIELDS, TrainConfig

PATIENCE = 10.0  # seconds that a scheduler has to answer
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
        return json.loads((root / self.name / f"{name}.json").read_text())


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
        found = json.loads(note.read_text()) if note.exists() else task.identity
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
        StudyError: workers below 1, the scheduler does not answer or has no workers, or runs of another kind lie in
            `root`.
        Stopped: a signal stopped a training in this process.
    """
    at_least(1, workers=workers)
    check(tasks, root)
    left = list({task.name: task for task in tasks if task.missing(root)}.values())
    workers = min(workers, len(left))
    with contextlib.ExitStack() as stack:
        if scheduler is not None:
            found = _on_dask(left, root, stack.enter_context(connected(scheduler)))
        elif workers > 1:
            found = _on_dask(left, root, stack.enter_context(local_cluster(workers, own_gpu)))
        else:
            found = _one_by_one(left, root)
        outcomes = []
        for outcome in found:
            outcomes.append(outcome)
            report(outcome)
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
        error = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
    return Outcome(task.name, error, round(time.monotonic() - begin, 2))


def _one_by_one(tasks: list[Task], root: Path) -> Iterator[Outcome]:
    """Runs that somebody else is at come last."""
    left, put_off = deque(tasks), set()
    while left:
        task = left.popleft()
        outcome = perform(task, root, wait=task.name in put_off)
        if outcome is None:
            put_off.add(task.name)
            left.append(task)
        else:
            yield outcome


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


# ---- dask.distributed ----


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator:
    """A client of a running scheduler.

    Raises:
        StudyError: it does not answer within PATIENCE seconds, or has no workers.
    """
    from distributed import Client

    try:
        with _quiet():
            client = Client(scheduler, timeout=PATIENCE)
    except (OSError, ValueError, TypeError) as error:  # TimeoutError is an OSError
        raise StudyError(f"The scheduler at {scheduler} does not answer; nothing was started.") from error
    with client:
        if not _workers(client):
            raise StudyError(
                f"The scheduler at {scheduler} has no workers; start some with: dask worker {scheduler} --nthreads 1"
            )
        yield client


@contextlib.contextmanager
def local_cluster(workers: int, own_gpu: bool = True) -> Iterator:
    """A client of a cluster on this machine: processes of one thread. A worker that dies is started again.

    Args:
        own_gpu: where there are GPUs, each process has one to itself, and there are no more processes than GPUs.
    """
    import torch
    from distributed import Client, Nanny, Scheduler, SpecCluster

    host = "127.0.0.1"  # nobody on the network may give it work
    options = {"nthreads": 1, "memory_limit": 0, "host": host, "dashboard": False, "silence_logs": logging.ERROR}
    each = [options] * workers
    if own_gpu and torch.cuda.is_available():
        gpus = range(min(workers, torch.cuda.device_count()))
        each = [{**options, "resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": str(gpu)}} for gpu in gpus]
    specification = {i: {"cls": Nanny, "options": options} for i, options in enumerate(each)}
    scheduler = {"cls": Scheduler, "options": {"host": host, "dashboard": False, "dashboard_address": f"{host}:0"}}
    with _quiet(), SpecCluster(specification, scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(len(each))
        yield client


def _workers(client) -> dict:
    return client.scheduler_info(n_workers=-1)["workers"]


def _on_dask(tasks: list[Task], root: Path, client) -> Iterator[Outcome]:
    """Every run as a task of the cluster; as they finish."""
    from distributed import as_completed

    gpus = any(worker["resources"].get("GPU") for worker in _workers(client).values())
    root = root.resolve()
    futures = {
        # one key for one run: two sweeps on one scheduler share it
        client.submit(perform, task, root, key=f"{root}/{task.name}", resources={"GPU": 1} if gpus else None): task
        for task in tasks
    }
    for future in as_completed(futures):
        error = future.exception()
        if error is None:
            yield future.result()
        else:  # its worker died again and again
            yield Outcome(futures[future].name, f"{type(error).__name__}: {error}", 0.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what distributed says of connections that come and go: we say it in a sentence."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
