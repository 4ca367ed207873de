"""Runs that died: a process that was killed leaves its run marked as started, which would hold a place in the queue."""

import os
import socket
from typing import TYPE_CHECKING

import dagster as dg

from mtmd_assets.processes import alive

if TYPE_CHECKING:
    from collections.abc import Iterable

HOST, PROCESS = "mtmd/host", "mtmd/process"
"""Tags that say where a run runs."""


def sign(context: dg.AssetExecutionContext) -> None:
    """Tag the run with this process."""
    context.instance.add_run_tags(context.run.run_id, {HOST: socket.gethostname(), PROCESS: str(os.getpid())})


def dead(run: dg.DagsterRun) -> bool:
    """Whether the run's process ran on this machine and is gone."""
    if run.tags.get(HOST) != socket.gethostname():
        return False
    return not alive(int(run.tags[PROCESS]))


def bury_dead(instance: dg.DagsterInstance) -> "Iterable[dg.DagsterRun]":
    """Mark started runs whose process is gone as failed; returns them."""
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    buried = [run for run in instance.get_runs(filters=started) if dead(run)]
    for run in buried:
        instance.report_run_failed(
            run, message="The process of this run is gone: it was killed, or the machine stopped."
        )
    return buried
