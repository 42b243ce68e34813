"""What interrupts a run: a signal, or crops too large for the memory."""

import signal
import threading
from collections.abc import Callable

import torch


class Signals:
    """Inside `with`, SIGINT and SIGTERM do not end the process; `caught` is the last one, so that a run can save first.

    Only the main thread can catch signals; in another one nothing changes.
    """

    def __init__(self):
        self.caught: int | None = None

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.caught = number


def largest_that_fits(too_large: int, attempt: Callable[[int], None]) -> int:
    """A number of crops that the memory holds, by halving; 0 where not even one fits.

    attempt: takes that many crops forward and backward.
    """
    count = too_large // 2
    while count:
        try:
            attempt(count)
            return count
        except torch.OutOfMemoryError:
            count //= 2
    return 0
