"""Memory that training frees and asks for again stays with the process."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 32 << 20
"""Bytes of the largest block that glibc lets be kept."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; says whether it does.

    By default it returns most freed activations to the system, and the next step gets them back page by page, zeroed.
    Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
