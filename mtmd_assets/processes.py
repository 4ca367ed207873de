"""Processes of this machine."""

import os
from pathlib import Path


def this_process() -> str:
    """`<id>.<start>`: ids come back, and in a restarted container at once, so that the start belongs to the name."""
    return f"{os.getpid()}.{_start(os.getpid())}"


def alive(process: str) -> bool:
    """Whether a process of this machine, named by `this_process`, exists."""
    number, _, start = process.partition(".")
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _start(int(number))
    return not (start and now) or start == now


def _start(number: int) -> str:
    """When a process started, in ticks since boot; empty where the system has no /proc to tell it."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the second, in brackets, may hold spaces
