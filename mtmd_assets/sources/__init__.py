"""Where logs come from: one module a kind of source, each a class with `read(day) -> LogDay`.

A source only reads (or simulates) and renames. What is wrong with a file it reports as `BadFile`; what is wrong with
a row is found by `mtmd_assets.intake`, the same way for every source.
"""

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import polars as pl

    from mtmd_assets.platform import Platform


@dataclass(frozen=True)
class LogDay:
    """The rows of one day as received.

    `impressions` has the columns of the table of that name (features from history aside); `scores` those of
    `heavyweight_scores`, or is None where the source has none. `ds`, a Date column, may be added to `impressions`
    where the log states its day; elsewhere the day follows from `ts` and the platform's time zone.
    """

    impressions: "pl.DataFrame"
    scores: "pl.DataFrame | None"
    impressions_file: str
    """Named in errors."""
    scores_file: str = ""


class Source(Protocol):
    """Reads one day of a platform's logs."""

    def read(self, day: date) -> LogDay:
        """The rows of `day` as received.

        Raises:
            BadFile: if a file is missing, unreadable, or lacks a column.
        """
        ...

    def look(self, day: date) -> None:
        """See whether the files of `day` are there with their columns, without reading all rows where that is long.

        Raises:
            BadFile: as `read`; what only the rows tell is found when they are read.
        """
        ...


def open_source(platform: "Platform") -> Source:
    """The source that the platform file names."""
    if platform.source.kind == "adworld":
        from mtmd_assets.sources.adworld import Adworld

        return Adworld(platform)
    if platform.source.kind == "kuairand":
        from mtmd_assets.sources.kuairand import Kuairand

        return Kuairand(platform)
    from mtmd_assets.sources.parquet import ParquetLogs

    return ParquetLogs(platform)
