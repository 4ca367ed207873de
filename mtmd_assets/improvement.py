"""By how much mtmd's LogMAE is below a contender's, by cell, with bootstrap intervals.

A cell is a surface x product x task. Its LogMAE is the mean over the seeds of the mean |ln p - ln t| over its rows of
all evaluation days together, and improvement = (contender - mtmd) / contender: 0.1 means an error 10 % lower.

Shapes: N prediction rows of one model and seed, U users, C cells, S seeds, B replicates, K = C x G numbers a replicate
with G groups of a cell's rows (its buckets 0..4 and, last, all its rows), L lines of the table (cells and means).
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mtmd_model.metrics import log_error

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "no clear difference"]

CELL = ("surface", "product", "task")
KEY = ("day", "impression_id", "task")
"""What a row of predictions of one model and seed is known by."""
SHARED = ("user_id", "surface", "product", "score", "bucket")
"""What every model and seed must say alike of a row."""
COLUMNS = ("seed", *KEY, *SHARED, "probability")
"""Of a frame of predictions."""
BUCKETS = 5
"""Buckets 0..4, the upper half of the scores, have lines of their own."""
GROUPS = BUCKETS + 1
ALL = BUCKETS
"""The group of all rows."""

_BLOCK = 250
"""Replicates multiplied at once: 30 MB of counts for 30,000 users."""
_ROUNDING = 1e-5
"""A cell whose replicates differ by less, beside 1 + |improvement|, has no spread but that of float32 sums."""


@dataclass(frozen=True)
class _Rows:
    """The rows that every model and seed share, sorted by `KEY`."""

    table: pl.DataFrame
    """(N,) `KEY` and `SHARED`."""
    cells: pl.DataFrame
    """(C,) `CELL`, sorted."""
    users: int
    place_N: NDArray[np.int64]
    """Flat index of a row's (user, cell, group) in a (U, C, G) array; the group `ALL` stands for buckets 5..9."""


@dataclass(frozen=True)
class _LogMAE:
    """LogMAE of one model, NaN where a group has no rows."""

    value_CG: Array
    replicates_BCG: Array


def improvement_table(
    mtmd: pl.DataFrame,
    contender: pl.DataFrame,
    *,
    min_rows: int = 200,
    replicates: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Improvement of every cell and its buckets 0..4, and its means over cells, with 95 % intervals.

    The bootstrap resamples users with replacement (a user's rows of all days, cells, tasks, seeds and both models go
    together) and, for each model by itself, its seeds. A group that no resampled user has a row in is left out of that
    replicate. The resamples depend on `seed`, the users and the number of seeds alone, so that tables of several
    contenders share those of mtmd.

    The bootstrap of so few seeds needs two corrections, see `seed_shares`; one seed says nothing about seeds at all.

    Args:
        mtmd: a row a seed x day x impression x task: `COLUMNS`, with score and probability in [0, 1] and bucket 0..9,
            0 the tenth of the day's slice x task with the highest scores.
        contender: the same rows and seeds of the other model.
        min_rows: cells with at least this many rows (a row counts once, not once a seed) are the family: they enter
            the means and have joint intervals.
        replicates: of the bootstrap.
        seed: of the bootstrap's random numbers.

    Returns:
        A row a line x bucket (null: all rows, then 0..4). Lines are the cells in order, then the unweighted mean over
        the family (surface, product, task null), then that over the family's cells of each task (surface, product
        null). A mean leaves out cells without rows in the bucket. Columns:

        - surface, product, task, bucket
        - rows, users, seeds: rows count once, not once a seed; a mean has its cells' rows and distinct users
        - mtmd, contender_logmae: LogMAE, of a mean the unweighted mean of its cells' LogMAEs
        - improvement: fraction, null without rows or where the contender makes no error; of a mean the unweighted mean
          of its cells' improvements, which is not that of its two LogMAEs
        - low, high: pointwise, percentiles 2.5 and 97.5 of the replicates
        - joint_low, joint_high: simultaneous over the family's cells (`joint_interval`); null elsewhere

    Raises:
        ValueError: a column or every row is missing, a value is missing or out of range, a row comes twice, or the two
            frames differ in their seeds or, at any seed, in their rows.

    Source: cluster bootstrap, Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    models = {"mtmd": _checked(mtmd, "mtmd"), "contender": _checked(contender, "contender")}
    seeds = _common_seeds(models)
    rows = _rows(_of_seed(models["mtmd"], seeds[0]))

    rng = np.random.default_rng(seed)
    users_BU = resample_counts(rng, rows.users, replicates)
    count_UK = _sums(rows)
    count_BK = resampled_sums(users_BU, count_UK)
    m, c = (
        _logmae(
            frame, who, seeds, rows, users_BU, count_UK, count_BK, seed_shares(rng, len(seeds), replicates, models=2)
        )
        for who, frame in models.items()
    )

    count_UCG = count_UK.reshape(rows.users, -1, GROUPS)
    rows_CG = count_UCG.sum(axis=0)
    family_C = rows_CG[:, ALL] >= min_rows
    names, members_LC = _lines(rows.cells, family_C)
    value_CG, value_BCG = improvement(m.value_CG, c.value_CG), improvement(m.replicates_BCG, c.replicates_BCG)
    low_LG, high_LG = percentile_interval(mean_over(members_LC, value_BCG))
    joint_low_LG, joint_high_LG = np.full((2, *low_LG.shape), np.nan)
    family = np.flatnonzero(family_C)
    joint_low_LG[family, ALL], joint_high_LG[family, ALL] = joint_interval(
        value_CG[family, ALL], value_BCG[:, family, ALL]
    )
    counts = {
        "rows": members_LC @ rows_CG,
        "users": np.stack([(count_UCG[:, members > 0] > 0).any(axis=1).sum(axis=0) for members in members_LC]),
        "seeds": np.full(low_LG.shape, len(seeds)),
    }
    numbers = {
        "mtmd": mean_over(members_LC, m.value_CG),
        "contender_logmae": mean_over(members_LC, c.value_CG),
        "improvement": mean_over(members_LC, value_CG),
        "low": low_LG,
        "high": high_LG,
        "joint_low": joint_low_LG,
        "joint_high": joint_high_LG,
    }
    return _table(names, counts, numbers)


def verdict(row: Mapping[str, Any]) -> Verdict:
    """What a cell's joint interval says of mtmd.

    Args:
        row: of `improvement_table`. Means, buckets and cells outside the family have no joint interval and always come
            out as no clear difference: read their `low` and `high` instead.
    """
    low, high = row["joint_low"], row["joint_high"]
    if low is not None and low > 0:
        return "better"
    if high is not None and high < 0:
        return "worse"
    return "no clear difference"


def improvement(mtmd: Array, contender: Array) -> Array:
    """(contender - mtmd) / contender of LogMAEs of any one shape, NaN where the contender's is 0 or either is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(contender > 0, (contender - mtmd) / contender, np.nan)


def resample_counts(rng: np.random.Generator, n: int, replicates: int) -> NDArray[np.uint8]:
    """(B, n) how often each of n things is drawn in n draws with replacement; above 255 with probability 1e-500."""
    counts = np.empty((replicates, n), np.uint8)
    for b in range(replicates):
        counts[b] = np.bincount(rng.integers(n, size=n), minlength=n)
    return counts


def seed_shares(rng: np.random.Generator, seeds: int, replicates: int, models: int) -> Array:
    """(B, S) the share of each seed in a replicate's mean; a row sums to 1, and shares may be below 0.

    S seeds drawn S times have too small a variance, by (S - 1) / S: S - 1 are drawn. And an interval of normal length is
    too short for a variance that is itself known from S values: the distance from the mean is stretched to Student's t.
    Where nothing but normal differences between seeds matters, three seeds' intervals of 95 % then cover the truth in 93
    to 96 % of the cases (`tests/test_improvement.py`), and in four fifths without.

    Args:
        models: that have `seeds` trainings each, all of which a difference depends on: (S - 1) degrees of freedom each.

    Source: Rao and Wu, JASA 83 (1988), for the number of draws; Hesterberg, The American Statistician 69 (2015), for
    the stretched interval.
    """
    if seeds == 1:
        return np.ones((replicates, 1))
    from scipy.stats import norm, t

    draws = seeds - 1
    stretch = t.ppf(0.975, models * (seeds - 1)) / norm.ppf(0.975)
    drawn_BS = rng.multinomial(draws, np.full(seeds, 1 / seeds), size=replicates) / draws
    return np.asarray(1 / seeds + stretch * (drawn_BS - 1 / seeds))


def resampled_sums(counts_BU: NDArray[np.uint8], sums_UK: Array) -> Array:
    """(B, K) counts @ sums, multiplied in float32 (relative error near 1e-6), a block of replicates at a time."""
    m_UK = sums_UK.astype(np.float32)
    blocks = (counts_BU[b : b + _BLOCK].astype(np.float32) for b in range(0, len(counts_BU), _BLOCK))
    return np.concatenate([block @ m_UK for block in blocks]).astype(np.float64)


def mean_over(members_LC: Array, x_CG: Array) -> Array:
    """(..., L, G) unweighted mean of x over each line's cells that have a number there, NaN where none has.

    Args:
        members_LC: 1 where a cell belongs to a line, else 0.
        x_CG: (..., C, G), NaN where a cell has no number.
    """
    with np.errstate(invalid="ignore"):
        return (members_LC @ np.nan_to_num(x_CG)) / (members_LC @ np.isfinite(x_CG))


def percentile_interval(replicates: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Pointwise interval: the quantiles (1 -+ level) / 2 over the first axis, NaNs left out."""
    with _silent():
        low, high = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def joint_interval(value_C: Array, replicates_BC: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Simultaneous interval value -+ q se: it covers all C true values at once in `level` of the data sets.

    se_c is the standard deviation of cell c's replicates, t_b = max_c |replicate_bc - value_c| / se_c and q the `level`
    quantile of t, NaNs left out. A cell without spread (one user and seed) has no width and does not enter t.

    Source: max-t bootstrap, Westfall and Young, Resampling-Based Multiple Testing (1993); Romano and Wolf,
    Econometrica 73 (2005).
    """
    if not len(value_C):
        return value_C, value_C
    with _silent():
        se_C = np.nanstd(replicates_BC, axis=0, ddof=1)
        scale_C = np.where(se_C > _ROUNDING * (1 + np.abs(value_C)), se_C, np.nan)
        t_B = np.nanmax(np.abs(replicates_BC - value_C) / scale_C, axis=1)
        q = np.nan_to_num(np.nanquantile(t_B, level))
    return value_C - q * se_C, value_C + q * se_C


def _checked(frame: pl.DataFrame, who: str) -> pl.DataFrame:
    """`COLUMNS` of a frame of predictions, of one type each; ValueError as `improvement_table`."""
    if missing := [c for c in COLUMNS if c not in frame.columns]:
        raise ValueError(f"{who} lacks the columns {missing}")
    if frame.is_empty():
        raise ValueError(f"{who} has no rows")
    unit, tenth = pl.col("score", "probability").is_between(0, 1), pl.col("bucket").is_between(0, 9)
    known = pl.col("seed", *KEY, "user_id", "surface", "product").is_not_null()
    # A null is neither inside nor outside a range.
    good = frame.select(known.all(), unit.fill_null(False).all(), tenth.fill_null(False).all()).row(0, named=True)
    if bad := [column for column, fine in good.items() if not fine]:
        raise ValueError(f"{who} has missing values or values out of range in {bad}")
    names, numbers = pl.col(CELL).cast(pl.String), pl.col("score", "probability").cast(pl.Float64)
    return frame.select(COLUMNS).with_columns(names, numbers, pl.col("bucket").cast(pl.Int64))


def _common_seeds(models: Mapping[str, pl.DataFrame]) -> list[int]:
    """The seeds of all models, sorted; ValueError if they differ."""
    of = {who: sorted(frame["seed"].unique().to_list()) for who, frame in models.items()}
    first, *others = of.values()
    if any(seeds != first for seeds in others):
        raise ValueError(f"the seeds differ: {of}")
    return first


def _of_seed(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    """(N,) the rows of one seed, sorted by `KEY`."""
    return frame.filter(pl.col("seed") == seed).sort(KEY)


def _rows(table: pl.DataFrame) -> _Rows:
    """The shared rows, from those of one model and seed; ValueError if a row comes twice."""
    same = table.select((pl.col(c) == pl.col(c).shift(1)) for c in KEY).select(pl.all_horizontal(pl.all()).sum()).item()
    if same:
        raise ValueError(f"{same} rows come twice: need one a seed x {' x '.join(KEY)}")
    cells = table.select(CELL).unique().sort(CELL)
    numbered = cells.with_row_index("cell")
    cell_N = table.join(numbered, on=CELL, how="left", maintain_order="left")["cell"].to_numpy().astype(np.int64)
    user_N = table["user_id"].rank("dense").to_numpy().astype(np.int64) - 1
    group_N = np.minimum(table["bucket"].to_numpy(), ALL)
    users = int(user_N.max()) + 1
    return _Rows(table.select(*KEY, *SHARED), cells, users, (user_N * len(cells) + cell_N) * GROUPS + group_N)


def _require_same(table: pl.DataFrame, expected: pl.DataFrame, who: str) -> None:
    """ValueError unless both, sorted by `KEY`, have the same rows, apart from probability."""
    if table.schema != expected.schema:
        raise ValueError(f"{who} has columns of other types: {table.schema} and not {expected.schema}")
    if not table.select(KEY).equals(expected.select(KEY)):
        for verb, a, b in (("lacks", expected, table), ("alone has", table, expected)):
            alone = a.join(b, on=KEY, how="anti")
            if len(alone):
                first = alone.select(KEY).row(0, named=True)
                raise ValueError(f"{who} {verb} {len(alone)} rows, the first {first}")
        raise ValueError(f"{who} has {len(table) - len(expected)} rows twice")
    for column in SHARED:
        differ = table[column] != expected[column]
        if differ.any():
            first = table.filter(differ).select(KEY).row(0, named=True)
            raise ValueError(f"{who} differs in {column} in {differ.sum()} rows, the first {first}")


def _sums(rows: _Rows, weight_N: Array | None = None) -> Array:
    """(U, K) sum of the weights, or number of rows, of each user's rows in each cell and group."""
    shape = rows.users, len(rows.cells), GROUPS
    sums_UCG = np.bincount(rows.place_N, weight_N, minlength=np.prod(shape, dtype=int)).astype(np.float64)
    sums_UCG = sums_UCG.reshape(shape)
    sums_UCG[:, :, ALL] = sums_UCG.sum(axis=2)
    return sums_UCG.reshape(rows.users, -1)


def _logmae(
    frame: pl.DataFrame,
    who: str,
    seeds: list[int],
    rows: _Rows,
    users_BU: NDArray[np.uint8],
    count_UK: Array,
    count_BK: Array,
    shares_BS: Array,
) -> _LogMAE:
    """LogMAE of one model and its replicates; ValueError if a seed's rows are not the shared ones."""
    value_K, value_BK = np.zeros(count_UK.shape[1]), np.zeros_like(count_BK)
    target_N = rows.table["score"].to_numpy()
    for s, seed in enumerate(seeds):
        table = _of_seed(frame, seed)
        _require_same(table.select(rows.table.columns), rows.table, f"{who}, seed {seed},")
        error_UK = _sums(rows, log_error(table["probability"].to_numpy(), target_N))
        with np.errstate(invalid="ignore"):
            value_K += error_UK.sum(axis=0) / count_UK.sum(axis=0) / len(seeds)
            value_BK += shares_BS[:, [s]] * (resampled_sums(users_BU, error_UK) / count_BK)
    return _LogMAE(value_K.reshape(-1, GROUPS), value_BK.reshape(len(value_BK), -1, GROUPS))


def _lines(cells: pl.DataFrame, family_C: NDArray[np.bool_]) -> tuple[list[tuple[str | None, ...]], Array]:
    """The table's lines: their (surface, product, task), and (L, C) 1 where a cell belongs to a line."""
    tasks = cells["task"].unique().sort().to_list()
    names = [*cells.iter_rows(), (None, None, None), *((None, None, task) for task in tasks)]
    of_task = [family_C & (cells["task"] == task).to_numpy() for task in tasks]
    return names, np.vstack([np.eye(len(cells)), family_C, *of_task]).astype(np.float64)


def _table(
    names: list[tuple[str | None, ...]], counts: Mapping[str, NDArray[Any]], numbers: Mapping[str, Array]
) -> pl.DataFrame:
    """The output frame from (L, G) arrays: each line's group `ALL` as bucket null, then its buckets; NaN as null."""
    order = [ALL, *range(BUCKETS)]
    index = pl.DataFrame(
        [(*name, None if g == ALL else g) for name in names for g in order],
        schema={**dict.fromkeys(CELL, pl.String), "bucket": pl.Int64},
        orient="row",
    )
    whole = {name: x_LG[:, order].ravel().astype(np.int64) for name, x_LG in counts.items()}
    real = {name: pl.Series(x_LG[:, order].ravel()).fill_nan(None) for name, x_LG in numbers.items()}
    return index.with_columns(**{name: pl.Series(x) for name, x in whole.items()}, **real)


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings about columns of NaN alone: their result is NaN."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
