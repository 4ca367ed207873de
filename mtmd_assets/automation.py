"""Jobs and schedules: data and models apart for backfills, both together every day."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import dagster as dg

from mtmd_assets.assets import embeddings, evaluation, experiment_scoring
from mtmd_assets.assets.common import asset_key
from mtmd_assets.home import Site

if TYPE_CHECKING:
    from dagster._core.definitions.partitions.partitioned_schedule import UnresolvedPartitionedAssetScheduleDefinition
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

MODEL_TABLES = ("models", *evaluation.TABLES, *embeddings.TABLES)


def jobs(site: Site) -> "dict[str, UnresolvedAssetJobDefinition]":
    """By what they do: `<platform>_data`, `<platform>_models` and `<platform>_daily`, which is both; `<platform>_experiments` and
    `<platform>_improvements`.

    One process a run: the steps are few, and each process would pay for torch and Lightning again.
    """
    platform = site.platform

    def assets(tables: Iterable[str]) -> dg.AssetSelection:
        return dg.AssetSelection.assets(*(asset_key(platform, t) for t in tables))

    models, tried, compared = assets(MODEL_TABLES), assets(experiment_scoring.TABLES), assets(["improvements"])
    everything = dg.AssetSelection.key_prefixes([platform.name]) - tried - compared
    described = {
        "data": (everything - models, "Build, check and publish days of logs, scores and joined examples."),
        "models": (
            models,
            "Train on the window that ends on the day; evaluate and embed the day by the model of the day before.",
        ),
        "daily": (everything, "The day, from its logs to its embeddings."),
        "experiments": (tried, "Train mtmd, its contenders and its ablations through the day before; score the day."),
        "improvements": (
            compared,
            "The improvement of mtmd over each contender and ablation, on the evaluation days up to the day.",
        ),
    }
    return {
        name: dg.define_asset_job(
            f"{platform.name}_{name}",
            selection=selection,
            description=description,
            executor_def=dg.in_process_executor,
        )
        for name, (selection, description) in described.items()
    }


def schedule(
    site: Site, daily: "UnresolvedAssetJobDefinition"
) -> "dg.ScheduleDefinition | UnresolvedPartitionedAssetScheduleDefinition":
    """A tick on day D runs the partition D-1: its window ends on D-1, and the model trained through D-2 is evaluated on it."""
    return dg.build_schedule_from_partitioned_job(
        daily, name=f"{site.platform.name}_every_day", hour_of_day=site.platform.schedule_hour, minute_of_hour=0
    )
