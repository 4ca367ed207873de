"""What the domain adaptation is worth beside the plain handling of features that the paper speaks of (its introduction).

python -m benchmarks.unadapted --platform adworld --day 2026-01-16

The ablation `no_domain_adaptation` takes away what is a domain's own, and keeps one normalisation and one learned value for
what is missing, of all domains together. Here these go too: numbers stay as the platform file reads them (some as
logarithms), missing ones are 0, and nothing weighs fields. Trained and compared as an ablation is, with MTMD's published
predictions (`mtmd results`) of the same day. Trained models stay in the platform's experiments, and a second run takes
them up.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor, nn

from mtmd_assets.assets.experiment_scoring import current_models, scored_data
from mtmd_assets.assets.improvements import predictions_of
from mtmd_assets.contenders import change_of
from mtmd_assets.faults import UsageError
from mtmd_assets.home import Home, Site
from mtmd_assets.improvement import improvement_table
from mtmd_assets.join import create_evaluated
from mtmd_assets.training_pool import train_all, training_jobs
from mtmd_model import checkpoint
from mtmd_model.architectures import ARCHITECTURES, Architecture
from mtmd_model.config import MTMDConfig
from mtmd_model.mtmd import MTMD
from mtmd_model.schema import Schema

NAME = "unadapted"


class AsItIs(nn.Module):
    """In the place of a normalisation: (B, F) with NaN where missing -> (B, F) with 0 there."""

    def forward(self, dense_BF: Tensor) -> Tensor:
        """Nothing is learned and nothing is counted."""
        return torch.nan_to_num(dense_BF, nan=0.0)


class Unadapted(MTMD):
    """MTMD whose features go to the experts as they are; arguments as of `MTMD`."""

    def __init__(self, schema: Schema, rows: Mapping[str, int], config: MTMDConfig) -> None:
        super().__init__(schema, rows, replace(config, domain_norm=False, excitation=False))
        for tower in (self.query_tower, self.item_tower):
            tower.add_module("norm", AsItIs())

    def normalisation(self) -> dict[str, Any]:
        """There is none."""
        return {}


ARCHITECTURE = Architecture(MTMDConfig, Unadapted)


def compare(site: Site, day: date, seeds: int) -> pl.DataFrame:
    """`improvement_table` of MTMD over `Unadapted` on a day.

    Args:
        site: a platform whose experiments of the day are published.
        day: to be scored; both learn from the window before it.
        seeds: how many of each.

    Raises:
        UsageError: fewer seeds of MTMD are published of the day, by today's code and settings.
    """
    ARCHITECTURES[NAME] = ARCHITECTURE
    with site.warehouse.connect() as con:
        create_evaluated(con, site.platform, site.warehouse, day)
        rows = con.sql("FROM evaluated ORDER BY impression_id").to_arrow_table()
        current = {t.seed for t in current_models(con, site, day, scored_data(con)) if t.model == "mtmd"}
        if not current.issuperset(range(seeds)):
            of_today = f"of today's code and settings (mtmd results); there are {sorted(current)}"
            raise UsageError(f"{site.platform.name}: {day} has not {seeds} seeds of mtmd published {of_today}")
        ours = predictions_of(con, [day], "mtmd", range(seeds))
    change = replace(change_of(site.platform, "mtmd"), architecture=NAME)
    first = 1000 * day.toordinal()
    trainings = {f"{NAME}-{n}": (change, first + n) for n in range(seeds)}
    jobs = list(training_jobs(site, site.platform.window(day - timedelta(1)), trainings).values())
    # in this process, for another does not know the architecture
    train_all([job for job in jobs if not job.trained], 1, lambda line: print(f"    {line}", flush=True))
    theirs = pl.concat(
        ours.filter(pl.col("seed") == n)
        .drop("probability")
        .join(_predicted(checkpoint.load(job.folder).predict(rows), rows), on=["impression_id", "task"])
        for n, job in enumerate(jobs)
    )
    return improvement_table(ours, theirs)


def _predicted(probabilities: Mapping[str, Any], rows: pa.Table) -> pl.DataFrame:
    """impression_id, task, probability, a row a prediction."""
    ids = pl.Series("impression_id", rows["impression_id"])
    return pl.concat(
        pl.DataFrame([ids]).with_columns(task=pl.lit(task), probability=pl.Series(p))
        for task, p in probabilities.items()
    )


def report(table: pl.DataFrame) -> str:
    """The mean over cells with its interval, and each task's."""
    lines = []
    for row in table.filter(pl.col("surface").is_null() & pl.col("bucket").is_null()).iter_rows(named=True):
        shown = f"{row['improvement']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}]"
        lines.append(f"{row['task'] or 'mean':<16} {row['mtmd']:.4f} {row['contender_logmae']:.4f}  {shown}")
    return "\n".join([f"{'':<16} {'mtmd':<6} {NAME}, and improvement of mtmd in LogMAE", *lines])


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", default="adworld")
    parser.add_argument("--day", type=date.fromisoformat, required=True, help="an evaluation day of `mtmd results`")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    print(report(compare(Home().site(options.platform), options.day, options.seeds)))


if __name__ == "__main__":
    main()
