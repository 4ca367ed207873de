"""Whether a window of days can be trained on, and whose scores it holds."""

from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def verify_window(site: Site, window: Sequence[date]) -> None:
    """Insist that every day of the window is published, with the columns of today's platform file.

    A day is published only if it passed its checks, so a window without holes is one whose days all passed.

    Raises:
        Withheld: naming the days and what to run.
    """
    warehouse, name = site.warehouse, site.platform.name
    holes = warehouse.missing("joined_examples", window[0], window[-1])
    if holes:
        raise Withheld(
            f"joined_examples has no {', '.join(map(str, holes))}: run {name}_data for these days, or see why they were refused",
            holes,
            "joined_examples",
        )
    wanted = list(warehouse.tables["joined_examples"].items())
    stale = [d for d in window if warehouse.columns("joined_examples", d) != wanted]
    if stale:
        raise Withheld(
            f"joined_examples of {', '.join(map(str, stale))} was built under another platform file: run {name}_data for these days",
            stale,
            "joined_examples",
        )


def rankers_of(con: "DuckDBPyConnection", window: Sequence[date]) -> list[str]:
    """The versions of the rankers that scored a window, sorted."""
    query = "SELECT list(DISTINCT ranker_version ORDER BY ranker_version) FROM joined_examples WHERE ds BETWEEN ? AND ?"
    [(rankers,)] = con.execute(query, [window[0], window[-1]]).fetchall()
    return list(rankers)
