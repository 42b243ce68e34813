"""Where the time of coding goes: stages mark themselves, and a study that wants to know switches the clock on.

with stage_times() as seconds:
    codec.encode(model, picture)
seconds  # {"transforms": 0.31, "hyper": 0.12, "context": 0.40, "entropy coding": 0.02}
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_running: dict[str, float] | None = None
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


def _wait() -> None:
    """A GPU works on after Python has gone on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
