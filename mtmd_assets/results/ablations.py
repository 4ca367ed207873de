"""The section of the ablations (paper, tables 5 and 6)."""

from datetime import date
from statistics import median
from typing import TYPE_CHECKING

from mtmd_assets.contenders import ABLATIONS
from mtmd_assets.domain_shift import domain_shifts
from mtmd_assets.home import Site
from mtmd_assets.improvement import MIN_ROWS
from mtmd_assets.markdown import markdown_table
from mtmd_assets.results.result import CELLS, VERDICTS, cell_in_words, interval, rows_where, span_of, verdicts
from mtmd_assets.results.setting import setting_section
from mtmd_assets.results.trainings import jumped, manifest_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ABLATED = f"""Improvement of mtmd over the model without it, by bucket of the heavyweight score (0 is the highest tenth); above zero it
helps. The mean is over the cells with at least {MIN_ROWS} rows on the last evaluation days, as many as *days* says, on which
both were trained with as many seeds; intervals of means and of cells with few rows or users are pointwise, *better* and *worse* count
the cells by simultaneous ones (of few seeds on one day these are too short: [experiments.md](experiments.md#tables)), *few users* those with too few for one,
*jumped* the trainings without it whose loss did (`checks/training.py`). Widths are divided by what the preset divides all of
its widths by; half of the rows are half of the steps too."""


def ablations_section(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """What is lost by taking one thing away, by bucket (paper, table 6): mean over the cells."""
    compared = span_of(con, ABLATIONS)
    if compared is None:
        return []
    rows: list[list[object]] = []
    for model in ABLATIONS:
        found = {
            r["bucket"]: r
            for r in rows_where(con, "contender = $model AND surface IS NULL AND task IS NULL", model=model)
        }
        if found:
            buckets = [interval(found[b]) if b in found else "" for b in range(5)]
            cells = [r for r in rows_where(con, CELLS, model=model) if r["rows"] >= MIN_ROWS]
            mean = found[None]
            days = (mean["eval_end"] - mean["eval_start"]).days + 1
            counts = [len(cells), *verdicts(cells, mean["seeds"]), days, mean["seeds"]]
            of_days = [model, mean["eval_start"], mean["eval_end"]]
            query = "SELECT list(model_version) FROM experiment_models WHERE model = ? AND ds BETWEEN ? AND ?"
            [(versions,)] = con.execute(query, of_days).fetchall()
            rows.append([model, *buckets, interval(mean), *counts, jumped(site, versions or [])])
    header = ["without", "0", "1", "2", "3", "4", "all", "cells", *VERDICTS, "days", "seeds", "jumped"]
    setting = setting_section(con, site, ABLATIONS, *compared)
    parts = [f"## {site.platform.name}: ablations", setting, ABLATED, markdown_table(header, rows)]
    by_slice = _by_slice(con, site, "no_domain_adaptation")
    if by_slice:
        parts += ["Domain adaptation, by slice:", by_slice, _shift(con, site, compared[1])]
    return [*parts, *_constrained(con, site)]


def _by_slice(con: "DuckDBPyConnection", site: Site, model: str) -> str:
    """Improvement over a model in every cell, a row a slice and a column a task; empty if it was not compared."""
    found = {(r["surface"], r["product"], r["task"]): r for r in rows_where(con, CELLS, model=model)}
    rows = []
    for surface, product in site.platform.slices:
        cells = [found.get((surface, product, task)) for task in site.platform.task_names]
        of_slice = [c for c in cells if c is not None]
        if of_slice:
            count = max(c["rows"] for c in of_slice)
            rows.append([surface, product, f"{count:,}", *("" if c is None else cell_in_words(c) for c in cells)])
    return markdown_table(["surface", "product", "rows", *site.platform.task_names], rows) if rows else ""


def _constrained(con: "DuckDBPyConnection", site: Site) -> list[str]:
    """Constrained modelling beside independent tasks, by task and by slice (paper, table 5)."""
    where = "contender = $model AND surface IS NULL AND task IS NOT NULL AND bucket IS NULL"
    found = {r["task"]: r for r in rows_where(con, where, model="unconstrained") if r["improvement"] is not None}
    if not found:
        return []
    rows = [[task, found[task]["rows"], interval(found[task])] for task in site.platform.task_names if task in found]
    words = "Constrained modelling, by task and by slice: improvement over independent tasks of equal width (`unconstrained`)."
    return [words, markdown_table(["task", "rows", "improvement"], rows), _by_slice(con, site, "unconstrained")]


def _shift(con: "DuckDBPyConnection", site: Site, day: date) -> str:
    """How unlike the domains are, by the statistics that mtmd's first seed normalises by."""
    query = "SELECT model_version FROM experiment_models WHERE ds = ? AND model = 'mtmd' ORDER BY seed LIMIT 1"
    [(version,)] = con.execute(query, [day]).fetchall()
    manifest = manifest_of(site, version)
    shifts = [] if manifest is None else domain_shifts(manifest["normalisation"])
    if not shifts:
        return ""
    between, spread = median(s.between for s in shifts), median(s.spread for s in shifts)
    words = f"""How unlike the domains are in the {len(shifts)} dense features that several domains of a tower have
(`mtmd_assets/domain_shift.py`): the share of the variance that lies between their means has a median of {between:.4f}, the
largest standard deviation over the smallest one of {spread:.2f}. The five most unlike in their means:"""
    rows = [[s.tower, s.feature, f"{s.between:.4f}", f"{s.spread:.2f}"] for s in shifts[:5]]
    header = ["tower", "feature", "variance between means", "largest over smallest deviation"]
    return f"{words}\n\n{markdown_table(header, rows)}"
