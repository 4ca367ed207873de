"""Failure signatures of a routing layer: experts that do not specialise, experts that nobody uses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

UNIFORM = 0.99
"""Gates count as uniform if the mean entropy of a row's gates is above this share of its maximum, ln(experts)."""
ONE_EXPERT = 0.05
"""A router has collapsed if the entropy of its mean gates is below this share of the maximum: one expert has all."""
UNUSED = 0.01
"""An expert is unused if its mean gate is below this."""


@dataclass(frozen=True)
class Signature:
    """One fault of one router."""

    tower: str
    domain: str
    task: str
    fault: str
    """uniform, collapsed or unused."""
    says: str


def signatures(rows: Iterable[Mapping[str, Any]]) -> list[Signature]:
    """The faults of the routers in rows of `routing_metrics`, those of one router next to each other.

    A model with one expert has nothing to route and no fault.
    """

    def router(row: Mapping[str, Any]) -> tuple[str, str, str]:
        return row["tower"], row["domain"], row["task"]

    return [s for key, group in groupby(rows, router) for s in _of_router(key, list(group))]


def _of_router(key: tuple[str, str, str], experts: Sequence[Mapping[str, Any]]) -> list[Signature]:
    if len(experts) < 2:
        return []
    most = math.log(len(experts))
    first = experts[0]
    top = max(experts, key=lambda r: r["mean_gate"])
    if first["entropy"] > UNIFORM * most:
        says = f"every row weighs the experts alike: mean entropy {first['entropy']:.3f} of {most:.3f}"
        return [Signature(*key, "uniform", says)]
    if first["entropy_of_mean"] < ONE_EXPERT * most:
        says = f"{top['expert']} has {top['mean_gate']:.1%} of the weight"
        return [Signature(*key, "collapsed", says)]
    return [
        Signature(*key, "unused", f"{r['expert']} has {r['mean_gate']:.2%} of the weight")
        for r in experts
        if r["mean_gate"] < UNUSED
    ]
