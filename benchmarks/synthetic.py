"""Joined examples of a made-up platform, 60 features wide, for measuring speed and memory: the scores are noise."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtmd_model.batch import Batch
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.schema import Feature, Schema, Side, Task

IDS = 1_000_000
KNOWN = tuple(str(n) for n in range(0, IDS, 128))


def platform(surfaces: int = 3, products: int = 2) -> Schema:
    """44 dense and 16 categorical features that every domain has, four tasks.

    Vocabularies are fixed or hashed: two features of a million ids are hashed, two have a row for every 128th id.
    """
    every_surface = tuple(f"surface {n}" for n in range(surfaces))
    every_product = tuple(f"product {n}" for n in range(products))
    sides: list[tuple[Side, tuple[str, ...], int]] = [("query", every_surface, 26), ("item", every_product, 18)]
    features = []
    for side, has, dense in sides:
        features += [Feature(f"{side} dense {n}", side, "dense", has, log1p=n % 4 == 0) for n in range(dense)]
        features += [
            Feature(f"{side} id", side, "categorical", has, buckets=8192),
            Feature(f"{side} known id", side, "categorical", has, vocabulary=KNOWN),
        ]
        words = tuple(f"word {n}" for n in range(20))
        features += [
            Feature(f"{side} word {n}", side, "categorical", has, vocabulary=words, key=n < 2) for n in range(6)
        ]
    slices = tuple((s, p) for s in every_surface for p in every_product)
    tasks = [Task("ctr", None, 2.0, 128, slices)]
    tasks += [Task(name, "ctr", 1.0, 32, slices) for name in ("gctr", "octr", "cvr")]
    return Schema("benchmark", every_surface, every_product, tuple(tasks), tuple(features))


def examples(schema: Schema, rows: int, seed: int = 0) -> pa.Table:
    """Rows of this platform, a tenth of the features' values missing; float32 and int64 as the lake stores them."""
    rng = np.random.default_rng(seed)
    columns = {
        "surface": pa.array(schema.surfaces).take(pa.array(rng.integers(len(schema.surfaces), size=rows))),
        "product": pa.array(schema.products).take(pa.array(rng.integers(len(schema.products), size=rows))),
    }
    for f in schema.features:
        missing = rng.random(rows, np.float32) < 0.1
        if f.kind == "dense":
            columns[f.name] = pa.array(rng.standard_normal(rows, np.float32), mask=missing)
        elif f.vocabulary is None or f.vocabulary == KNOWN:
            columns[f.name] = pa.array(rng.integers(IDS, size=rows), mask=missing)
        else:
            columns[f.name] = pa.array(f.vocabulary).take(pa.array(rng.integers(20, size=rows), mask=missing))
    ctr = rng.random(rows)
    for task in schema.tasks:
        columns[f"score_{task.name}"] = pa.array(ctr if task.given is None else ctr * rng.random(rows))
    columns["weight"] = pa.array(np.ones(rows))
    return pa.table(columns)


def write_days(schema: Schema, folder: Path, days: int, rows: int) -> list[Path]:
    """A file a day, as the lake holds them. They repeat after the fourth: what is measured does not read the values."""
    files: list[Path] = []
    for day in range(days):
        path = folder / f"ds={day:04d}" / "data.parquet"
        path.parent.mkdir(parents=True)
        if day < 4:
            _write(examples(schema, rows, day), path)
        else:
            path.hardlink_to(files[day % 4])
        files.append(path)
    return files


def _write(day: pa.Table, path: Path) -> None:
    """By the lake's writer, for what a file costs to read depends on who wrote it; by pyarrow where there is no DuckDB."""
    try:
        import duckdb
    except ImportError:
        pq.write_table(day, path, row_group_size=122_880, compression="zstd")
        return
    with duckdb.connect() as con:
        con.register("day", day)
        con.execute(f"COPY (FROM day) TO '{path}' (FORMAT parquet, COMPRESSION zstd)")


def window(schema: Schema, rows: int) -> tuple[Encoder, Batch]:
    """An encoder with nothing to fit, and that many encoded rows."""
    encoder = fit_encoder(schema, [])
    return encoder, encoder.encode(examples(schema, rows))
