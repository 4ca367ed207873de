"""Memory that training frees and asks for again stays with the process."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGEST = 32 << 20
"""Bytes of the largest block that glibc lets be kept."""
HEAP = 64 << 20
"""Bytes of a heap of a thread that is not the first. glibc gives back an empty one, but not if it wants so much room on
top."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; says whether it does.

    By default it returns most freed activations to the system, and the next step gets them back page by page, zeroed.
    Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: HEAP}
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
