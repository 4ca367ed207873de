"""The logs stage: one day as received, its faulty rows set apart, staged as `impressions` and scores."""

from datetime import date

import dagster as dg

from mtmd_assets.assets.common import Done, preview, table_specs
from mtmd_assets.home import Site
from mtmd_assets.intake import take_in, write_intake
from mtmd_assets.warehouse import Stage

TABLES = ("impressions",)
SCORES = ("heavyweight_scores",)


def specs(site: Site) -> list[dg.AssetSpec]:
    """`impressions`, and `heavyweight_scores` where the log brings them."""
    described = {"impressions": "The impression log: keys, features as logged, outcomes; a row an impression in scope."}
    if site.platform.logs_scores:
        described["heavyweight_scores"] = (
            "The heavyweight ranker's scores as logged, late, doubled and invalid ones included."
        )
    return table_specs(site.platform, described)


def build(site: Site, day: date, stage: Stage) -> Done:
    """Read a day from the source and stage it.

    Raises:
        BadFile: if the day cannot be used.
    """
    log = site.source.read(day)
    with stage.connect() as con:
        intake = take_in(site.platform, log, day, con)
        write_intake(con, stage, day)
        metadata = {
            "impressions": {
                "dagster/row_count": intake.accepted,
                "received": intake.received,
                "rejected": intake.rejected,
                "rejected by reason": intake.reasons,
                "file": log.impressions_file,
                "preview": preview(con, f"SELECT * FROM impressions WHERE ds = '{day}'"),
            }
        }
        if intake.scores is not None:
            metadata["heavyweight_scores"] = {
                "dagster/row_count": intake.scores,
                "file": log.scores_file,
                "preview": preview(con, f"SELECT * FROM heavyweight_scores WHERE ds = '{day}'"),
            }
        return Done(metadata)
