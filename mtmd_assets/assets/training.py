"""Training: one MTMD model a day, on the trailing window that ends on it."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from mtmd_assets import model_store
from mtmd_assets.assets.common import asset_key, daily_partitions
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.pictures import loss_curve
from mtmd_assets.platform import Platform
from mtmd_assets.runs import sign

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
        sign(context)
        day = date.fromisoformat(context.partition_key)
        if day < platform.first_window_end:
            context.log.info(f"{day}: nothing to do, the first whole window ends on {platform.first_window_end}")
            return
        yield train_window(site, day, context.run.run_id, context.log.info)

    return models


def train_window(site: Site, day: date, run_id: str, log: Callable[[str], None]) -> dg.MaterializeResult:
    """Train on the window that ends on `day`, store the model, publish its row of `models`.

    Raises:
        dagster.Failure: if a day of the window is not published or was built under another platform file.
    """
    from mtmd_model.train import train

    platform, warehouse = site.platform, site.warehouse
    window = platform.window(day)
    try:
        verify_window(site, window)
    except Withheld as e:
        raise dg.Failure(f"not trained: {e}", allow_retries=False) from e
    files = {d: warehouse.path("joined_examples", d) for d in window}
    config = train_config(platform)
    hashes = {str(d): file_hash(f) for d, f in files.items()}
    version = model_store.version_name(
        day,
        {
            "data": hashes,
            "config": config.to_dict(),
            "schema": platform.model_schema.to_dict(),
            "code": model_store.code_version(),
        },
    )
    *fitted, stopped_on = window
    result = train(
        platform.model_schema,
        [files[d] for d in fitted],
        [files[stopped_on]],
        config,
        site.models / version,
        on_epoch=lambda e: log(
            f"epoch {e['epoch']}: loss {e['train_loss']:.5f}, on {stopped_on} {e['validation_loss']:.5f}, LogMAE {e['validation_logmae']:.4f}"
        ),
        manifest={
            "model_version": version,
            "platform": platform.name,
            "window": [str(d) for d in window],
            "code_version": model_store.code_version(),
        },
    )
    best = result.history[result.best_epoch]
    params = result.manifest["params"]
    with warehouse.stage(run_id) as stage, warehouse.connect() as con:
        sources = "SELECT list(DISTINCT ranker_version ORDER BY ranker_version), count(*) FROM joined_examples WHERE ds BETWEEN ? AND ?"
        [(rankers, rows)] = con.execute(sources, [window[0], day]).fetchall()
        record = {
            "model": "mtmd",
            "model_version": version,
            "seed": config.seed,
            "window_start": window[0],
            "window_end": day,
            "rows": rows,
            "embedding_params": params["embedding"],
            "dense_params": params["dense"],
            "data_hashes": json.dumps(hashes),
            "ranker_versions": rankers,
            "code_version": model_store.code_version(),
            "config": json.dumps(config.to_dict()),
            "epochs": len(result.history),
            "best_epoch": result.best_epoch,
            "validation_loss": best["validation_loss"],
            "validation_logmae": best["validation_logmae"],
            "promoted": True,
        }
        stage.write_rows(con, "models", day, [record])
        stage.publish()
    return dg.MaterializeResult(
        metadata={
            "model_version": version,
            "window": f"{window[0]} to {day}",
            "dagster/row_count": 1,
            "training rows": rows,
            "parameters": params,
            "epochs": f"{len(result.history)}, weights of epoch {result.best_epoch}",
            "validation loss": best["validation_loss"],
            "validation LogMAE": best["validation_logmae"],
            "loss curve": loss_curve(result.history, result.best_epoch),
            "ranker versions": rankers,
            "folder": dg.MetadataValue.path(str(result.out_dir)),
        }
    )


def verify_window(site: Site, window: Sequence[date]) -> None:
    """Insist that every day of the window is published, with the columns of today's platform file.

    A day is published only if it passed its checks, so a window without holes is one whose days all passed.

    Raises:
        Withheld: naming the days and what to run.
    """
    warehouse, name = site.warehouse, site.platform.name
    holes = warehouse.missing("joined_examples", window[0], window[-1])
    if holes:
        raise Withheld(
            f"joined_examples has no {', '.join(map(str, holes))}: run {name}_data for these days, or see why they were refused"
        )
    wanted = list(warehouse.tables["joined_examples"].items())
    stale = [d for d in window if warehouse.columns("joined_examples", d) != wanted]
    if stale:
        raise Withheld(
            f"joined_examples of {', '.join(map(str, stale))} was built under another platform file: run {name}_data for these days"
        )


def train_config(platform: Platform) -> "TrainConfig":
    """The platform file's training section, as the model package wants it."""
    from mtmd_model.lightning_module import OptimiserConfig
    from mtmd_model.mtmd import MTMDConfig
    from mtmd_model.train import TrainConfig

    t = platform.training
    return TrainConfig(
        model=MTMDConfig.preset(t.preset, dropout=t.dropout),
        optimiser=OptimiserConfig(
            learning_rate=t.learning_rate, weight_decay=t.weight_decay, embedding_weight_decay=t.weight_decay
        ),
        batch_size=t.batch_size,
        max_epochs=t.max_epochs,
        patience=t.patience,
        seed=t.seed,
        accelerator=t.accelerator,
        precision=t.precision,
        progress_bar=sys.stderr.isatty(),
    )


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
