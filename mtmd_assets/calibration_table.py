"""How well the predictions of a model's seeds sum to the scores, by cell, with bootstrap intervals.

A cell is a surface x product x task, and its calibration is sum p / sum t over its rows of all evaluation days and seeds:
1.1 means predictions 10 % too high.

Shapes: U users, C cells, S seeds, B replicates.
"""

import numpy as np
import polars as pl

from mtmd_assets.improvement import CELL, percentile_interval, resample_counts, resampled_sums, seed_shares


def calibration_table(sums: pl.DataFrame, *, replicates: int = 2000, seed: int = 0) -> pl.DataFrame:
    """Calibration of every cell with a pointwise 95 % interval, over users and seeds as in `improvement_table`.

    Where an interval reaches over the edge of a band, the value says little of whether the model is inside.

    Args:
        sums: a row a seed x user x cell: seed, user_id, surface, product, task, rows, predicted (sum of the
            probabilities) and scored (sum of the scores).
        replicates: of the bootstrap.
        seed: of the bootstrap's random numbers.

    Returns:
        surface, product, task, rows (once, not once a seed), calibration, low, high; a row a cell, sorted. NaN where no
        score is above zero.
    """
    cells = sums.select(CELL).unique().sort(CELL)
    cell = sums.join(cells.with_row_index("cell"), on=CELL, how="left", maintain_order="left")["cell"].to_numpy()
    user = sums["user_id"].rank("dense").to_numpy().astype(np.int64) - 1
    seeds, users = sums["seed"].unique().sort().to_list(), int(user.max()) + 1

    rng = np.random.default_rng(seed)
    users_BU = resample_counts(rng, users, replicates)
    shares_BS = seed_shares(rng, len(seeds), replicates, models=1)
    above_C, below_C = np.zeros((2, len(cells)))
    above_BC, below_BC = np.zeros((2, replicates, len(cells)))
    for s, number in enumerate(seeds):
        here = (sums["seed"] == number).to_numpy()
        place = user[here] * len(cells) + cell[here]
        for column, value_C, value_BC in (("predicted", above_C, above_BC), ("scored", below_C, below_BC)):
            sum_UC = np.bincount(place, sums[column].to_numpy()[here], users * len(cells)).astype(np.float64)
            sum_UC = sum_UC.reshape(users, -1)
            value_C += sum_UC.sum(0)
            value_BC += shares_BS[:, [s]] * resampled_sums(users_BU, sum_UC)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_C, ratio_BC = above_C / below_C, above_BC / below_BC
    low_C, high_C = percentile_interval(ratio_BC)
    rows_C = np.bincount(cell, sums["rows"].to_numpy(), len(cells)) / len(seeds)
    return cells.with_columns(
        rows=pl.Series(rows_C.astype(np.int64)),
        calibration=pl.Series(ratio_C),
        low=pl.Series(low_C),
        high=pl.Series(high_C),
    )
