"""Evaluation of day D by the model trained through D-1: predictions, slice metrics, who the routers use."""

from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING

import dagster as dg

import sql
from mtmd_assets.assets.common import asset_key, preview
from mtmd_assets.assets.scored_day import ScoredDay, scored_day_assets
from mtmd_assets.home import Site
from mtmd_assets.pictures import heat_map
from mtmd_assets.scoreboard import scoreboard

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

    from mtmd_assets.model_store import ModelRecord
    from mtmd_model.predict import Predictor

TABLES = {
    "predictions": "P(task | impression) of the model beside the heavyweight score, a row an impression x task.",
    "slice_metrics": "LogMAE and other distances to the heavyweight scores, a row a model x slice x task x bucket.",
    "routing_metrics": "Which experts the routers use, a row a domain x task x expert.",
}

FLOOR = 1e-6
"""LogMAE floors both probabilities here; `slice_metrics.floored` is the share of rows it touched."""


def evaluation_assets(site: Site) -> dg.AssetsDefinition:
    """The multi-asset that evaluates one day of a platform."""
    return scored_day_assets(site, "evaluate", TABLES, _evaluate)


def _evaluate(scored: ScoredDay) -> Iterator[dg.MaterializeResult]:
    con, stage, day, record = scored.con, scored.stage, scored.day, scored.record
    rows = con.sql("FROM evaluated").to_arrow_table()
    con.register("predicted", _predictions(scored.model, record, rows))
    window = f"ds BETWEEN '{record.window_start}' AND '{record.window_end}'"
    con.execute(f"CREATE TEMP VIEW window_examples AS FROM joined_examples WHERE {window}")
    con.execute(f"CREATE TEMP TABLE constants AS {sql.text('constants')}", {"floor": FLOOR})
    con.execute(f"CREATE TEMP VIEW scored AS FROM predicted UNION ALL BY NAME ({sql.text('constant_predictions')})")
    routing = [{"model_version": record.version, **row} for row in scored.model.routing(rows)]
    stage.write(con, "predictions", day, "FROM predicted")
    stage.write(con, "slice_metrics", day, sql.text("slice_metrics"), {"floor": FLOOR})
    stage.write_rows(con, "routing_metrics", day, routing)
    results = list(_results(scored.site, con, day, record))
    stage.publish()
    yield from results


def _predictions(model: "Predictor", record: "ModelRecord", rows: "pa.Table") -> "pl.DataFrame":
    """One row an impression x task that exists in its slice."""
    import polars as pl

    keys = pl.DataFrame(rows.select(["impression_id", "user_id", "surface", "product"]))
    parts = [
        keys.with_columns(
            pl.lit(task).alias("task"),
            pl.DataFrame(rows.select([f"score_{task}"])).to_series().alias("score"),
            pl.Series("probability", probability),
        ).drop_nulls("score")
        for task, probability in model.predict(rows).items()
    ]
    return pl.concat(parts).with_columns(
        pl.lit("mtmd").alias("model"),
        pl.lit(record.version).alias("model_version"),
        pl.lit(record.seed).cast(pl.Int32).alias("seed"),
    )


def _results(site: Site, con: "DuckDBPyConnection", day: date, record: "ModelRecord") -> Iterator[dg.MaterializeResult]:
    """Asset results with what a person wants to see at once."""
    key = [day, record.version]
    of_day = "ds = ? AND model_version = ?"
    cells = con.execute(
        f"SELECT surface || ' · ' || product, task, logmae FROM slice_metrics WHERE {of_day} AND model = 'mtmd' AND bucket IS NULL",
        key,
    ).fetchall()
    [(mean, rows)] = con.execute(
        f"SELECT avg(logmae), sum(rows)::BIGINT FROM slice_metrics WHERE {of_day} AND model = 'mtmd' AND bucket IS NULL",
        key,
    ).fetchall()
    slices = [f"{s} · {p}" for s, p in site.platform.slices]
    shared = {"model_version": record.version, "trained through": str(record.window_end)}
    yield dg.MaterializeResult(
        asset_key=asset_key(site.platform, "predictions"),
        metadata={
            **shared,
            "dagster/row_count": rows,
            "preview": preview(con, f"SELECT * FROM predictions WHERE ds = '{day}'"),
        },
    )
    yield dg.MaterializeResult(
        asset_key=asset_key(site.platform, "slice_metrics"),
        metadata={
            **shared,
            "mean LogMAE over slice x task": mean,
            "LogMAE": heat_map(
                slices, site.platform.task_names, {(s, t): v for s, t, v in cells}, f"LogMAE of mtmd on {day}"
            ),
            "beside the constants": dg.MetadataValue.md(scoreboard(con, site, [day])),
        },
    )
    yield dg.MaterializeResult(
        asset_key=asset_key(site.platform, "routing_metrics"),
        metadata={
            **shared,
            "mean gates": preview(
                con,
                f"PIVOT (SELECT tower, domain, task, expert, mean_gate FROM routing_metrics WHERE ds = '{day}') ON expert USING first(mean_gate)",
                100,
            ),
        },
    )
