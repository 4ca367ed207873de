"""One day as received: faults of the file refuse it, faults of rows are kept with their reason."""

import json
from datetime import UTC, date, datetime, timedelta

import duckdb
import polars as pl
import pytest

from mtmd_assets.faults import BadFile
from mtmd_assets.intake import take_in, write_intake
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.sources import LogDay
from mtmd_assets.tables import tables, views
from mtmd_assets.warehouse import Warehouse

DAY = date(2026, 1, 2)
NOON = datetime(2026, 1, 2, 12)
ROWS = 20

TEXT = """
name: toy
start: 2026-01-01
source: {kind: adworld}
surfaces: [home, search]
products: [standard, shopping]
out_of_scope: {surfaces: [tab9], products: [unknown]}
join: {max_rejected: 0.25}
tasks:
  - {name: ctr}
  - {name: gctr, given: ctr}
features:
  - {name: age, side: query, kind: dense}
  - {name: country, side: query, kind: categorical, buckets: 10}
  - {name: price, side: item, kind: dense}
  - {name: shop, side: item, kind: categorical, type: integer, buckets: 10}
extras: {bid: double}
"""
TOY = parse_platform(TEXT, "toy.yaml")


def log(scores=True, **changes):
    """A faultless day; `changes` replace columns (a value goes into row 0)."""
    columns = {
        "impression_id": [f"i{k:02}" for k in range(ROWS)],
        "request_id": [f"r{k:02}" for k in range(ROWS)],
        "user_id": ["u"] * ROWS,
        "item_id": [f"a{k:02}" for k in range(ROWS)],
        "ts": [NOON + timedelta(minutes=k) for k in range(ROWS)],
        "surface": ["home", "search"] * (ROWS // 2),
        "product": ["standard"] * ROWS,
        "age": [30.0] * ROWS,
        "country": ["fr"] * ROWS,
        "price": [1.5] * ROWS,
        "shop": [7] * ROWS,
        "outcome_ctr": [1] * ROWS,
        "outcome_gctr": [0] * ROWS,
        "bid": [0.5] * ROWS,
    }
    for name, change in changes.items():
        if isinstance(change, list | pl.Series):
            columns[name] = change
        else:
            columns[name] = [change, *columns[name][1:]]
    impressions = pl.DataFrame(columns)
    scored = pl.DataFrame(
        {
            "impression_id": columns["impression_id"],
            "scored_at": [NOON + timedelta(hours=1)] * ROWS,
            "ranker_version": ["v1"] * ROWS,
            "score_ctr": [0.5] * ROWS,
            "score_gctr": [0.25] * ROWS,
        }
    )
    return LogDay(impressions, scored if scores else None, "imp.parquet", "scores.parquet")


def without(day, column):
    return LogDay(day.impressions.drop(column), day.scores, day.impressions_file, day.scores_file)


@pytest.fixture
def con():
    with duckdb.connect() as con:
        yield con


def rejected(con):
    return con.execute("SELECT impression_id, reason FROM log_rejected ORDER BY ALL").fetchall()


def test_a_faultless_day_is_taken_whole(con):
    intake = take_in(TOY, log(), DAY, con)
    assert (intake.received, intake.accepted, intake.rejected, intake.scores) == (ROWS, ROWS, 0, ROWS)
    assert rejected(con) == []
    types = dict(con.execute("SELECT column_name, column_type FROM (DESCRIBE accepted_impressions)").fetchall())
    assert types == tables(TOY)["impressions"]


# -- faults of the file ------------------------------------------------------------------------------------------


def test_a_missing_column_is_named(con):
    with pytest.raises(BadFile, match=r"imp.parquet, day 2026-01-02, column price: column missing") as e:
        take_in(TOY, without(log(), "price"), DAY, con)
    assert (e.value.column, e.value.day, e.value.file) == ("price", DAY, "imp.parquet")


def test_the_names_of_other_columns_hint_at_a_rename(con):
    day = log()
    renamed = LogDay(day.impressions.rename({"price": "cost"}), day.scores, "imp.parquet", "s")
    with pytest.raises(BadFile, match=r"the other columns are \['cost'\]"):
        take_in(TOY, renamed, DAY, con)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("age", ["30"] * ROWS, r"column age: expected numbers \(received \"String, for example '30'\"\)"),
        ("country", [3] * ROWS, "column country: expected text"),
        ("impression_id", list(range(ROWS)), "column impression_id: expected text"),
        ("shop", ["x"] * ROWS, "column shop: expected whole numbers"),
        (
            "shop",
            [1.0] * (ROWS - 1) + [2.5],
            r"column shop: expected whole numbers \(received 'Float64, for example 2.5",
        ),
        ("shop", pl.Series([2**64 - 1] * ROWS, dtype=pl.UInt64), "column shop: expected whole numbers of 64 bits"),
        ("ts", ["2026-01-02T12:00:00"] * ROWS, "column ts: expected time stamps"),
        ("ts", [DAY] * ROWS, "column ts: expected time stamps"),
        ("outcome_ctr", ["1"] * ROWS, "column outcome_ctr: expected 0, 1 or missing"),
        ("ds", ["2026-01-02"] * ROWS, "column ds: expected dates"),
    ],
)
def test_a_wrong_type_is_refused(con, column, values, message):
    with pytest.raises(BadFile, match=message):
        take_in(TOY, log(**{column: values}), DAY, con)


@pytest.mark.parametrize(
    ("column", "values", "stored"),
    [
        ("age", [30] * ROWS, 30.0),
        ("age", pl.Series([None] * ROWS), None),
        ("age", pl.Series(["x"] * ROWS).is_not_null(), 1.0),
        ("shop", pl.Series([7] * ROWS, dtype=pl.UInt8), 7),
        ("shop", [7.0] * ROWS, 7),
        ("shop", [float("nan")] * ROWS, None),
        ("country", pl.Series(["fr"] * ROWS, dtype=pl.Categorical), "fr"),
        ("country", pl.Series(["fr"] * ROWS, dtype=pl.Enum(["fr", "de"])), "fr"),
        ("outcome_ctr", [True] * ROWS, 1),
        ("outcome_ctr", [1.0] * ROWS, 1),
        ("outcome_ctr", [None] * ROWS, None),
        ("outcome_ctr", [float("nan")] * ROWS, None),
        ("ts", pl.Series([NOON] * ROWS, dtype=pl.Datetime("ns")), NOON),
        ("ts", pl.Series([NOON] * ROWS, dtype=pl.Datetime("ms")), NOON),
        ("ts", pl.Series([NOON.replace(tzinfo=UTC)] * ROWS).dt.convert_time_zone("Asia/Tokyo"), NOON),
    ],
)
def test_a_type_that_loses_nothing_is_cast(con, column, values, stored):
    take_in(TOY, log(**{column: values}), DAY, con)
    assert con.execute(f"SELECT {column} FROM accepted_impressions LIMIT 1").fetchall() == [(stored,)]


def test_an_empty_day_is_refused(con):
    day = log()
    with pytest.raises(BadFile, match=r"imp.parquet.*holds no rows"):
        take_in(TOY, LogDay(day.impressions.clear(), day.scores, "imp.parquet"), DAY, con)
    with pytest.raises(BadFile, match=r"scores.parquet.*holds no rows"):
        take_in(TOY, LogDay(day.impressions, day.scores.clear(), "imp.parquet", "scores.parquet"), DAY, con)


def test_rows_of_another_day_are_refused(con):
    with pytest.raises(BadFile, match=r"column ts: 1 of 20 rows are of another day \(UTC\) \(received '2026-01-03'\)"):
        take_in(TOY, log(ts=NOON + timedelta(days=1)), DAY, con)
    # Where the log states its day, that counts and the time stamp does not.
    take_in(TOY, log(ts=NOON + timedelta(days=1), ds=[DAY] * ROWS), DAY, con)
    with pytest.raises(BadFile, match="column ds: 1 of 20"):
        take_in(TOY, log(ds=[date(2026, 1, 1)] + [DAY] * (ROWS - 1)), DAY, con)


def test_the_day_is_that_of_the_platforms_time_zone(con):
    own = TEXT.replace("{kind: adworld}", "{kind: parquet, impressions: here, heavyweight_scores: there}")
    tokyo = parse_platform(own + "time_zone: Asia/Tokyo\n", "toy.yaml")
    start = datetime(2026, 1, 1, 15)  # midnight of 2 January in Tokyo, in UTC
    take_in(tokyo, log(ts=[start] * ROWS), DAY, con)
    with pytest.raises(BadFile, match=r"received '2026-01-01'"):
        take_in(tokyo, log(ts=[start - timedelta(microseconds=1)] * ROWS), DAY, con)


def test_a_missing_time_stamp_is_refused(con):
    with pytest.raises(BadFile, match="column ts: 1 of 20 rows have no time stamp"):
        take_in(TOY, log(ts=None), DAY, con)


def test_scores_are_held_to_their_types(con):
    day = log()
    with pytest.raises(BadFile, match=r"scores.parquet, day 2026-01-02, column score_ctr: column missing"):
        take_in(TOY, LogDay(day.impressions, day.scores.drop("score_ctr"), "i", "scores.parquet"), DAY, con)
    text = day.scores.with_columns(score_ctr=pl.lit("0.5"))
    with pytest.raises(BadFile, match=r"column score_ctr: expected numbers"):
        take_in(TOY, LogDay(day.impressions, text, "i", "scores.parquet"), DAY, con)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"request_id": ["r"] * ROWS, "surface": ["home"] * ROWS, "age": 31.0}, r"'r'} .* differ in \['age'\]"),
        ({"request_id": ["r"] * ROWS, "surface": ["home"] * ROWS, "country": None}, r"differ in \['country'\]"),
        ({"request_id": ["r"] * ROWS, "surface": ["home"] * ROWS, "user_id": "v"}, r"differ in \['user_id'\]"),
        ({"request_id": ["r"] * ROWS}, r"differ in \['surface'\]: a request has one user, surface"),
        ({"item_id": ["a"] * ROWS, "price": 2.0}, r"'a', 'product': 'standard'} .* differ in \['price'\]"),
    ],
)
def test_what_varies_within_a_request_or_an_item_is_refused(con, changes, said):
    with pytest.raises(BadFile, match=rf"imp.parquet, day 2026-01-02: .*{said}"):
        take_in(TOY, log(**changes), DAY, con)


def test_rows_that_are_refused_make_no_request_vary(con):
    surfaces = ["attic", *["home"] * (ROWS - 1)]
    assert take_in(TOY, log(request_id=["r"] * ROWS, surface=surfaces), DAY, con).reasons == {"unknown_surface": 1}


# -- faults of rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"surface": "attic"}, "unknown_surface"),
        ({"surface": None}, "unknown_surface"),
        ({"product": "video"}, "unknown_product"),
        ({"product": None}, "unknown_product"),
        ({"surface": "tab9"}, "out_of_scope"),
        ({"product": "unknown"}, "out_of_scope"),
        ({"surface": "tab9", "product": "video", "user_id": None}, "out_of_scope"),
        ({"user_id": None}, "missing_id"),
        ({"item_id": None}, "missing_id"),
        ({"request_id": None}, "missing_id"),
        ({"outcome_ctr": 2}, "invalid_outcome"),
        ({"outcome_ctr": -1}, "invalid_outcome"),
        ({"outcome_ctr": [0.5] + [1.0] * (ROWS - 1)}, "invalid_outcome"),
        ({"outcome_ctr": 0, "outcome_gctr": 1}, "invalid_outcome"),
    ],
)
def test_a_faulty_row_is_kept_with_its_reason(con, change, reason):
    intake = take_in(TOY, log(**change), DAY, con)
    assert rejected(con) == [("i00", reason)]
    assert (intake.received, intake.accepted, intake.reasons) == (ROWS, ROWS - 1, {reason: 1})
    assert con.execute("SELECT count(*) FROM accepted_impressions").fetchall() == [(ROWS - 1,)]


def test_a_missing_parent_outcome_does_not_refute_the_child(con):
    assert take_in(TOY, log(outcome_ctr=None, outcome_gctr=1), DAY, con).rejected == 0


def test_a_row_without_impression_id(con):
    take_in(TOY, log(impression_id=None), DAY, con)
    assert rejected(con) == [(None, "missing_id")]


def test_of_duplicates_the_earliest_is_kept_and_a_faulty_one_never_wins(con):
    ids = [f"i{k:02}" for k in range(ROWS)]
    ids[0] = ids[1] = ids[2] = ids[3] = "d"
    surfaces = ["attic"] + ["home"] * (ROWS - 1)  # row 0, the earliest of all, is faulty
    times = [NOON + timedelta(minutes=k) for k in (0, 9, 5, 5)] + [NOON] * (ROWS - 4)
    ages = [float(k) for k in range(ROWS)]
    intake = take_in(TOY, log(impression_id=ids, surface=surfaces, ts=times, age=ages), DAY, con)
    assert intake.reasons == {"duplicate_id": 2, "unknown_surface": 1}
    # Rows 2 and 3 share the earliest time: the first in the file stays.
    assert con.execute("SELECT age FROM accepted_impressions WHERE impression_id = 'd'").fetchall() == [(2.0,)]


def test_the_row_is_kept_as_received(con):
    take_in(TOY, log(surface="attic", age=float("nan"), price=float("-inf"), note=['"x" : NaN,'] * ROWS), DAY, con)
    text = con.execute("SELECT row FROM log_rejected").fetchall()[0][0]
    row = json.loads(text)
    assert (row["surface"], row["age"], row["price"], row["note"]) == ("attic", "nan", "-inf", '"x" : NaN,')
    assert row["ts"] == "2026-01-02 12:00:00"


def test_nan_and_infinite_features_are_stored_as_missing(con):
    take_in(TOY, log(age=float("nan"), price=float("inf"), bid=float("inf")), DAY, con)
    row = con.execute("SELECT age, price, bid FROM accepted_impressions WHERE impression_id = 'i00'").fetchall()
    assert row == [(None, None, float("inf"))]  # bid is no feature


def test_the_share_of_faulty_rows_is_limited(con):
    at_limit = ["attic"] * 4 + ["tab9"] * 4 + ["home"] * 12  # 4 of 16 in scope: a quarter
    assert take_in(TOY, log(surface=at_limit), DAY, con).reasons == {"out_of_scope": 4, "unknown_surface": 4}
    beyond = ["attic"] * 5 + ["tab9"] * 4 + ["home"] * 11
    message = (
        r"31.25% of its 16 rows in scope are faulty.*25.00%.*; the first unknown_surface: surface 'attic' "
        r"\(received {'unknown_surface': 5}\)"
    )
    with pytest.raises(BadFile, match=message):
        take_in(TOY, log(surface=beyond), DAY, con)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"product": ["odd"] * ROWS}, "unknown_product: product 'odd'"),
        (
            {"user_id": pl.Series([None] * ROWS, dtype=pl.String)},
            "missing_id: impression_id 'i00', request_id 'r00', user_id None",
        ),
        ({"outcome_ctr": [0] * ROWS, "outcome_gctr": [1] * ROWS}, "invalid_outcome: outcome_ctr 0, outcome_gctr 1"),
        ({"impression_id": ["i"] * ROWS}, "duplicate_id: impression_id 'i'"),
    ],
)
def test_a_refused_day_shows_what_is_wrong_with_its_first_row(con, changes, shown):
    with pytest.raises(BadFile, match=f"; the first {shown}"):
        take_in(TOY, log(**changes), DAY, con)


def test_a_day_wholly_out_of_scope_is_refused(con):
    with pytest.raises(BadFile, match="none of its rows"):
        take_in(TOY, log(surface=["tab9"] * ROWS), DAY, con)


def test_a_day_without_scores_follows_one_with_scores(con):
    take_in(TOY, log(), DAY, con)
    assert take_in(TOY, log(scores=False), DAY, con).scores is None
    assert con.execute("SELECT count(*) FROM duckdb_views() WHERE view_name = 'received_scores'").fetchall() == [(0,)]


def test_invalid_scores_are_stored_as_received(tmp_path):
    day = log(surface="attic")
    odd = [float("nan"), float("inf"), 0.0, 1.0, None] + [0.5] * (ROWS - 5)
    day = LogDay(day.impressions, day.scores.with_columns(score_ctr=pl.Series(odd)), "i", "s")
    warehouse = Warehouse(tmp_path / "toy", tables(TOY), views(TOY))
    with warehouse.connect() as con, warehouse.stage() as stage:
        take_in(TOY, day, DAY, con)
        write_intake(con, stage, DAY)
        query = "SELECT score_ctr FROM heavyweight_scores ORDER BY impression_id LIMIT 5"
        stored = [v for (v,) in con.execute(query).fetchall()]
        assert str(stored) == "[nan, inf, 0.0, 1.0, None]"
        assert con.execute("SELECT count(*) FROM impressions").fetchall() == [(ROWS - 1,)]
        assert con.execute("SELECT received FROM log_row_counts").fetchall() == [(ROWS,)]
        assert con.execute("SELECT source, reason, ds FROM log_rejected_rows").fetchall() == [
            ("log", "unknown_surface", DAY)
        ]
