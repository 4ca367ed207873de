"""From a number to a row of an embedding table: which of its feature's quantile bins it lies in.

A network reads a standardised number as the same nearly linear input everywhere; heavyweight scores often jump along it,
as those of trees do. A vector a bin has a value of its own for each part of the range.

Reference: Gorishniy, Rubachev and Babenko, On embeddings for numerical features in tabular deep learning, NeurIPS 2022,
https://arxiv.org/abs/2203.05556 (section 3.2.1: bins from quantiles).

Row 0 is a missing value; row 1, unknown, is that of a bin which none of the rows has that train a table
(`embeddings.py`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mtmd_model.vocabulary import FIRST, MISSING


@dataclass(frozen=True)
class Bins:
    """Bins between ascending edges; a number on an edge lies in the bin above it, and the outermost are open."""

    edges: tuple[float, ...]

    @classmethod
    def fit(cls, numbers: NDArray[np.float32], bins: int) -> "Bins":
        """So that each bin has about as many of the numbers as any other; fewer bins where many numbers are equal.

        Args:
            numbers: (N,), NaN where missing.
            bins: how many at most, 2 or more.
        """
        observed = numbers[~np.isnan(numbers)]
        if not len(observed):
            return cls(())
        # an observed number each, never one between two: numbers that are all alike have one bin
        edges = np.quantile(observed, np.arange(1, bins) / bins, method="higher")
        return cls(tuple(np.unique(edges[edges > observed.min()]).tolist()))

    @property
    def rows(self) -> int:
        """Rows of the embedding table, counting missing and unknown."""
        return FIRST + len(self.edges) + 1

    @cached_property
    def _edges(self) -> NDArray[np.float32]:
        return np.array(self.edges, np.float32)

    def lookup(self, numbers: NDArray[np.float32]) -> NDArray[np.int32]:
        """(N,), NaN where missing -> the row of each, (N,)."""
        place = np.searchsorted(self._edges, numbers, side="right") + FIRST
        return np.where(np.isnan(numbers), MISSING, place).astype(np.int32)
