"""Intervals by users and few seeds, on numbers whose truth is known."""

import numpy as np
import pytest
from scipy.stats import norm, t

from mtmd_assets.intervals import (
    Array,
    degrees_of_freedom,
    joint_interval,
    pointwise_interval,
    resample_counts,
    resampled_sums,
    seed_shares,
)

MANY = np.inf
"""Degrees of freedom of the normal distribution."""


def test_resampling() -> None:
    counts = resample_counts(np.random.default_rng(0), 50, 600)
    assert (counts.sum(axis=1) == 50).all()
    assert counts.mean(axis=0) == pytest.approx(1, abs=0.2)
    assert counts.var(axis=0).mean() == pytest.approx(1 - 1 / 50, abs=0.05)  # of one count of a multinomial
    sums = np.random.default_rng(1).exponential(size=(50, 3)) * (np.arange(50) % 3 > 0)[:, None]
    assert resampled_sums(counts, sums) == pytest.approx(counts @ sums, rel=1e-5)


def test_shares_of_seeds() -> None:
    shares_BS = seed_shares(np.random.default_rng(0), 3, 20_000)
    assert shares_BS.sum(axis=1) == pytest.approx(1)
    assert shares_BS.mean(axis=0) == pytest.approx(1 / 3, abs=0.01)
    # of a mean of three values: the unbiased variance over three
    x = np.array([0.0, 1.0, 5.0])
    assert (shares_BS @ x).std() == pytest.approx(np.sqrt(x.var(ddof=1) / 3), rel=0.02)
    assert (seed_shares(np.random.default_rng(0), 1, 4) == 1).all()


def test_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    parts_PS = np.array([[0.0, 3.0, 6.0], [1.0, 1.0, 4.0]])
    a, b = 9 / 3, 3 / 3  # variances of their means
    alone = rng.normal(size=200_000) * np.sqrt(a + b)
    assert degrees_of_freedom(alone, parts_PS) == pytest.approx((a + b) ** 2 / ((a**2 + b**2) / 2), rel=0.02)
    # beside a variance that is known well there are more
    beside = rng.normal(size=200_000) * np.sqrt(a + b + 6)
    assert degrees_of_freedom(beside, parts_PS) == pytest.approx((a + b + 6) ** 2 / ((a**2 + b**2) / 2), rel=0.02)
    # never fewer than by the parts alone, and as many as one likes where nothing is estimated from few
    assert degrees_of_freedom(0 * alone, parts_PS) == pytest.approx((a + b) ** 2 / ((a**2 + b**2) / 2))
    assert degrees_of_freedom(alone, np.ones((2, 3))) == np.inf
    assert degrees_of_freedom(alone, np.ones((2, 1))) == np.inf


def test_pointwise_interval() -> None:
    replicates_B = 1 + np.random.default_rng(0).normal(size=100_000)
    low, high = pointwise_interval(np.array(1.0), replicates_B, np.array(MANY))
    assert [low, high] == pytest.approx([1 - 1.96, 1 + 1.96], abs=0.03)
    low, high = pointwise_interval(np.array(1.0), replicates_B, np.array(4.0))
    assert [low, high] == pytest.approx([1 - 2.776, 1 + 2.776], abs=0.04)


def test_joint_interval_is_wider_than_one_cells_and_as_wide_for_copies_of_a_cell() -> None:
    rng = np.random.default_rng(0)
    value_C, normal_BC, many_C = np.zeros(8), rng.normal(size=(4000, 8)), np.full(8, MANY)
    one = joint_interval(value_C[:1], normal_BC[:, :1], many_C[:1])[1].item()
    assert one == pytest.approx(1.96, abs=0.08)
    # 0.95 = P(|z| < q)^8 at q = 2.73.
    assert joint_interval(value_C, normal_BC, many_C)[1] == pytest.approx(2.73, abs=0.12)
    assert joint_interval(value_C, np.tile(normal_BC[:, :1], 8), many_C)[1] == pytest.approx(one)
    # A constant cell neither widens the others nor gets a width, and a cell may be missing in a replicate.
    constant = np.column_stack([normal_BC[:, 0], np.full(4000, 1e-12)])
    assert joint_interval(value_C[:2], constant, many_C[:2])[1] == pytest.approx([one, 0], abs=1e-9)
    gaps = np.column_stack([normal_BC[:, 0], np.where(np.arange(4000) % 2, np.nan, normal_BC[:, 0])])
    assert np.isfinite(joint_interval(value_C[:2], gaps, many_C[:2])).all()


def test_a_cell_with_few_degrees_of_freedom_is_as_far_out_in_students_t() -> None:
    normal_BC = np.random.default_rng(0).normal(size=(4000, 2))
    wide, narrow = joint_interval(np.zeros(2), normal_BC, np.array([4.0, MANY]))[1]
    assert narrow == pytest.approx(2.24, abs=0.1)
    assert wide / normal_BC[:, 0].std() == pytest.approx(t.isf(norm.sf(narrow / normal_BC[:, 1].std()), 4), rel=0.02)


def covered(rng: np.random.Generator, days: int, seeds: int, of_seeds: float, alike: float) -> tuple[float, float]:
    """How often intervals contain the truth of 40 differences of two models, pointwise and all at once.

    Args:
        of_seeds: share of the variance that is between seeds; the rest is known.
        alike: correlation of a training's cells.
    """
    cells, sets, replicates = 40, 250, 500
    pointwise, joint = 0.0, 0.0
    for _ in range(sets):
        value_C = np.sqrt(1 - of_seeds) * rng.normal(size=cells)
        replicates_BC = value_C + np.sqrt(1 - of_seeds) * rng.normal(size=(replicates, cells))
        trainings = []
        for _ in ("mtmd", "contender"):
            common_DS1, own_DSC = rng.normal(size=(days, seeds, 1)), rng.normal(size=(days, seeds, cells))
            x_DSC = np.sqrt(alike) * common_DS1 + np.sqrt(1 - alike) * own_DSC
            x_DSC *= np.sqrt(of_seeds * seeds / days / 2)
            value_C = value_C + x_DSC.mean(axis=1).sum(axis=0)
            replicates_BC += sum((seed_shares(rng, seeds, replicates) @ x_SC for x_SC in x_DSC), np.zeros(cells))
            trainings.append(x_DSC)
        freedom_C = degrees_of_freedom(replicates_BC, np.concatenate(trainings))
        pointwise += _inside(pointwise_interval(value_C, replicates_BC, freedom_C)).mean() / sets
        joint += _inside(joint_interval(value_C, replicates_BC, freedom_C)).all() / sets
    return pointwise, joint


def _inside(interval: tuple[Array, Array]) -> np.ndarray:
    low, high = interval
    return (low <= 0) & (high >= 0)


@pytest.mark.parametrize(
    ("days", "seeds", "of_seeds", "alike", "least"),
    [
        (3, 3, 0.0, 0.0, 0.91),
        (3, 3, 0.5, 0.0, 0.90),
        (3, 3, 0.5, 0.7, 0.91),
        (3, 3, 1.0, 0.0, 0.92),
        (3, 3, 1.0, 0.7, 0.93),
        (3, 2, 0.5, 0.3, 0.90),
        # few trainings say little of 40 variances at once
        (1, 3, 0.5, 0.3, 0.85),
        (1, 2, 0.5, 0.3, 0.78),
    ],
)
def test_coverage_with_few_seeds(days: int, seeds: int, of_seeds: float, alike: float, least: float) -> None:
    pointwise, joint = covered(np.random.default_rng(1), days, seeds, of_seeds, alike)
    assert 0.93 <= pointwise <= 0.985
    assert least <= joint <= 0.995
