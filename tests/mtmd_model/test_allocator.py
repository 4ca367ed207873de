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
    sys.exit("no mallinfo2")
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


def held(keep: bool) -> int:
    """Bytes that a process still has from the system after it has freed 320 MiB."""
    code = HELD.format(root=str(Path(__file__).parents[2]), keep=keep)
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    if "no mallinfo2" in found.stderr:
        pytest.skip("the C library is not glibc 2.33 or newer")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_what_is_freed_is_kept():
    assert held(keep=True) > 320 * MIB
    assert held(keep=False) < 320 * MIB


AGAIN = """
import resource, sys, threading
sys.path.insert(0, {root!r})
import torch
from mtmd_model.allocator import keep_freed_memory

if not keep_freed_memory({room}):
    sys.exit("no mallopt")

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
    def faults(room: int) -> int:
        code = AGAIN.format(root=str(Path(__file__).parents[2]), room=room)
        found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        if "no mallopt" in found.stderr:
            pytest.skip("the C library is not glibc")
        assert found.returncode == 0, found.stderr
        return int(found.stdout)

    kept, given_back = faults(HEAP), faults(128 << 10)
    if given_back < 1000:
        pytest.skip("this C library keeps an empty heap anyway")
    assert kept < given_back / 10
