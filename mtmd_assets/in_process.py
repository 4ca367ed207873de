"""Jobs in this process, for who waits at a terminal."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from mtmd_assets.home import Home, Site

if TYPE_CHECKING:
    from dagster import DagsterInstance, Definitions
    from dagster._utils.error import SerializableErrorInfo


class RunFailed(SystemExit):
    """A run failed; its reasons are printed."""


@dataclass(frozen=True)
class Run:
    """Runs jobs of a site in this process, quietly; the runs are kept in the home and seen in the UI."""

    site: Site
    definitions: "Definitions"
    instance: "DagsterInstance"

    def __call__(
        self,
        job: str,
        first: date,
        last: date | None = None,
        only: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Run a job for one day, or for a range of days in one run; for some of its tables, or all.

        Raises:
            RunFailed: the run failed; its reasons are printed.
        """
        from dagster import DagsterExecutionInterruptedError

        from mtmd_assets.assets.common import asset_key

        name = self.site.platform.name
        span = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
        try:
            result = self.definitions.resolve_job_def(f"{name}_{job}").execute_in_process(
                instance=self.instance,
                partition_key=None if last else str(first),
                tags=span if last else None,
                asset_selection=[asset_key(self.site.platform, t) for t in only] or None,
                raise_on_error=False,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}, **(config or {})},
            )
        except DagsterExecutionInterruptedError as e:
            raise KeyboardInterrupt from e
        if not result.success:
            for event in result.all_events:
                if event.is_step_failure:
                    error = event.step_failure_data.error
                    while error and error.cause:
                        error = error.cause
                    print(f"    {event.step_key}: {_said(error) if error else 'failed'}", file=sys.stderr)
            raise RunFailed(f"{name}_{job} failed; `make ui` shows run {result.run_id}")


@contextmanager
def jobs_in_process(home: Home, site: Site) -> Iterator[Run]:
    """What runs jobs of a site, on Dagster's instance of the home."""
    from mtmd_assets.definitions import platform_definitions
    from mtmd_assets.runs import bury_dead, instance_of

    site.warehouse.create()
    folder = home.prepare_dagster()
    definitions = platform_definitions(site)
    with instance_of(folder) as instance:
        bury_dead(instance)
        yield Run(site, definitions, instance)


def _said(error: "SerializableErrorInfo") -> str:
    """An error's message; the class of one of ours, or of Dagster's, says nothing more to a user."""
    kind, _, message = error.message.strip().partition(": ")
    return message if kind.startswith(("mtmd_assets.", "dagster.")) else error.message.strip()


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    print(title, flush=True)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)
