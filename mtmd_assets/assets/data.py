"""The data assets: each day's logs, heavyweight scores and joined examples, one day after the other in one step.

One step for all of them: a day is published whole or not at all, and one that cannot be published stops only itself.
In a backfill the other days of the run go on.
"""

from collections.abc import Callable, Iterator
from datetime import date
from functools import partial

import dagster as dg

from checks import dagster_results
from mtmd_assets.assets import examples, logs, ranker
from mtmd_assets.assets.common import DayReport, Done, Refused, asset_key, daily_partitions
from mtmd_assets.assets.waiting import waiting
from mtmd_assets.faults import BadFile, Withheld
from mtmd_assets.home import Site
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
        check_specs=dagster_results.check_specs(asset_key(platform, "joined_examples")),
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
                    done = [
                        waiting(context, platform, partial(build, site, day, stage))
                        for tables, build in _stages(site)
                        if report.selected(tables)
                    ]
                    stage.publish()
                report.add(day, [d for d in done if d is not None])
            except (BadFile, Withheld, Refused) as e:
                report.fail(day, e)
            except Exception:  # a fault of the machine or of this code ends the run; what stands is still reported
                yield from report.results()
                raise
        yield from report.results()
        report.raise_failures()

    return data
