"""The same function for many items: one after the other in this process, or on a cluster of dask.distributed.

`processes` opens the cluster, or says that there is none; `over` goes through the items on it. Sweeps, `eval` and the
coding of folders all go this way. A task is one item. When a worker dies, dask blames every task that waits there. So
there are never more tasks under way than the workers have threads.

Workers on other machines need this library, and the same files under the same paths.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from entroformer_lib.errors import ClusterError, in_words

PATIENCE = 10.0  # seconds that a scheduler has to answer
ALONE_FOR = 60.0  # seconds that a cluster may be without any worker: a new one takes some to start
GONE = "The scheduler does not answer any more; what is done stays, and the same command can be given again."
OURS = __name__.partition(".")[0]
_ONE = threading.Lock()


@contextlib.contextmanager
def processes(scheduler: str | None = None, workers: int = 1, own_gpu: bool = True) -> Iterator:
    """What `over` takes: a client of a cluster, or None, which means this process.

    Args:
        scheduler: address of a running dask scheduler, such as tcp://host:8786.
        workers: without a scheduler: 1 means this process; more are processes of a cluster on this machine.
        own_gpu: on a machine with GPUs each process of that cluster has one to itself.

    Raises:
        ClusterError: the scheduler does not answer or has no workers.
    """
    if scheduler is not None:
        with connected(scheduler) as client:
            yield client
    elif workers > 1:
        with local_cluster(workers, own_gpu) as client:
            yield client
    else:
        yield None


def over(
    function: Callable[[Any], Any], items: Sequence, client, lost: Callable[[Any, str], Any]
) -> Iterator[tuple[int, Any]]:
    """Results of a function for all items, each with the item's number, as they are done.

    An item whose worker dies goes to another worker. One at which workers die again and again costs itself alone.

    Args:
        function: called with an item; on a cluster both are pickled. One call at a time is made in a process.
        client: of `processes`.
        lost: makes the result of an item that cannot be had from a cluster, of the item and a sentence.

    Raises:
        ClusterError: the scheduler is gone, or all workers are and no new one comes.
        Exception: in this process, whatever the function raises.
    """
    if client is None:
        for number, item in enumerate(items):
            yield number, function(item)
        return
    from distributed import wait

    waiting, busy, seen = deque(enumerate(items)), {}, time.monotonic()
    while waiting or busy:
        room, resources = _room(client)
        seen = time.monotonic() if room else seen
        if time.monotonic() - seen > ALONE_FOR:
            raise ClusterError("The cluster has no workers any more; the same command goes on when it has some.")
        while waiting and len(busy) < max(room, 1):
            number, item = waiting.popleft()
            busy[client.submit(_alone, function, item, pure=False, resources=resources)] = number, item
        try:
            done = wait(list(busy), timeout=1.0, return_when="FIRST_COMPLETED").done
        except TimeoutError:  # time to see whether there are more workers
            continue
        except CancelledError:
            raise ClusterError(GONE) from None
        for future in done:
            number, item = busy.pop(future)
            yield number, _result(future, functools.partial(lost, item))


def _alone(function: Callable[[Any], Any], item) -> Any:
    """One call at a time: models, seeds and torch's number of threads belong to the whole process."""
    with _ONE:
        return function(item)


def _room(client) -> tuple[int, dict | None]:
    """How many tasks the workers take at a time, and what each needs: where workers have GPUs, one."""
    try:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
    except (OSError, ValueError, RuntimeError):
        raise ClusterError(GONE) from None
    if client.status == "closed":  # it has tried for PATIENCE to find its scheduler again
        raise ClusterError(GONE)
    gpus = sum(worker["resources"].get("GPU", 0) for worker in workers)
    return (int(gpus), {"GPU": 1}) if gpus else (sum(worker["nthreads"] for worker in workers), None)


def _result(future, lost: Callable[[str], Any]) -> Any:
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        times = error.allowed_failures + 1
        return lost(f"{times} processes that worked at it died, perhaps for want of memory; fewer at a time may help.")
    except (CancelledError, CommClosedError):
        raise ClusterError(GONE) from None
    except Exception as error:
        return lost(in_words(error))


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator:
    """A client of a running scheduler.

    Raises:
        ClusterError: it does not answer within PATIENCE seconds, or has no workers.
    """
    from distributed import Client

    with _quiet(), contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(Client(scheduler, timeout=PATIENCE))
        except (OSError, ValueError, TypeError) as error:  # TimeoutError is an OSError
            raise ClusterError(f"The scheduler at {scheduler} does not answer; nothing was started.") from error
        if not _room(client)[0]:
            raise ClusterError(
                f"The scheduler at {scheduler} has no workers; start some with: dask worker {scheduler} --nthreads 1"
            )
        yield client


@contextlib.contextmanager
def local_cluster(workers: int, own_gpu: bool = True, closed: bool = True) -> Iterator:
    """A client of a cluster on this machine: processes of one thread. A worker that dies is started again.

    Args:
        own_gpu: where there are GPUs, each process has one to itself, and there are no more processes than GPUs.
        closed: a worker runs whatever it is sent, so nobody else on this machine may send it anything: the certificates
            live in these processes alone. Open, it is as dask's clusters are by themselves.
    """
    import torch
    from dask import config
    from distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.security import Security

    security = Security.temporary() if closed else None
    listens = {"host": "127.0.0.1", "dashboard": False}  # nobody on the network may give it work
    listens |= {"protocol": "tls://", "security": security} if closed else {}
    options = {**listens, "nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    options |= {"env": dict(os.environ), "preload": [__name__]}
    each, method = [options] * workers, "spawn"
    if not torch.cuda.is_available():  # CUDA does not survive a fork
        method = _forked()
    elif own_gpu:
        gpus = range(min(workers, torch.cuda.device_count()))
        env = options["env"]
        each = [{**options, "resources": {"GPU": 1}, "env": {**env, "CUDA_VISIBLE_DEVICES": str(gpu)}} for gpu in gpus]
    specification = {i: {"cls": Nanny, "options": options} for i, options in enumerate(each)}
    scheduler = {"cls": Scheduler, "options": {**listens, "dashboard_address": "127.0.0.1:0"}}
    with (
        config.set({"distributed.worker.multiprocessing-method": method}),
        _quiet(),
        SpecCluster(specification, scheduler, security=security) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(len(each))
        yield client


def dask_setup(worker) -> None:
    """Called by dask in each worker of this machine: Ctrl+C goes to all processes, and is for the one above them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _forked() -> str:
    """How processes start without importing everything anew, which takes seconds: forked from a server that has
    imported what this process has of the library. dask gives it one thread. Windows cannot."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    from dask import config
    from distributed.utils import get_mp_context

    with config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        context = get_mp_context()
    context.set_forkserver_preload(["distributed", *(name for name in sys.modules if name.startswith(f"{OURS}."))])
    return "forkserver"


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
