"""Serving: publishing both towers' embeddings beside their bare forward passes; one query against a million items.

python -m benchmarks.serving

The export is what a day's run does: distinct items (or requests) from the day's rows, encoding, the tower, vectors to
Parquet. The model is untrained: speed does not read its weights. Every row is an item and a request of its own, with
values of its own, so that vectors differ and compress as badly as real ones; once more with the day's own items and
requests, which have several rows each, apart and both, as a day exports them.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from benchmarks.figures import Figure, alternating, table
from benchmarks.lake import DAY, Metered, world
from mtmd_assets.assets.embeddings import KEYS, TABLE_OF, write_embeddings
from mtmd_assets.home import Site
from mtmd_model.architectures import build
from mtmd_model.encoder import fit_encoder
from mtmd_model.mtmd import MTMDConfig
from mtmd_model.predict import Predictor
from mtmd_model.schema import Side
from sql import quoted

WIDTH = 192
"""Of the paper's vector of ctr, without its bias coordinates."""
EXPORT = 0.8
"""The bound: rows a second exported over rows a second through the tower alone."""


def figures(
    rows: int = 50_000,
    items: int = 1_000_000,
    preset: str = "paper",
    width: int = WIDTH,
    repetitions: int = 5,
    folder: Path | None = None,
) -> list[Figure]:
    """Export both towers' embeddings, and score stored items for one query.

    Args:
        rows: items, and requests, of the exported day.
        items: stored vectors that a query is scored against.
        preset: of the model.
        width: of the stored vectors.
        repetitions: medians count.
        folder: where the lake goes; a temporary one when left out.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        site = world(Path(scratch) / "serving", rows)
        apart: list[Sequence[Side]] = [["item"], ["query"]]
        found = [f for sides in apart for f in _export(site, sides, preset, repetitions, own_keys=True)]
        for sides in (*apart, list(TABLE_OF)):
            found += _export(site, sides, preset, repetitions, own_keys=False)
        return found + _score(site, items, width, repetitions)


def _export(site: Site, sides: Sequence[Side], preset: str, repetitions: int, own_keys: bool) -> list[Figure]:
    """Towers: the day's rows to staged tables, beside the forward passes over the same items or requests.

    Args:
        own_keys: a key for every row; else the day's own, so that its rows have to be searched for what is distinct.
    """
    log = site.source.read(DAY).impressions
    day = log.filter(pl.col("surface").is_in(list(site.platform.surfaces)))
    if own_keys:
        rng = np.random.default_rng(0)
        day = day.with_columns(
            *(pl.int_range(day.height).alias(key) for key in ("request_id", "item_id")),
            *(pl.Series(f, rng.standard_normal(day.height, np.float32)) for f in ("user_taste_0", "ad_content_0")),
        )
    schema = site.platform.model_schema
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "day.parquet"
        day.write_parquet(file)
        encoder = fit_encoder(schema, [file])
        model = build("mtmd", encoder, MTMDConfig.preset(preset)).eval()
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.05, generator=noise)
        predictor = Predictor(model, encoder, {})
        distinct = {side: day.unique([*KEYS[side]], maintain_order=True) for side in sides}
        encoded = {side: encoder.encode_side(rows.to_arrow(), side) for side, rows in distinct.items()}
        embed = {"item": model.embed_item, "query": model.embed_query}

        def forward() -> None:
            with torch.inference_mode():
                for side, rows in encoded.items():
                    for start in range(0, len(rows), predictor.batch_size):
                        embed[side](rows.slice(start, start + predictor.batch_size))

        def write() -> None:
            for side in sides:
                write_embeddings(site, con, stage, DAY, side, predictor, "benchmark")

        with site.warehouse.stage() as stage, stage.connect() as con:
            con.execute(f"CREATE TEMP VIEW evaluated AS FROM read_parquet({quoted(file)})")
            export, towers = Metered(write), Metered(forward)
            took, alone = alternating(export, towers, repetitions=repetitions)
    count = sum(rows.height for rows in distinct.values())
    what = " and ".join(f"{rows.height:,} {KEYS[side][0].removesuffix('_id')}" for side, rows in distinct.items())
    towers_of = "the towers'" if len(sides) > 1 else "the tower's"
    name = f"export of {what} embeddings over {towers_of} forward speed"
    name += "" if own_keys else f", from {day.height:,} rows"
    rate = f"forward {count / alone:,.0f} rows/s, export {count / took:,.0f} rows/s"
    cpu = f"forward {towers.cpu:.2f} CPU s, export {export.cpu:.2f} CPU s"
    ratio = alone / took
    held = own_keys or len(sides) > 1
    return [
        Figure.at_least(name, ratio, "x", rate, EXPORT) if held else Figure.report(name, ratio, "x", rate),
        Figure.report(f"{name}: CPU", towers.cpu / export.cpu, "x", cpu),
    ]


def _score(site: Site, items: int, width: int, repetitions: int) -> list[Figure]:
    """One query against every stored item: SQL over the lake, SQL in memory, and an exact index in numpy."""
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((items, width), dtype=np.float32)
    query_D = rng.standard_normal(width, dtype=np.float32) / np.float32(width)
    frame = pl.DataFrame(
        {
            "model_version": pl.repeat("benchmark", items, eager=True),
            "item_id": pl.int_range(items, eager=True),
            "product": pl.repeat("standard", items, eager=True),
            "task": pl.repeat("ctr", items, eager=True),
            "embedding": pl.Series(vectors_ND).arr.to_list(),
        }
    )
    ranked = "SELECT item_id, probability($q, embedding) AS p FROM {} WHERE task = 'ctr' ORDER BY p DESC LIMIT 100"
    asked = {"q": query_D.tolist()}
    with site.warehouse.stage() as stage:
        with stage.connect() as con:
            stage.write_frame(con, "item_embeddings", DAY, frame)
        stage.publish()

    def index() -> list[int]:
        """The hundred best items, best first."""
        logit_N = vectors_ND @ query_D
        best = np.argpartition(logit_N, -100)[-100:]
        return [int(n) for n in best[np.argsort(-logit_N[best])]]

    with site.warehouse.connect() as con:
        stored = f"(FROM item_embeddings WHERE ds = '{DAY}')"
        con.execute(f"CREATE TEMP TABLE held AS FROM {stored}")
        found = [i for i, _ in con.execute(ranked.format(stored), asked).fetchall()]
        # float32 against float64: neighbours may swap places
        assert len(set(found) & set(index())) >= 99, "SQL and the exact index disagree"
        copied = np.empty_like(vectors_ND)
        lake, memory, exact, copy = alternating(
            lambda: con.execute(ranked.format(stored), asked).fetchall(),
            lambda: con.execute(ranked.format("held"), asked).fetchall(),
            index,
            lambda: np.copyto(copied, vectors_ND),
            repetitions=max(5, repetitions),
        )
    size = vectors_ND.nbytes
    bandwidth = 2 * size / copy  # a copy reads and writes
    shown = f"a copy, {bandwidth / 1e9:.1f} GB/s; one query, vectors of {width}"

    def read(name: str, took: float) -> Figure:
        reference = f"{took * 1e3:.0f} ms, {size / took / 1e9:.1f} GB/s; {shown}"
        return Figure.report(
            f"{items:,} items scored {name}", size / took / bandwidth, "of memory bandwidth", reference
        )

    return [
        read("in SQL from the lake's Parquet", lake),
        read("in SQL from memory", memory),
        read("by an exact index (numpy)", exact),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--preset", choices=["small", "paper"], default="paper")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the lake goes while it runs")
    print(table(figures(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
