"""What became of every row received: the account that `mtmd_assets.join.check_accounting` holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowCount:
    """One row of `row_counts`: accepted are the rows in the next table, rejected those in `rejected_rows`."""

    source: str
    received: int
    accepted: int
    rejected: int
