"""By how much mtmd's LogMAE is below a contender's, by cell, with bootstrap intervals.

A cell is a surface x product x task. Its LogMAE is the mean over the seeds of the mean |ln p - ln t| over its rows of
all evaluation days together, and improvement = (contender - mtmd) / contender: 0.1 means an error 10 % lower.

Shapes: N prediction rows of one model and seed, U users, C cells, D days, S seeds, B replicates, K = C x G numbers a
replicate with G groups of a cell's rows (its buckets 0..4 and, last, all its rows), L lines of the table (cells and means).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mtmd_assets.intervals import (
    Array,
    degrees_of_freedom,
    joint_interval,
    pointwise_interval,
    resample_counts,
    resampled_sums,
    seed_shares,
)
from mtmd_model.metrics import log_error

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
MIN_ROWS = 200
"""Evaluation rows from which a cell enters the means."""
GROUPS = BUCKETS + 1
ALL = BUCKETS
"""The group of all rows."""


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
    of_training_DSCG: Array
    """What each training adds: the sum over the days, averaged over the seeds, is the value."""


def improvement_table(
    mtmd: pl.DataFrame,
    contender: pl.DataFrame,
    *,
    min_rows: int = MIN_ROWS,
    min_users: int = 20,
    replicates: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """Improvement of every cell and its buckets 0..4, and its means over cells, with 95 % intervals.

    The bootstrap resamples users with replacement (a user's rows of all days, cells, tasks, seeds and both models go
    together) and, for each model and day by itself, its seeds (`intervals`): a model of one day and seed is a training of
    its own. A group that no resampled user has a row in is left out of that replicate. The resamples depend on `seed`, the
    users and the numbers of days and seeds alone, so that tables of several contenders share those of mtmd. Days are not
    resampled. One seed says nothing about seeds: its intervals are of these trainings, and none is simultaneous.

    Args:
        mtmd: a row a seed x day x impression x task: `COLUMNS`, with score and probability in [0, 1] and bucket 0..9,
            0 the tenth of the day's slice x task with the highest scores.
        contender: the same rows and seeds of the other model.
        min_rows: cells with at least this many rows (a row counts once, not once a seed) are the family: they enter
            the means and have joint intervals.
        min_users: of a cell with a joint interval: a bootstrap over fewer says too little of what others would do.
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
        - low, high: pointwise (`pointwise_interval`)
        - joint_low, joint_high: simultaneous over the family's cells with enough users (`joint_interval`); null elsewhere,
          and with one seed

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
    m, c = (_logmae(frame, who, seeds, rows, users_BU, count_UK, count_BK, rng) for who, frame in models.items())

    count_UCG = count_UK.reshape(rows.users, -1, GROUPS)
    rows_CG = count_UCG.sum(axis=0)
    family_C = rows_CG[:, ALL] >= min_rows
    names, members_LC = _lines(rows.cells, family_C)
    value_CG, value_BCG = improvement(m.value_CG, c.value_CG), improvement(m.replicates_BCG, c.replicates_BCG)
    value_LG, value_BLG = mean_over(members_LC, value_CG), mean_over(members_LC, value_BCG)
    of_training = [
        mean_over(members_LC, model.of_training_DSCG * slope_CG)
        for model, slope_CG in zip((m, c), _slopes(m.value_CG, c.value_CG), strict=True)
    ]
    freedom_LG = degrees_of_freedom(value_BLG, np.concatenate(of_training))
    low_LG, high_LG = pointwise_interval(value_LG, value_BLG, freedom_LG)
    joint_low_LG, joint_high_LG = np.full((2, *low_LG.shape), np.nan)
    if len(seeds) > 1:
        many_users_C = (count_UCG[:, :, ALL] > 0).sum(axis=0) >= min_users
        family = np.flatnonzero(family_C & many_users_C), ALL
        joint_low_LG[family], joint_high_LG[family] = joint_interval(
            value_LG[family], value_BLG[:, *family], freedom_LG[family]
        )
    counts = {
        "rows": members_LC @ rows_CG,
        "users": np.stack([(count_UCG[:, members > 0] > 0).any(axis=1).sum(axis=0) for members in members_LC]),
        "seeds": np.full(low_LG.shape, len(seeds)),
    }
    numbers = {
        "mtmd": mean_over(members_LC, m.value_CG),
        "contender_logmae": mean_over(members_LC, c.value_CG),
        "improvement": value_LG,
        "low": low_LG,
        "high": high_LG,
        "joint_low": joint_low_LG,
        "joint_high": joint_high_LG,
    }
    return _table(names, counts, numbers)


def verdict(row: Mapping[str, Any]) -> Verdict:
    """What a cell's joint interval says of mtmd.

    Args:
        row: of `improvement_table`. Means, buckets and cells with few rows or users have no joint interval and always come
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


def _slopes(mtmd: Array, contender: Array) -> tuple[Array, Array]:
    """Of `improvement` by each LogMAE, NaN where it is."""
    contender = np.where(contender > 0, contender, np.nan)
    return -1 / contender, mtmd / contender**2


def mean_over(members_LC: Array, x_CG: Array) -> Array:
    """(..., L, G) unweighted mean of x over each line's cells that have a number there, NaN where none has.

    Args:
        members_LC: 1 where a cell belongs to a line, else 0.
        x_CG: (..., C, G), NaN where a cell has no number.
    """
    with np.errstate(invalid="ignore"):
        return (members_LC @ np.nan_to_num(x_CG)) / (members_LC @ np.isfinite(x_CG))


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
    rng: np.random.Generator,
) -> _LogMAE:
    """LogMAE of one model and its replicates; ValueError if a seed's rows are not the shared ones."""
    target_N, day_N = rows.table["score"].to_numpy(), rows.table["day"].rank("dense").to_numpy() - 1
    days, count_K = int(day_N.max()) + 1, count_UK.sum(axis=0)
    shares_DBS = [seed_shares(rng, len(seeds), len(users_BU)) for _ in range(days)]
    value_BK, of_training_DSK = np.zeros_like(count_BK), np.empty((days, len(seeds), len(count_K)))
    for s, seed in enumerate(seeds):
        table = _of_seed(frame, seed)
        _require_same(table.select(rows.table.columns), rows.table, f"{who}, seed {seed},")
        error_N = log_error(table["probability"].to_numpy(), target_N)
        for d, shares_BS in enumerate(shares_DBS):
            error_UK = _sums(rows, np.where(day_N == d, error_N, 0))
            with np.errstate(invalid="ignore"):
                of_training_DSK[d, s] = error_UK.sum(axis=0) / count_K
                value_BK += shares_BS[:, [s]] * (resampled_sums(users_BU, error_UK) / count_BK)
    value_K = of_training_DSK.sum(axis=0).mean(axis=0)
    shape = -1, GROUPS
    return _LogMAE(
        value_K.reshape(shape),
        value_BK.reshape(len(value_BK), *shape),
        of_training_DSK.reshape(days, len(seeds), *shape),
    )


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
