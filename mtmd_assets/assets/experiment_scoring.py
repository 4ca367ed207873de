"""Scoring an evaluation day by the models of an experiment, and which of the published ones still count."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sql
from mtmd_assets import model_store, training_record
from mtmd_assets.assets.common import Metadata, preview
from mtmd_assets.assets.evaluation import create_scored, predictions
from mtmd_assets.contenders import MODELS, change_of
from mtmd_assets.home import Site
from mtmd_assets.join import create_evaluated
from mtmd_assets.training_pool import TrainJob, training_jobs
from mtmd_assets.windows import rankers_of
from mtmd_model.metrics import FLOOR

if TYPE_CHECKING:
    import polars as pl
    from duckdb import DuckDBPyConnection

TABLES = {
    "experiment_models": "One row a trained contender, ablation or seed, as in `models`, and a hash of the rows it scored.",
    "experiment_predictions": "As `predictions`, of every model and seed.",
    "experiment_slice_metrics": "Metrics of every model and seed, and of the constants; the view `slice_metrics` adds the daily ones.",
    "experiment_routing_metrics": "Which experts the routers of each seed of mtmd use.",
}


@dataclass(frozen=True)
class Trained:
    """One model of an experiment."""

    model: str
    seed: int
    version: str
    folder: Path


def jobs_of(site: Site, window: Sequence[date], models: Sequence[tuple[str, int]]) -> dict[tuple[str, int], TrainJob]:
    """(model, seed) -> its training."""
    platform = site.platform
    trainings = {f"{m}-{seed}": (change_of(platform, m), _training_seed(window[-1], seed)) for m, seed in models}
    return dict(zip(models, training_jobs(site, window, trainings).values(), strict=True))


def _training_seed(last: date, seed: int) -> int:
    """What a training is seeded with: those of different windows share nothing by chance (`intervals`)."""
    return 1000 * last.toordinal() + seed


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
        scored = scored_data(con)
        manifests, routing = _score(con, trained, scored)
        con.execute(f"CREATE TEMP VIEW predicted AS FROM of_models WHERE model_version = '{trained[0].version}'")
        create_scored(con, window[0], window[-1], "of_models")
        kept = _kept(con, site, day, scored, trained, log)
        others = f"ds = '{day}' AND list_contains([{', '.join(map(sql.quoted, kept))}]::VARCHAR[], model_version)"

        def write(table: str, rows: str, parameters: object = None) -> None:
            published = f"SELECT * EXCLUDE ds FROM {table} WHERE {others}"
            stage.write(con, table, day, f"FROM ({rows}) UNION ALL BY NAME {published}", parameters)

        con.register("trained", _model_rows(trained, manifests, window, rankers_of(con, window), scored))
        con.register("routed", pa.Table.from_pylist(routing))
        write("experiment_models", "FROM trained")
        write("experiment_predictions", "FROM of_models")
        write("experiment_slice_metrics", sql.text("cell_metrics"), {"floor": FLOOR})
        write("experiment_routing_metrics", "FROM routed")
        metadata: dict[str, Metadata] = {
            table: {"preview": preview(con, f"SELECT * FROM {table} WHERE ds = '{day}'")} for table in TABLES
        }
        stage.publish()
    return metadata


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
    jobs = jobs_of(site, window, list(published))
    return [Trained(*key, job.name, job.folder) for key, job in jobs.items() if published[key] == (job.name, scored)]


def scored_data(con: "DuckDBPyConnection") -> str:
    """A hash of `evaluated` (`join.create_evaluated`), the rows that the models of a day are scored on, in any order."""
    [(found,)] = con.execute("SELECT bit_xor(md5_number(e::VARCHAR)) FROM evaluated e").fetchall()
    return f"{found or 0:x}"


def scored_data_of(site: Site, day: date) -> str:
    """`scored_data` of a day."""
    with site.warehouse.connect() as con:
        create_evaluated(con, site.platform, site.warehouse, day)
        return scored_data(con)


def _score(
    con: "DuckDBPyConnection", trained: Sequence[Trained], scored: str
) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
    """Leave the temp table `of_models`, in the columns of `predictions`; returns the trainings' manifests, and the routing of
    mtmd's seeds."""
    rows = con.sql("FROM evaluated ORDER BY impression_id").to_arrow_table()
    manifests, routing = list[Mapping[str, Any]](), list[dict[str, Any]]()
    for n, t in enumerate(trained):
        record = training_record.read_or_make(t.folder, rows, scored, routing=t.model == "mtmd")
        con.register("of_one", predictions(record.probabilities, t.model, t.version, t.seed, rows))
        con.execute(f"{'INSERT INTO of_models' if n else 'CREATE TEMP TABLE of_models AS'} FROM of_one")
        con.unregister("of_one")
        manifests.append(record.manifest)
        routing += [{"seed": t.seed, "model_version": t.version, **row} for row in record.routing]
    return manifests, routing


def _model_rows(
    trained: Sequence[Trained],
    manifests: Sequence[Mapping[str, Any]],
    window: Sequence[date],
    rankers: Sequence[str],
    scored: str,
) -> "pl.DataFrame":
    """Rows of `experiment_models`, from the trainings' manifests."""
    import polars as pl

    rows = [
        {**model_store.row_of(t.model, t.version, t.seed, window, m, rankers, promoted=False), "scored_data": scored}
        for t, m in zip(trained, manifests, strict=True)
    ]
    return pl.DataFrame(rows, schema_overrides={"ranker_versions": pl.List(pl.String)})
