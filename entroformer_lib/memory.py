"""Memory that the C library keeps instead of giving it back after every tensor."""

import ctypes
import sys

# glibc's mallopt: numbers from <malloc.h>
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


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
