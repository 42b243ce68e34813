"""Where the time of coding goes, and how far it has come: stages mark themselves for whoever wants to know.

with stage_times() as seconds:
    codec.encode(model, picture)
seconds  # {"transforms": 0.31, "hyper": 0.12, "context": 0.40, "entropy coding": 0.02}

Who listens is kept in context variables, so every thread has its own.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

Listener = Callable[[str, int, int], None]
_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def stage_times() -> AbstractContextManager[dict[str, float]]:
    """Collects the seconds of each stage that runs inside the block."""
    return _during(_seconds, {})


def listening(listener: Listener) -> AbstractContextManager[Listener]:
    """Calls `listener(what, done, total)` as long work inside the block goes on."""
    return _during(_listener, listener)


@contextmanager
def _during(variable: ContextVar, value) -> Iterator:
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def stage(name: str) -> AbstractContextManager[None]:
    """Marks a stretch of work as belonging to a stage; costs next to nothing while no clock runs."""
    seconds = _seconds.get()
    return nullcontext() if seconds is None else _timed(name, seconds)


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    _wait()
    start = time.perf_counter()
    try:
        yield
    finally:
        _wait()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def tell(what: str, done: int, total: int) -> None:
    """Says how far some work has come, if anybody listens."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)


def _wait() -> None:
    """A GPU works on after Python has gone on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
