"""How well the predictions of a model's seeds sum to the scores, by cell, with bootstrap intervals.

A cell is a surface x product x task, and its calibration is sum p / sum t over its rows of all evaluation days and seeds:
1.1 means predictions 10 % too high.

Shapes: U users, C cells, D days, S seeds, B replicates.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from mtmd_assets.improvement import CELL
from mtmd_assets.intervals import (
    Array,
    degrees_of_freedom,
    pointwise_interval,
    resample_counts,
    resampled_sums,
    seed_shares,
)


def calibration_table(sums: pl.DataFrame, *, replicates: int = 2000, seed: int = 0) -> pl.DataFrame:
    """Calibration of every cell with a pointwise 95 % interval, over users and seeds as in `improvement_table`.

    Where an interval reaches over the edge of a band, the value says little of whether the model is inside.

    Args:
        sums: a row a day x seed x user x cell: day, seed, user_id, surface, product, task, rows, predicted (sum of the
            probabilities) and scored (sum of the scores); every seed has the same rows.
        replicates: of the bootstrap.
        seed: of the bootstrap's random numbers.

    Returns:
        surface, product, task, rows (once, not once a seed), calibration, low, high; a row a cell, sorted. NaN where no
        score is above zero.

    Raises:
        ValueError: seeds that differ in their rows.
    """
    seeds, days = (sums[name].unique().sort().to_list() for name in ("seed", "day"))
    rows = sums.group_by("day", "user_id", *CELL).agg(pl.len().alias("seeds"), pl.col("rows").n_unique())
    if not rows.select((pl.col("seeds") == len(seeds)).all() & (pl.col("rows") == 1).all()).item():
        raise ValueError(f"the seeds {seeds} differ in their rows")
    cells = sums.select(CELL).unique().sort(CELL)
    cell_N = sums.join(cells.with_row_index("cell"), on=CELL, how="left", maintain_order="left")["cell"].to_numpy()
    user_N = sums["user_id"].rank("dense").to_numpy().astype(np.int64) - 1
    users = int(user_N.max()) + 1
    day_N, seed_N = (sums[name].to_numpy() for name in ("day", "seed"))

    def by_user(column: str, here_N: NDArray[np.bool_]) -> Array:
        """(U, C) sums over some rows."""
        place = user_N[here_N] * len(cells) + cell_N[here_N]
        summed = np.bincount(place, sums[column].to_numpy()[here_N], users * len(cells)).astype(np.float64)
        return summed.reshape(users, -1)

    rng = np.random.default_rng(seed)
    users_BU = resample_counts(rng, users, replicates)
    of_one = seed_N == seeds[0]
    scored_UC = by_user("scored", of_one)
    scored_C, scored_BC = scored_UC.sum(axis=0), resampled_sums(users_BU, scored_UC)
    ratio_BC, of_training_DSC = np.zeros_like(scored_BC), np.empty((len(days), len(seeds), len(cells)))
    with np.errstate(invalid="ignore", divide="ignore"):
        for d, day in enumerate(days):
            shares_BS = seed_shares(rng, len(seeds), replicates)
            for s, number in enumerate(seeds):
                predicted_UC = by_user("predicted", (day_N == day) & (seed_N == number))
                of_training_DSC[d, s] = predicted_UC.sum(axis=0) / scored_C
                ratio_BC += shares_BS[:, [s]] * (resampled_sums(users_BU, predicted_UC) / scored_BC)
    ratio_C = of_training_DSC.sum(axis=0).mean(axis=0)
    low_C, high_C = pointwise_interval(ratio_C, ratio_BC, degrees_of_freedom(ratio_BC, of_training_DSC))
    return cells.with_columns(
        rows=pl.Series(by_user("rows", of_one).sum(axis=0).astype(np.int64)),
        calibration=pl.Series(ratio_C),
        low=pl.Series(low_C),
        high=pl.Series(high_C),
    )
