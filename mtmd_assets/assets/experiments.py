"""Experiments: MTMD, its contenders and its ablations on the same windows and seeds, and by how much MTMD is better.

A partition is an evaluation day D: every model is trained on the window that ends on D-1, as the daily one is, and
scores D. Models that are trained already, by the same code on the same data, are not trained again, so that an
interrupted run goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

import sql
from mtmd_assets.assets.common import (
    DayReport,
    Done,
    Metadata,
    Result,
    asset_key,
    daily_partitions,
    preview,
    printed_log,
)
from mtmd_assets.assets.evaluation import create_scored, predictions
from mtmd_assets.assets.training import verify_window, window_source
from mtmd_assets.contenders import ABLATIONS, CONTENDERS, MODELS, change_of
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.join import create_evaluated
from mtmd_assets.platform import Platform
from mtmd_assets.runs import sign
from mtmd_assets.training_pool import TrainJob, train_all, training_jobs
from mtmd_model.metrics import FLOOR

if TYPE_CHECKING:
    import polars as pl
    from duckdb import DuckDBPyConnection

TABLES = {
    "experiment_models": "One row a trained contender, ablation or seed, as in `models`, and a hash of the rows it scored.",
    "experiment_predictions": "As `predictions`, of every model and seed.",
    "experiment_slice_metrics": "As the daily metrics, of every model, seed and constant; the view `slice_metrics` has both, of the constants the daily.",
    "experiment_routing_metrics": "Which experts the routers of each seed of mtmd use.",
}


class ExperimentConfig(dg.Config):
    """What to train."""

    models: list[str] = Field(default=["mtmd", *CONTENDERS])
    """Names in `contenders.MODELS`, beside mtmd; what is published of others, and of further seeds, stays if they would
    be trained the same today, and scored on the same rows."""
    seeds: int = 0
    """How many; 0 is what the platform file says."""
    workers: int = 0
    """Models trained at a time, each on one thread; 0 is the number of cores."""


@dataclass(frozen=True)
class Trained:
    """One model of an experiment."""

    model: str
    seed: int
    version: str
    folder: Path


def experiment_assets(site: Site) -> list[dg.AssetsDefinition]:
    """The multi-asset of the experiments' tables, and `improvements`."""
    platform = site.platform
    before = dg.TimeWindowPartitionMapping(start_offset=-platform.training.window_days, end_offset=0)
    group = f"{platform.name}_experiments"

    @dg.multi_asset(
        name=op_name(site),
        specs=[
            dg.AssetSpec(
                asset_key(platform, table),
                deps=[dg.AssetDep(asset_key(platform, "joined_examples"), partition_mapping=before)],
                description=description,
                group_name=group,
                kinds={"pytorch", "parquet"},
                skippable=True,
            )
            for table, description in TABLES.items()
        ],
        partitions_def=daily_partitions(platform),
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def experiments(context: dg.AssetExecutionContext, config: ExperimentConfig) -> Iterator[Result]:
        sign(context)
        report = DayReport(context, platform)
        run_experiments(context, site, config, report)
        yield from report.results()
        report.raise_failures()

    pooled = dg.TimeWindowPartitionMapping(start_offset=1 - platform.experiments.days, end_offset=0)

    @dg.asset(
        key=asset_key(platform, "improvements"),
        deps=[dg.AssetDep(asset_key(platform, "experiment_predictions"), partition_mapping=pooled)],
        description="(contender - mtmd) / contender of LogMAE, by slice x task x bucket, over the pooled rows of the "
        "last evaluation days, with bootstrap intervals over users and seeds.",
        group_name=group,
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

    return [experiments, improvements]


def op_name(site: Site) -> str:
    """The step that takes an `ExperimentConfig`; a job's name would be taken."""
    return f"{site.platform.name}_train_and_score"


def run_experiments(context: dg.AssetExecutionContext, site: Site, config: ExperimentConfig, report: DayReport) -> None:
    """Train what is missing for all days of the run, so that no core waits at the end of each; then score day by day.

    A day of which a window's day, or the day itself, is not published fails by itself.

    Raises:
        dagster.Failure: an unknown model.
    """
    unknown = [m for m in config.models if m not in MODELS]
    if unknown:
        raise dg.Failure(f"models: {unknown} are none of {', '.join(MODELS)}", allow_retries=False)
    platform = site.platform
    windows: dict[date, list[date]] = {}
    for day in map(date.fromisoformat, context.partition_keys):
        if day <= platform.first_window_end:
            first = platform.first_window_end + timedelta(1)
            context.log.info(f"{day}: nothing to do, the first model can score {first}")
            continue
        window = platform.window(day - timedelta(1))
        try:
            verify_window(site, [*window, day])
            windows[day] = window
        except Withheld as e:
            report.fail(day, e)
    models = list(dict.fromkeys(["mtmd", *config.models]))
    seeds = range(config.seeds or platform.experiments.seeds)
    log = printed_log(context)
    trained = train_models(site, windows, models, seeds, config.workers, log)
    for day, window in windows.items():
        if not any(t.model == "mtmd" for t in trained[day]):
            report.fail(day, Withheld(f"every training of mtmd on the window to {window[-1]} diverged"))
            continue
        metadata = score_day(site, window, day, trained[day], context.run.run_id, log)
        seen = {"models": ", ".join(models), "seeds": len(seeds)}
        report.add(day, [Done({table: {**seen, **of_table} for table, of_table in metadata.items()})])


def score_day(
    site: Site, window: Sequence[date], day: date, trained: Sequence[Trained], run_id: str, log: Callable[[str], None]
) -> dict[str, Metadata]:
    """Publish the day scored by the models trained on its window, with what was published of others; table -> metadata.

    Of these only what today's code, data and settings would make again: an ablation of another mtmd says nothing.
    """
    import pyarrow as pa

    platform = site.platform
    with site.warehouse.stage(run_id) as stage, site.warehouse.connect() as con:
        create_evaluated(con, platform, site.warehouse, day)
        routing = _score(con, trained)
        con.execute(f"CREATE TEMP VIEW predicted AS FROM of_models WHERE model_version = '{trained[0].version}'")
        create_scored(con, window[0], window[-1], "of_models")
        scored = scored_data(con)
        kept = _kept(con, site, day, scored, trained, log)
        others = f"ds = '{day}' AND list_contains([{', '.join(map(sql.quoted, kept))}]::VARCHAR[], model_version)"
        stage.write(
            con,
            "experiment_predictions",
            day,
            f"FROM of_models UNION ALL BY NAME SELECT * EXCLUDE ds FROM experiment_predictions WHERE {others}",
        )
        metrics = f"({sql.text('cell_metrics').rstrip().rstrip(';')})"
        stage.write(
            con,
            "experiment_slice_metrics",
            day,
            f"FROM {metrics} UNION ALL BY NAME SELECT * EXCLUDE ds FROM experiment_slice_metrics WHERE {others}",
            {"floor": FLOOR},
        )
        rankers, _ = window_source(con, window)
        con.register("trained", _records(trained, window, rankers, scored))
        stage.write(
            con,
            "experiment_models",
            day,
            f"FROM trained UNION ALL BY NAME SELECT * EXCLUDE ds FROM experiment_models WHERE {others}",
        )
        con.register("routed", pa.Table.from_pylist(routing))
        stage.write(
            con,
            "experiment_routing_metrics",
            day,
            f"FROM routed UNION ALL BY NAME SELECT * EXCLUDE ds FROM experiment_routing_metrics WHERE {others}",
        )
        metadata: dict[str, Metadata] = {
            table: {"preview": preview(con, f"SELECT * FROM {table} WHERE ds = '{day}'")} for table in TABLES
        }
        stage.publish()
    return metadata


def train_models(
    site: Site,
    windows: Mapping[date, Sequence[date]],
    models: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    log: Callable[[str], None],
) -> dict[date, list[Trained]]:
    """Every model with every seed on each day's window, the last day of which decides when to stop; by day, without
    those that diverged.
    """
    jobs = {day: _jobs(site, window, [(m, seed) for seed in seeds for m in models]) for day, window in windows.items()}
    # seed by seed, so that what an interrupted run leaves is whole tables of fewer seeds
    every = [jobs[day][model, seed] for seed in seeds for day in windows for model in models]
    todo = [job for job in every if not job.finished]
    log(f"{len(every) - len(todo)} of {len(every)} models are trained already")
    train_all(todo, workers, log)
    for job in every:
        if not job.trained:
            log(f"{job.name} is left out: it diverged, {job.diverged.read_text().strip()}")
    return {
        day: [Trained(model, seed, job.name, job.folder) for (model, seed), job in of_day.items() if job.trained]
        for day, of_day in jobs.items()
    }


def _jobs(site: Site, window: Sequence[date], models: Sequence[tuple[str, int]]) -> dict[tuple[str, int], TrainJob]:
    """(model, seed) -> its training."""
    platform = site.platform
    trainings = {f"{m}-{seed}": (change_of(platform, m), _training_seed(window[-1], seed)) for m, seed in models}
    return dict(zip(models, training_jobs(site, window, trainings).values(), strict=True))


def _training_seed(last: date, seed: int) -> int:
    """What a training is seeded with: those of different windows share nothing by chance (`intervals`)."""
    return 1000 * last.toordinal() + seed


def _kept(
    con: "DuckDBPyConnection",
    site: Site,
    day: date,
    scored: str,
    trained: Sequence[Trained],
    log: Callable[[str], None],
) -> list[str]:
    """Versions of the day's other published models and seeds that are current."""
    published = con.execute("SELECT model, seed FROM experiment_models WHERE ds = ?", [day]).fetchall()
    replaced = {(t.model, t.seed) for t in trained}
    kept = [c.version for c in current_models(con, site, day, scored) if (c.model, c.seed) not in replaced]
    others = len(set(published) - replaced)
    if len(kept) < others:
        log(
            f"{day}: {others - len(kept)} published models of other code, settings or data, the day's own too, are left out"
        )
    return kept


def current_models(con: "DuckDBPyConnection", site: Site, day: date, scored: str) -> list[Trained]:
    """The models and seeds that are published of a day and that today would be trained alike, by the same code and settings
    on the same data, and scored on the same rows: others say nothing of these.

    Args:
        scored: what today are the day's rows (`scored_data`).
    """
    window = site.platform.window(day - timedelta(1))
    published = {
        (model, seed): (version, rows)
        for model, seed, version, rows in con.execute(
            "SELECT model, seed, model_version, scored_data FROM experiment_models WHERE ds = ?", [day]
        ).fetchall()
        if model in MODELS
    }
    if not published or site.warehouse.missing("joined_examples", window[0], day):
        return []
    jobs = _jobs(site, window, list(published))
    return [Trained(*key, job.name, job.folder) for key, job in jobs.items() if published[key] == (job.name, scored)]


def scored_data(con: "DuckDBPyConnection") -> str:
    """A hash of `evaluated` (`join.create_evaluated`), the rows that the models of a day are scored on, in any order."""
    [(found,)] = con.execute("SELECT bit_xor(md5_number(e::VARCHAR)) FROM evaluated e").fetchall()
    return f"{found or 0:x}"


def _score(con: "DuckDBPyConnection", trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """Leave the temp table `of_models`, in the columns of `predictions`; returns the routing of mtmd's seeds."""
    from mtmd_model import checkpoint

    rows = con.sql("FROM evaluated").to_arrow_table()
    routing: list[dict[str, Any]] = []
    for n, t in enumerate(trained):
        model = checkpoint.load(t.folder)
        con.register("of_one", predictions(model, t.model, t.version, t.seed, rows))
        con.execute(f"{'INSERT INTO of_models' if n else 'CREATE TEMP TABLE of_models AS'} FROM of_one")
        con.unregister("of_one")
        if t.model == "mtmd":
            routing += [{"seed": t.seed, "model_version": t.version, **row} for row in model.routing(rows)]
    return routing


def _records(
    trained: Sequence[Trained], window: Sequence[date], rankers: Sequence[str], scored_data: str
) -> "pl.DataFrame":
    """Rows of `experiment_models`, from the models' manifests."""
    import polars as pl

    rows = []
    for t in trained:
        manifest = json.loads((t.folder / "manifest.json").read_text())
        best = manifest["history"][manifest["best_epoch"]]
        rows.append(
            {
                "model": t.model,
                "model_version": t.version,
                "seed": t.seed,
                "window_start": window[0],
                "window_end": window[-1],
                "rows": manifest["rows"]["train"] + manifest["rows"]["validation"],
                "embedding_params": manifest["params"]["embedding"],
                "dense_params": manifest["params"]["dense"],
                "data_hashes": json.dumps(manifest["data"]),
                "ranker_versions": rankers,
                "code_version": manifest["code_version"],
                "config": json.dumps(manifest["train_config"]),
                "epochs": len(manifest["history"]),
                "best_epoch": manifest["best_epoch"],
                "validation_loss": best["validation_loss"],
                "validation_logmae": best["validation_logmae"],
                "promoted": False,
                "scored_data": scored_data,
            }
        )
    return pl.DataFrame(rows, schema_overrides={"ranker_versions": pl.List(pl.String)})


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
            seeds = _common_seeds([current[day] for day in days], model)
            if not seeds:
                log(
                    f"{model} is left out: it and mtmd have no seed by today's code, settings and data on all of "
                    f"{', '.join(map(str, days))}"
                )
                continue
            ours, theirs = (_predictions_of(con, days, name, seeds) for name in ("mtmd", model))
            table = improvement_table(ours, theirs)
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
        result_id = f"{last}-{hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:10]}"
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
    with site.warehouse.connect() as con:
        create_evaluated(con, site.platform, site.warehouse, day)
        scored = scored_data(con)
        return current_models(con, site, day, scored), scored


def _common_seeds(days: Sequence[Sequence[Trained]], model: str) -> list[int]:
    """The seeds that a model and mtmd have on every day."""
    return sorted(
        set.intersection(*({t.seed for t in of_day if t.model == name} for of_day in days for name in (model, "mtmd")))
    )


def _predictions_of(
    con: "DuckDBPyConnection", days: Sequence[date], model: str, seeds: Sequence[int]
) -> "pl.DataFrame":
    """A model's predictions on consecutive days, with the bucket of each row among its day's slice x task."""
    return con.sql(
        """SELECT seed, ds AS day, impression_id, user_id, surface, product, task, score, probability,
            (ntile(10) OVER (PARTITION BY ds, seed, surface, product, task ORDER BY score DESC, impression_id) - 1)::INT AS bucket
        FROM experiment_predictions
        WHERE ds BETWEEN $first AND $last AND model = $model AND list_contains($seeds, seed)""",
        params={"model": model, "first": days[0], "last": days[-1], "seeds": list(seeds)},
    ).pl()
