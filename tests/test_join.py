"""Impressions meet their scores: every row in exactly one place, held against a plain Python reference."""

import hashlib
import json
import math
from collections import Counter
from datetime import date, datetime, timedelta

import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from checks.accounting import RowCount
from mtmd_assets.faults import BadFile, Withheld
from mtmd_assets.intake import take_in, write_intake
from mtmd_assets.join import SCORE_FAULTS, AccountingError, build_examples, check_accounting, prepare_join
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.sources import LogDay
from mtmd_assets.tables import tables
from mtmd_assets.warehouse import Warehouse

DAY = date(2026, 1, 2)
NOON = datetime(2026, 1, 2, 12)
NAN, INF = float("nan"), float("inf")
TABLES = (
    "impressions",
    "heavyweight_scores",
    "log_rejected_rows",
    "log_row_counts",
    "joined_examples",
    "rejected_rows",
    "row_counts",
)


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """One folder for all tests, for a day that is published again is replaced whole."""
    return tmp_path_factory.mktemp("lake")


def platform(max_rejected=1.0, lateness_hours=2, sample_rate=1.0, history=""):
    return parse_platform(
        f"""
name: toy
start: 2026-01-01
source: {{kind: adworld}}
surfaces: [home, search]
products: [standard, shopping]
out_of_scope: {{surfaces: [tab9]}}
join: {{max_rejected: {max_rejected}, lateness_hours: {lateness_hours}, sample_rate: {sample_rate}}}
tasks:
  - {{name: ctr}}
  - {{name: gctr, given: ctr, products: [standard]}}
features:
  - {{name: age, side: query, kind: dense}}
  - {{name: price, side: item, kind: dense}}
{history}
""",
        "toy.yaml",
    )


def impressions(ids, products=None, surfaces=None):
    n = len(ids)
    return pl.DataFrame(
        {
            "impression_id": ids,
            "request_id": [f"r{k}" for k in range(n)],
            "user_id": ["u"] * n,
            "item_id": ["a"] * n,
            "ts": [NOON] * n,
            "surface": surfaces or ["home"] * n,
            "product": products or ["standard"] * n,
            "age": [float(k) for k in range(n)],
            "price": [1.0] * n,
            "outcome_ctr": [0] * n,
            "outcome_gctr": [0] * n,
        }
    )


SCORE_COLUMNS = {
    "impression_id": pl.String,
    "scored_at": pl.Datetime("us"),
    "ranker_version": pl.String,
    "score_ctr": pl.Float64,
    "score_gctr": pl.Float64,
}


def score(impression, hours=1.0, ctr=0.5, gctr=0.25, version="v1"):
    return (impression, None if hours is None else NOON + timedelta(hours=hours), version, ctr, gctr)


def publish(folder, toy, log, scores):
    warehouse = Warehouse(folder / "toy", {t: tables(toy)[t] for t in TABLES})
    frame = pl.DataFrame(scores, schema=SCORE_COLUMNS, orient="row")
    with warehouse.connect() as con, warehouse.stage() as stage:
        take_in(toy, LogDay(log, frame, "imp.parquet", "scores.parquet"), DAY, con)
        write_intake(con, stage, DAY)
        stage.publish()
    return warehouse


def join(folder, toy, log, scores):
    """Publish a day and join it."""
    warehouse = publish(folder, toy, log, scores)
    with warehouse.connect() as con, warehouse.stage() as stage:
        examples = build_examples(con, toy, stage, DAY)
        stage.publish()
    return warehouse, examples


def read(warehouse, query):
    with warehouse.connect() as con:
        return con.execute(query).fetchall()


def reasons(warehouse, source):
    return read(warehouse, f"SELECT impression_id, reason FROM rejected_rows WHERE source = '{source}' ORDER BY ALL")


def reason_counts(warehouse, source):
    return dict(read(warehouse, f"SELECT reason, count(*) FROM rejected_rows WHERE source = '{source}' GROUP BY ALL"))


def test_the_latest_valid_score_wins(lake):
    scores = [
        score("a", hours=0.5, ctr=0.1, gctr=0.01),
        score("a", hours=1.5, ctr=0.2, gctr=0.02, version="v2"),
        score("a", hours=1.9, ctr=NAN),  # later, invalid
        score("a", hours=2.1, ctr=0.4),  # later, late
        score("b", hours=-3),  # a score before its impression is valid
        score("b", hours=2.0, ctr=0.7),  # exactly at the limit
    ]
    warehouse, examples = join(lake, platform(), impressions(["a", "b"]), scores)
    rows = read(
        warehouse, "SELECT impression_id, score_ctr, score_gctr, ranker_version, weight, age, ds FROM joined_examples"
    )
    assert rows == [("a", 0.2, 0.02, "v2", 1.0, 0.0, DAY), ("b", 0.7, 0.25, "v1", 1.0, 1.0, DAY)]
    assert reasons(warehouse, "heavyweight_scores") == [
        ("a", "invalid_score"),
        ("a", "late"),
        ("a", "superseded"),
        ("b", "superseded"),
    ]
    row = read(warehouse, "SELECT row FROM rejected_rows WHERE reason = 'late'")[0][0]
    assert json.loads(row) == {"scored_at": "2026-01-02 14:06:00", "ranker_version": "v1"}
    assert examples.counts == (
        RowCount("log", 2, 2, 0),
        RowCount("impressions", 2, 2, 0),
        RowCount("heavyweight_scores", 6, 2, 4),
    )
    assert reason_counts(warehouse, "heavyweight_scores") == {"superseded": 2, "invalid_score": 1, "late": 1}


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 1.0, -0.1, 1.1, None])
@pytest.mark.parametrize("task", ["ctr", "gctr"])
def test_a_score_outside_the_open_unit_interval_is_invalid(lake, task, value):
    warehouse, _ = join(lake, platform(), impressions(["a", "b"]), [score("a", **{task: value}), score("b")])
    assert reasons(warehouse, "heavyweight_scores") == [("a", "invalid_score")]
    assert reasons(warehouse, "impressions") == [("a", "only_invalid_scores")]
    assert read(warehouse, "SELECT impression_id FROM joined_examples") == [("b",)]


def test_a_score_of_a_task_that_the_slice_lacks_is_ignored(lake):
    log = impressions(["a", "b"], products=["shopping", "shopping"])
    warehouse, _ = join(lake, platform(), log, [score("a", gctr=NAN), score("b", gctr=0.9)])
    assert read(warehouse, "SELECT score_ctr, score_gctr FROM joined_examples") == [(0.5, None)] * 2
    assert [str(v) for (v,) in read(warehouse, "SELECT score_gctr FROM heavyweight_scores")] == ["nan", "0.9"]


def test_a_child_above_its_parent(lake):
    scores = [score("a", ctr=0.5, gctr=0.5 + 1e-6), score("b", ctr=0.5, gctr=0.5 + 1e-12)]
    warehouse, _ = join(lake, platform(), impressions(["a", "b"]), scores)
    assert reasons(warehouse, "heavyweight_scores") == [("a", "child_exceeds_parent")]
    assert read(warehouse, "SELECT impression_id FROM joined_examples") == [("b",)]


def test_why_an_impression_has_no_score(lake):
    scores = [
        score("invalid", ctr=0.0),
        score("undated", hours=None),
        score("late", hours=3),
        score("both", hours=3),
        score("both", ctr=2.0),
        score("fine"),
    ]
    log = impressions(["none", "invalid", "undated", "late", "both", "fine"])
    warehouse, _ = join(lake, platform(), log, scores)
    assert reasons(warehouse, "impressions") == [
        ("both", "only_late_scores"),
        ("invalid", "only_invalid_scores"),
        ("late", "only_late_scores"),
        ("none", "no_score"),
        ("undated", "only_invalid_scores"),
    ]


def test_scores_of_no_impression(lake):
    log = impressions(["a", "tab", "attic"], surfaces=["home", "tab9", "attic"])
    warehouse, examples = join(lake, platform(), log, [score(i) for i in ("a", "tab", "attic", "stranger", None)])
    assert reasons(warehouse, "heavyweight_scores") == [
        ("attic", "impression_rejected"),
        ("stranger", "orphan"),
        ("tab", "out_of_scope"),
        (None, "orphan"),
    ]
    assert reasons(warehouse, "log") == [("attic", "unknown_surface"), ("tab", "out_of_scope")]
    assert examples.counts[0] == RowCount("log", 3, 1, 2)


def test_scores_out_of_scope_do_not_count_towards_the_limit(lake):
    log = impressions(["a"] + [f"t{k}" for k in range(9)], surfaces=["home"] + ["tab9"] * 9)
    _, examples = join(lake, platform(max_rejected=0.0), log, [score(i) for i in log["impression_id"]])
    assert examples.rows == 1


def test_scores_of_rejected_impressions_do_not_count_towards_the_limit(lake):
    """The log's faulty rows are counted when it is taken in; 1 of 9 other score rows is an orphan."""
    log = impressions([f"i{k}" for k in range(10)], surfaces=["home"] * 8 + ["attic"] * 2)
    scores = [score(i) for i in [*log["impression_id"], "stranger"]]
    warehouse, examples = join(lake, platform(max_rejected=0.2), log, scores)
    assert examples.rows == 8
    assert reason_counts(warehouse, "heavyweight_scores") == {"impression_rejected": 2, "orphan": 1}
    with pytest.raises(BadFile, match=r"20.00% of 10 rows of heavyweight_scores.*'orphan': 2"):
        join(lake, platform(max_rejected=0.199), log.head(8), [*scores[:8], score("stranger"), score("other")])


def test_too_many_faulty_score_rows_refuse_the_day(lake):
    log = impressions([f"i{k}" for k in range(8)])
    fine = [score(i) for i in log["impression_id"]]
    faulty = [score("stranger"), score("i0", hours=-1, ctr=NAN)]
    assert join(lake, platform(max_rejected=0.2), log, fine + faulty)[1].rows == 8
    message = (
        r"heavyweight_scores.ds=2026-01-02.*27.27% of 11 rows of heavyweight_scores.*; the first orphan: "
        r"impression_id 'stranger', score_ctr 0.5, score_gctr 0.25 .*'orphan': 2, 'invalid_score': 1"
    )
    with pytest.raises(BadFile, match=message):
        join(lake, platform(max_rejected=0.2), log, [*fine, *faulty, score("other")])


def test_too_many_unscored_impressions_refuse_the_day(lake):
    log = impressions([f"i{k}" for k in range(8)])
    fine = [score(i) for i in log["impression_id"]]
    assert join(lake, platform(max_rejected=0.25), log, fine[2:])[1].rows == 6
    with pytest.raises(
        BadFile,
        match=r"37.50% of 8 rows of impressions lack a valid score.*the first no_score: impression_id 'i0' .*'no_score': 3",
    ):
        join(lake, platform(max_rejected=0.25), log, fine[3:])


def test_ties_do_not_depend_on_the_order_of_the_file(lake):
    scores = [
        score("a", ctr=0.3, version="v1"),
        score("a", ctr=0.4, version="v2"),
        score("a", ctr=0.6, version="v2"),
        score("a", ctr=0.9, version=None),
    ]
    for order in (scores, scores[::-1]):
        warehouse, _ = join(lake, platform(), impressions(["a"]), order)
        assert read(warehouse, "SELECT score_ctr, ranker_version FROM joined_examples") == [(0.6, "v2")]


def test_a_rebuilt_day_is_identical_and_in_the_order_of_the_log(lake):
    ids = [f"i{k * 7919 % 5000}" for k in range(5000)]
    log, scores = impressions(ids), [score(i) for i in sorted(ids)]
    warehouse, _ = join(lake, platform(), log, scores)
    first = warehouse.path("joined_examples", DAY).read_bytes()
    assert [i for (i,) in read(warehouse, "SELECT impression_id FROM joined_examples")] == ids
    warehouse, _ = join(lake, platform(), log, scores)
    assert warehouse.path("joined_examples", DAY).read_bytes() == first


def test_a_large_day_is_identical_whatever_the_threads(lake):
    """Several row groups, whose bounds follow the threads wherever the rows are written without an order."""
    toy, ids = platform(), [f"i{k}" for k in range(300_000)]
    log, scores = impressions(ids), [score(i) for k, i in enumerate(ids) if k % 15]
    warehouse = publish(lake, toy, log, scores[::-1])
    found = []
    for threads in (1, 2, 4):
        with warehouse.stage() as stage, stage.connect() as con:
            con.execute(f"SET threads = {threads}")
            build_examples(con, toy, stage, DAY)
            found.append([stage.path(t, DAY).read_bytes() for t in ("joined_examples", "rejected_rows")])
    assert found[0] == found[1] == found[2]


# -- sampling ----------------------------------------------------------------------------------------------------


def in_sample(impression, rate):
    return int(hashlib.md5(f"sample {impression}".encode()).hexdigest()[:13], 16) / 2**52 < rate


def test_a_sample_is_chosen_by_the_id_alone(lake):
    ids = [f"i{k}" for k in range(2000)]
    expected = [i for i in ids if in_sample(i, 0.25)]
    assert 400 < len(expected) < 600
    log = impressions(ids)
    for log_, scores in [(log, [score(i) for i in ids]), (log.reverse(), [score(i) for i in ids[::-1]])]:
        warehouse, _ = join(lake, platform(sample_rate=0.25, max_rejected=0.0), log_, scores)
        sampled = read(warehouse, "SELECT impression_id, weight FROM joined_examples")
        assert sorted(sampled) == sorted((i, 4.0) for i in expected)
        out = 2000 - len(expected)
        assert reason_counts(warehouse, "impressions") == {"sampled_out": out}
        assert reason_counts(warehouse, "heavyweight_scores") == {"impression_sampled_out": out}


def test_evaluation_joins_a_sampled_day_whole(lake):
    toy = platform(sample_rate=0.25)
    log = impressions([f"i{k}" for k in range(200)])
    warehouse, examples = join(lake, toy, log, [score(i) for i in log["impression_id"]])
    assert examples.rows < 200
    with warehouse.connect() as con:
        prepare_join(con, toy, warehouse, DAY, sample_rate=1.0)
        assert con.execute("SELECT count(*), min(weight), max(weight) FROM joined").fetchall() == [(200, 1.0, 1.0)]


# -- the rest ----------------------------------------------------------------------------------------------------


def test_features_from_history_are_joined(tmp_path):
    toy = platform(
        history="  - {name: seen, side: item, kind: dense, history: {by: [item_id], of: impressions, days: 1}}"
    )
    log = impressions(["a", "b"]).with_columns(item_id=pl.Series(["x", "y"]))
    warehouse = publish(tmp_path, toy, log, [score("a"), score("b")])
    yesterday = log.with_columns(item_id=pl.lit("x"), ts=NOON - timedelta(1))
    with warehouse.connect() as con, warehouse.stage() as stage:
        con.register("yesterday", yesterday)
        stage.write(con, "impressions", DAY - timedelta(1), "FROM yesterday")
        stage.publish()
    for with_history, seen in ((True, [("a", 2.0), ("b", 0.0)]), (False, [("a", None), ("b", None)])):
        with warehouse.connect() as con, warehouse.stage() as stage:
            build_examples(con, toy, stage, DAY, with_history=with_history)
            stage.publish()
        assert read(warehouse, "SELECT impression_id, seen FROM joined_examples") == seen


def test_a_day_whose_logs_are_not_published_is_withheld(tmp_path):
    toy = platform()
    warehouse = Warehouse(tmp_path, tables(toy))
    with warehouse.connect() as con, pytest.raises(Withheld, match="impressions of 2026-01-02 is not published"):
        prepare_join(con, toy, warehouse, DAY)


def _spoiled(lake, statement):
    """The accounting of a day after something went wrong between two tables."""
    toy = platform()
    warehouse = publish(lake, toy, impressions(["a", "b", "c"]), [score("a"), score("b")])
    with warehouse.connect() as con, warehouse.stage() as stage:
        build_examples(con, toy, stage, DAY)
        assert check_accounting(con)[1] == RowCount("impressions", 3, 2, 1)
        con.execute(statement)
        check_accounting(con)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM row_counts_of_day WHERE source = 'log'", "one row a source"),
        ("UPDATE row_counts_of_day SET received = received + 1 WHERE source = 'log'", "not accepted \\+ rejected"),
        ("CREATE OR REPLACE TEMP VIEW joined_of_day AS SELECT 'a' AS impression_id FROM range(2)", "2 rows of 1 impr"),
        ("CREATE OR REPLACE TEMP VIEW joined_of_day AS SELECT 'a' AS impression_id", "1 rows of 1 impressions"),
        (
            "CREATE OR REPLACE TEMP VIEW joined_of_day AS SELECT unnest(['a', 'x']) AS impression_id",
            "1 impressions are neither",
        ),
        (
            "CREATE OR REPLACE TEMP VIEW joined_of_day AS SELECT unnest(['a', 'c']) AS impression_id",
            "1 impressions are neither",
        ),
    ],
)
def test_lost_or_doubled_rows_are_an_error(lake, statement, message):
    with pytest.raises(AccountingError, match=message):
        _spoiled(lake, statement)


# -- a plain reference -------------------------------------------------------------------------------------------


def reference(toy, log, scores, rate):
    """What the SQL must do, row by row."""
    known = {r["impression_id"]: r for r in log.iter_rows(named=True)}
    why, by_impression = [], {i: [] for i in known}
    for row in scores:
        impression, at, _, ctr, gctr = row
        if impression not in known:
            why.append("orphan")
            continue
        wanted = {"ctr": ctr}
        if known[impression]["product"] == "standard":
            wanted["gctr"] = gctr
        valid = all(v is not None and not math.isnan(v) and 0 < v < 1 for v in wanted.values())
        if at is None or not valid:
            reason = "invalid_score"
        elif wanted.get("gctr", 0) > ctr + 1e-9:
            reason = "child_exceeds_parent"
        elif at > known[impression]["ts"] + timedelta(hours=toy.join.lateness_hours):
            reason = "late"
        else:
            reason = None if rate >= 1 or in_sample(impression, rate) else "impression_sampled_out"
        why.append(reason)
        by_impression[impression].append((reason, row))
    joined, lost = [], Counter()
    for impression in log["impression_id"]:
        found = by_impression[impression]
        usable = [r for reason, r in found if reason is None]
        if usable:
            product = known[impression]["product"]
            best = max(
                usable, key=lambda r: (r[1], r[2] is not None, r[2] or "", r[3], r[4] if product == "standard" else 0)
            )
            joined.append((impression, best[3], best[4] if product == "standard" else None, best[2], 1 / rate))
        elif not found:
            lost["no_score"] += 1
        elif any(reason == "impression_sampled_out" for reason, _ in found):
            lost["sampled_out"] += 1
        else:
            lost["only_late_scores" if any(r == "late" for r, _ in found) else "only_invalid_scores"] += 1
    faults = Counter(r for r in why if r)
    superseded = why.count(None) - len(joined)
    if superseded:
        faults["superseded"] = superseded
    return joined, dict(lost), dict(faults)


@st.composite
def days(draw):
    n = draw(st.integers(1, 8))
    ids = draw(st.permutations([f"i{k}" for k in range(n)]))
    products = draw(st.lists(st.sampled_from(["standard", "shopping"]), min_size=n, max_size=n))
    value = st.sampled_from([NAN, INF, -INF, 0.0, 1.0, None, 0.1, 0.2, 0.2 + 1e-12, 0.9])
    row = st.builds(
        score,
        st.sampled_from([*ids, *ids, *ids, "stranger", None]),
        st.sampled_from([-1, 0, 1, 1, 2, 2.001, None]),
        value,
        value,
        st.sampled_from(["v1", "v2", None]),
    )
    return impressions(ids, products=products), draw(st.lists(row, min_size=1, max_size=30))


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(day=days(), rate=st.sampled_from([1.0, 0.5]))
def test_the_join_equals_the_reference(lake, day, rate):
    log, scores = day
    toy = platform(sample_rate=rate)
    warehouse, examples = join(lake, toy, log, scores)
    joined, lost, faults = reference(toy, log, scores, rate)
    query = "SELECT impression_id, score_ctr, score_gctr, ranker_version, weight FROM joined_examples"
    assert read(warehouse, query) == joined
    assert reason_counts(warehouse, "impressions") == lost
    assert reason_counts(warehouse, "heavyweight_scores") == faults
    assert examples.counts == (
        RowCount("log", log.height, log.height, 0),
        RowCount("impressions", log.height, len(joined), sum(lost.values())),
        RowCount("heavyweight_scores", len(scores), len(joined), sum(faults.values())),
    )
    assert set(SCORE_FAULTS) >= set(faults) - {"late", "superseded", "impression_sampled_out"}
