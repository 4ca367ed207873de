"""The table everybody asks for first: LogMAE by slice and task, the model beside the constants."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import sql
from mtmd_assets.home import ALWAYS, Site
from mtmd_assets.markdown import markdown_table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROUNDING = 1e-9
"""A LogMAE below this is one of rounding: all scores of the slice are the same."""
HEADER = ("surface", "product", "task", "rows", "mtmd", "constant", "constant_median", "gain over constant")


@dataclass(frozen=True)
class Cell:
    """One slice x task: LogMAE of the model and of the constants (None unless the windows of all days saw the slice)."""

    surface: str
    product: str
    task: str
    rows: int
    mtmd: float
    constant: float | None
    constant_median: float | None

    @property
    def gain(self) -> float | None:
        """(constant - mtmd) / constant; None where the constant is not there, or makes no error but by rounding."""
        return (
            None if self.constant is None or self.constant < ROUNDING else (self.constant - self.mtmd) / self.constant
        )


def cells(con: "DuckDBPyConnection", site: Site, days: Sequence[date]) -> list[Cell]:
    """Every slice x task of today's platform file that has rows on these days, in the file's order."""
    query = f"SELECT surface, product, task, rows, mtmd, constant, constant_median FROM ({sql.text('scoreboard')})"
    found = {row[:3]: Cell(*row) for row in con.execute(query, {"days": list(days)}).fetchall()}
    platform = site.platform
    keys = ((s, p, t) for s, p in platform.slices for t in platform.task_names)
    return [found[key] for key in keys if key in found]


def scoreboard(con: "DuckDBPyConnection", site: Site, days: Sequence[date]) -> str:
    """The table in Markdown."""

    def row(c: Cell) -> list[object]:
        numbers = ("" if v is None else f"{v:.4f}" for v in (c.mtmd, c.constant, c.constant_median))
        return [c.surface, c.product, c.task, c.rows, *numbers, "" if c.gain is None else f"{c.gain:+.1%}"]

    return markdown_table(HEADER, [row(c) for c in cells(con, site, days)])


def ranker_auc(con: "DuckDBPyConnection", site: Site) -> str:
    """AUC of the built-in ranker's scores against the outcomes of each day it scored, in Markdown.

    A model that imitates a ranker is no better than the ranker: this belongs beside every result on its scores.
    """
    from mtmd_assets.ranker import day_auc

    tasks = site.platform.task_names
    rows = []
    for day in site.warehouse.days("joined_examples"):
        scores = con.sql(f"SELECT * EXCLUDE ds FROM heavyweight_scores WHERE ds = '{day}'").pl()
        auc = day_auc(con, site.platform, day, scores)
        overall = {r["task"]: r["auc"] for r in auc.filter(auc["surface"].is_null()).iter_rows(named=True)}
        rows.append([str(day), *(f"{overall[t]:.3f}" if overall.get(t) is not None else "" for t in tasks)])
    return markdown_table(["day", *tasks], rows)


def show(site: Site) -> int:
    """Print LogMAE by slice and task over every evaluated day, the model beside the constants; returns the exit
    status."""
    from mtmd_assets.improvement import MIN_ROWS

    days = site.warehouse.days("daily_slice_metrics")
    if not days:
        print(f"no day of {site.platform.name} is evaluated yet", file=sys.stderr)
        return 1
    with site.warehouse.connect() as con:
        found = cells(con, site, days)
        print(f"LogMAE to the heavyweight scores, {site.platform.name}, evaluated on {', '.join(map(str, days))}\n")
        print(scoreboard(con, site, days))
        if not site.platform.logs_scores:
            print(
                "\nAUC of the heavyweight ranker that is imitated, against the outcomes of days it was not trained on\n"
            )
            print(ranker_auc(con, site))
    judged = [c for c in found if c.gain is not None]
    large = [c for c in judged if c.rows >= MIN_ROWS]
    for those, which in ((judged, ""), (large, f" with at least {MIN_ROWS} rows"))[: 1 if large == judged else 2]:
        better = sum(c.mtmd < c.constant for c in those if c.constant is not None)
        print(f"\nmtmd is better than the slice's mean in {better} of the {len(those)} cells{which}", end="")
    print(f"\n\n{_where_to_look(site.platform.name)}")
    return 0


def _where_to_look(name: str) -> str:
    query = f'make sql{"" if name == ALWAYS else f" PLATFORM={name}"} Q="FROM slice_metrics LIMIT 5"'
    return f"{'make ui':<{len(query)}}   the assets, in Dagster\n{query}   the tables, in DuckDB"
