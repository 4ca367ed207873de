"""Names of a platform file that become columns: what DuckDB cannot take is refused, and all the rest goes through."""

import json
import re
from datetime import date, datetime

import duckdb
import polars as pl
import yaml

import sql
from mtmd_assets.contract import measure_contract
from mtmd_assets.intake import take_in, write_intake
from mtmd_assets.join import build_examples
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.platform_names import RESERVED, column_name
from mtmd_assets.sources import LogDay
from mtmd_assets.tables import tables, views
from mtmd_assets.warehouse import Warehouse


def keywords(con):
    return sorted(k for (k,) in con.execute("SELECT DISTINCT keyword_name FROM duckdb_keywords()").fetchall())


def test_the_reserved_words_are_those_that_fail_as_columns():
    statements = (
        'SELECT {0} FROM (SELECT 7 AS "{0}")',
        "SELECT 7 AS {0}",
        "SELECT s.{0} FROM (SELECT {{{0}: 7}} AS s)",
    )
    with duckdb.connect() as con:

        def works(statement):
            try:
                return con.execute(statement).fetchall() == [(7,)]
            except duckdb.Error:
                return False

        failing = {k for k in keywords(con) if not all(works(s.format(k)) for s in statements)}
    assert failing == RESERVED


def test_every_name_that_is_accepted_goes_through_the_sql(tmp_path):
    """DuckDB's keywords and the words of our own statements, all of them features of one platform."""
    day, rows = date(2026, 1, 1), 4
    with duckdb.connect() as con:
        words = set(keywords(con))
    for file in sql.FOLDER.glob("*.sql"):
        words |= set(re.findall(r"\b[a-z][a-z0-9_]*\b", file.read_text()))
    names = [w for w in sorted(words) if accepted(w)]
    assert len(names) > 400
    specs = [{"name": n, "side": "query", "kind": "categorical", "min_count": 1} for n in names]
    content = {
        "name": "toy",
        "start": day,
        "source": {"kind": "adworld"},
        "surfaces": ["feed"],
        "products": ["standard"],
        "tasks": [{"name": "ctr"}],
        "features": [*specs, {"name": "price", "side": "item", "kind": "dense"}],
        "join": {"max_rejected": 0.5},
    }
    platform = parse_platform(yaml.safe_dump(content), "toy.yaml")
    keys = ["impression_id", "request_id", "user_id", "item_id"]
    ids = pl.Series([f"i{k}" for k in range(rows)])
    impressions = pl.DataFrame(
        {
            **dict.fromkeys(keys, ids),
            "ts": [datetime(2026, 1, 1, 12)] * rows,
            "surface": ["feed"] * (rows - 1) + ["elsewhere"],
            "product": ["standard"] * rows,
            **{n: [f"{n}{k}" for k in range(rows)] for n in names},
            "price": [1.0] * rows,
            "outcome_ctr": [1] * rows,
        }
    )
    scores = pl.DataFrame(
        {
            "impression_id": ids,
            "scored_at": impressions["ts"],
            "ranker_version": ["v"] * rows,
            "score_ctr": [0.5] * rows,
        }
    )
    warehouse = Warehouse(tmp_path, tables(platform), views(platform))
    with warehouse.connect() as con, warehouse.stage() as stage:
        take_in(platform, LogDay(impressions, scores, "here", "there"), day, con)
        [(rejected,)] = con.execute("SELECT row FROM log_rejected").fetchall()
        assert json.loads(rejected).keys() == set(impressions.columns)
        write_intake(con, stage, day)
        stage.publish()
    with warehouse.connect() as con, warehouse.stage() as stage:
        build_examples(con, platform, stage, day)
        examples = stage.path("joined_examples", day)
        assert pl.read_parquet(examples).select(names).equals(impressions.head(rows - 1).select(names))
        measured = measure_contract(con, platform, day, examples)
        assert set(measured["feature"]) == {*names, "price"}
        assert set(measured["rows"]) == {rows - 1}
        assert set(measured["missing"]) == {0}


def accepted(name):
    try:
        return column_name(name) not in ("ctr", "price")
    except ValueError:
        return False
