"""Memory that training frees and asks for again stays with the process."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGEST = 32 << 20
"""Bytes of the largest block that glibc lets be kept."""
HEAP = 64 << 20
"""Bytes of a heap of a thread that is not the first. glibc gives an empty one back, but not if so much is to be left on
top of the one before."""


def keep_freed_memory(room: int = HEAP) -> bool:
    """Tell glibc to keep what is freed, up to blocks of `LARGEST`; says whether it does.

    By default it returns most freed activations to the system, and the next step gets them back page by page, zeroed.
    Elsewhere than on glibc nothing happens.

    Args:
        room: bytes left on top of a heap; glibc's own 128 KiB let threads' heaps go.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: room}
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
