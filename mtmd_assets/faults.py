"""The errors a user can cause, each saying what to look at.

A `BadFile` refuses a day; a bad row never raises: it is counted and kept (see `rejected_rows`).
"""

from collections.abc import Sequence
from datetime import date
from pathlib import Path


class PlatformError(ValueError):
    """The platform file cannot be used. The message names the file, the key and the value received."""


class UsageError(ValueError):
    """What was asked for cannot be done. The message names what was given."""


class BadFile(ValueError):
    """A log file of one day cannot be used; nothing of that day is published."""

    def __init__(self, problem: str, *, file: str, day: date, column: str | None = None, received: object = None):
        """`problem` in words; `file`, `day`, `column` and the value `received` locate it."""
        self.problem, self.file, self.day, self.column, self.received = problem, file, day, column, received
        where = f"{file}, day {day}" + (f", column {column}" if column else "")
        super().__init__(f"{where}: {problem}" + (f" (received {received!r})" if received is not None else ""))


class Withheld(RuntimeError):
    """A day cannot be built yet: something it depends on is not published. The message says what to build."""

    def __init__(self, message: str, days: Sequence[date] = (), table: str = "impressions"):
        """`days`: the days of `table` that must be built first, where it is a matter of days."""
        super().__init__(message)
        self.days, self.table = tuple(days), table


def not_writable(folder: Path, error: OSError) -> PermissionError:
    """The error to raise where a folder of the home cannot be written."""
    return PermissionError(f"{folder} cannot be written ({error.strerror}): set MTMD_HOME to a folder that can")
