"""The data assets: each day's logs, heavyweight scores and joined examples, one day after the other in one step.

One step for all of them: a day is published whole or not at all, and one that cannot be published stops only itself.
In a backfill the other days of the run go on. Where all that a new day lacks is an earlier one (its history, or the
ranker), its log is published without examples: otherwise one lost day would withhold every later one.
"""

from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import dagster as dg

from checks.dagster_results import ACCOUNTING, CONTRACT, DRIFT, accounting_result, check_specs
from mtmd_assets.assets import examples, logs, ranker
from mtmd_assets.assets.common import DayReport, Done, Refused, asset_key, daily_partitions
from mtmd_assets.assets.waiting import waiting
from mtmd_assets.faults import BadFile, Withheld
from mtmd_assets.home import Site
from mtmd_assets.join import AccountingError
from mtmd_assets.runs import sign
from mtmd_assets.warehouse import Stage

Build = Callable[[Site, date, Stage], Done | None]


def _stages(site: Site) -> list[tuple[tuple[str, ...], Build]]:
    """The stages of a day in order, each with the tables it makes."""
    if site.platform.logs_scores:
        return [(logs.TABLES + logs.SCORES, logs.build), (examples.TABLES, examples.build)]
    return [
        (logs.TABLES, logs.build),
        (ranker.MODEL, ranker.train),
        (logs.SCORES, ranker.score),
        (examples.TABLES, examples.build),
    ]


def data_assets(site: Site) -> dg.AssetsDefinition:
    """The multi-asset that builds the days of one platform's data tables."""
    platform = site.platform
    specs = [*logs.specs(site), *([] if platform.logs_scores else ranker.specs(site)), *examples.specs(site)]

    @dg.multi_asset(
        name=f"{platform.name}_build_days",
        specs=specs,
        check_specs=check_specs(asset_key(platform, "joined_examples"), CONTRACT, ACCOUNTING, DRIFT),
        partitions_def=daily_partitions(platform),
        backfill_policy=dg.BackfillPolicy.single_run(),
        can_subset=True,
    )
    def data(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        sign(context)
        report = DayReport(context, platform)
        for partition in context.partition_keys:
            day = date.fromisoformat(partition)
            try:
                with site.warehouse.stage(context.run.run_id) as stage:
                    _build_day(context, site, day, stage, report)
                report.progress(day, "done")
            except (BadFile, Withheld, Refused) as e:
                report.fail(day, e)
                report.progress(day, "withheld" if isinstance(e, Withheld) else "refused")
            except Exception:  # a fault of the machine or of this code ends the run; what stands is still reported
                yield from report.results()
                raise
        yield from report.results()
        report.raise_failures()

    return data


def _build_day(context: dg.AssetExecutionContext, site: Site, day: date, stage: Stage, report: DayReport) -> None:
    """Build, check, publish and report one day.

    Raises:
        BadFile, Refused: if the day cannot be published.
        Withheld: if an earlier day is not; what the day has without it is then published.
    """
    done: list[Done] = []
    try:
        lacking = _make(context, site, day, stage, report, done)
    except BadFile as e:
        raise _as_received(e, stage, done) from e
    except AccountingError as e:
        found = accounting_result(e.counts, asset_key(site.platform, "joined_examples"), str(e))
        raise Refused(f"rows got lost: {e}", [found]) from e
    stage.publish()
    report.add(day, done)
    if lacking:
        message = f"{lacking} (the log of {day} is checked and published, joined_examples is not)"
        raise Withheld(message, lacking.days, lacking.table) from lacking


def _make(
    context: dg.AssetExecutionContext, site: Site, day: date, stage: Stage, report: DayReport, done: list[Done]
) -> Withheld | None:
    """Stage what the run asks for of a day, `done`; returns why there is a log only, if so.

    Raises:
        BadFile, Refused, Withheld: if nothing of the day is to be published.
    """
    try:
        for tables, build in _stages(site):
            if report.selected(tables):
                made = waiting(context, site.platform, partial(build, site, day, stage))
                done += [made] if made else []
    except Withheld as e:
        if not examples.stands_alone(site, day, stage):
            raise
        done.append(examples.build_log(site, day, stage))
        return e
    return None


def _as_received(e: BadFile, stage: Stage, done: list[Done]) -> BadFile:
    """The fault with the file that the log came in, where it names the staged copy, which nobody will find."""
    table = stage.table_of(Path(e.file))
    if table is None:
        return e
    files = {name: metadata["file"] for d in done for name, metadata in d.metadata.items() if "file" in metadata}
    return BadFile(e.problem, file=files.get(table, table), day=e.day, column=e.column, received=e.received)
