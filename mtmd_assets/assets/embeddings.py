"""Embeddings of day D's requests and items, by the model trained through D-1: one version for both towers."""

from collections.abc import Iterator, Mapping
from datetime import date
from typing import TYPE_CHECKING

import dagster as dg

from mtmd_assets.assets.common import asset_key, preview
from mtmd_assets.assets.scored_day import ScoredDay, scored_day_assets
from mtmd_assets.home import Site
from mtmd_assets.snapshots import KEPT, KEYS, varying
from mtmd_model.schema import Side

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

    from mtmd_assets.warehouse import Stage
    from mtmd_model.predict import Predictor

TABLES = {
    "item_embeddings": "The item tower's vectors, a row an item x product x task.",
    "query_embeddings": "The query tower's vectors, a row a request x task.",
}
TABLE_OF: dict[Side, str] = {"item": "item_embeddings", "query": "query_embeddings"}


def embedding_assets(site: Site) -> dg.AssetsDefinition:
    """The multi-asset that publishes both towers' embeddings of one day."""
    return scored_day_assets(site, "embed", TABLES, _embed)


def _embed(scored: ScoredDay) -> Iterator[dg.MaterializeResult]:
    con, stage, day, version = scored.con, scored.stage, scored.day, scored.record.version
    for side in TABLE_OF:
        write_embeddings(scored.site, con, stage, day, side, scored.model, version)
    results = [_result(scored.site, con, table, day, version) for table in TABLES]
    stage.publish()
    yield from results


def write_embeddings(
    site: Site, con: "DuckDBPyConnection", stage: "Stage", day: date, side: Side, model: "Predictor", version: str
) -> int:
    """Stage one tower's vectors of the rows that `con` sees as `evaluated`; returns how many items or requests.

    Raises:
        dagster.Failure: see `_snapshot`.
    """
    rows, keys = _snapshot(site, con, day, side)
    vectors = model.embed_items(rows) if side == "item" else model.embed_queries(rows)
    stage.write_frame(con, TABLE_OF[side], day, _long(rows.select(keys), vectors, version))
    return int(rows.num_rows)


def _snapshot(site: Site, con: "DuckDBPyConnection", day: date, side: Side) -> "tuple[pa.Table, list[str]]":
    """The distinct items (or requests) of a day with their features, and the columns to keep beside their vectors.

    Raises:
        dagster.Failure: if one key has two different rows, naming the key and the features that vary.
    """
    import polars as pl

    kept, features = list(KEPT[side]), [f.name for f in site.platform.features if f.side == side]
    columns, keys = ", ".join(kept + features), ", ".join(KEYS[side])
    rows = con.sql(f"SELECT DISTINCT {columns} FROM evaluated ORDER BY {keys}").to_arrow_table()
    if pl.DataFrame(pl.from_arrow(rows.select(KEYS[side]))).n_unique() < rows.num_rows:
        raise dg.Failure(f"{day}: {varying(con, 'evaluated', side, features)}", allow_retries=False)
    return rows, kept


def _long(keys: "pa.Table", vectors: "Mapping[str, tuple[np.ndarray, np.ndarray]]", version: str) -> "pl.DataFrame":
    """One row a key x task that exists there, the vector as a list of float32."""
    import numpy as np
    import polars as pl
    import pyarrow as pa

    named = pl.DataFrame(pl.from_arrow(keys))
    parts = []
    for task, (vectors_ND, exists_N) in vectors.items():
        kept = np.ascontiguousarray(vectors_ND if exists_N.all() else vectors_ND[exists_N], dtype=np.float32)
        n, width = kept.shape
        offsets = pa.array(np.arange(n + 1) * width)
        embedding = pl.Series("embedding", pa.LargeListArray.from_arrays(offsets, pa.array(kept.reshape(-1))))
        described = pl.lit(version).alias("model_version"), pl.lit(task).alias("task"), embedding
        parts.append(named.filter(exists_N).with_columns(*described))
    return pl.concat(parts)


def _result(site: Site, con: "DuckDBPyConnection", table: str, day: date, version: str) -> dg.MaterializeResult:
    counted = con.execute(
        f"SELECT task, count(*), any_value(len(embedding)) FROM {table} WHERE ds = ? GROUP BY task", [day]
    ).fetchall()
    shown = f"SELECT * REPLACE (embedding[:4] AS embedding) FROM {table} WHERE ds = '{day}'"
    return dg.MaterializeResult(
        asset_key=asset_key(site.platform, table),
        metadata={
            "dagster/row_count": sum(n for _, n, _ in counted),
            "model_version": version,
            "width": {task: width for task, _, width in counted},
            "preview (first 4 coordinates)": preview(con, shown),
        },
    )
