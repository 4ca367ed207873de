"""Sums of probabilities over sums of scores, by slice."""

from datetime import date
from typing import TYPE_CHECKING, Any

from mtmd_assets.calibration_table import calibration_table
from mtmd_assets.contenders import CONTENDERS
from mtmd_assets.markdown import markdown_table
from mtmd_assets.results.result import rows_where, whole_seeds

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

CALIBRATED_ROWS = 1000
"""Of a slice, from which its ratio is judged."""


def calibration_section(con: "DuckDBPyConnection", first: date, last: date) -> str:
    """Sum of probabilities over sum of scores, a cell with enough rows: mtmd with intervals, its contenders beside it."""
    compared = [c for c in CONTENDERS if rows_where(con, "contender = $model AND surface IS NULL", model=c)]
    found = {model: _calibrations(con, model, first, last) for model in ("mtmd", *compared)}
    cells = [cell for cell, r in found["mtmd"].items() if r["rows"] >= CALIBRATED_ROWS]
    inside = {m: sum(0.95 <= of[cell]["calibration"] <= 1.05 for cell in cells) for m, of in found.items()}
    counts = ", ".join(f"{n} of {model}" for model, n in inside.items())
    of_mtmd = [found["mtmd"][cell] for cell in cells]
    if not cells:
        return f"No slice has the {CALIBRATED_ROWS:,} rows with a score that Σp̂/Σt is judged from."
    words = f"Σp̂/Σt in the slices with at least {CALIBRATED_ROWS:,} rows. Of the {len(cells)} cells are within 0.95 to 1.05: {counts}."
    several = len(whole_seeds(con, "mtmd", first, last)) > 1  # of one seed users alone say too little of a training
    if several:
        beyond = sum(r["low"] > 1.05 or r["high"] < 0.95 for r in of_mtmd)
        words += f""" Intervals
are 95 %, pointwise, from a bootstrap over users and seeds; of mtmd's, {beyond or "none"} lie wholly outside."""
    rows = []
    for cell in cells:
        mtmd, *others = (of[cell] for of in found.values())
        interval = f"{mtmd['calibration']:.3f}" + (f" [{mtmd['low']:.3f}, {mtmd['high']:.3f}]" if several else "")
        rows.append([*cell, mtmd["rows"], interval, *(f"{r['calibration']:.3f}" for r in others)])
    return f"{words}\n\n{markdown_table(['surface', 'product', 'task', 'rows', *found], rows)}"


def _calibrations(
    con: "DuckDBPyConnection", model: str, first: date, last: date
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Surface, product, task -> a model's line of `calibration_table`."""
    sums = con.sql(
        """SELECT ds AS day, seed, user_id, surface, product, task, count(*) AS rows, sum(probability) AS predicted, sum(score) AS scored
        FROM experiment_predictions WHERE model = $model AND ds BETWEEN $first AND $last AND list_contains($seeds, seed)
        GROUP BY ALL""",
        params={"model": model, "first": first, "last": last, "seeds": whole_seeds(con, model, first, last)},
    ).pl()
    return {(r["surface"], r["product"], r["task"]): r for r in calibration_table(sums).iter_rows(named=True)}
