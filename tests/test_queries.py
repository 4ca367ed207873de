"""Shipped queries, on rows made by hand."""

import duckdb
import pytest

import sql

DAY, EARLIER = "2026-01-02", "2026-01-01"
# Request, impression, what the ranker says, what a good and what a bad model say: of r1 and r2 the good one has the first,
# of r2 alone the bad one; r3 shows one candidate.
SHOWN = [
    ("r1", "a", 0.3, 0.4, 0.1),
    ("r1", "b", 0.2, 0.1, 0.4),
    ("r2", "c", 0.1, 0.1, 0.1),
    ("r2", "d", 0.3, 0.2, 0.2),
    ("r2", "e", 0.2, 0.1, 0.1),
    ("r3", "f", 0.3, 0.1, 0.1),
]


@pytest.fixture
def con():
    with duckdb.connect() as con:
        con.execute("CREATE TABLE impressions (ds DATE, impression_id VARCHAR, request_id VARCHAR)")
        columns = (
            "ds DATE, impression_id VARCHAR, surface VARCHAR, task VARCHAR, model VARCHAR, model_version VARCHAR, "
            "seed INTEGER, score DOUBLE, probability DOUBLE"
        )
        con.execute(f"CREATE TABLE predictions ({columns})")
        con.execute(f"CREATE TABLE experiment_predictions ({columns})")
        con.execute("CREATE TABLE experiment_models (ds DATE, model VARCHAR)")
        for day in (EARLIER, DAY):
            con.executemany("INSERT INTO impressions VALUES (?, ?, ?)", [(day, i, r) for r, i, *_ in SHOWN])
        yield con


def predict(con, table, day, model, column):
    rows = [(day, s[1], "feed", "click", model, f"{model}-{day}", 0, s[2], s[column]) for s in SHOWN]
    con.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    con.execute("INSERT INTO experiment_models VALUES (?, ?)", [day, model])


def test_the_best_is_kept_in_the_newest_days_requests_of_several_candidates(con):
    predict(con, "predictions", EARLIER, "mtmd", 3)
    predict(con, "predictions", DAY, "mtmd", 4)
    query = sql.text("queries/is_the_best_kept")
    assert con.sql(query).fetchall() == [("feed", "click", 2, 2.5, 0.5, round((1 / 2 + 1 / 3) / 2, 3))]


def test_models_of_every_evaluation_day_are_ranked(con):
    for day in (EARLIER, DAY):
        predict(con, "experiment_predictions", day, "good", 3)
        predict(con, "experiment_predictions", day, "bad", 4)
    predict(con, "experiment_predictions", DAY, "ablation", 3)
    found = con.sql(sql.text("queries/who_keeps_the_best")).fetchall()
    assert [(str(row[1]), row[2], *row[3:]) for row in found] == [
        (day, model, 2, 1, share, share, share)
        for day in (EARLIER, DAY)
        for model, share in (("good", 1), ("bad", 0.5))
    ]
