"""The feature contract that a platform file implies, and one day's examples measured against it."""

from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

import sql
from checks.missingness import ContractRule
from mtmd_assets.platform import Platform

if TYPE_CHECKING:
    import duckdb


def contract_rules(platform: Platform, day: date, with_history: bool = True) -> list[ContractRule]:
    """One rule a slice and feature: `present` up to its `max_missing`, or `absent` everywhere else.

    A feature from history has rules from the first day on which its whole look-back lies in the log; none at all
    unless `with_history`.
    """
    features = [
        f
        for f in platform.features
        if not f.history or (with_history and day >= platform.start + timedelta(f.history.days))
    ]
    return [
        ContractRule(surface, product, f.name, "present", 0.0, f.max_missing)
        if platform.has(f, surface, product)
        else ContractRule(surface, product, f.name, "absent", 1.0, 1.0)
        for surface, product in platform.slices
        for f in features
    ]


def measure_contract(
    con: "duckdb.DuckDBPyConnection", platform: Platform, day: date, examples: Path, with_history: bool = True
) -> pl.DataFrame:
    """The rows of `feature_contract` for a day; also left in `con` as the temp table `contract_of_day`.

    Args:
        con: any connection.
        platform: decides the rules.
        day: the examples' day.
        examples: their Parquet file, staged or published.
        with_history: whether features from history have rules.
    """
    rules = contract_rules(platform, day, with_history)
    features = list(dict.fromkeys(r.feature for r in rules))
    con.register("contract", pl.DataFrame(rules))
    # Only the contract's columns, so that counting them all in one scan reads nothing else.
    columns = ", ".join(["surface", "product", *features])
    source = f"read_parquet({sql.quoted(examples)}, hive_partitioning = false)"
    con.execute(f"CREATE OR REPLACE TEMP VIEW examples_of_day AS SELECT {columns} FROM {source}")
    judged = {"judged_from": platform.contract.judged_from, "empty_allowed": platform.contract.empty_slices == "allow"}
    con.execute(f"CREATE OR REPLACE TEMP TABLE contract_of_day AS {sql.text('feature_contract')}", judged)
    return con.sql("FROM contract_of_day").pl()
