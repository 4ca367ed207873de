"""Freed memory stays with the process that trains."""

import subprocess
import sys
from pathlib import Path

import pytest

from mtmd_model.allocator import HEAP

MIB = 2**20
HELD = """
import ctypes, sys
sys.path.insert(0, {root!r})
import torch
from mtmd_model.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    sys.exit("not glibc 2.33 or newer: it keeps no account of what it has (mallinfo2)")
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
libc.mallinfo2.restype = Info
assert not {keep} or keep_freed_memory()
blocks = [torch.empty(16 << 20, dtype=torch.uint8) for _ in range(20)]
del blocks
info = libc.mallinfo2()
print(info.arena + info.hblkhd)
"""


def printed(code: str, **values: object) -> int:
    """The number that a process of its own prints; skips where the C library lacks what the code asks for."""
    code = code.format(root=str(Path(__file__).parents[2]), **values)
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    if found.stderr.startswith("not glibc"):
        pytest.skip(found.stderr.strip())
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_what_is_freed_is_kept():
    """Bytes that a process still has from the system after it has freed 320 MiB."""
    assert printed(HELD, keep=True) > 320 * MIB
    assert printed(HELD, keep=False) < 320 * MIB


AGAIN = """
import resource, sys, threading
sys.path.insert(0, {root!r})
import torch
from mtmd_model.allocator import keep_freed_memory

if not keep_freed_memory({room}):
    sys.exit("not glibc: it cannot be told to keep memory (mallopt)")

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    held = [torch.ones(5 << 20, dtype=torch.uint8) for _ in range(60)]
    while held:
        held.pop()

def train():
    for _ in range(6):
        step()
    before = faults()
    for _ in range(4):
        step()
    print(faults() - before)

thread = threading.Thread(target=train)
thread.start()
thread.join()
"""


def test_another_thread_does_not_fetch_its_memory_again_page_by_page():
    """Page faults of four steps, with room for a whole heap and with glibc's own 128 KiB."""
    kept, given_back = printed(AGAIN, room=HEAP), printed(AGAIN, room=128 << 10)
    # a C library that keeps an empty heap anyway has none either way
    assert kept < max(given_back / 10, 100)
