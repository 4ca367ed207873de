"""By how much MTMD is better than every other model of its experiments, over the pooled rows of the last evaluation days."""

from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

import sql
from mtmd_assets import model_store
from mtmd_assets.assets.common import asset_key, daily_partitions, preview, printed_log
from mtmd_assets.assets.experiment_scoring import Trained, current_models, scored_data_of
from mtmd_assets.contenders import ABLATIONS, MODELS
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.platform import Platform
from mtmd_assets.runs import sign

if TYPE_CHECKING:
    import polars as pl
    from duckdb import DuckDBPyConnection


def improvement_asset(site: Site) -> dg.AssetsDefinition:
    """`improvements`: a partition is the last of the evaluation days that are compared."""
    platform = site.platform
    pooled = dg.TimeWindowPartitionMapping(start_offset=1 - platform.experiments.days, end_offset=0)

    @dg.asset(
        key=asset_key(platform, "improvements"),
        deps=[dg.AssetDep(asset_key(platform, "experiment_predictions"), partition_mapping=pooled)],
        description="(contender - mtmd) / contender of LogMAE, by slice x task x bucket, over the pooled rows of the "
        "last evaluation days, with bootstrap intervals over users and seeds.",
        group_name=f"{platform.name}_experiments",
        kinds={"parquet"},
        partitions_def=daily_partitions(platform),
        backfill_policy=dg.BackfillPolicy.multi_run(1),
    )
    def improvements(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        sign(context)
        try:
            return compare(site, date.fromisoformat(context.partition_key), context.run.run_id, printed_log(context))
        except Withheld as e:
            raise dg.Failure(str(e), allow_retries=False) from e

    return improvements


def compared_days(platform: Platform, model: str, last: date) -> list[date]:
    """The evaluation days that end on `last`, as many as a model is compared on: ablations may have fewer."""
    experiments = platform.experiments
    count = (experiments.ablation_days if model in ABLATIONS else None) or experiments.days
    return [last - timedelta(n) for n in reversed(range(count))]


def compare(site: Site, last: date, run_id: str, log: Callable[[str], None]) -> dg.MaterializeResult:
    """Improvements of mtmd over every other model that has all of its days (`compared_days`), by what is current on each.

    Raises:
        Withheld: none has.
    """
    import polars as pl

    from mtmd_assets.improvement import improvement_table

    platform, warehouse = site.platform, site.warehouse
    with warehouse.stage(run_id) as stage, warehouse.connect() as con:
        widest = compared_days(platform, "mtmd", last)
        scored = {day: _scored(site, day) for day in widest}
        current = {day: models for day, (models, _) in scored.items()}
        published = con.execute(
            "SELECT DISTINCT model FROM experiment_models WHERE ds BETWEEN ? AND ?", [widest[0], last]
        )
        seen = {model for (model,) in published.fetchall()} - {"mtmd"}
        tables, versions = [], {}
        for model in (m for m in MODELS if m in seen):
            days = compared_days(platform, model, last)
            seeds = _seeds_on_all([current[day] for day in days], model)
            if not seeds:
                log(
                    f"{model} is left out: it and mtmd have no seed by today's code, settings and data on all of "
                    f"{', '.join(map(str, days))}"
                )
                continue
            ours, theirs = (predictions_of(con, days, name, seeds) for name in ("mtmd", model))
            table = improvement_table(ours, theirs).join(
                _by_rows(ours, theirs), on=["surface", "task", "bucket"], how="left", nulls_equal=True
            )
            tables.append(table.with_columns(contender=pl.lit(model), eval_start=pl.lit(days[0])))
            versions[model] = [
                (t.version, scored[day][1])
                for day in days
                for t in current[day]
                if t.model in ("mtmd", model) and t.seed in seeds
            ]
        if not tables:
            raise Withheld(
                f"no model has experiments of {widest[0]} to {last} by today's code, settings and data: "
                f"run {platform.name}_experiments"
            )
        result_id = f"{last}-{model_store.digest(versions)}"
        con.register("compared", pl.concat(tables))
        stage.write(
            con,
            "improvement_results",
            last,
            f"SELECT '{result_id}' AS result_id, DATE '{last}' AS eval_end, * FROM compared",
        )
        query = f"SELECT contender, rows, seeds, improvement, low, high FROM improvement_results WHERE ds = '{last}' AND surface IS NULL AND task IS NULL AND bucket IS NULL"
        metadata: dict[str, Any] = {"result_id": result_id, "mean improvement": preview(con, query, 50)}
        stage.publish()
    return dg.MaterializeResult(metadata=metadata)


def _scored(site: Site, day: date) -> tuple[list[Trained], str]:
    """The current models of a day, and a hash of what they were scored on; none where it is not published."""
    if not site.warehouse.published("joined_examples", day):
        return [], ""
    scored = scored_data_of(site, day)
    with site.warehouse.connect() as con:
        return current_models(con, site, day, scored), scored


def _seeds_on_all(days: Sequence[Sequence[Trained]], model: str) -> list[int]:
    """The seeds that a model and mtmd have on every day."""
    return sorted(
        set.intersection(*({t.seed for t in of_day if t.model == name} for of_day in days for name in (model, "mtmd")))
    )


def _by_rows(ours: "pl.DataFrame", theirs: "pl.DataFrame") -> "pl.DataFrame":
    """Improvement of the LogMAE of all rows of a task together, with its pointwise interval, as further columns of the
    task's lines: in these a large slice counts for more, in the mean over cells for as much as a small one."""
    import polars as pl

    from mtmd_assets.improvement import improvement_table

    everywhere = [pl.lit("all").alias(column) for column in ("surface", "product")]
    of_tasks = improvement_table(ours.with_columns(everywhere), theirs.with_columns(everywhere))
    return of_tasks.filter(pl.col("surface").is_not_null()).select(
        pl.lit(None, pl.String).alias("surface"),
        "task",
        "bucket",
        pl.col("improvement").alias("by_rows"),
        pl.col("low").alias("by_rows_low"),
        pl.col("high").alias("by_rows_high"),
    )


def predictions_of(con: "DuckDBPyConnection", days: Sequence[date], model: str, seeds: Sequence[int]) -> "pl.DataFrame":
    """A model's predictions on consecutive days, each with its bucket."""
    params = {"model": model, "first": days[0], "last": days[-1], "seeds": list(seeds)}
    return con.sql(sql.text("compared_predictions"), params=params).pl()
