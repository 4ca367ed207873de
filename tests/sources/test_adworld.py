"""adworld: reproducible day by day, honest to its contract, and as damaged as documented."""

from datetime import date
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import pytest

from mtmd_assets.faults import PlatformError
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import shipped_platform
from mtmd_assets.sources import LogDay
from mtmd_assets.sources.adworld import CHUNK, Adworld
from mtmd_assets.sources.adworld_world import Constants, ads_of, uniform, users_of
from mtmd_assets.tables import tables

DAY = date(2026, 1, 5)
TASKS = ("ctr", "gctr", "octr", "cvr")
POLARS_TYPES = {
    "BIGINT": pl.Int64,
    "VARCHAR": pl.String,
    "TIMESTAMP": pl.Datetime("us"),
    "FLOAT": pl.Float32,
    "DOUBLE": pl.Float64,
    "TINYINT": pl.Int8,
}


def platform(**source: Any) -> Platform:
    shipped = shipped_platform("adworld")
    return shipped.model_copy(update={"source": shipped.source.model_copy(update=source)})


def small(**source: Any) -> Adworld:
    return Adworld(platform(**{"rows_per_day": 3000, "users": 500, "ads": 300, **source}))


@lru_cache
def large() -> LogDay:
    """One day at the shipped world's size, of two chunks."""
    return Adworld(platform(rows_per_day=CHUNK + 70_000)).read(DAY)


def honest() -> pl.DataFrame:
    """The impressions before the log was damaged."""
    return large().impressions.unique("impression_id", maintain_order=True).filter(pl.col("surface") != "notifications")


def same(a: LogDay, b: LogDay) -> bool:
    return a.impressions.equals(b.impressions) and scores_of(a).equals(scores_of(b))


def scores_of(day: LogDay) -> pl.DataFrame:
    assert day.scores is not None
    return day.scores


# -- one day, alone ------------------------------------------------------------------------------------------------


def test_a_day_is_the_same_in_any_order():
    days = [date(2026, 1, 3), date(2026, 1, 1), date(2026, 1, 2)]
    forwards, backwards = small(), small()
    first = {d: forwards.read(d) for d in days}
    second = {d: backwards.read(d) for d in reversed(days)}
    assert all(same(first[d], second[d]) for d in days)
    assert not same(first[days[0]], first[days[1]])


def test_another_seed_is_another_world():
    assert not same(small().read(DAY), small(seed=1).read(DAY))


def test_threads_do_not_matter(monkeypatch):
    source = small(rows_per_day=CHUNK + 10)
    many = source.read(DAY)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert same(many, source.read(DAY))


def test_an_entity_is_drawn_alike_whoever_is_asked_for_with_it():
    ids = np.arange(1, 1000)
    assert (uniform(3, "x", ids)[::7] == uniform(3, "x", ids[::7])).all()
    assert abs(np.corrcoef(uniform(3, "x", ids), uniform(3, "y", ids))[0, 1]) < 0.1
    assert abs(uniform(3, "x", ids).mean() - 0.5) < 0.03


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_any_number_of_rows(rows):
    assert small(rows_per_day=rows).read(DAY).impressions["impression_id"].n_unique() == rows


def test_days_before_the_start_can_be_read():
    day = small().read(date(2020, 2, 29))
    assert day.impressions["ts"].dt.date().unique().to_list() == [date(2020, 2, 29)]


# -- the shape of the logs -------------------------------------------------------------------------------------------


def test_columns_are_those_declared():
    declared = tables(platform())
    for frame, table in ((large().impressions, "impressions"), (scores_of(large()), "heavyweight_scores")):
        assert dict(frame.schema) == {c: POLARS_TYPES[t] for c, t in declared[table].items()}


def test_a_column_adworld_does_not_simulate_is_refused():
    asked = platform(rows_per_day=10).model_copy(update={"extras": {"outcome_share": "integer"}})
    with pytest.raises(PlatformError, match="outcome_share"):
        Adworld(asked).read(DAY)


def test_ids_and_times():
    i = honest()
    assert i["impression_id"].is_unique().all()
    assert i["ts"].dt.date().unique().to_list() == [DAY]
    tomorrow = small().read(date(2026, 1, 6)).impressions
    assert tomorrow["impression_id"].min() > large().impressions["impression_id"].max()


def test_requests():
    requests = (
        honest()
        .group_by("request_id")
        .agg(pl.len(), pl.col("user_id", "surface", "ts").n_unique(), both=pl.col("product").n_unique() == 2)
    )
    assert (requests["user_id"].max(), requests["surface"].max(), requests["ts"].max()) == (1, 1, 1)
    assert 4.8 < requests["len"].mean() < 5.2
    assert requests["len"].max() <= 12
    assert requests["both"].mean() > 0.5
    twice = 1 - honest().select("request_id", "item_id").n_unique() / len(honest())
    assert twice < 0.005


def test_features_are_snapshots():
    p = platform()
    query, item = ([f.name for f in p.features if f.side == side] for side in ("query", "item"))
    i = honest()
    assert i.select("request_id", *query).n_unique() == i["request_id"].n_unique()
    assert i.select("item_id", "product", *item, "bid", "objective").n_unique() == i["item_id"].n_unique()


def test_features_are_where_the_file_says():
    p = platform()
    for (surface, product), rows in honest().group_by("surface", "product"):
        for f in p.features:
            rate = rows[f.name].null_count() / len(rows)
            if p.has(f, str(surface), str(product)):
                assert rate <= 0.6 * f.max_missing, (surface, product, f.name, rate)
            else:
                assert rate == 1, (surface, product, f.name)
            if f.kind == "categorical" and f.vocabulary:
                assert set(rows[f.name].drop_nulls().cast(pl.String)) <= set(f.vocabulary)
            if f.kind == "dense":
                assert rows[f.name].is_finite().all(ignore_nulls=True)


def test_unequal_traffic():
    share = {k[0]: len(v) / len(honest()) for k, v in honest().group_by("surface")}
    assert share == pytest.approx({"home_feed": 0.6, "search": 0.25, "related_pins": 0.15}, abs=0.01)
    assert (honest()["product"] == "shopping").mean() == pytest.approx(0.305, abs=0.01)


# -- outcomes, truth, scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["outcome", "true"])
def test_children_never_exceed_their_parent(kind):
    i = honest()
    for task in TASKS[1:]:
        rows = i.drop_nulls(f"{kind}_{task}")
        assert (rows[f"{kind}_{task}"] <= rows[f"{kind}_ctr"]).all()


@pytest.mark.parametrize("kind", ["outcome", "true", "score"])
def test_tasks_are_where_the_file_says(kind):
    columns = [f"{kind}_{t}" for t in TASKS]
    joined = honest().join(scores_of(large()), on="impression_id")
    rows = joined.group_by("product").agg(pl.col(columns).is_null().mean())
    null = {r["product"]: tuple(r[f"{kind}_{t}"] for t in TASKS) for r in rows.to_dicts()}
    assert null == {"standard": (0, 0, 0, 1), "shopping": (0, 0, 1, 0)}


@pytest.mark.parametrize("outcome", [*TASKS, "hide", "repin"])
def test_outcomes_follow_the_truth(outcome):
    """By tenths of the true probability in each slice: |z| of sums of Bernoullis, the seed fixed."""
    p = pl.col(f"true_{outcome}")
    tenth = (10 * p.rank("ordinal") / (pl.len() + 1)).floor().over("surface", "product")
    rows = honest().drop_nulls(f"true_{outcome}").with_columns(tenth=tenth)
    sums = rows.group_by("surface", "product", "tenth").agg(
        n=pl.col(f"outcome_{outcome}").sum(), expected=p.sum(), variance=(p * (1 - p)).sum()
    )
    enough = sums.filter(pl.col("expected") > 5)
    z = ((enough["n"] - enough["expected"]) / enough["variance"].sqrt()).to_numpy()
    assert len(z) >= 3
    assert abs(z).max() < 4
    assert (z**2).mean() < 2


def test_base_rates_differ():
    rates = {k: float(v["true_ctr"].mean()) for k, v in honest().group_by("surface", "product")}
    assert all(0.005 < r < 0.08 for r in rates.values())
    assert rates["search", "shopping"] > 3 * rates["home_feed", "standard"]


def valid(scores: pl.DataFrame) -> pl.DataFrame:
    columns = [pl.col(f"score_{t}") for t in TASKS]
    return scores.filter(pl.all_horizontal(((c > 0) & (c < 1) & c.is_not_nan()).fill_null(True) for c in columns))


def valid_scores() -> pl.DataFrame:
    return valid(scores_of(large()))


def test_scores_are_the_truth_with_a_rankers_error():
    joined = honest().join(valid_scores().sort("scored_at").unique("impression_id", keep="last"), on="impression_id")
    for task in TASKS:
        rows = joined.drop_nulls(f"score_{task}")
        error = (rows[f"score_{task}"].log() - rows[f"true_{task}"].log()).abs().mean()
        assert 0.1 < error < 0.4
        assert (rows[f"score_{task}"] <= rows["score_ctr"]).all()


def defects(day: LogDay) -> dict[str, int]:
    """Rows of each defect that a day's logs hold."""
    i, scores = day.impressions, scores_of(day)
    known = i.unique("impression_id").select("impression_id", "ts")
    joined = scores.join(known, on="impression_id")
    late = joined.filter(pl.col("scored_at") - pl.col("ts") > pl.duration(hours=24))
    twice = scores.group_by("impression_id").len().filter(pl.col("len") == 2)
    assert late.join(twice, on="impression_id", how="semi").is_empty()
    assert joined.select(pl.col("scored_at") > pl.col("ts")).to_series().all()
    return {
        "written twice": len(i) - len(known),
        "unknown surface": len(i.unique("impression_id").filter(pl.col("surface") == "notifications")),
        "orphan": len(scores.join(known, on="impression_id", how="anti")),
        "scored twice": len(twice),
        "unscored": len(known.join(scores, on="impression_id", how="anti")),
        "late": len(late),
        "invalid": len(scores) - len(valid(scores)),
    }


DEFECTS = {
    "written twice": 0.0005,
    "unknown surface": 0.0002,
    "orphan": 0.001,
    "scored twice": 0.01,
    "unscored": 0.02,
    "late": 0.015,
    "invalid": 0.003,
}


def test_defects_come_at_the_documented_rates():
    """Within four standard deviations of a binomial, the seed fixed."""
    found, n = defects(large()), CHUNK + 70_000
    assert found.keys() == DEFECTS.keys()
    z = {d: (found[d] - n * p) / np.sqrt(n * p * (1 - p)) for d, p in DEFECTS.items()}
    assert max(map(abs, z.values())) < 4, z


def test_days_have_different_numbers_of_defects():
    """As in a real log: binomial, hence a variance of about n p (1 - p) over days, and never one count for all."""
    source = small()
    days = [defects(source.read(date(2026, 1, d))) for d in range(1, 16)]
    for defect in ("unscored", "late", "scored twice"):
        p, counts = DEFECTS[defect], [d[defect] for d in days]
        assert len(set(counts)) > 5
        assert 0.3 < np.var(counts, ddof=1) / (3000 * p * (1 - p)) < 3


def test_an_honest_day_stays_far_from_the_limit_of_rejections():
    """Impressions without a timely valid score, and faulty rows of each log."""
    on_time = (
        valid_scores()
        .join(large().impressions.select("impression_id", "ts"), on="impression_id")
        .filter(pl.col("scored_at") - pl.col("ts") <= pl.duration(hours=24))
    )
    lost = 1 - honest().join(on_time, on="impression_id", how="semi").height / len(large().impressions)
    assert 0.03 < lost < 0.8 * platform().join.max_rejected


def test_a_ranker_serves_for_weeks():
    days = [small(rows_per_day=50).read(date(2026, 1, d)) for d in (1, 28, 29)]
    assert [scores_of(d)["ranker_version"][0] for d in days] == ["hw-1", "hw-1", "hw-2"]


# -- days hang together ------------------------------------------------------------------------------------------------


def _correlation(later: int, entity: str) -> tuple[float, float]:
    """Of the logged vector of those who are there on both days; and the share that is."""
    c, day = Constants(0), DAY.toordinal()
    if entity == "user":
        a, b, key = users_of(c, 2000, day).frame, users_of(c, 2000, day + later).frame, "user_id"
        columns = [f"user_taste_{k}" for k in range(6)]
    else:
        a, b, key = ads_of(c, 2000, 2000, day).frame, ads_of(c, 2000, 2000, day + later).frame, "item_id"
        columns = [f"ad_content_{k}" for k in range(6)]
    both = a.join(b, on=key).drop_nulls([*columns, *(f"{n}_right" for n in columns)])
    x, y = both[columns].to_numpy(), both[[f"{n}_right" for n in columns]].to_numpy()
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1]), len(a.join(b, on=key)) / len(a)


def test_tastes_persist_and_drift():
    (tomorrow, stays), (in_two_months, remains) = _correlation(1, "user"), _correlation(60, "user")
    assert tomorrow > 0.97
    assert stays > 0.99
    assert 0.4 < in_two_months < 0.9
    assert remains > 0.9


def test_ads_are_born_and_die():
    (tomorrow, stays), (in_two_months, remains) = _correlation(1, "ad"), _correlation(60, "ad")
    assert tomorrow > 0.999
    assert 0.95 < stays < 1
    assert 0.8 < in_two_months < 0.999
    assert 0.1 < remains < 0.7


def test_counters_tell_of_the_truth():
    """The logged click rate of an ad goes with its true rate, as its advertiser would expect."""
    known = honest().filter(pl.col("ad_impressions_7d") > 1000).drop_nulls("ad_ctr_7d")
    ads = known.group_by("item_id").agg(pl.col("ad_ctr_7d").first(), pl.col("true_ctr").mean())
    assert ads.select(pl.corr("ad_ctr_7d", "true_ctr", method="spearman")).item() > 0.3
