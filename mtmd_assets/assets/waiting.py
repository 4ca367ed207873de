"""Waiting for days that another run is building, so that two backfills of neighbouring days do not fail each other."""

import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import TypeVar

import dagster as dg

from mtmd_assets.assets.common import asset_key
from mtmd_assets.faults import Withheld
from mtmd_assets.platform import Platform

T = TypeVar("T")

PATIENCE = 900.0
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

    A run waits for earlier days only and builds its own in order, so runs cannot wait for each other in a circle.

    Raises:
        Withheld: if nobody is building a missing day, or none was published for `patience` seconds.
    """
    lacked: Sequence[date] = ()
    since = time.monotonic()
    while True:
        try:
            return build()
        except Withheld as e:
            if set(e.days) != set(lacked):
                lacked, since = e.days, time.monotonic()
                context.log.info(f"waits for {', '.join(map(str, e.days))}: {e}")
            if time.monotonic() - since > patience:
                raise
            if not being_built(context.instance, platform, e.days, context.run.run_id):
                return build()  # the other run may have ended since
            time.sleep(pause)


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
        if run.run_id != own_run and of_this_platform and any(first <= str(d) <= last for d in days):
            return True
    return False
