"""Waiting for days that another run is building, so that two backfills of neighbouring days do not fail each other."""

import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import TypeVar

import dagster as dg

from mtmd_assets.assets.common import asset_key
from mtmd_assets.faults import Withheld
from mtmd_assets.platform import Platform
from mtmd_assets.runs import dead

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds to wait while none of the missing days is published."""

_RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


def waiting(
    context: dg.AssetExecutionContext,
    platform: Platform,
    build: Callable[[], T],
    patience: float = PATIENCE,
    pause: float = 2.0,
) -> T:
    """The result of `build`, tried again while other runs of this platform are building the days that it lacks.

    A run waits for earlier days only and builds its own in order, so runs do not wait for each other in a circle.
    They may all wait for one that is queued behind them: `patience` ends that.

    Raises:
        Withheld: if nobody is building a missing day, or none was published for `patience` seconds.
    """
    lacked: Sequence[date] = ()
    since = time.monotonic()
    while True:
        try:
            return build()
        except Withheld as e:
            if not being_built(context.instance, platform, e.days, context.run.run_id):
                break
            if set(e.days) != set(lacked):
                lacked, since = e.days, time.monotonic()
                print(f"waits while another run builds what is missing: {e}", file=sys.stderr, flush=True)
            if time.monotonic() - since > patience:
                raise
            time.sleep(pause)
    return build()  # the other run may have ended since


def being_built(instance: dg.DagsterInstance, platform: Platform, days: Sequence[date], own_run: str) -> bool:
    """Whether another run, queued or started, is to build the impressions of one of the days."""
    unfinished = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
    )
    for run in instance.get_runs(filters=unfinished):
        of_this_platform = (
            asset_key(platform, "impressions") in run.asset_selection
            if run.asset_selection
            else run.job_name in (f"{platform.name}_data", f"{platform.name}_daily")
        )
        first, last = (run.tags.get(t, run.tags.get("dagster/partition", "")) for t in _RANGE)
        if run.run_id != own_run and not dead(run) and of_this_platform and any(first <= str(d) <= last for d in days):
            return True
    return False
