"""Assets of a day that is scored by the model trained through the day before: what evaluation and embeddings share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from typing import TYPE_CHECKING

import dagster as dg

from mtmd_assets import model_store
from mtmd_assets.assets.common import Result, asset_key, daily_partitions, selected, table_specs
from mtmd_assets.assets.waiting import TRAINING_PATIENCE, waiting
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.join import create_evaluated
from mtmd_assets.model_store import ModelRecord
from mtmd_assets.runs import sign
from mtmd_assets.windows import verify_window

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from mtmd_assets.warehouse import Stage
    from mtmd_model.predict import Predictor


@dataclass(frozen=True)
class ScoredDay:
    """A day, the model that scores it, and where to read and write."""

    site: Site
    day: date
    record: ModelRecord
    model: "Predictor"
    con: "DuckDBPyConnection"
    """Sees the published tables, and `evaluated`: the day's examples, never down-sampled."""
    stage: "Stage"


def scored_day_assets(
    site: Site,
    name: str,
    tables: Mapping[str, str],
    build: Callable[[ScoredDay], Iterator[Result]],
    checks: Sequence[dg.AssetCheckSpec] = (),
) -> dg.AssetsDefinition:
    """The multi-asset that `build`s some tables of a scored day.

    Args:
        site: whose.
        name: of the step.
        tables: table -> description.
        build: writes to the stage, publishes it and yields a result a table, and one a check.
        checks: that it makes.
    """
    platform = site.platform
    day_before = dg.TimeWindowPartitionMapping(start_offset=-1, end_offset=-1)
    deps = [
        dg.AssetDep(asset_key(platform, "models"), partition_mapping=day_before),
        dg.AssetDep(asset_key(platform, "joined_examples")),
    ]

    @dg.multi_asset(
        name=f"{platform.name}_{name}",
        specs=table_specs(platform, tables, deps),
        check_specs=checks,
        # with this a check may stay away, as the tables may (on days that no model can score yet)
        can_subset=True,
        partitions_def=daily_partitions(platform),
        backfill_policy=dg.BackfillPolicy.multi_run(1),
    )
    def scored_day(context: dg.AssetExecutionContext) -> Iterator[Result]:
        sign(context)
        day = date.fromisoformat(context.partition_key)
        if day < platform.first_evaluated:
            context.log.info(f"{day}: nothing to do, the first model can score {platform.first_evaluated}")
            return
        try:
            record, model = waiting(
                context, platform, partial(_model_of, site, day), TRAINING_PATIENCE, for_queued=False
            )
        except Withheld as e:
            raise dg.Failure(str(e), allow_retries=False) from e
        with site.warehouse.stage(context.run.run_id) as stage, site.warehouse.connect() as con:
            create_evaluated(con, platform, site.warehouse, day)
            # all are published together, whatever was asked for
            for result in build(ScoredDay(site, day, record, model, con, stage)):
                if selected(context, result):
                    yield result

    return scored_day


def _model_of(site: Site, day: date) -> "tuple[ModelRecord, Predictor]":
    """The model trained through the day before.

    Raises:
        Withheld: if it, or the day's examples, is not there.
    """
    verify_window(site, [day])
    record = model_store.trained_on(site, day - timedelta(1))
    return record, model_store.load(site, record)
