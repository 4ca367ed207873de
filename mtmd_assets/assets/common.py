"""What every stage shares: asset keys, partitions, and reporting days one by one to Dagster."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import dagster as dg

from mtmd_assets.markdown import markdown_table
from mtmd_assets.platform import Platform

Metadata = dict[str, Any]
Result = dg.MaterializeResult | dg.AssetCheckResult
"""Of a table or a check."""


def asset_key(platform: Platform, table: str) -> dg.AssetKey:
    """`<platform>/<table>`."""
    return dg.AssetKey([platform.name, table])


def table_specs(platform: Platform, described: Mapping[str, str], deps: Sequence[Any] = ()) -> list[dg.AssetSpec]:
    """An asset a table (name -> description); skippable, since not every day can have every table."""
    return [
        dg.AssetSpec(
            asset_key(platform, table),
            deps=deps,
            description=description,
            group_name=platform.name,
            kinds={"duckdb", "parquet"},
            skippable=True,
        )
        for table, description in described.items()
    ]


def daily_partitions(platform: Platform) -> dg.DailyPartitionsDefinition:
    """The platform's days, in its own time zone, from its first day to its last (or yesterday)."""
    end = None if platform.end is None else (platform.end + timedelta(1)).isoformat()
    return dg.DailyPartitionsDefinition(
        start_date=platform.start.isoformat(), end_date=end, timezone=platform.time_zone
    )


def preview(con: Any, query: str, rows: int = 5) -> dg.MarkdownMetadataValue:
    """The first rows of a query as a table a person can read."""
    cursor = con.execute(f"SELECT * FROM ({query}) LIMIT {rows}")
    header = [c[0] for c in cursor.description]
    return dg.MetadataValue.md(markdown_table(header, cursor.fetchall()))


def selected(context: dg.AssetExecutionContext, result: Result) -> bool:
    """Whether the run asked for it."""
    if isinstance(result, dg.MaterializeResult):
        return result.asset_key in context.selected_asset_keys
    assert result.asset_key is not None
    assert result.check_name is not None
    return dg.AssetCheckKey(result.asset_key, result.check_name) in context.selected_asset_check_keys


def printed_log(context: dg.AssetExecutionContext) -> Callable[[str], None]:
    """A log of a run that is also printed: for who waits at a terminal, in the UI among the run's output."""

    def log(line: str) -> None:
        context.log.info(line)
        print(f"    {line}", flush=True)

    return log


@dataclass
class Done:
    """What a stage made of one day."""

    metadata: dict[str, Metadata]
    """Table -> asset metadata."""
    checks: list[dg.AssetCheckResult] = field(default_factory=list)


class Refused(RuntimeError):
    """A day was built, checked and not published. `checks` say why."""

    def __init__(self, message: str, checks: list[dg.AssetCheckResult], metadata: dict[str, Metadata] | None = None):
        super().__init__(message)
        self.checks = checks
        self.metadata = metadata or {}
        """Audit tables that were published all the same."""


class DayReport:
    """Reports the days of one run to Dagster.

    A run of one day yields its results. A run of several days (a backfill) logs each table the moment it is published,
    so that a day stands on its own whatever becomes of the others.
    """

    def __init__(self, context: dg.AssetExecutionContext, platform: Platform):
        self.context, self.platform = context, platform
        self.several = len(context.partition_keys) > 1
        self.done: dict[str, Metadata] = {}
        self.checks: dict[tuple[dg.AssetKey, str], list[tuple[date, dg.AssetCheckResult]]] = {}
        self.failures: dict[date, Exception] = {}

    def selected(self, tables: Iterable[str]) -> bool:
        """Whether the run asks for any of these tables."""
        return any(asset_key(self.platform, t) in self.context.selected_asset_keys for t in tables)

    def add(self, day: date, stages: list[Done]) -> None:
        """A day was published, with what its stages say of it."""
        for done in stages:
            self._checked(day, done.checks)
        for table, metadata in (item for done in stages for item in done.metadata.items()):
            key = asset_key(self.platform, table)
            if key not in self.context.selected_asset_keys:
                continue
            if self.several:
                self.context.log_event(dg.AssetMaterialization(key, partition=day.isoformat(), metadata=metadata))
            else:
                self.done[table] = metadata

    def fail(self, day: date, error: Exception) -> None:
        """A day could not be published; the others go on."""
        self.failures[day] = error
        self.context.log.error(f"{day} is not published: {error}")
        if isinstance(error, Refused):
            self._checked(day, error.checks)
            for table, metadata in error.metadata.items():
                self.context.log_event(
                    dg.AssetMaterialization(
                        asset_key(self.platform, table), partition=day.isoformat(), metadata=metadata
                    )
                )

    def progress(self, day: date, what: str) -> None:
        """Print what became of one of several days: for who waits at a terminal, in the UI among the run's output."""
        if self.several:
            print(f"    {day}: {what}", flush=True)

    def results(self) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        """What was published and checked so far, checks last."""
        for table, metadata in self.done.items():
            yield dg.MaterializeResult(asset_key=asset_key(self.platform, table), metadata=metadata)
        for results in self.checks.values():
            yield _together(results)

    def raise_failures(self) -> None:
        """End the run as failed if a day was not published.

        Raises:
            dagster.Failure: with each such day's reason.
        """
        if self.failures:
            reasons = "\n".join(f"{day}: {error}" for day, error in self.failures.items())
            raise dg.Failure(
                description=f"not published: {', '.join(str(d) for d in self.failures)}\n{reasons}",
                metadata={str(day): dg.MetadataValue.md(f"```\n{error}\n```") for day, error in self.failures.items()},
                allow_retries=False,
            )

    def _checked(self, day: date, results: list[dg.AssetCheckResult]) -> None:
        for r in results:
            assert r.asset_key is not None
            assert r.check_name is not None
            spec = dg.AssetCheckKey(asset_key=r.asset_key, name=r.check_name)
            if spec in self.context.selected_asset_check_keys:
                self.checks.setdefault((r.asset_key, r.check_name), []).append((day, r))


def _together(results: list[tuple[date, dg.AssetCheckResult]]) -> dg.AssetCheckResult:
    """One check result of several days: passed if all did; with the tables of the failing days, or of the last day."""
    if len(results) == 1:
        return results[0][1]
    first = results[0][1]
    failing = [(d, r) for d, r in results if not r.passed]
    tables = {
        f"{day} {name}": value
        for day, r in failing or results[-1:]
        for name, value in r.metadata.items()
        if isinstance(value, dg.MarkdownMetadataValue)
    }
    return dg.AssetCheckResult(
        asset_key=first.asset_key,
        check_name=first.check_name,
        passed=not failing,
        severity=first.severity,
        description="\n\n".join(f"{d}: {r.description}" for d, r in failing)
        or f"{results[0][0]} to {results[-1][0]}: all {len(results)} days pass",
        metadata={"days": len(results), "failing days": len(failing), **tables},
    )
