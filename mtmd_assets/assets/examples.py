"""The examples stage: impressions joined with their scores, checked against the contract, staged or refused."""

from datetime import date
from typing import TYPE_CHECKING

import dagster as dg

from checks.accounting import RowCount
from checks.dagster_results import accounting_result, contract_result, drift_result
from checks.missingness import check_contract, check_drift, markdown
from mtmd_assets.assets.common import Done, Metadata, Refused, asset_key, preview, table_specs
from mtmd_assets.contract import measure_contract
from mtmd_assets.home import Site
from mtmd_assets.join import Examples, account_log, build_examples
from mtmd_assets.warehouse import Stage

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
    return table_specs(site.platform, DESCRIBED, deps)


def build(site: Site, day: date, stage: Stage) -> Done:
    """Join a day, check it and stage its tables; on a day that can have no scores, only the account of the log.

    Raises:
        BadFile: if too many rows are faulty.
        Withheld: if a table it needs is not published.
        Refused: if the day breaks the feature contract. Its measured contract is then published, so that SQL shows
            why, unless it would stand beside the tables of an earlier build of that day.
    """
    platform = site.platform
    with stage.connect() as con:
        if day < platform.scored_from:
            return Done(_of_the_log(con, account_log(con, stage, day), day))
        examples = build_examples(con, platform, stage, day)
        checks, audit = _check(con, site, stage, day, "joined_examples", examples.counts)
        return Done(_of_the_join(con, examples, day, audit), checks)


def stands_alone(site: Site, day: date, stage: Stage) -> bool:
    """Whether the staged log may be published without examples: nothing later would be left from an earlier build."""
    later = [t for t in ("heavyweight_scores", "joined_examples") if not stage.holds(t, day)]
    return stage.holds("impressions", day) and not any(site.warehouse.published(t, day) for t in later)


def build_log(site: Site, day: date, stage: Stage) -> Done:
    """Check the staged log of a day whose examples are withheld, and account for it.

    Its scores, where they are staged, are held against the limits of the join; features from history have no rules.

    Raises:
        BadFile: as `build`.
        Refused: as `build`.
    """
    platform = site.platform
    with stage.connect() as con:
        counts: tuple[RowCount, ...] = ()
        if stage.holds("heavyweight_scores", day):
            counts = build_examples(con, platform, stage, day, with_history=False).counts
        rows = "joined_examples" if counts else "impressions"
        _, audit = _check(con, site, stage, day, rows, counts, with_history=False)
        count = account_log(con, stage, day)
        shown = {"feature_missingness": audit, **_of_the_log(con, count, day)}
    if counts:
        stage.drop("joined_examples", day)
    return Done(shown)


def _check(
    con: "DuckDBPyConnection",
    site: Site,
    stage: Stage,
    day: date,
    rows: str,
    counts: tuple[RowCount, ...],
    *,
    with_history: bool = True,
) -> tuple[list[dg.AssetCheckResult], Metadata]:
    """Hold the rows of a day against the contract: the results, and what a person wants to see of them.

    Raises:
        Refused: if the day breaks the feature contract; see `build`.
    """
    measured = measure_contract(con, site.platform, day, stage.path(rows, day), with_history=with_history)
    stage.write(con, "feature_contract", day, "FROM contract_of_day")
    contract = check_contract(measured)
    drift = check_drift(con.sql(f"FROM feature_drift WHERE ds = '{day}'").pl())
    key = asset_key(site.platform, "joined_examples")
    accounted = [accounting_result(counts, key)] if counts else []
    checks = [contract_result(contract, key), *accounted, drift_result(drift, key)]
    audit: Metadata = {
        "contract": dg.MetadataValue.md(markdown(contract)),
        "drift": dg.MetadataValue.md(markdown(drift)),
        "dagster/row_count": contract.rules,
    }
    if contract.passed:
        return checks, audit
    shown = {}
    earlier = ("impressions", "joined_examples") if stage.holds("impressions", day) else ("joined_examples",)
    if not any(site.warehouse.published(t, day) for t in earlier):
        stage.keep_only("feature_contract")
        stage.publish()
        shown = {"feature_missingness": audit}
    raise Refused(f"the feature contract is broken: {markdown(contract, 20)}", checks, shown)


def _of_the_log(con: "DuckDBPyConnection", count: RowCount, day: date) -> dict[str, Metadata]:
    """What a person wants to see of a day without scores."""
    return {
        "rejected_rows": {"dagster/row_count": count.rejected, "by reason": _by_reason(con, day)},
        "row_counts": {"dagster/row_count": 1, "counts": preview(con, f"SELECT * FROM row_counts WHERE ds = '{day}'")},
    }


def _of_the_join(con: "DuckDBPyConnection", examples: Examples, day: date, audit: Metadata) -> dict[str, Metadata]:
    """What a person wants to see of a joined day."""
    of_day = f"FROM joined_examples WHERE ds = '{day}'"
    by_slice = f"SELECT surface, product, count(*) AS rows, {_means(con)} {of_day} GROUP BY ALL ORDER BY ALL"
    return {
        "joined_examples": {
            "dagster/row_count": examples.rows,
            "rows by slice": preview(con, by_slice, 100),
            "preview": preview(con, f"SELECT * {of_day}"),
        },
        "rejected_rows": {
            "dagster/row_count": sum(c.rejected for c in examples.counts),
            "by reason": _by_reason(con, day),
        },
        "row_counts": {
            "dagster/row_count": len(examples.counts),
            "counts": preview(con, f"SELECT * FROM row_counts WHERE ds = '{day}'"),
        },
        "feature_missingness": audit,
    }


def _by_reason(con: "DuckDBPyConnection", day: date) -> dg.MarkdownMetadataValue:
    counts = f"SELECT source, reason, count(*) AS rows FROM rejected_rows WHERE ds = '{day}' GROUP BY ALL"
    return preview(con, f"{counts} ORDER BY rows DESC", 100)


def _means(con: "DuckDBPyConnection") -> str:
    """The mean score of each task, as select-list entries."""
    columns = [c for c, *_ in con.execute("DESCRIBE joined_examples").fetchall() if c.startswith("score_")]
    return ", ".join(f"avg({c}) AS {c}" for c in columns)
