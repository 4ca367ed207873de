"""Freed memory stays with the process that trains."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
sys.path.insert(0, {root!r})
from mtmd_model.allocator import keep_freed_memory
kept = {keep} and keep_freed_memory()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [torch.ones(1 << 21) for _ in range(16)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(kept), faults())
"""


def faults(keep: bool) -> tuple[bool, int]:
    from pathlib import Path

    code = FAULTS.format(root=str(Path(__file__).parents[2]), keep=keep)
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return out[0] == "1", int(out[1])


def test_freed_memory_is_not_faulted_in_again():
    kept, found = faults(keep=True)
    if not kept:
        pytest.skip("the C library has no mallopt")
    assert found < faults(keep=False)[1] / 10
