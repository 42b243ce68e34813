"""Where the time of coding goes, and how far it has come: stages mark themselves for whoever wants to know.

with stage_times() as seconds:
    codec.encode(model, picture)
seconds  # {"transforms": 0.31, "hyper": 0.12, "context": 0.40, "entropy coding": 0.02}
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

_running: dict[str, float] | None = None
_listener: Callable[[str, int, int], None] | None = None
_idle = nullcontext()


@contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """Collects the seconds of each stage that runs inside the block."""
    global _running
    before, _running = _running, {}
    try:
        yield _running
    finally:
        _running = before


def stage(name: str):
    """Marks a stretch of work as belonging to a stage; costs next to nothing while no clock runs."""
    return _idle if _running is None else _timed(name)


@contextmanager
def _timed(name: str) -> Iterator[None]:
    _wait()
    start = time.perf_counter()
    try:
        yield
    finally:
        _wait()
        if _running is not None:
            _running[name] = _running.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def listening(listener: Callable[[str, int, int], None]) -> Iterator[None]:
    """Calls `listener(what, done, total)` as long work inside the block goes on."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def tell(what: str, done: int, total: int) -> None:
    """Says how far some work has come, if anybody listens."""
    if _listener is not None:
        _listener(what, done, total)


def _wait() -> None:
    """A GPU works on after Python has gone on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
