"""The examples stage: impressions joined with their scores, checked against the contract, published or refused."""

from datetime import date
from typing import TYPE_CHECKING

import dagster as dg

from checks.dagster_results import accounting_result, contract_result, drift_result
from checks.missingness import check_contract, check_drift, markdown
from mtmd_assets.assets.common import Done, Metadata, Refused, asset_key, preview
from mtmd_assets.contract import measure_contract, measure_drift
from mtmd_assets.history import create_history
from mtmd_assets.home import Site
from mtmd_assets.join import Examples, build_examples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

DESCRIBED = {
    "joined_examples": "One row an impression with its latest valid scores: what a model trains on.",
    "rejected_rows": "Every row that is in no later table, with its reason.",
    "row_counts": "received = accepted + rejected, for each source.",
    "feature_missingness": "Missing rate of each feature in each slice against the platform's contract and its trailing week.",
}
TABLES = tuple(DESCRIBED)


def specs(site: Site) -> list[dg.AssetSpec]:
    """The tables of this stage."""
    deps = [asset_key(site.platform, t) for t in ("impressions", "heavyweight_scores")]
    return [
        dg.AssetSpec(
            asset_key(site.platform, t),
            deps=deps,
            description=d,
            group_name=site.platform.name,
            kinds={"duckdb", "parquet"},
            skippable=True,
        )
        for t, d in DESCRIBED.items()
    ]


def publish(site: Site, day: date, run_id: str) -> Done | None:
    """Join, check, publish; None on a day that can have no scores.

    The measured contract of a refused day is published, so that SQL shows why, unless it would stand beside the tables
    of an earlier build of that day.

    Raises:
        BadFile: if too many rows are faulty.
        Withheld: if a table it needs is not published.
        Refused: if the day breaks the feature contract.
    """
    platform, warehouse = site.platform, site.warehouse
    if day < platform.scored_from:
        return None
    key = asset_key(platform, "joined_examples")
    with warehouse.stage(run_id) as stage, warehouse.connect() as con:
        if platform.history_days:
            create_history(con, platform, warehouse, day)
        examples = build_examples(con, platform, warehouse, stage, day)
        measured = measure_contract(con, platform, day, stage.path("joined_examples", day))
        stage.write(con, "feature_contract", day, "FROM contract_of_day")
        contract, drift = check_contract(measured), check_drift(measure_drift(con, day))
        checks = [contract_result(contract, key), accounting_result(examples.counts, key), drift_result(drift, key)]
        audit: Metadata = {
            "contract": dg.MetadataValue.md(markdown(contract)),
            "drift": dg.MetadataValue.md(markdown(drift)),
            "rules": contract.rules,
        }
        if contract.passed:
            stage.publish()
            return Done(_metadata(con, examples, day, audit), checks)
        published = {}
        if not warehouse.published("joined_examples", day):
            stage.keep_only("feature_contract")
            stage.publish()
            published = {"feature_missingness": audit}
        raise Refused(f"the feature contract is broken: {markdown(contract, 20)}", checks, published)


def _metadata(con: "DuckDBPyConnection", examples: Examples, day: date, audit: Metadata) -> dict[str, Metadata]:
    """What a person wants to see of the day."""
    of_day = f"WHERE ds = '{day}'"
    reasons = (
        "SELECT source, reason, count(*) AS rows FROM rejected_rows " + of_day + " GROUP BY ALL ORDER BY rows DESC"
    )
    return {
        "joined_examples": {
            "dagster/row_count": examples.rows,
            "rows by slice": preview(
                con,
                f"SELECT surface, product, count(*) AS rows, {_means(con)} FROM joined_examples {of_day} GROUP BY ALL ORDER BY ALL",
                100,
            ),
            "preview": preview(con, f"SELECT * FROM joined_examples {of_day}"),
        },
        "rejected_rows": {
            "dagster/row_count": sum(c.rejected for c in examples.counts),
            "by reason": preview(con, reasons, 100),
        },
        "row_counts": {
            "dagster/row_count": len(examples.counts),
            "counts": preview(con, f"SELECT * FROM row_counts {of_day}"),
        },
        "feature_missingness": {**audit, "dagster/row_count": audit["rules"]},
    }


def _means(con: "DuckDBPyConnection") -> str:
    """The mean score of each task, as select-list entries."""
    columns = [c for c, *_ in con.execute("DESCRIBE joined_examples").fetchall() if c.startswith("score_")]
    return ", ".join(f"avg({c}) AS {c}" for c in columns)
