"""Which names a platform file may give: they become SQL columns, written without quotes everywhere."""

import re

IDS = ("impression_id", "request_id", "user_id", "item_id")
# Columns every table of logs has; a feature may not take their names.
KEY_COLUMNS = (*IDS, "ts", "surface", "product", "ds", "weight", "ranker_version")

SQL_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
VALUE = re.compile(r"[A-Za-z0-9_]+")

# DuckDB's keywords that are no column when written without quotes; tests/test_platform.py derives them anew.
_KEYWORDS = """
all analyse analyze and anti any array as asc asof asymmetric at authorization binary both by case cast check collate
collation column concurrently constraint create cross default deferrable desc describe distinct do else end except
false fetch for foreign freeze from full glob group having ilike in initially inner intersect into is isnull join
lambda lateral leading left like limit natural not notnull null offset on only or order outer overlaps pivot
pivot_longer pivot_wider placing positional primary qualify references returning right select semi show similar some
summarize symmetric table tablesample then to trailing true union unique unpack unpivot using variadic verbose when
where window with
"""
RESERVED = frozenset(_KEYWORDS.split())

INTERNAL = {
    "count": "counts of a vocabulary's values",
    "feature": "the feature contract",
    "file_row_number": "DuckDB's reader of Parquet files",
    "impressions": "counts of impressions",
    "line": "the position of a row in its file",
    "missing": "the feature contract",
    "present": "the feature contract",
    "r": "rows as received",
    "rows": "the feature contract",
    "s": "the join with scores",
}
"""Names that our own statements give to something beside the columns of features -> to what."""


def sql_name(name: str) -> str:
    """`name`, if it can be a column.

    Raises:
        ValueError: if it cannot.
    """
    if not SQL_NAME.fullmatch(name):
        raise ValueError("not usable as an SQL column: lower-case letters, digits and _, a letter first, at most 63")
    if name in RESERVED:
        raise ValueError("not usable as an SQL column: a keyword of DuckDB")
    return name


def column_name(name: str) -> str:
    """`name`, if a feature's or another logged column can have it.

    Raises:
        ValueError: if it cannot.
    """
    sql_name(name)
    if name in KEY_COLUMNS or name.startswith("score_"):
        raise ValueError("that name is taken by a column every log has")
    if name in INTERNAL:
        raise ValueError(f"that name is taken: the pipeline uses it for {INTERNAL[name]}")
    if name.startswith("past_"):
        raise ValueError("names that begin with past_ are taken by the built-in ranker's counters")
    return name


def task_name(name: str) -> str:
    """`name`, if a task can have it.

    Raises:
        ValueError: if it cannot.
    """
    sql_name(name)
    if name == "impressions" or name in KEY_COLUMNS:
        raise ValueError("that name is taken by a column or table every log has")
    if "score_" in name:
        raise ValueError("a task's name may not contain score_, for its column is score_<name>")
    return name
