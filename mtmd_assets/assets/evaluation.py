"""Evaluation of day D by the model trained through D-1: predictions, slice metrics, who the routers use."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import dagster as dg

import sql
from checks.dagster_results import ROUTING, check_specs, routing_result
from checks.routing import signatures
from mtmd_assets.assets.common import Result, asset_key, preview
from mtmd_assets.assets.scored_day import ScoredDay, scored_day_assets
from mtmd_assets.home import Site
from mtmd_assets.pictures import heat_map
from mtmd_assets.scoreboard import scoreboard
from mtmd_model.metrics import FLOOR

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from duckdb import DuckDBPyConnection
    from numpy.typing import NDArray

    from mtmd_assets.model_store import ModelRecord

TABLES = {
    "predictions": "P(task | impression) of the model beside the heavyweight score, a row an impression x task.",
    "slice_metrics": "LogMAE and other distances to the heavyweight scores, a row a model x slice x task x bucket.",
    "routing_metrics": "Which experts the routers use, a row a domain x task x expert.",
}


def evaluation_assets(site: Site) -> dg.AssetsDefinition:
    """The multi-asset that evaluates one day of a platform."""
    checks = check_specs(asset_key(site.platform, "routing_metrics"), ROUTING)
    return scored_day_assets(site, "evaluate", TABLES, _evaluate, checks)


def _evaluate(scored: ScoredDay) -> Iterator[Result]:
    con, stage, day, record = scored.con, scored.stage, scored.day, scored.record
    rows = con.sql("FROM evaluated").to_arrow_table()
    con.register("predicted", predictions(scored.model.predict(rows), "mtmd", record.version, record.seed, rows))
    create_scored(con, record.window_start, record.window_end)
    routing = [{"model_version": record.version, **row} for row in scored.model.routing(rows)]
    stage.write(con, "predictions", day, "FROM predicted")
    stage.write(con, "daily_slice_metrics", day, sql.text("cell_metrics"), {"floor": FLOOR})
    stage.write_rows(con, "routing_metrics", day, routing)
    results = list(_results(scored.site, con, day, record, routing))
    stage.publish()
    yield from results
    yield routing_result(signatures(routing), asset_key(scored.site.platform, "routing_metrics"))


def create_scored(con: "DuckDBPyConnection", first: date, last: date, models: str = "predicted") -> None:
    """Leave the temp view `scored`: what models predicted, and what the constants of a window say of the same rows.

    Args:
        first: day of the window.
        last: its last day.
        models: the table of all predictions, where `predicted` is of one model among several.
    """
    window = f"ds BETWEEN '{first}' AND '{last}'"
    con.execute(f"CREATE TEMP VIEW window_examples AS FROM joined_examples WHERE {window}")
    con.execute(f"CREATE TEMP TABLE constants AS {sql.text('constants')}", {"floor": FLOOR})
    con.execute(f"CREATE TEMP VIEW scored AS FROM {models} UNION ALL BY NAME ({sql.text('constant_predictions')})")


def predictions(
    probabilities: "Mapping[str, NDArray[Any]]", name: str, version: str, seed: int, rows: "pa.Table"
) -> "pl.DataFrame":
    """One row an impression x task that exists in its slice.

    Args:
        probabilities: task -> those of the rows.
        name: for the column `model`.
        version: for the column `model_version`.
        seed: it was trained with.
        rows: joined examples.
    """
    import polars as pl

    keys = pl.DataFrame(rows.select(["impression_id", "user_id", "surface", "product"]))
    parts = [
        keys.with_columns(
            pl.lit(task).alias("task"),
            pl.DataFrame(rows.select([f"score_{task}"])).to_series().alias("score"),
            pl.Series("probability", probability, pl.Float64),
        ).drop_nulls("score")
        for task, probability in probabilities.items()
    ]
    return pl.concat(parts).with_columns(
        pl.lit(name).alias("model"),
        pl.lit(version).alias("model_version"),
        pl.lit(seed).cast(pl.Int32).alias("seed"),
    )


def _results(
    site: Site, con: "DuckDBPyConnection", day: date, record: "ModelRecord", routing: Sequence[Mapping[str, Any]]
) -> Iterator[dg.MaterializeResult]:
    """Asset results with what a person wants to see at once."""
    key = [day, record.version]
    of_day = "ds = ? AND model_version = ?"
    cells = con.execute(
        f"SELECT surface || ' · ' || product, task, logmae FROM daily_slice_metrics WHERE {of_day} AND model = 'mtmd' AND bucket IS NULL",
        key,
    ).fetchall()
    [(mean, rows)] = con.execute(
        f"SELECT avg(logmae), sum(rows)::BIGINT FROM daily_slice_metrics WHERE {of_day} AND model = 'mtmd' AND bucket IS NULL",
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
            "mean gates": heat_map(
                list(dict.fromkeys(f"{r['tower']} · {r['domain']} · {r['task']}" for r in routing)),
                list(dict.fromkeys(r["expert"] for r in routing)),
                {(f"{r['tower']} · {r['domain']} · {r['task']}", r["expert"]): r["mean_gate"] for r in routing},
                f"mean gates of mtmd on {day}",
            ),
        },
    )
