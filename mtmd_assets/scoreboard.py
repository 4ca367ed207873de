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


def cells(con: "DuckDBPyConnection", site: Site, days: Sequence[date]) -> list[tuple[str, str, str, int, float, float, float, float]]:
    """Rows of `HEADER`, in the order of the platform file; the gain is (constant - mtmd) / constant."""
    found = con.execute(
        f"SELECT surface, product, task, rows, mtmd, constant, constant_median, (constant - mtmd) / constant FROM ({sql.text('scoreboard')})",
        {"days": list(days)},
    ).fetchall()
    platform = site.platform
    order = {(s, p, t): n for n, (s, p, t) in enumerate((s, p, t) for s, p in platform.slices for t in platform.task_names)}
    return sorted(found, key=lambda row: order[row[:3]])


def scoreboard(con: "DuckDBPyConnection", site: Site, days: Sequence[date]) -> str:
    """The table in Markdown."""
    return markdown_table(HEADER, [(*c[:4], *(f"{v:.4f}" for v in c[4:7]), f"{c[7]:+.1%}") for c in cells(con, site, days)])
