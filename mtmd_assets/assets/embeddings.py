"""Embeddings of day D's requests and items, by the model trained through D-1: one version for both towers."""

from collections.abc import Iterator, Mapping, Sequence
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
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

TABLES = {
    "item_embeddings": "The item tower's vectors, a row an item x product x task.",
    "query_embeddings": "The query tower's vectors, a row a request x task.",
}


def embedding_assets(site: Site) -> dg.AssetsDefinition:
    """The multi-asset that publishes both towers' embeddings of one day."""
    return scored_day_assets(site, "embed", TABLES, _embed)


def _embed(scored: ScoredDay) -> Iterator[dg.MaterializeResult]:
    con, stage, day, version = scored.con, scored.stage, scored.day, scored.record.version
    items, item_keys = _snapshot(scored.site, con, day, "item")
    queries, query_keys = _snapshot(scored.site, con, day, "query")
    con.register("items", _long(items, item_keys, scored.model.embed_items(items), version))
    con.register("queries", _long(queries, query_keys, scored.model.embed_queries(queries), version))
    stage.write(con, "item_embeddings", day, "FROM items")
    stage.write(con, "query_embeddings", day, "FROM queries")
    results = [_result(scored.site, con, table, day, version) for table in TABLES]
    stage.publish()
    yield from results


def _snapshot(site: Site, con: "DuckDBPyConnection", day: date, side: Side) -> "tuple[pa.Table, list[str]]":
    """The distinct items (or requests) of a day with their features, and the columns to keep beside their vectors.

    Raises:
        dagster.Failure: if one key has two different rows, naming the key and the features that vary.
    """
    kept, features = list(KEPT[side]), [f.name for f in site.platform.features if f.side == side]
    problem = varying(con, "evaluated", side, features)
    if problem:
        raise dg.Failure(f"{day}: {problem}", allow_retries=False)
    columns, keys = ", ".join(kept + features), ", ".join(KEYS[side])
    return con.sql(f"SELECT DISTINCT {columns} FROM evaluated ORDER BY {keys}").to_arrow_table(), kept


def _long(
    rows: "pa.Table", keys: Sequence[str], vectors: "Mapping[str, tuple[np.ndarray, np.ndarray]]", version: str
) -> "pa.Table":
    """One row a key x task that exists there, the vector as a list of float32."""
    import numpy as np
    import pyarrow as pa

    parts = []
    for task, (vectors_ND, exists_N) in vectors.items():
        kept = np.ascontiguousarray(vectors_ND[exists_N], dtype=np.float32)
        n, width = kept.shape
        part = rows.select(list(keys)).filter(pa.array(exists_N))
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
        part = part.append_column("embedding", pa.ListArray.from_arrays(offsets, pa.array(kept.reshape(-1))))
        parts.append(
            part.append_column("task", pa.array([task] * n)).append_column("model_version", pa.array([version] * n))
        )
    return pa.concat_tables(parts)


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
