"""What is one and the same within a day: a request's user, surface and features, an item's features for a product.

The towers see each request and each item once, so a log in which they vary cannot be embedded.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtmd_model.schema import Side

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

KEPT: dict[Side, tuple[str, ...]] = {"query": ("request_id", "user_id", "surface"), "item": ("item_id", "product")}
"""Side -> the columns that stand beside its features."""

KEYS: dict[Side, tuple[str, ...]] = {"query": ("request_id",), "item": ("item_id", "product")}
"""Side -> those that name a request, or an item."""

_RULE = {
    "query": "a request has one user, surface and set of features",
    "item": "an item's features are one snapshot a day and product",
}


def varying(con: "DuckDBPyConnection", rows: str, side: Side, features: Sequence[str]) -> str | None:
    """The first request (or item) with rows that differ, and in what; None where there is none.

    Args:
        con: sees `rows`.
        rows: a view or table with a row an impression of one day.
        side: whose keys.
        features: the side's features in `rows`.
    """
    keys = ", ".join(KEYS[side])
    columns = [c for c in (*KEPT[side], *features) if c not in KEYS[side]]
    if not columns:
        return None
    # Two numbers a key, however many and wide the columns.
    state = f"hash({', '.join(columns)})"
    found = con.execute(
        f"SELECT {keys} FROM {rows} GROUP BY ALL HAVING min({state}) <> max({state}) ORDER BY ALL LIMIT 1"
    ).fetchall()
    if not found:
        return None
    counts = ", ".join(f"count(DISTINCT {c}) + max(({c} IS NULL)::INT)" for c in columns)
    where = " AND ".join(f"{k} = ?" for k in KEYS[side])
    [numbers] = con.execute(f"SELECT {counts} FROM {rows} WHERE {where}", found[0]).fetchall()
    differ = [c for c, n in zip(columns, numbers, strict=True) if n > 1]
    return f"{dict(zip(KEYS[side], found[0], strict=True))} has several rows that differ in {differ}: {_RULE[side]}"
