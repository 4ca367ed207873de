"""Training: one MTMD model a day, on the trailing window that ends on it."""

import json
from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING

import dagster as dg

from mtmd_assets import model_store
from mtmd_assets.assets.common import asset_key, daily_partitions
from mtmd_assets.home import Site
from mtmd_assets.pictures import loss_curve

if TYPE_CHECKING:
    from mtmd_model.train import TrainConfig


def training_assets(site: Site) -> dg.AssetsDefinition:
    """The asset `models` of one platform."""
    platform = site.platform
    window_of_days = dg.TimeWindowPartitionMapping(start_offset=1 - platform.training.window_days, end_offset=0)

    @dg.asset(
        key=asset_key(platform, "models"),
        deps=[dg.AssetDep(asset_key(platform, "joined_examples"), partition_mapping=window_of_days)],
        description="One row a trained version: window, data hashes, parameters, validation figures. The last day of "
        "the window decides when to stop; the other days are trained on.",
        group_name=platform.name,
        kinds={"pytorch"},
        partitions_def=daily_partitions(platform),
        backfill_policy=dg.BackfillPolicy.multi_run(1),
        output_required=False,
    )
    def models(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
        day = date.fromisoformat(context.partition_key)
        if day < platform.first_window_end:
            context.log.info(f"{day}: nothing to do, the first whole window ends on {platform.first_window_end}")
            return
        yield train_window(site, day, context.run_id, context.log.info)

    return models
