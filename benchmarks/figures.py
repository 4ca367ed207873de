"""What a benchmark reports: a figure beside what it is measured against, in the same run."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the table, and one object of `bench.json`."""

    name: str
    value: float
    unit: str
    reference: str
    """What it is measured against, with that one's own figure."""
    goal: str
    """The bound as a person reads it; empty where the figure is only reported."""
    holds: bool | None
    """Whether the goal is met; None without one."""

    @classmethod
    def at_least(cls, name: str, value: float, unit: str, reference: str, bound: float) -> "Figure":
        """A figure that is good when it is large."""
        return cls(name, value, unit, reference, f"≥ {bound:g}", value >= bound)

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, reference: str, bound: float) -> "Figure":
        """A figure that is good when it is small."""
        return cls(name, value, unit, reference, f"≤ {bound:g}", value <= bound)

    @classmethod
    def report(cls, name: str, value: float, unit: str, reference: str) -> "Figure":
        """A figure without a goal."""
        return cls(name, value, unit, reference, "", None)


def seconds(work: Callable[[], object], repetitions: int = 5, warm_up: int = 1) -> float:
    """Median wall-clock seconds of a piece of work."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def alternating(*works: Callable[[], object], repetitions: int = 5) -> tuple[float, ...]:
    """Median seconds of each of several pieces of work, run in turn: what else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(repetitions):
        for work, found in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return tuple(statistics.median(found) for found in times)


def table(figures: Sequence[Figure]) -> str:
    """A line a figure, in aligned columns."""
    rows = [
        (f.name, "-" if math.isnan(f.value) else f"{f.value:,.3g} {f.unit}", f.goal, _holds(f), f.reference)
        for f in figures
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    lines = ("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _holds(figure: Figure) -> str:
    return {True: "holds", False: "DOES NOT HOLD", None: ""}[figure.holds]
