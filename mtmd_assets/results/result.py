"""What was compared: the view `result` of a day's `improvement_results`, its lines, and how they are written."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from typing import TYPE_CHECKING, Any

from mtmd_assets.home import Site
from mtmd_assets.improvement import MIN_ROWS, verdict
from mtmd_assets.markdown import markdown_table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

CELLS = "contender = $model AND surface IS NOT NULL AND bucket IS NULL"
"""Of the result: the lines of a contender's slices x tasks."""
WHOLE = """SELECT (model, seed) FROM experiment_models WHERE ds BETWEEN $first AND $last
    GROUP BY model, seed HAVING count(DISTINCT ds) = $days"""
"""Models and seeds that were trained for every day."""
VERDICTS = ("better", "worse", "few users")
"""Columns of how many cells are so by their simultaneous intervals; the last have none."""
LARGE_ROWS = 500
"""Evaluation rows from which a cell is large: the smallest improvement of these is named by itself."""


@contextmanager
def result_of(site: Site, last: date) -> Iterator["DuckDBPyConnection"]:
    """A connection with the view `result`: what was compared on the evaluation days up to `last`."""
    with site.warehouse.connect() as con:
        con.execute(f"CREATE TEMP VIEW result AS SELECT * EXCLUDE ds FROM improvement_results WHERE ds = '{last}'")
        yield con


def compared(site: Site, last: date) -> set[str]:
    """The models that were compared on the evaluation days up to `last`."""
    with result_of(site, last) as con:
        return {model for (model,) in con.execute("SELECT DISTINCT contender FROM result").fetchall()}


def headline(site: Site, last: date, models: Collection[str]) -> str:
    """A row a model that was compared on the evaluation days up to `last`: mean improvement over it, and how its cells fall."""
    with result_of(site, last) as con:
        return headline_of(con, models)


def headline_of(con: "DuckDBPyConnection", models: Collection[str]) -> str:
    """The same, of a connection with the view."""
    rows: list[list[object]] = []
    for model in models:
        found = rows_where(con, "contender = $model AND bucket IS NULL", model=model)
        mean = next((r for r in found if r["surface"] is None and r["task"] is None), None)
        if mean is None:
            continue
        # without an error of the contender there is no improvement over it
        cells = [r for r in found if r["surface"] is not None and r["improvement"] is not None]
        family = [r for r in cells if r["rows"] >= MIN_ROWS]
        above = sum(r["improvement"] > 0 for r in family)
        smallest = [_smallest(family), _smallest([r for r in family if r["rows"] >= LARGE_ROWS])]
        rows.append(
            [model, mean["seeds"], interval(mean), len(family), above, *verdicts(family, mean["seeds"]), *smallest]
        )
    header = ["model", "seeds", "mean improvement", "cells", "above zero", *VERDICTS]
    return markdown_table([*header, "smallest", f"smallest of the cells with {LARGE_ROWS} rows"], rows)


def _smallest(cells: Sequence[dict[str, Any]]) -> str:
    """The smallest improvement and its cell; empty of none."""
    if not cells:
        return ""
    worst = min(cells, key=lambda r: r["improvement"])
    return f"{worst['improvement']:+.1%} ({worst['surface']} {worst['product']} {worst['task']})"


def span_of(con: "DuckDBPyConnection", models: Collection[str]) -> tuple[date, date, int] | None:
    """First and last evaluation day of what was compared of some models, and how many seeds; None if nothing was."""
    [span] = con.execute(
        "SELECT min(eval_start), max(eval_end), max(seeds) FROM result WHERE list_contains($models, contender)",
        {"models": list(models)},
    ).fetchall()
    return None if span[0] is None else span


def whole_seeds(con: "DuckDBPyConnection", model: str, first: date, last: date) -> list[int]:
    """The seeds that a model was trained with on every day."""
    whole = con.execute(WHOLE, {"first": first, "last": last, "days": (last - first).days + 1}).fetchall()
    return sorted(seed for ((name, seed),) in whole if name == model)


def rows_where(con: "DuckDBPyConnection", where: str, **parameters: object) -> list[dict[str, Any]]:
    """Lines of the result."""
    return list(con.sql(f"FROM result WHERE {where}", params=parameters).pl().iter_rows(named=True))


def interval(row: dict[str, Any]) -> str:
    """A line's improvement with its pointwise interval, as far as its seeds allow one."""
    if row["improvement"] is None:
        few = row["rows"] < MIN_ROWS
        return "" if row["bucket"] is not None else f"no cell with {MIN_ROWS} rows" if few else "it errs in no cell"
    if row["seeds"] == 1:
        return f"{row['improvement']:+.1%} (one seed)"  # users alone say too little of a training
    return f"{row['improvement']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}]"


def cell_in_words(row: dict[str, Any]) -> str:
    """A cell's improvement with its simultaneous interval, or with what its rows, users and seeds allow."""
    if row["improvement"] is None:
        return ""
    if row["seeds"] == 1:
        return f"{row['improvement']:+.1%} (one seed)"
    if row["joint_low"] is None:
        return f"{interval(row)} (few rows or users)"
    mark = {"better": "", "worse": " **worse**", "no clear difference": " ~"}[verdict(row)]
    return f"{row['improvement']:+.1%} [{row['joint_low']:+.1%}, {row['joint_high']:+.1%}]{mark}"


def verdicts(cells: Sequence[dict[str, Any]], seeds: int) -> list[object]:
    """`VERDICTS`: how many are better, how many worse, how many have too few users to say; nothing of one seed, which cannot."""
    if seeds == 1:
        return [""] * len(VERDICTS)
    found = [verdict(r) for r in cells]
    return [found.count("better"), found.count("worse"), sum(r["joint_low"] is None for r in cells)]
