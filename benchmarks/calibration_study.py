"""Which constants from the day that training stopped on calibrate a model for later days, in worlds of other seeds.

python -m benchmarks.calibration_study --worlds 10

Each world is adworld with a seed of its own. MTMD, as experiments train it, learns from days 1 to 6 and stops on day 7;
judged are days 8 to 10 by ln(sum of predictions / sum of scores) of every slice and task, after the odds of the mean
prediction are divided by the constant that a way of calibrating takes from day 7. Trained models stay in the folder, and a
second run takes them up.
"""

from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch

from benchmarks.worlds import options, world
from mtmd_assets.contenders import change_of
from mtmd_assets.home import Home, Site
from mtmd_assets.in_process import jobs_in_process, step
from mtmd_assets.platform_file import SHIPPED
from mtmd_assets.training_pool import TrainJob, train_all, training_jobs
from mtmd_model import checkpoint
from mtmd_model.calibration import expected

DAYS, STOP, JUDGED_DAYS = 10, 7, (8, 9, 10)
"""How many a world has; numbers of days, from 1."""
INSIDE = np.log(0.95), np.log(1.05)

WAYS = {
    "nothing": lambda x_Z, task, v_Z: 0 * x_Z,
    "the task's": lambda x_Z, task, v_Z: task + 0 * x_Z,
    "the slice's": lambda x_Z, task, v_Z: x_Z,
    "half of each": lambda x_Z, task, v_Z: (task + x_Z) / 2,
    "calibration.expected": lambda x_Z, task, v_Z: _expected(x_Z, v_Z),
}
"""Constants of a task's slices from what day 7 shows: logarithms of the slices' odds ratios, that of the task's, variances."""


def _expected(x_Z: np.ndarray, v_Z: np.ndarray) -> np.ndarray:
    found_Z1 = expected(torch.tensor(x_Z)[:, None], torch.tensor(v_Z)[:, None])
    return np.asarray(found_Z1[:, 0])


def worlds(folder: Path, count: int, base: Path) -> list[tuple[Site, TrainJob]]:
    """Sites with ten days of data, each with its training of MTMD.

    Args:
        folder: a home for them.
        count: seeds 1 to `count` of the simulator.
        base: the platform file whose seed is changed.
    """
    home = Home(folder)
    found = []
    for seed in range(1, count + 1):
        site = world(home, seed, base, lambda content: content["training"].update(calibrate=False))
        days = [site.platform.start + timedelta(n) for n in range(DAYS)]
        if site.warehouse.missing("joined_examples", days[0], days[-1]):
            with jobs_in_process(home, site) as run, step(f"build {len(days)} days of world {seed}"):
                run("data", days[0], days[-1])
        training = change_of(site.platform, "mtmd"), site.platform.training.seed
        found.append((site, training_jobs(site, days[:STOP], {"calibration": training})["calibration"]))
    return found


def sums(site: Site, job: TrainJob, days: list[date]) -> pl.DataFrame:
    """Surface, product, task, rows, mean prediction and score, and the variance of the logarithm of their odds ratio (rows
    being independent), a row a cell, over some days."""
    model = checkpoint.load(job.folder)
    frames = []
    for day in days:
        with pq.ParquetFile(site.warehouse.path("joined_examples", day)) as opened:
            table = opened.read()
        for task, p in model.predict(table).items():
            named = pl.DataFrame(pl.from_arrow(table.select(["surface", "product", f"score_{task}"])))
            frames.append(
                named.rename({f"score_{task}": "t"}).with_columns(
                    pl.lit(task).alias("task"), pl.Series("p", p, dtype=pl.Float64), pl.col("t").cast(pl.Float64)
                )
            )
    of_p, of_t = ((pl.col(c) - pl.col(c).mean()) / (pl.col(c).mean() * (1 - pl.col(c).mean())) for c in ("p", "t"))
    return (
        pl.concat(frames)
        .filter(pl.col("t").is_not_null() & pl.col("p").is_not_nan())
        .group_by("surface", "product", "task")
        .agg(
            rows=pl.len(),
            predicted=pl.col("p").mean(),
            scored=pl.col("t").mean(),
            variance=((of_p - of_t) ** 2).mean() / (pl.len() - 1),
        )
        .sort("task", "surface", "product")
    )


def judge(stop: pl.DataFrame, later: pl.DataFrame, least_rows: int) -> pl.DataFrame:
    """Surface, product, task, and the logarithm of the ratio of sums that each way of calibrating leaves on the later days.

    Args:
        stop: `sums` of the day that training stopped on.
        later: those of the days to judge.
        least_rows: cells with fewer on the later days are left out.
    """
    parts = []
    for _, cells in stop.group_by("task", maintain_order=True):
        rows_Z, p_Z, t_Z, v_Z = (cells[c].to_numpy() for c in ("rows", "predicted", "scored", "variance"))
        task = _logit(np.average(p_Z, weights=rows_Z)) - _logit(np.average(t_Z, weights=rows_Z))
        x_Z = _logit(p_Z) - _logit(t_Z)
        constants = [pl.Series(name, way(x_Z, task, v_Z)) for name, way in WAYS.items()]
        parts.append(cells.select("surface", "product", "task").with_columns(constants))
    both = later.filter(pl.col("rows") >= least_rows).join(pl.concat(parts), on=["surface", "product", "task"])
    odds = pl.col("predicted") / (1 - pl.col("predicted"))
    left = ((1 / (1 + (pl.col(name).exp() / odds)) / pl.col("scored")).log().alias(name) for name in WAYS)
    return both.select("surface", "product", "task", *left)


def _logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def summary(left: Mapping[int, pl.DataFrame]) -> str:
    """A line a way: root mean square of what it leaves, in all cells and a task, and how many cells lie outside.

    Args:
        left: world -> `judge`.
    """
    cells = pl.concat([frame.with_columns(pl.lit(n).alias("world")) for n, frame in left.items()])
    tasks = cells["task"].unique(maintain_order=True).to_list()
    lines = [f"{'constant':<22}" + "".join(f"{name:>16}" for name in ("all", *tasks))]
    for name in WAYS:
        shown = []
        for task in (None, *tasks):
            of = cells.filter(pl.lit(task is None) | (pl.col("task") == (task or "")))[name].to_numpy()
            outside = int(((of < INSIDE[0]) | (of > INSIDE[1])).sum())
            shown.append(f"{np.sqrt((of**2).mean()):.2%} {outside}/{len(of)}")
        lines.append(f"{name:<22}" + "".join(f"{s:>16}" for s in shown))
    return "\n".join(lines)


def study(folder: Path, count: int, base: Path = SHIPPED / "adworld.yaml", least_rows: int = 1_000) -> str:
    """The whole study, its table as text; arguments as of `worlds` and `judge`."""
    made = worlds(folder, count, base)
    missing = [job for _, job in made if not job.trained]
    train_all(missing, 0, lambda line: print(f"    {line}", flush=True))
    left = {}
    for n, (site, job) in enumerate(made, 1):
        start = site.platform.start
        stop, later = ([start + timedelta(d - 1) for d in days] for days in ((STOP,), JUDGED_DAYS))
        left[n] = judge(sums(site, job, stop), sums(site, job, later), least_rows)
    return summary(left)


def main() -> None:
    given = options(__doc__, 10, ".mtmd/calibration_study")
    print(study(given.folder, given.worlds))
    print("root mean square of the logarithm that is left, and cells of at least 1,000 rows outside 0.95 to 1.05")


if __name__ == "__main__":
    main()
