"""Dagster's instance of a home, and runs that died: a killed process leaves its run started, holding a place in the queue."""

import fcntl
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from mtmd_assets.processes import alive, this_process

HOST, PROCESS = "mtmd/host", "mtmd/process"
"""Tags that say where a run runs."""


@contextmanager
def instance_of(folder: Path) -> Iterator[dg.DagsterInstance]:
    """Dagster's instance in a folder, which must be `DAGSTER_HOME`.

    Opened by one process at a time: two that create the SQLite tables of a new home at once get in each other's way.
    """
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        instance = dg.DagsterInstance.get()
    with instance:
        yield instance


def sign(context: dg.AssetExecutionContext) -> None:
    """Tag the run with this process."""
    context.instance.add_run_tags(context.run.run_id, {HOST: socket.gethostname(), PROCESS: this_process()})


def dead(run: dg.DagsterRun) -> bool:
    """Whether the run's process ran on this machine and is gone."""
    if run.tags.get(HOST) != socket.gethostname():
        return False
    return not alive(run.tags[PROCESS])


def bury_dead(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Mark started runs whose process is gone as failed; returns them."""
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    buried = [run for run in instance.get_runs(filters=started) if dead(run)]
    for run in buried:
        instance.report_run_failed(
            run, message="The process of this run is gone: it was killed, or the machine stopped."
        )
    return buried
