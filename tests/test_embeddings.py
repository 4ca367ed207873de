"""What is embedded of a day: each item and each request once."""

from datetime import date

import dagster as dg
import duckdb
import polars as pl
import pytest

from mtmd_assets.assets.embeddings import _snapshot
from mtmd_assets.home import Home
from mtmd_assets.snapshots import KEPT
from tests.worlds import small_adworld

DAY = date(2026, 1, 1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A site and a day's rows: three items, each seen in several requests of several impressions."""
    folder = tmp_path_factory.mktemp("embeddings")
    site = Home(folder / "home").register(str(small_adworld(folder)))
    log = site.source.read(DAY).impressions.filter(pl.col("surface") == "search", pl.col("product") == "standard")
    return site, pl.concat([log.head(20), log.head(20).reverse()])


@pytest.mark.parametrize("side", ["item", "query"])
def test_each_is_taken_once_in_the_order_of_its_key(evaluated, side):
    site, rows = evaluated
    con = duckdb.connect()
    con.register("evaluated", rows)
    taken, kept = _snapshot(site, con, DAY, side)
    features = [f.name for f in site.platform.features if f.side == side]
    expected = rows.select(*KEPT[side], *features).unique().sort(KEPT[side])
    assert kept == list(KEPT[side])
    assert 1 < taken.num_rows < len(rows)
    assert pl.DataFrame(pl.from_arrow(taken)).equals(expected)


@pytest.mark.parametrize(("side", "feature"), [("item", "ad_age_days"), ("query", "user_tenure_days")])
def test_a_key_with_two_rows_that_differ_is_refused(evaluated, side, feature):
    site, rows = evaluated
    key = KEPT[side][0]
    first = rows[key][0]
    odd = rows.with_row_index().with_columns(
        pl.when((pl.col("index") == 0) & (pl.col(key) == first)).then(-1).otherwise(pl.col(feature)).alias(feature)
    )
    con = duckdb.connect()
    con.register("evaluated", odd)
    with pytest.raises(dg.Failure, match=rf"2026-01-01: .*{first}.* differ in \['{feature}'\]"):
        _snapshot(site, con, DAY, side)
