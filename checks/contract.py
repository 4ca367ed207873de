"""The feature contract: how often each feature may be missing in each slice (surface x product)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ContractRule:
    """The allowed missing rate of one feature in one slice, bounds included.

    A slice without rows has no rate, and fails all its rules.
    """

    surface: str
    product: str
    feature: str
    rule: Literal["present", "absent"]
    min_rate: float
    max_rate: float
