"""How far a model's probabilities are from the heavyweight ranker's, in float64 NumPy.

Shapes: N rows of one slice and task.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOOR = 1e-6
"""Probabilities below this count as this in LogMAE."""


@dataclass(frozen=True)
class Metrics:
    """All metrics of one cell."""

    rows: int
    logmae: float
    """Mean |ln p - ln t|, both floored."""
    floored: float
    """Share of the rows in which p or t was floored."""
    mae: float
    """Mean |p - t|."""
    kl: float
    """Mean KL(t || p) of the two Bernoulli distributions, in nats."""
    bce: float
    """Mean binary cross entropy, in nats."""
    calibration: float
    """Sum of p over sum of t."""


def measure(probability: ArrayLike, target: ArrayLike, weight: ArrayLike | None = None) -> Metrics:
    """Compare predicted probabilities with the heavyweight ranker's.

    Args:
        probability: (N,) in [0, 1].
        target: (N,) in [0, 1].
        weight: (N,) of the rows; all one if None.

    Raises:
        ValueError: different lengths, no row, or a value outside [0, 1].
    """
    p, t = _probabilities(probability, "probability"), _probabilities(target, "target")
    w = np.ones_like(p) if weight is None else np.asarray(weight, np.float64)
    if not len(p) == len(t) == len(w) or not len(p):
        raise ValueError(f"need one or more rows and equal lengths, got {len(p)}, {len(t)} and {len(w)}")
    share = w / w.sum()
    return Metrics(
        rows=len(p),
        logmae=float(share @ log_error(p, t)),
        floored=float(share @ ((p < FLOOR) | (t < FLOOR))),
        mae=float(share @ np.abs(p - t)),
        kl=float(share @ kl(p, t)),
        bce=float(share @ bce(p, t)),
        calibration=float((w @ p) / (w @ t)) if w @ t > 0 else float("nan"),
    )


def log_error(p: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) |ln p - ln t|, both floored at `FLOOR`; its mean is LogMAE."""
    return np.abs(np.log(np.maximum(p, FLOOR)) - np.log(np.maximum(t, FLOOR)))


def bce(p: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) -t ln p - (1 - t) ln(1 - p); infinite where p rules out what t expects."""
    return _product_log(t, p) + _product_log(1 - t, 1 - p)


def kl(p: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) KL(t || p) = bce(p, t) - bce(t, t); rounding below zero is cut off."""
    return np.maximum(bce(p, t) - bce(t, t), 0)


def _product_log(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """-a ln b, zero where a is zero."""
    with np.errstate(divide="ignore"):
        return -a * np.log(np.where(a > 0, b, 1))


def _probabilities(values: ArrayLike, name: str) -> NDArray[np.float64]:
    x = np.asarray(values, np.float64)
    if x.size and not (np.min(x) >= 0 and np.max(x) <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got {np.min(x)} to {np.max(x)}")
    return x
