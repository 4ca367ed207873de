"""Calibration by cell and its interval."""

import numpy as np
import polars as pl
import pytest

from mtmd_assets.calibration_table import calibration_table


def sums(ratio_SU: np.ndarray, scored_U: np.ndarray) -> pl.DataFrame:
    """One cell, of which each user has ten rows."""
    seeds, users = ratio_SU.shape
    return pl.DataFrame(
        {
            "day": 1,
            "seed": np.repeat(np.arange(seeds), users),
            "user_id": np.tile(np.arange(users), seeds),
            "surface": "s",
            "product": "p",
            "task": "t",
            "rows": 10,
            "predicted": (ratio_SU * scored_U).ravel(),
            "scored": np.tile(scored_U, seeds),
        }
    )


def test_hand_computed():
    one = sums(np.array([[1.5, 1.0], [0.5, 1.2]]), np.array([1.0, 3.0]))
    two = one.with_columns(surface=pl.lit("q"), predicted=pl.col("predicted") * 2)
    table = calibration_table(pl.concat([one, two]), replicates=100)
    assert table["surface"].to_list() == ["q", "s"]
    assert table["rows"].to_list() == [20, 20]
    # (1.5 + 3 + 0.5 + 3.6) / (2 (1 + 3))
    assert table["calibration"].to_list() == pytest.approx([2.15, 1.075])


def test_without_noise_the_interval_is_the_value():
    [row] = calibration_table(sums(np.full((3, 50), 1.25), np.arange(1.0, 51))).iter_rows(named=True)
    assert (row["low"], row["high"]) == pytest.approx((1.25, 1.25))


def test_the_interval_is_that_of_the_users_errors():
    rng = np.random.default_rng(0)
    users = 400
    [row] = calibration_table(sums(np.tile(rng.normal(1, 0.5, users), (3, 1)), np.ones(users))).iter_rows(named=True)
    se = 0.5 / np.sqrt(users)
    assert row["low"] == pytest.approx(row["calibration"] - 1.96 * se, abs=0.3 * se)
    assert row["high"] == pytest.approx(row["calibration"] + 1.96 * se, abs=0.3 * se)


def test_seeds_that_differ_widen_it():
    alike, apart = (
        calibration_table(sums(np.outer(of_seeds, np.ones(50)), np.ones(50))) for of_seeds in ([1, 1, 1], [0.9, 1, 1.1])
    )
    assert alike["calibration"].item() == pytest.approx(apart["calibration"].item())
    assert (apart["high"] - apart["low"]).item() > 0.1 > (alike["high"] - alike["low"]).item() + 0.09


def test_a_cell_without_a_score_has_none():
    [row] = calibration_table(sums(np.ones((2, 3)), np.zeros(3)), replicates=10).iter_rows(named=True)
    assert np.isnan([row["calibration"], row["low"], row["high"]]).all()


def test_days_are_trainings_of_their_own():
    """The same spread of seeds on two days, the other way round on the second: the seeds' sums are alike, the trainings
    are not."""
    one = sums(np.outer([0.9, 1.1], np.ones(50)), np.ones(50))
    two = sums(np.outer([1.1, 0.9], np.ones(50)), np.ones(50)).with_columns(day=2)
    [row] = calibration_table(pl.concat([one, two])).iter_rows(named=True)
    assert row["calibration"] == pytest.approx(1)
    assert row["rows"] == 1000
    # each day's mean has a standard error of 0.1, and the mean of both 0.1 / sqrt(2), with two degrees of freedom
    assert row["high"] - row["low"] == pytest.approx(2 * 4.303 * 0.1 / np.sqrt(2), rel=0.1)


def test_seeds_of_other_rows_are_refused():
    frame = sums(np.ones((2, 3)), np.ones(3))
    for other in (frame.slice(1), frame.with_columns(rows=pl.Series([10, 10, 10, 10, 10, 9]))):
        with pytest.raises(ValueError, match=r"the seeds \[0, 1\] differ in their rows"):
            calibration_table(other, replicates=10)
