"""Whether MTMD is better than its contenders in worlds of other seeds: one day and one training of each model a world.

python -m benchmarks.other_worlds --worlds 5

Each world is adworld with a seed of its own, in which nothing was chosen: by the platform file's settings, on the first day
that has a whole window before it. One training says little of one world; the interval is of the mean over worlds, by
Student's t, and so counts what differs between worlds, days and trainings. Tables and trained models stay in the folder, and
a second run takes them up.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
from scipy.stats import ttest_1samp

from benchmarks.worlds import options, world
from mtmd_assets.contenders import CONTENDERS
from mtmd_assets.home import Home, Site
from mtmd_assets.improvement import MIN_ROWS
from mtmd_assets.in_process import jobs_in_process, step
from mtmd_assets.markdown import markdown_table
from mtmd_assets.platform_file import SHIPPED
from mtmd_assets.study import results

FIRST_SEED = 101
"""Settings were chosen in adworld's own world and looked into in those of seeds 1 to 10."""


def study(folder: Path, count: int, base: Path = SHIPPED / "adworld.yaml") -> str:
    """Train, compare and summarise.

    Args:
        folder: a home for the worlds.
        count: how many, with the seeds from `FIRST_SEED`.
        base: the platform file whose seed is changed.
    """
    home = Home(folder)
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        site = world(home, seed, base, _one_day)
        with jobs_in_process(home, site) as run:
            results(site, CONTENDERS, folder / f"world{seed}.md", run, step, seeds=1)
        found.append(_cells(site).with_columns(pl.lit(seed).alias("world")))
    return summary(pl.concat(found))


def _one_day(content: dict[str, Any]) -> None:
    window = content["training"]["window_days"]
    last = content["start"] + timedelta(window)
    changes = {"days": 1, "last_day": last, "tuning_days": []}
    content["experiments"] = {**content["experiments"], **changes}


def _cells(site: Site) -> pl.DataFrame:
    """Contender, surface, product, task and improvement of each cell with enough rows to be in the mean."""
    with site.warehouse.connect() as con:
        return con.sql(
            f"""SELECT contender, surface, product, task, improvement FROM improvements
            WHERE surface IS NOT NULL AND bucket IS NULL AND rows >= {MIN_ROWS}"""
        ).pl()


def summary(cells: pl.DataFrame) -> str:
    """A line a contender: each world's mean improvement over its cells, the mean of these with its interval of 95 %, and in
    how many cells of all worlds, and in the mean over worlds of how many, MTMD is better.

    Args:
        cells: contender, surface, product, task, improvement and world.
    """
    worlds = cells["world"].unique().sort().to_list()
    rows = []
    for contender in CONTENDERS:
        of = cells.filter(pl.col("contender") == contender)
        means = of.group_by("world").agg(pl.col("improvement").mean()).sort("world")["improvement"].to_numpy()
        mean = f"{means.mean():+.1%}"
        if len(means) > 1:
            low, high = ttest_1samp(means, 0).confidence_interval(0.95)
            mean += f" [{low:+.1%}, {high:+.1%}]"
        above = int((of["improvement"] > 0).sum())
        by_cell = of.group_by("surface", "product", "task").agg(pl.col("improvement").mean())["improvement"]
        rows.append(
            [
                contender,
                mean,
                *(f"{of_world:+.1%}" for of_world in means),
                f"{above} of {len(of)}",
                f"{int((by_cell > 0).sum())} of {len(by_cell)}",
            ]
        )
    header = ["model", "mean improvement", *map(str, worlds), "cells above zero", "in the mean over worlds"]
    return markdown_table(header, rows)


def main() -> None:
    given = options(__doc__, 5, ".mtmd/other_worlds")
    print(study(given.folder, given.worlds))
    print("improvement of mtmd's LogMAE, and of each world by its seed; one day and one training of each model a world")


if __name__ == "__main__":
    main()
