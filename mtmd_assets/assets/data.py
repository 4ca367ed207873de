"""The data assets: each day's logs, heavyweight scores and joined examples, one day after the other in one step.

One step for all of them, so that a day that cannot be published stops only itself: in a backfill the other days of
the run go on through every stage.
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

Stage = Callable[[Site, date, str], Done | None]


def _stages(site: Site) -> list[tuple[tuple[str, ...], Stage]]:
    """The stages of a day in order, each with the tables it publishes."""
    if site.platform.logs_scores:
        return [(logs.TABLES + logs.SCORES, logs.publish), (examples.TABLES, examples.publish)]
    return [
        (logs.TABLES, logs.publish),
        (ranker.MODEL, ranker.train),
        (logs.SCORES, ranker.score),
        (examples.TABLES, examples.publish),
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
        report = DayReport(context, platform)
        for partition in context.partition_keys:
            day = date.fromisoformat(partition)
            for tables, stage in _stages(site):
                if not report.selected(tables):
                    continue
                try:
                    done = waiting(context, platform, partial(stage, site, day, context.run.run_id))
                except (BadFile, Withheld, Refused) as e:
                    report.fail(day, e)
                    break
                if done is None:
                    context.log.info(
                        f"{day}: {', '.join(tables)} do not exist on this day; scores begin {platform.scored_from}"
                    )
                else:
                    report.add(day, done)
        yield from report.finish()

    return data
