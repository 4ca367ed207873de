"""Who the routers use, and how many of them show a failure signature."""

import math
from collections import Counter
from datetime import date
from statistics import median
from typing import TYPE_CHECKING

import polars as pl

from checks.routing import signatures
from mtmd_assets.markdown import markdown_table

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def routing_section(con: "DuckDBPyConnection", first: date, last: date, seeds: list[int]) -> str:
    """Mean gates and entropies over the days and seeds, a row a tower, domain and task."""
    cursor = con.execute(
        f"""PIVOT (SELECT tower, domain, task, expert, avg(mean_gate) AS gate, round(avg(entropy), 6) AS entropy, round(avg(entropy_of_mean), 6) AS of_mean
            FROM experiment_routing_metrics WHERE ds BETWEEN '{first}' AND '{last}' AND list_contains({seeds}, seed) GROUP BY ALL)
        ON expert USING first(gate) ORDER BY tower DESC, domain, task"""
    )
    header = [c[0] for c in cursor.description]
    rows = [[f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in cursor.fetchall()]
    words = f"""Mean gate by expert over the days and seeds; entropy of a row's gates and of the mean gates, in nats (ln 3 = 1.099 is
uniform). {_signatures(con, first, last, seeds)} A uniform router weighs its experts equally, as the ablation `no_routing` does for
good."""
    return f"{words}\n\n{markdown_table(header, rows)}"


def _signatures(con: "DuckDBPyConnection", first: date, last: date, seeds: list[int]) -> str:
    """How many routers of all days and seeds show a failure signature, by its name."""
    models = con.sql(
        "FROM experiment_routing_metrics WHERE ds BETWEEN $first AND $last AND list_contains($seeds, seed) ORDER BY tower, domain, task",
        params={"first": first, "last": last, "seeds": seeds},
    ).pl()
    routers = models.n_unique(["model_version", "tower", "domain", "task"])
    found: Counter[str] = Counter()
    for _, model in models.group_by("model_version"):
        found.update({(s.tower, s.domain, s.task): s.fault for s in signatures(model.to_dicts())}.values())
    faults = ", ".join(f"{n} {fault}" for fault, n in found.most_common()) or "none"
    shares = sorted(_entropy_shares(models))
    low, middle, high = shares[0], median(shares), shares[-1]
    return f"""Failure signatures (`checks/routing.py`) in {routers} routers of all days and seeds: {faults}. How near they are to it:
the entropy of a row's gates is {middle:.1%} of the largest possible in the median router, {low:.1%} in the most decided one
and {high:.1%} in the least."""


def _entropy_shares(models: pl.DataFrame) -> list[float]:
    """Each router's entropy as a share of the logarithm of the number of its experts."""
    routers = models.group_by("model_version", "tower", "domain", "task").agg(
        pl.col("entropy").first(), pl.col("expert").n_unique().alias("experts")
    )
    return [entropy / math.log(experts) for entropy, experts in routers.select("entropy", "experts").iter_rows()]
