"""Memory: how much there is, and what the C library keeps instead of giving it back after every tensor."""

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil

# glibc's mallopt: numbers from <malloc.h>
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


def free_memory(container: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: of the machine, or of the container that it runs in."""
    left = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        taken = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        used = int((container / "memory.current").read_text()) - int(taken["inactive_file"])
        left = min(left, int((container / "memory.max").read_text()) - used)
    return max(left, 0)


def keep_freed_memory() -> bool:
    """Lets freed tensors be used again without asking the kernel for fresh, zeroed pages.

    glibc maps every large tensor anew, and touching new pages takes much of a CPU's training step (docs/training.md).
    Costs: the process never shrinks below its largest size.  ->  whether it worked: only with glibc, on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28, ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in settings.items())
