"""The logs stage: one day as received, its faulty rows set apart, published as `impressions` and scores."""

from datetime import date

import dagster as dg

from mtmd_assets.assets.common import Done, asset_key, preview
from mtmd_assets.home import Site
from mtmd_assets.intake import take_in, write_intake

TABLES = ("impressions",)
SCORES = ("heavyweight_scores",)


def specs(site: Site) -> list[dg.AssetSpec]:
    """`impressions`, and `heavyweight_scores` where the log brings them."""
    described = {"impressions": "The impression log: keys, features as logged, outcomes; a row an impression in scope."}
    if site.platform.logs_scores:
        described["heavyweight_scores"] = (
            "The heavyweight ranker's scores as logged, late, doubled and invalid ones included."
        )
    return [
        dg.AssetSpec(
            asset_key(site.platform, t),
            description=d,
            group_name=site.platform.name,
            kinds={"duckdb", "parquet"},
            skippable=True,
        )
        for t, d in described.items()
    ]


def publish(site: Site, day: date, run_id: str) -> Done:
    """Read a day from the source and publish it.

    Raises:
        BadFile: if the day cannot be used; then nothing is published.
    """
    log = site.source.read(day)
    with site.warehouse.stage(run_id) as stage, site.warehouse.connect() as con:
        intake = take_in(site.platform, log, day, con)
        write_intake(con, stage, day)
        stage.publish()
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
