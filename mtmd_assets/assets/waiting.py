"""Waiting for days that another run is building, so that runs of neighbouring days do not fail each other."""

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

TRAINING_PATIENCE = 3 * 3600.0
"""The same where it is a model that is missing."""

_RUNNING = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]

_RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


def waiting(
    context: dg.AssetExecutionContext,
    platform: Platform,
    build: Callable[[], T],
    patience: float = PATIENCE,
    pause: float = 2.0,
    for_queued: bool = True,
) -> T:
    """The result of `build`, tried again while other runs of this platform are building the days that it lacks.

    A run waits for earlier days only and builds its own in order, so runs do not wait for each other in a circle.
    They may all wait for one that is queued behind them: `patience` ends that.

    Args:
        context: of this run.
        platform: whose days.
        build: raises `Withheld`, with the days it lacks and the table it lacks them of.
        patience: seconds to wait while none of the missing days is published.
        pause: seconds between two attempts.
        for_queued: wait for queued runs too. Without it no run waits for one that is queued behind it.

    Raises:
        Withheld: if nobody is building a missing day, or none was published for `patience` seconds.
    """
    lacked: Sequence[date] = ()
    since = time.monotonic()
    while True:
        try:
            return build()
        except Withheld as e:
            if not being_built(context.instance, platform, e, context.run.run_id, for_queued):
                break
            if set(e.days) != set(lacked):
                lacked, since = e.days, time.monotonic()
                print(f"waits while another run builds what is missing: {e}", file=sys.stderr, flush=True)
            if time.monotonic() - since > patience:
                raise
            time.sleep(pause)
    return build()  # the other run may have ended since


def being_built(
    instance: dg.DagsterInstance, platform: Platform, lacking: Withheld, own_run: str, queued: bool
) -> bool:
    """Whether another run, started or perhaps `queued`, is to build one of the days that are lacking."""
    statuses = [dg.DagsterRunStatus.QUEUED, *_RUNNING] if queued else _RUNNING
    jobs = [f"{platform.name}_{name}" for name in ("models" if lacking.table == "models" else "data", "daily")]
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=statuses)):
        builds_it = (
            asset_key(platform, lacking.table) in run.asset_selection if run.asset_selection else run.job_name in jobs
        )
        first, last = (run.tags.get(t, run.tags.get("dagster/partition", "")) for t in _RANGE)
        of_these_days = any(first <= str(d) <= last for d in lacking.days)
        if run.run_id != own_run and not dead(run) and builds_it and of_these_days:
            return True
    return False
