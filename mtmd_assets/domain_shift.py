"""How differently the domains of a tower are distributed: what per-domain normalisation has to adapt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Statistics = Mapping[str, float]
"""Mean, std and count of a dense feature's observed values in a domain."""


@dataclass(frozen=True)
class Shift:
    """One dense feature of a tower."""

    tower: str
    feature: str
    between: float
    """Share of its variance that lies between the domains: 0 where all have the same mean, 1 where the domain tells
    the value (the correlation ratio, eta squared)."""
    spread: float
    """The largest standard deviation of a domain over the smallest; infinite if that is zero and the other is not."""


def domain_shifts(normalisation: Mapping[str, Mapping[str, Mapping[str, Statistics]]]) -> list[Shift]:
    """The dense features that several domains have, the most unlike first.

    Args:
        normalisation: tower -> domain -> feature -> statistics, as a model's manifest has them.
    """
    found = []
    for tower, domains in normalisation.items():
        for feature in dict.fromkeys(f for features in domains.values() for f in features):
            seen = [of[feature] for of in domains.values() if of.get(feature, {"count": 0})["count"] > 0]
            if len(seen) > 1:
                found.append(Shift(tower, feature, _between(seen), _spread(seen)))
    return sorted(found, key=lambda shift: -shift.between)


def _between(seen: Sequence[Statistics]) -> float:
    rows = sum(s["count"] for s in seen)
    mean = sum(s["count"] * s["mean"] for s in seen) / rows
    between = sum(s["count"] * (s["mean"] - mean) ** 2 for s in seen)
    within = sum(s["count"] * s["std"] ** 2 for s in seen)
    return between / (between + within) if between else 0.0


def _spread(seen: Sequence[Statistics]) -> float:
    low, high = min(s["std"] for s in seen), max(s["std"] for s in seen)
    return high / low if low else (math.inf if high else 1.0)
