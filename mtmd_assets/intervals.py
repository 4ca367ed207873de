"""95 % intervals of numbers that differ by users and by trainings.

Users are many: they are resampled. Seeds are few, and their trainings on different days share nothing: what a replicate
makes of them is drawn from the normal distribution of their mean, day by day, and as its variance is itself known from few
values, intervals are stretched to Student's t, with as many degrees of freedom as that variance has in the whole.

Shapes: B replicates, U users, S seeds, K numbers, P parts of a variance.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_BLOCK = 250
"""Replicates multiplied at once: 60 MB of counts for 30,000 users."""
_ROUNDING = 1e-9
"""A number whose replicates differ by less, beside 1 + its size, has no spread but that of sums in another order."""


def resample_counts(rng: np.random.Generator, n: int, replicates: int) -> NDArray[np.uint8]:
    """(B, n) how often each of n things is drawn in n draws with replacement; above 255 with probability 1e-500."""
    counts = np.empty((replicates, n), np.uint8)
    for b in range(replicates):
        counts[b] = np.bincount(rng.integers(n, size=n), minlength=n)
    return counts


def resampled_sums(counts_BU: NDArray[np.uint8], sums_UK: Array) -> Array:
    """(B, K) counts @ sums; a user has rows in few of the K groups."""
    from scipy.sparse import csr_array

    sums_KU = csr_array(np.ascontiguousarray(sums_UK.T))
    blocks = (counts_BU[b : b + _BLOCK].T for b in range(0, len(counts_BU), _BLOCK))
    return np.concatenate([(sums_KU @ np.ascontiguousarray(block_UB, np.float64)).T for block_UB in blocks])


def seed_shares(rng: np.random.Generator, seeds: int, replicates: int) -> Array:
    """(B, S) the share of each seed in a replicate's mean; a row sums to 1, and shares may be below 0.

    shares @ x, of any S values x, is normal about their mean, with the unbiased estimate of the mean's variance. One seed
    says nothing of that: its share is 1.

    Source: Gaussian multiplier bootstrap, Chernozhukov, Chetverikov and Kato, Annals of Statistics 41 (2013).
    """
    if seeds == 1:
        return np.ones((replicates, 1))
    normal_BS = rng.normal(size=(replicates, seeds))
    about_BS = normal_BS - normal_BS.mean(axis=1, keepdims=True)
    return np.asarray(1 / seeds + about_BS / np.sqrt(seeds * (seeds - 1)))


def degrees_of_freedom(replicates_B: Array, of_seeds_PS: Array) -> Array:
    """(...) of the replicates' variance, some parts of which are known from S values each, and the rest well.

    Args:
        replicates_B: (B, ...).
        of_seeds_PS: (P, S, ...) for each part the S values whose mean enters the number.

    Source: Satterthwaite, Biometrics Bulletin 2 (1946).
    """
    seeds = of_seeds_PS.shape[1]
    if seeds == 1:
        return np.full(replicates_B.shape[1:], np.inf)
    parts_P = of_seeds_PS.var(axis=1, ddof=1) / seeds
    squares = (parts_P**2).sum(axis=0) / (seeds - 1)
    with _silent():
        # replicates stray: the whole is no less than its parts
        whole = np.fmax(np.nanvar(replicates_B, axis=0, ddof=1), parts_P.sum(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares > 0, whole**2 / squares, np.inf)


def pointwise_interval(value: Array, replicates_B: Array, freedom: Array, level: float = 0.95) -> tuple[Array, Array]:
    """The quantiles (1 -+ level) / 2 of the replicates, NaNs left out, their distances to the value stretched from the
    normal distribution to Student's t.

    Args:
        value: (...).
        replicates_B: (B, ...).
        freedom: (...) degrees of freedom.

    Source: Hesterberg, The American Statistician 69 (2015), for the stretch.
    """
    from scipy.stats import norm, t

    with _silent():
        low, high = np.nanquantile(replicates_B, [(1 - level) / 2, (1 + level) / 2], axis=0)
    stretch = t.ppf((1 + level) / 2, freedom) / norm.ppf((1 + level) / 2)
    return value + stretch * (low - value), value + stretch * (high - value)


def joint_interval(value_C: Array, replicates_BC: Array, freedom_C: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Simultaneous interval value -+ q_c se_c: it covers all C true values at once in `level` of the data sets.

    se_c is the standard deviation of cell c's replicates, t_b = max_c |replicate_bc - value_c| / se_c and q the `level`
    quantile of t, NaNs left out; q_c is as far out in Student's t of the cell's degrees of freedom as q is in the normal
    distribution. A cell without spread (one user and seed) has no width and does not enter t.

    Source: max-t bootstrap, Westfall and Young, Resampling-Based Multiple Testing (1993); Romano and Wolf,
    Econometrica 73 (2005).
    """
    from scipy.stats import norm, t

    if not len(value_C):
        return value_C, value_C
    with _silent():
        se_C = np.nanstd(replicates_BC, axis=0, ddof=1)
        scale_C = np.where(se_C > _ROUNDING * (1 + np.abs(value_C)), se_C, np.nan)
        t_B = np.nanmax(np.abs(replicates_BC - value_C) / scale_C, axis=1)
        q = np.nan_to_num(np.nanquantile(t_B, level))
    width_C = t.isf(norm.sf(q), freedom_C) * se_C
    return value_C - width_C, value_C + width_C


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings about columns of NaN alone: their result is NaN."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
