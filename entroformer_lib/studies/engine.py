"""Many runs that survive: a grid of runs, each in a folder, one after the other or on dask.distributed.

A task is one run. What it gives are answers, each kept as a JSON file in the run's folder and written whole or not at
all. From that follows the rest:

- A finished run is never repeated: its answers are there.
- A killed sweep goes on: the same call again does what is missing, and a training goes on from its checkpoint.
- A failed run is reported and does not stop the others.
- One run has one answer: its folder is locked while somebody works in it. The lock is the operating system's
  (`flock`), so that of a killed process is free at once. Whoever comes second waits, and finds the answer there.

On dask every run is one task; where workers have GPUs (`dask worker --resources "GPU=1"`), each run takes one. Workers
on other machines need this library and the same folder under the same path.
"""

import contextlib
import fcntl
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

from entroformer_lib.errors import Stopped, StudyError, UserError
from entroformer_lib.files import write_bytes

PATIENCE = 10.0  # seconds that a scheduler has to answer
Work = Callable[[Path, str], Any]


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    name: of its folder. work: called with the folder and the name of an answer that is missing, returns it (anything
    JSON); it can be pickled, and goes on where a killed one stopped. answers: what the run gives, in this order.
    identity: what the answers depend on (JSON); a folder in which something else began is refused.
    """

    name: str
    work: Work
    answers: tuple[str, ...] = ("answer",)
    identity: dict = field(default_factory=dict)

    def missing(self, root: Path) -> list[str]:
        """Answers that are not there yet."""
        return [name for name in self.answers if not (root / self.name / f"{name}.json").exists()]

    def answer(self, root: Path, name: str) -> Any:
        """An answer that is there."""
        return self._saved(root, name)["answer"]

    def seconds(self, root: Path, name: str) -> float:
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


def check(tasks: Iterable[Task], root: Path) -> None:
    """Refuses a sweep in whose folder runs of another kind have begun.

    Raises:
        StudyError: names the run and what differs.
    """
    for task in tasks:
        note = root / task.name / "task.json"
        found = json.loads(note.read_text()) if note.exists() else task.identity
        for key in sorted({*found, *task.identity}):
            if found.get(key) != task.identity.get(key):
                raise StudyError(
                    f"The folder {note.parent} holds a run with another {key} ({_short(found.get(key))}, and not "
                    f"{_short(task.identity.get(key))}); choose another folder."
                )


def sweep(
    tasks: list[Task],
    root: Path,
    scheduler: str | None = None,
    workers: int = 1,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Does what is missing of all tasks.

    Args:
        tasks: the runs, in the order in which they begin.
        root: the folder of their folders.
        scheduler: address of a running dask scheduler, such as tcp://host:8786.
        workers: without a scheduler: 1 works here, one run after the other; more are processes of a local cluster,
            on a machine with GPUs each with one of them.
        report: called with each outcome as soon as it is there.

    Returns:
        Outcomes of the runs that were not finished before.

    Raises:
        StudyError: the scheduler does not answer or has no workers, or runs of another kind lie in `root`.
        Stopped: a signal stopped a training in this process.
    """
    check(tasks, root)
    with contextlib.ExitStack() as stack:
        client = None
        if scheduler is not None:
            client = stack.enter_context(connected(scheduler))
        elif workers > 1:
            client = stack.enter_context(local_cluster(workers))
        left = [task for task in tasks if task.missing(root)]
        outcomes = []
        for outcome in _one_by_one(left, root) if client is None else _on_dask(left, root, client):
            outcomes.append(outcome)
            report(outcome)
    return outcomes


def perform(task: Task, root: Path, wait: bool = True) -> Outcome | None:
    """Does what is missing of one run, alone in its folder.

    Args:
        wait: for somebody else who works in the folder; without it None is returned at once.
    """
    folder, begin = root / task.name, time.monotonic()
    error = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, wait) as mine:
            if not mine:
                return None
            check([task], root)
            write_bytes(folder / "task.json", json.dumps(task.identity, indent=1).encode())
            for name in task.missing(root):
                start = time.monotonic()
                answer = task.work(folder, name)
                saved = {"answer": answer, "seconds": round(time.monotonic() - start, 2)}
                write_bytes(folder / f"{name}.json", json.dumps(saved).encode())
    except Stopped:
        raise
    except Exception as problem:
        error = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
    return Outcome(task.name, error, round(time.monotonic() - begin, 2))


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Alone in a folder, or False where somebody else is and we do not wait."""
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        print(socket.gethostname(), os.getpid(), file=file, flush=True)  # for people: who works here
        yield True  # closing the file gives the lock back


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
def local_cluster(workers: int) -> Iterator:
    """A client of a cluster on this machine: processes of one thread, each with a GPU of its own where there are some.

    A worker that dies is started again.
    """
    import torch
    from distributed import Client, Nanny, Scheduler, SpecCluster

    gpus = torch.cuda.device_count()
    count = min(workers, gpus) if gpus else workers
    specification = {i: {"cls": Nanny, "options": _worker_options(i, gpus)} for i in range(count)}
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": None}}
    with _quiet(), SpecCluster(specification, scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(count)
        yield client


def _worker_options(number: int, gpus: int) -> dict:
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": logging.ERROR}
    if gpus:
        options |= {"resources": {"GPU": 1}, "env": {"CUDA_VISIBLE_DEVICES": str(number)}}
    return options


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


def _short(value: Any) -> str:
    return str(value)[:60]
