"""The published metrics (`sql/cell_metrics.sql`) against the formulas in NumPy (`mtmd_model.metrics`)."""

import math

import duckdb
import numpy as np
import polars as pl
import pytest

import sql
from mtmd_model.metrics import FLOOR, measure

ROWS = 50


def cells(probability, score, surface="feed"):
    """The rows of `cell_metrics` for one model's predictions of one task."""
    n = len(score)
    scored = pl.DataFrame(
        {
            "model": ["mtmd"] * n,
            "model_version": ["v"] * n,
            "seed": [0] * n,
            "impression_id": list(range(n)),
            "surface": [surface] * n if isinstance(surface, str) else surface,
            "product": ["standard"] * n,
            "task": ["ctr"] * n,
            "score": score,
            "probability": probability,
        }
    )
    with duckdb.connect() as con:
        con.execute(sql.text("macros"))
        con.register("scored", scored)
        return con.sql(sql.text("cell_metrics"), params={"floor": FLOOR}).pl()


def test_every_metric_is_the_formulas_in_each_slice_and_bucket():
    rng = np.random.default_rng(0)
    probability, score = rng.uniform(2 * FLOOR, 1 - 1e-9, (2, ROWS))
    surface = np.repeat(["feed", "search"], [ROWS - 20, 20])
    found = cells(probability, score, surface.tolist())
    assert found.height == 2 * (1 + 10)
    for cell in found.iter_rows(named=True):
        rows = np.flatnonzero(surface == cell["surface"])
        if cell["bucket"] is not None:
            tenth = len(rows) // 10
            highest = rows[np.argsort(-score[rows])]
            rows = highest[cell["bucket"] * tenth : (cell["bucket"] + 1) * tenth]
        expected = vars(measure(probability[rows], score[rows]))
        assert {name: cell[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_what_is_below_the_floor_counts_as_the_floor_but_in_sums_and_differences():
    [cell] = cells([0.0], [0.5]).filter(pl.col("bucket").is_null()).iter_rows(named=True)
    assert cell["floored"] == 1
    assert cell["logmae"] == pytest.approx(math.log(0.5 / FLOOR))
    assert cell["bce"] == pytest.approx(-0.5 * math.log(FLOOR) - 0.5 * math.log1p(-FLOOR))
    assert cell["kl"] == pytest.approx(cell["bce"] - math.log(2))
    assert (cell["mae"], cell["calibration"]) == (0.5, 0.0)


def test_a_certain_prediction_stays_finite():
    [cell] = cells([1.0], [0.5]).filter(pl.col("bucket").is_null()).iter_rows(named=True)
    assert cell["bce"] == pytest.approx(-0.5 * math.log(1e-12), rel=1e-3)
