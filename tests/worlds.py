"""Small worlds for the tests: a small adworld, its home, and its jobs run in this process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import yaml

from mtmd_assets.home import Site
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import SHIPPED

SCORED = ("predictions", "slice_metrics", "routing_metrics", "item_embeddings", "query_embeddings")
"""Tables of an evaluated day."""


def small_adworld(folder: Path, rows_per_day: int = 5_000, **changes: object) -> Path:
    """A platform file: adworld as shipped, but small and quick to train on."""
    content = yaml.safe_load((SHIPPED / "adworld.yaml").read_text())
    content["source"].update(rows_per_day=rows_per_day, users=1_000, ads=500)
    content["training"] = {"window_days": 3, "max_epochs": 2, "batch_size": 1024, "accelerator": "cpu"}
    content.update(changes)
    file = folder / "small_adworld.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


class Runner:
    """Runs the jobs of one site in this process, keeping their events in an ephemeral instance."""

    def __init__(self, site: Site):
        from mtmd_assets.definitions import platform_definitions

        self.site = site
        self.definitions = platform_definitions(site)
        self.instance = dg.DagsterInstance.ephemeral()

    def key(self, table: str) -> dg.AssetKey:
        """The asset key of a table."""
        return dg.AssetKey([self.site.platform.name, table])

    def run(
        self,
        job: str,
        first: date,
        last: date | None = None,
        only: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
    ) -> dg.ExecuteInProcessResult:
        """Run `<platform>_<job>` for one day, or for a range of days in one run."""
        span = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
        return self.definitions.resolve_job_def(f"{self.site.platform.name}_{job}").execute_in_process(
            instance=self.instance,
            partition_key=None if last else str(first),
            tags=span if last else None,
            asset_selection=[self.key(t) for t in only] or None,
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}, **(config or {})},
        )

    def tick(self, at: datetime) -> dg.ExecuteInProcessResult:
        """Run what the daily schedule asks for at a time of the platform's zone."""
        name = self.site.platform.name
        schedule = self.definitions.get_repository_def().get_schedule_def(f"{name}_every_day")
        context = dg.build_schedule_context(scheduled_execution_time=at, instance=self.instance)
        [request] = schedule.evaluate_tick(context).run_requests or []
        assert request.partition_key is not None
        return self.run("daily", date.fromisoformat(request.partition_key))

    def materialized(self, table: str) -> set[str]:
        """The partitions that Dagster shows as materialised."""
        return self.instance.get_materialized_partitions(self.key(table))

    def checks(self, name: str, table: str = "joined_examples") -> list[dg.AssetCheckEvaluation]:
        """Evaluations of a table's check, newest first."""
        key = dg.AssetCheckKey(self.key(table), name)
        records = self.instance.event_log_storage.get_asset_check_execution_history(key, limit=20)
        found = [r.event.dagster_event.event_specific_data for r in records if r.event and r.event.dagster_event]
        return [e for e in found if isinstance(e, dg.AssetCheckEvaluation)]


def show_failure(result: dg.ExecuteInProcessResult) -> str:
    """Why a run failed, all of it."""
    errors = [e.step_failure_data.error for e in result.all_events if e.is_step_failure]
    return "\n".join(str(e.cause or e) for e in errors if e)


def query(runner: Runner, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
    """What a person's DuckDB shell answers."""
    with duckdb.connect(str(runner.site.warehouse.database), read_only=True) as con:
        return con.execute(sql, parameters).fetchall()


def copy_of(runner: Runner, home: Path, platform: Platform | None = None) -> Runner:
    """A home like a runner's, to do with as one likes; of another platform if one is given."""
    site = Site(platform or runner.site.platform, home / "adworld")
    shutil.copytree(runner.site.folder, site.folder)
    site.warehouse.create()
    return Runner(site)


def run_cli(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mtmd` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mtmd_assets.cli", *arguments],
        env={**os.environ, "MTMD_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def cli_output(runner: Runner, *arguments: str) -> str:
    """What `mtmd` prints about a runner's home."""
    result = run_cli(runner.site.folder.parent, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout
