import random
from datetime import date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from mtmd_assets.faults import Withheld
from mtmd_assets.history import create_history
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.tables import tables
from mtmd_assets.warehouse import Warehouse

START = date(2026, 1, 1)

PLATFORM = """
name: small
start: 2026-01-01
id_type: integer
source: {kind: parquet, impressions: nowhere}
ranker: {}
surfaces: [feed, search]
products: [standard, shopping]
tasks:
  - {name: click}
  - {name: buy, given: click, products: [shopping]}
features:
  - {name: country, side: query, kind: categorical, min_count: 1, key: true}
  - {name: seller, side: item, kind: categorical, min_count: 1, key: true}
  - {name: user_shown, side: query, kind: dense, history: {by: [user_id], of: impressions, days: 2}}
  - {name: user_clicks, side: query, kind: dense, surfaces: [feed],
     history: {by: [user_id, surface], of: click, days: 1}}
  - {name: item_ctr, side: item, kind: dense, history: {by: [item_id], of: click, per: impressions, days: 2, prior: 2}}
  - {name: seller_buys, side: item, kind: dense, history: {by: [seller], of: buy, per: click, days: 2, prior: 1}}
"""
COLUMNS = ["user_id", "item_id", "surface", "product", "seller", "outcome_click", "outcome_buy"]
Row = tuple[int, int, str, str, str | None, int | None, int | None]


def small() -> Platform:
    return parse_platform(PLATFORM, "small.yaml")


def publish(warehouse: Warehouse, day: date, rows: list[Row]) -> None:
    frame = pl.DataFrame(rows, schema=COLUMNS, orient="row").with_columns(
        pl.int_range(len(rows), dtype=pl.Int64).alias("impression_id"),
        pl.int_range(len(rows), dtype=pl.Int64).alias("request_id"),
        pl.lit(datetime.combine(day, datetime.min.time())).alias("ts"),
        pl.lit("US").alias("country"),
    )
    with warehouse.connect() as con, warehouse.stage() as stage:
        con.register("frame", frame)
        stage.write(con, "impressions", day, "FROM frame")
        stage.publish()


def history(platform: Platform, warehouse: Warehouse, day: date) -> list[dict[str, object]]:
    with warehouse.connect() as con:
        create_history(con, platform, warehouse, day)
        return con.sql("FROM history ORDER BY impression_id").pl().rows(named=True)


def day(n: int) -> date:
    return START + timedelta(n)


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    warehouse = Warehouse(tmp_path, tables(small()))
    publish(warehouse, day(0), [(1, 7, "feed", "shopping", "s", 1, 1), (2, 7, "feed", "shopping", "s", 1, 0)])
    publish(
        warehouse,
        day(1),
        [
            (1, 7, "search", "shopping", "s", 1, 0),
            (1, 8, "feed", "standard", None, 1, None),
            (1, 8, "feed", "standard", None, 0, None),
            (3, 9, "feed", "standard", "t", None, None),
        ],
    )
    publish(
        warehouse,
        day(2),
        [
            (1, 7, "feed", "shopping", "s", 0, 0),
            (1, 8, "search", "standard", None, 0, None),
            (9, 99, "feed", "standard", "new", 0, None),
        ],
    )
    return warehouse


def test_counts_by_hand(warehouse: Warehouse) -> None:
    a, b, c = history(small(), warehouse, day(2))
    # Users: 1 was shown 1 + 3 rows in two days, 9 none.
    assert [r["user_shown"] for r in (a, b, c)] == [4, 4, 0]
    # Clicks of yesterday on the same surface; search lacks the feature.
    assert [r["user_clicks"] for r in (a, b, c)] == [1, None, 0]
    # Clicks of rows with a known outcome: 4 of 5. Item 7: 3 of 3, item 8: 1 of 2, item 99: 0 of 0.
    mean = 4 / 5
    assert a["item_ctr"] == pytest.approx((3 + 2 * mean) / (3 + 2))
    assert b["item_ctr"] == pytest.approx((1 + 2 * mean) / (2 + 2))
    assert c["item_ctr"] == pytest.approx(mean)
    # Buys per click, over the clicks where a buy could be seen: 1 of 3. The unknown seller's is missing.
    assert a["seller_buys"] == pytest.approx((1 + 1 * (1 / 3)) / (3 + 1))
    assert b["seller_buys"] is None
    assert c["seller_buys"] == pytest.approx(1 / 3)


def test_days_before_the_start_are_empty(warehouse: Warehouse) -> None:
    first = history(small(), warehouse, day(0))[0]
    assert first == {"impression_id": 0, "user_shown": 0, "user_clicks": 0, "item_ctr": None, "seller_buys": None}
    assert [r["user_shown"] for r in history(small(), warehouse, day(1))] == [1, 1, 1, 0]


def test_a_missing_day_withholds(warehouse: Warehouse) -> None:
    warehouse.path("impressions", day(1)).unlink()
    with pytest.raises(Withheld, match=r"2026-01-02.*build the asset impressions"):
        history(small(), warehouse, day(2))
    assert history(small(), warehouse, day(0))


def test_older_days_do_not_count(warehouse: Warehouse) -> None:
    publish(warehouse, day(3), [(2, 7, "feed", "shopping", "s", 0, 0)])
    # User 2 was shown on day 0 only, three days ago.
    assert history(small(), warehouse, day(3))[0]["user_shown"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_the_day_or_later_is_seen(warehouse: Warehouse, seed: int) -> None:
    rng = random.Random(seed)

    def some(user: int, item: int, product: str) -> Row:
        return user, item, rng.choice(["feed", "search"]), product, "s", rng.randint(0, 1), rng.randint(0, 1)

    rows = [some(rng.randint(1, 9), rng.choice([7, 8, 99]), "shopping") for _ in range(6)]
    publish(warehouse, day(2), rows)
    before = history(small(), warehouse, day(2))
    publish(warehouse, day(2), [(*r[:5], rng.randint(0, 1), rng.randint(0, 1)) for r in rows])
    publish(warehouse, day(3), [some(rng.randint(1, 9), 7, "shopping") for _ in range(rng.randint(1, 5))])
    assert history(small(), warehouse, day(2)) == before
