"""Training: one MTMD model a day, on the trailing window that ends on it."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial

import dagster as dg

from checks.dagster_results import TRAINING, check_specs, training_result
from checks.training import high_passes
from mtmd_assets import model_store
from mtmd_assets.assets.common import Result, asset_key, daily_partitions, printed_log, selected
from mtmd_assets.assets.waiting import waiting
from mtmd_assets.contenders import train_config
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.pictures import loss_curve
from mtmd_assets.runs import sign
from mtmd_assets.windows import rankers_of, verify_window


def training_assets(site: Site) -> dg.AssetsDefinition:
    """The asset `models` of one platform."""
    platform = site.platform
    window_of_days = dg.TimeWindowPartitionMapping(start_offset=1 - platform.training.window_days, end_offset=0)

    key = asset_key(platform, "models")
    spec = dg.AssetSpec(
        key,
        deps=[dg.AssetDep(asset_key(platform, "joined_examples"), partition_mapping=window_of_days)],
        description="One row a trained version: window, data hashes, parameters, validation figures. The last day of "
        "the window decides when to stop; the other days are trained on.",
        group_name=platform.name,
        kinds={"pytorch"},
    )

    @dg.multi_asset(
        name=f"{platform.name}_train",
        specs=[spec],
        check_specs=check_specs(key, TRAINING),
        # with this the check may stay away, as the model may (on days that end no whole window)
        can_subset=True,
        partitions_def=daily_partitions(platform),
        backfill_policy=dg.BackfillPolicy.multi_run(1),
    )
    def models(context: dg.AssetExecutionContext) -> Iterator[Result]:
        sign(context)
        day = date.fromisoformat(context.partition_key)
        if day < platform.first_window_end:
            context.log.info(f"{day}: nothing to do, the first whole window ends on {platform.first_window_end}")
            return
        try:
            waiting(context, platform, partial(verify_window, site, platform.window(day)), for_queued=False)
        except Withheld as e:
            raise dg.Failure(f"not trained: {e}", allow_retries=False) from e
        log = context.log.info if sys.stderr.isatty() else printed_log(context)  # there the progress bar tells
        for result in train_window(site, day, context.run.run_id, log):
            if selected(context, result):
                yield result

    return models


def train_window(site: Site, day: date, run_id: str, log: Callable[[str], None]) -> list[Result]:
    """Train on the window that ends on `day`, which is published; publish the model and its row of `models`."""
    from mtmd_model.train import train

    platform, warehouse = site.platform, site.warehouse
    window = platform.window(day)
    config = replace(train_config(platform), progress_bar=sys.stderr.isatty())
    hashes = model_store.data_hashes(site, window)
    code = model_store.code_version()
    *fitted, stopped_on = (warehouse.path("joined_examples", d) for d in window)
    with warehouse.stage(run_id) as stage:
        result = train(
            platform.model_schema,
            fitted,
            [stopped_on],
            config,
            stage.draft / "model",
            on_epoch=lambda e: log(
                f"epoch {e['epoch']}: loss {e['train_loss']:.5f}, on {day} {e['validation_loss']:.5f}, LogMAE {e['validation_logmae']:.4f}"
            ),
            manifest={
                "platform": platform.name,
                "window": [str(d) for d in window],
                "data": hashes,
                "code_version": code,
            },
        )
        ingredients = {
            "data": hashes,
            "config": config.to_dict(),
            "schema": platform.model_schema.to_dict(),
            "code": code,
            "weights": result.manifest["tensors_sha256"],
        }
        version = model_store.version_name(day, ingredients)
        stage.add(result.out_dir, site.models / version)
        best = result.history[result.best_epoch]
        params = result.manifest["params"]
        with warehouse.connect() as con:
            rankers = rankers_of(con, window)
            record = model_store.row_of("mtmd", version, config.seed, window, result.manifest, rankers, promoted=True)
            stage.write_rows(con, "models", day, [record])
            stage.publish()
    key = asset_key(platform, "models")
    published: Result = dg.MaterializeResult(
        asset_key=key,
        metadata={
            "model_version": version,
            "window": f"{window[0]} to {day}",
            "dagster/row_count": 1,
            "training rows": record["rows"],
            "parameters": params,
            "epochs": f"{len(result.history)}, weights of epoch {result.best_epoch}",
            "validation loss": best["validation_loss"],
            "validation LogMAE": best["validation_logmae"],
            "loss curve": loss_curve(result.history, result.best_epoch),
            "ranker versions": rankers,
            "folder": dg.MetadataValue.path(str(site.models / version)),
        },
    )
    return [published, training_result(high_passes(result.history), key)]
