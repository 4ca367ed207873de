"""The table everybody asks for first: LogMAE by slice and task, the model beside the constants."""

from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

import sql
from mtmd_assets.home import Site
from mtmd_assets.pictures import markdown_table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

HEADER = ("surface", "product", "task", "rows", "mtmd", "constant", "constant_median", "gain over constant")


def cells(
    con: "DuckDBPyConnection", site: Site, days: Sequence[date]
) -> list[tuple[str, str, str, int, float, float, float, float]]:
    """Rows of `HEADER`, in the order of the platform file; the gain is (constant - mtmd) / constant."""
    found = con.execute(
        f"SELECT surface, product, task, rows, mtmd, constant, constant_median, (constant - mtmd) / constant FROM ({sql.text('scoreboard')})",
        {"days": list(days)},
    ).fetchall()
    platform = site.platform
    order = {
        (s, p, t): n for n, (s, p, t) in enumerate((s, p, t) for s, p in platform.slices for t in platform.task_names)
    }
    return sorted(found, key=lambda row: order[row[:3]])


def scoreboard(con: "DuckDBPyConnection", site: Site, days: Sequence[date]) -> str:
    """The table in Markdown."""
    return markdown_table(
        HEADER, [(*c[:4], *(f"{v:.4f}" for v in c[4:7]), f"{c[7]:+.1%}") for c in cells(con, site, days)]
    )


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
