import json
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mtmd_assets.assets import ranker as assets
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.ranker import RankerInfo, auc, day_auc, load_ranker, ranker_day, score_day, train_ranker, training_days
from mtmd_assets.tables import tables
from mtmd_assets.warehouse import Warehouse

START = date(2026, 1, 1)
ROWS = 1200

PLATFORM = """
name: small
start: 2026-01-01
id_type: integer
source: {{kind: parquet, impressions: nowhere}}
ranker: {{train_days: {train_days}, trees: 30, min_leaf: 20, history_days: 2, cross: [[user_id, seller]]{more}}}
surfaces: [feed, search]
products: [standard, shopping]
tasks:
  - {{name: click}}
  - {{name: buy, given: click, products: [shopping]}}
features:
  - {{name: mood, side: query, kind: categorical, vocabulary: [good, bad], key: true}}
  - {{name: seller, side: item, kind: categorical, min_count: 1, key: true}}
  - {{name: price, side: item, kind: dense}}
  - {{name: item_ctr, side: item, kind: dense, history: {{by: [item_id], of: click, per: impressions, days: 2}}}}
"""


def small(train_days: int = 3, more: str = "") -> Platform:
    return parse_platform(PLATFORM.format(train_days=train_days, more=more), "small.yaml")


def day(n: int) -> date:
    return START + timedelta(n)


def impressions(n: int) -> pl.DataFrame:
    """Day n: a good mood, and a user's own favourite of five sellers, make clicks; a low price makes buys."""
    rng = np.random.default_rng(n)
    user, seller = rng.integers(0, 30, ROWS), rng.integers(0, 5, ROWS)
    mood, price = rng.integers(0, 2, ROWS), rng.uniform(0, 1, ROWS)
    click = rng.uniform(size=ROWS) < 0.1 + 0.2 * mood + 0.5 * (user % 5 == seller)
    buy = click & (rng.uniform(size=ROWS) < 0.8 - 0.7 * price)
    shopping = rng.integers(0, 2, ROWS) == 1
    return pl.DataFrame(
        {
            "impression_id": n * ROWS + np.arange(ROWS),
            "request_id": np.arange(ROWS),
            "user_id": user,
            "item_id": seller * 10 + rng.integers(0, 10, ROWS),
            "ts": [datetime(2026, 1, 1 + n, 12)] * ROWS,
            "surface": np.where(rng.integers(0, 2, ROWS) == 1, "feed", "search"),
            "product": np.where(shopping, "shopping", "standard"),
            "mood": np.where(mood == 1, "good", "bad"),
            "seller": [f"s{s}" for s in seller],
            "price": price,
            "outcome_click": click.astype(np.int8),
            "outcome_buy": [int(b) if s else None for b, s in zip(buy, shopping, strict=True)],
        }
    )


def publish(warehouse: Warehouse, n: int, frame: pl.DataFrame) -> None:
    with warehouse.connect() as con, warehouse.stage() as stage:
        con.register("frame", frame)
        stage.write(con, "impressions", day(n), "FROM frame")
        stage.publish()


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    warehouse = Warehouse(tmp_path / "home", tables(small()))
    for n in range(4):
        publish(warehouse, n, impressions(n))
    return warehouse


def train(warehouse: Warehouse, folder: Path, platform: Platform | None = None, last: int = 2) -> RankerInfo:
    with warehouse.connect() as con:
        return train_ranker(con, platform or small(), warehouse, day(last), folder)


def score(warehouse: Warehouse, folder: Path, n: int = 3, platform: Platform | None = None) -> pl.DataFrame:
    with warehouse.connect() as con:
        return score_day(con, platform or small(), warehouse, day(n), folder)


def test_scores_are_valid_and_rank_a_later_day(warehouse: Warehouse, tmp_path: Path) -> None:
    info = train(warehouse, tmp_path / "ranker")
    assert (info.first_day, info.last_day) == (str(day(0)), str(day(2)))
    assert "past_user_id_x_seller_click" in info.columns
    assert not [c for c in info.columns if c.startswith("outcome")]
    scores = score(warehouse, tmp_path / "ranker")
    assert scores.columns == list(tables(small())["heavyweight_scores"])
    assert scores["ranker_version"].unique().to_list() == [info.version]
    shown = impressions(3).join(scores, on="impression_id")
    assert len(shown) == ROWS
    assert (shown["scored_at"] > shown["ts"]).all()
    assert shown["score_click"].is_between(0, 1, closed="none").all()
    shopping = shown.filter(product="shopping")
    assert shopping["score_buy"].is_between(0, 1, closed="none").all()
    assert (shopping["score_buy"] <= shopping["score_click"]).all()
    assert shown.filter(product="standard")["score_buy"].null_count() == len(shown) - len(shopping)

    with warehouse.connect() as con:
        table = day_auc(con, small(), day(3), scores)
    overall = {r["task"]: r for r in table.filter(pl.col("surface").is_null()).rows(named=True)}
    assert overall["click"]["auc"] > 0.7
    assert overall["buy"]["auc"] > 0.7
    assert overall["buy"]["rows"] == len(shopping)
    assert set(table["product"].drop_nulls()) == {"standard", "shopping"}
    assert "buy" not in table.filter(product="standard")["task"]


def test_the_same_data_give_the_same_ranker(warehouse: Warehouse, tmp_path: Path) -> None:
    a, b = train(warehouse, tmp_path / "a"), train(warehouse, tmp_path / "b")
    assert a == b
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert [str(f) for f in files] == [f"{a.version}/buy.txt", f"{a.version}/click.txt", "manifest.json"]
    for f in files:
        assert (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes()
    assert score(warehouse, tmp_path / "a").equals(score(warehouse, tmp_path / "b"))
    train(warehouse, tmp_path / "a")
    assert load_ranker(tmp_path / "a")[0] == a

    other = impressions(2).with_columns(outcome_click=1 - pl.col("outcome_click"), outcome_buy=pl.lit(0))
    publish(warehouse, 2, other)
    assert train(warehouse, tmp_path / "a").version != a.version


def test_a_ranker_is_stored_with_the_day_or_not_at_all(warehouse: Warehouse) -> None:
    """The day may be refused after its ranker was trained; the one that was there stays."""
    site = Site(small(), warehouse.folder)
    folder = warehouse.folder / "models" / "heavyweight_ranker" / str(day(2))
    with warehouse.stage() as stage:
        assert assets.train(site, day(2), stage) is not None
    assert not folder.exists()
    with warehouse.stage() as stage:
        assets.train(site, day(2), stage)
        stage.publish()
    before = load_ranker(folder)[0]
    publish(warehouse, 2, impressions(2).with_columns(outcome_click=1 - pl.col("outcome_click")))
    with warehouse.stage() as stage:
        assets.train(site, day(2), stage)
        stage.keep_only("feature_contract")
        stage.publish()
    assert load_ranker(folder)[0] == before
    with warehouse.stage() as stage:
        assets.train(site, day(2), stage)
        stage.publish()
    assert load_ranker(folder)[0].version != before.version


def test_outcomes_of_the_scored_day_or_later_are_not_seen(warehouse: Warehouse, tmp_path: Path) -> None:
    version = train(warehouse, tmp_path / "ranker").version
    before = score(warehouse, tmp_path / "ranker")
    publish(warehouse, 3, impressions(3).with_columns(outcome_click=pl.lit(1), outcome_buy=pl.lit(1)))
    publish(warehouse, 4, impressions(4))
    assert score(warehouse, tmp_path / "ranker").equals(before)
    assert train(warehouse, tmp_path / "ranker").version == version


def test_a_day_it_was_trained_on_is_not_scored(warehouse: Warehouse, tmp_path: Path) -> None:
    train(warehouse, tmp_path / "ranker")
    with pytest.raises(ValueError, match="may not score 2026-01-03"):
        score(warehouse, tmp_path / "ranker", n=2)


def test_what_is_missing_withholds(warehouse: Warehouse, tmp_path: Path) -> None:
    with pytest.raises(Withheld, match="no trained ranker"):
        score(warehouse, tmp_path / "ranker")
    train(warehouse, tmp_path / "ranker")
    with pytest.raises(Withheld, match="2026-01-05"):
        score(warehouse, tmp_path / "ranker", n=4)
    warehouse.path("impressions", day(1)).unlink()
    with pytest.raises(Withheld, match="2026-01-02"):
        score(warehouse, tmp_path / "ranker")
    with pytest.raises(Withheld, match="the ranker of 2026-01-03 needs the impressions of 2026-01-02"):
        train(warehouse, tmp_path / "ranker")


def test_an_outcome_never_seen_gets_a_constant(warehouse: Warehouse, tmp_path: Path) -> None:
    publish(warehouse, 0, impressions(0).with_columns(outcome_buy=pl.lit(0)))
    platform = small(train_days=1)
    info = train(warehouse, tmp_path / "ranker", platform, last=0)
    clicks = impressions(0)["outcome_click"].sum()
    assert info.tasks["buy"].constant == pytest.approx(1 / (clicks + 2))
    assert info.tasks["click"].holdout_auc is not None, "a window of one day holds out users"
    scores = score(warehouse, tmp_path / "ranker", 1, platform).drop_nulls()
    assert ((scores["score_buy"] / scores["score_click"]).round(6) == round(1 / (clicks + 2), 6)).all()


def test_a_ranker_of_other_columns_is_refused(warehouse: Warehouse, tmp_path: Path) -> None:
    train(warehouse, tmp_path / "ranker")
    manifest = tmp_path / "ranker" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["columns"].remove("price")
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="other columns"):
        score(warehouse, tmp_path / "ranker")


def test_which_ranker_scores_a_day() -> None:
    frozen, weekly = small(), small(more=", refresh_days: 2")
    assert [ranker_day(frozen, day(n)) for n in (3, 4, 30)] == [day(2)] * 3
    assert [ranker_day(weekly, day(n)) for n in range(3, 8)] == [day(2), day(2), day(4), day(4), day(6)]
    assert training_days(weekly, day(4)) == [day(2), day(3), day(4)]
    with pytest.raises(ValueError, match="no ranker scores 2026-01-03"):
        ranker_day(frozen, day(2))


def test_auc_by_hand() -> None:
    # Pairs positive over negative: (.4 > .1), (.4 = .4), (.8 > .1), (.8 > .4): 3.5 of 4.
    assert auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 1, 0, 1])) == 3.5 / 4
    assert auc(np.array([0.5, 0.5, 0.5]), np.array([0, 1, 0])) == 0.5
    assert auc(np.array([3.0, 2.0, 1.0]), np.array([0, 0, 1])) == 0.0
    assert auc(np.array([3.0, 2.0]), np.array([1, 1])) is None


def test_auc_against_all_pairs() -> None:
    rng = np.random.default_rng(0)
    s, y = rng.integers(0, 9, 60), rng.integers(0, 2, 60)
    pairs = [np.sign(p - q) / 2 + 0.5 for p in s[y == 1] for q in s[y == 0]]
    assert auc(s, y) == pytest.approx(np.mean(pairs))
