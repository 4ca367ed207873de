"""Features from history: counters and rates of strictly earlier days.

They are computed when a day's examples are built, from published `impressions` of exactly the days D-w..D-1, so that
neither the order of a backfill nor anything that happens on day D or later can change them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

import sql
from mtmd_assets.faults import Withheld
from mtmd_assets.platform import History, Platform
from mtmd_assets.warehouse import Warehouse

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@dataclass(frozen=True)
class Counter:
    """One column to compute."""

    name: str
    history: History
    surfaces: tuple[str, ...] | None = None
    """Missing on other surfaces; every surface has it when None."""
    products: tuple[str, ...] | None = None
    """Missing for other products; every product has it when None."""


def create_history(con: "DuckDBPyConnection", platform: Platform, warehouse: Warehouse, day: date) -> None:
    """Create the temporary table `history`: `impression_id` and a FLOAT column a feature from history.

    A count of an entity without rows in its days is 0, and its rate is the platform's own rate (0 of 0, by the
    formula of `History`), so that on honest data nothing is missing, except: where the entity itself is unknown, where
    the platform file says that the slice lacks the feature, and a rate when its days hold nothing to take a mean from.

    Args:
        con: sees the published tables (`Warehouse.connect`).
        platform: names the features.
        warehouse: says which days are published.
        day: the impressions' day; only strictly earlier days are read.

    Raises:
        Withheld: if a day of the look-back is not published; days before the platform's start count as empty.
    """
    counters = [Counter(f.name, f.history, f.surfaces, f.products) for f in platform.features if f.history]
    create_counters(con, platform, warehouse, day, counters)


def require_days(platform: Platform, warehouse: Warehouse, first: date, last: date, wanted_by: str) -> None:
    """Insist on published `impressions` of first..last; days before the platform's start count as empty.

    Raises:
        Withheld: naming the missing days and what to build.
    """
    missing = warehouse.missing("impressions", max(first, platform.start), last)
    if missing:
        days = ", ".join(d.isoformat() for d in missing)
        raise Withheld(
            f"{platform.name}: {wanted_by} needs the impressions of {days}: build the asset impressions there first",
            missing,
        )


def create_counters(
    con: "DuckDBPyConnection",
    platform: Platform,
    warehouse: Warehouse,
    day: date,
    counters: Sequence[Counter],
    table: str = "history",
) -> None:
    """Create the temporary table `table` with `impression_id` and one FLOAT column a counter; see `create_history`.

    Raises:
        Withheld: as `create_history`.
    """
    yesterday = day - timedelta(1)
    if counters:
        first = day - timedelta(max(c.history.days for c in counters))
        require_days(platform, warehouse, first, yesterday, f"history of {day}")
    features, joins, temporary = ["r.impression_id"], [], []
    # One pass over the earlier days for each kind of entity and look-back, whatever the number of features.
    groups = dict.fromkeys((c.history.by, c.history.days) for c in counters)
    for n, (by, days) in enumerate(groups):
        counts, means = {}, {}
        for c in counters:
            if (c.history.by, c.history.days) != (by, days):
                continue
            h = c.history
            if h.per is None:
                counts[h.of] = f"coalesce(sum({_value(h.of)}), 0)"
                value = f"coalesce(c{n}.{h.of}, 0)"
            else:
                of, per, mean = f"{h.of}_of_{h.per}", f"{h.per}_for_{h.of}", f"mean_{h.of}_of_{h.per}"
                known = f"FILTER (WHERE {_value(h.of)} IS NOT NULL AND {_value(h.per)} IS NOT NULL)"
                counts[of] = f"coalesce(sum({_value(h.of)}) {known}, 0)"
                counts[per] = f"coalesce(sum({_value(h.per)}) {known}, 0)"
                means[mean] = f"sum({of}) / nullif(sum({per}), 0)"
                value = (
                    f"(coalesce(c{n}.{of}, 0) + {h.prior!r} * m{n}.{mean}) / (coalesce(c{n}.{per}, 0) + {h.prior!r})"
                )
            features.append(f"CASE WHEN {_has(c)} THEN {value} END::FLOAT AS {c.name}")
        name = f"{table}_counts_{n}"
        temporary.append(name)
        con.execute(
            sql.text("history_counts").format(
                table=name,
                by=", ".join(by),
                counts=", ".join(f"{text} AS {column}" for column, text in counts.items()),
                first=max(day - timedelta(days), platform.start),
                last=yesterday,
            )
        )
        joins.append(f"LEFT JOIN {name} AS c{n} ON " + " AND ".join(f"r.{b} = c{n}.{b}" for b in by))
        if means:
            columns = ", ".join(f"{text} AS {column}" for column, text in means.items())
            joins.append(f"CROSS JOIN (SELECT {columns} FROM {name}) AS m{n}")
    con.execute(
        sql.text("history").format(table=table, features=",\n    ".join(features), day=day, joins="\n".join(joins))
    )
    for name in temporary:
        con.execute(f"DROP TABLE {name}")


def _value(count: str) -> str:
    """What one row adds to a count."""
    return "1" if count == "impressions" else f"outcome_{count}"


def _has(counter: Counter) -> str:
    """Whether a row has the feature: its entity is known and its slice has it."""
    conditions = [f"r.{b} IS NOT NULL" for b in counter.history.by]
    for column, values in (("surface", counter.surfaces), ("product", counter.products)):
        if values is not None:
            conditions.append(f"r.{column} IN ({', '.join(repr(v) for v in values)})")
    return " AND ".join(conditions)
