"""One day of a log as received -> the rows the platform keeps, and those it refuses with their reasons.

A fault of the file raises `BadFile`; a fault of a row sends the row to `log_rejected_rows`. Every source goes through
here, so a fault is found the same way whatever the log's origin.

Types: a column may arrive in any type whose values fit the table's without loss (integers of any width, whole
floats for integers, categorical or enum for text, time stamps of any unit). A time stamp without zone is UTC. In
dense features NaN and infinite values count as missing and are stored as NULL. Further columns are ignored.
"""

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import polars as pl

from mtmd_assets.faults import BadFile
from mtmd_assets.platform import Platform
from mtmd_assets.platform_names import IDS
from mtmd_assets.snapshots import varying
from mtmd_assets.sources import LogDay
from mtmd_assets.tables import Columns, tables
from mtmd_model.schema import Side

if TYPE_CHECKING:
    import duckdb

    from mtmd_assets.warehouse import Stage

_INVALID = -1
"""Stands for an outcome that is neither 0, 1 nor missing until its row is refused."""

_IN_WORDS = {
    "VARCHAR": "text",
    "BIGINT": "whole numbers",
    "FLOAT": "numbers",
    "DOUBLE": "numbers",
    "TINYINT": "0, 1 or missing",
    "TIMESTAMP": "time stamps",
}


@dataclass(frozen=True)
class Intake:
    """What became of one day's rows."""

    received: int
    accepted: int
    reasons: dict[str, int]
    """Reason -> refused rows, most first."""
    scores: int | None
    """Heavyweight score rows, all stored as received; None where the source has none."""

    @property
    def rejected(self) -> int:
        """Refused rows."""
        return sum(self.reasons.values())


def take_in(platform: Platform, log: LogDay, day: date, con: "duckdb.DuckDBPyConnection") -> Intake:
    """Check one day as received and leave it in `con` for `write_intake`.

    Leaves the temp views `accepted_impressions`, `log_rejected` (columns of the table `log_rejected_rows`),
    `log_received` and, where the log has scores, `received_scores`.

    Raises:
        BadFile: if a column is missing or of another type, the day is empty, holds rows of another day or a row
            without `ts`, has no row in scope, more than `join.max_rejected` of its rows in scope are faulty, or what
            belongs to a request (or an item) varies within it.
    """
    wanted, file = tables(platform)["impressions"], log.impressions_file
    received = log.impressions
    typed = _typed(received, wanted, file, day)
    _check_day(typed, received, platform, file, day)

    verdict = _verdicts(typed, platform)
    counts = verdict.drop_nulls().value_counts(sort=True).rows()
    reasons: dict[str, int] = dict(sorted(counts, key=lambda c: (-c[1], c[0])))
    in_scope = received.height - reasons.get("out_of_scope", 0)
    faulty = {r: n for r, n in reasons.items() if r != "out_of_scope"}
    if in_scope == 0:
        raise BadFile("none of its rows is in the platform's scope", file=file, day=day, received=reasons)
    if sum(faulty.values()) > platform.join.max_rejected * in_scope:
        share = f"{sum(faulty.values()) / in_scope:.2%} of its {in_scope} rows in scope are faulty"
        limit = f"the limit is {platform.join.max_rejected:.2%} (join.max_rejected)"
        most = next(iter(faulty))
        first = received.row((verdict == most).arg_true()[0], named=True)
        shown = ", ".join(f"{column} {first[column]!r}" for column in _columns_of(most, platform))
        raise BadFile(f"{share}, {limit}; the first {most}: {shown}", file=file, day=day, received=faulty)

    good = verdict.is_null()
    accepted = typed if not reasons else typed.filter(good)
    con.register("accepted_impressions", accepted)
    _check_snapshots(con, platform, file, day)
    _leave_rejected(con, received.filter(~good), typed["impression_id"].filter(~good), verdict.filter(~good))
    con.register("log_received", pl.DataFrame({"received": [received.height]}))
    con.execute("DROP VIEW IF EXISTS received_scores")
    if log.scores is not None:
        columns = tables(platform)["heavyweight_scores"]
        con.register("received_scores", _typed(log.scores, columns, log.scores_file, day))
    return Intake(received.height, accepted.height, reasons, None if log.scores is None else log.scores.height)


def write_intake(con: "duckdb.DuckDBPyConnection", stage: "Stage", day: date) -> None:
    """Stage what `take_in` left: `impressions`, `log_rejected_rows`, `log_row_counts` and any `heavyweight_scores`."""
    stage.write(con, "impressions", day, "FROM accepted_impressions")
    stage.write(con, "log_rejected_rows", day, "FROM log_rejected")
    stage.write(con, "log_row_counts", day, "FROM log_received")
    if con.execute("SELECT count(*) FROM duckdb_views() WHERE view_name = 'received_scores'").fetchall()[0][0]:
        stage.write(con, "heavyweight_scores", day, "FROM received_scores")


# -- faults of the file ------------------------------------------------------------------------------------------


def _typed(frame: pl.DataFrame, wanted: Columns, file: str, day: date) -> pl.DataFrame:
    """The wanted columns in the table's types."""
    missing = [c for c in wanted if c not in frame.columns]
    if missing:
        others = [c for c in frame.columns if c not in wanted]
        raise BadFile(f"column missing; the other columns are {others}", file=file, day=day, column=", ".join(missing))
    if frame.is_empty():
        raise BadFile("it holds no rows", file=file, day=day)
    return pl.DataFrame([_cast(frame[name], sql_type, file, day) for name, sql_type in wanted.items()])


def _cast(column: pl.Series, wanted: str, file: str, day: date) -> pl.Series:
    """`column` in the type of the table, if no value is lost by it."""
    dtype, name = column.dtype, column.name
    number = dtype.is_numeric() or dtype == pl.Boolean

    def wrong(problem: str, example: pl.Series) -> BadFile:
        values = example.drop_nulls()
        received = f"{dtype}, for example {values[0]!r}" if len(values) else str(dtype)
        return BadFile(problem, file=file, day=day, column=name, received=received)

    if wanted == "VARCHAR" and (dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum) or dtype == pl.Null):
        return column.cast(pl.String)
    if wanted == "TIMESTAMP" and (isinstance(dtype, pl.Datetime) or dtype == pl.Null):
        if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
            column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return column.cast(pl.Datetime("us"))
    if wanted == "BIGINT" and (number or dtype == pl.Null):
        if dtype.is_float():
            column = column.fill_nan(None)
            # Beyond 2^53 a float no longer tells neighbouring whole numbers apart.
            inexact = column.filter((column != column.round()) | (column.abs() > 2**53))
            if len(inexact):
                raise wrong("expected whole numbers", inexact)
        try:
            return column.cast(pl.Int64)
        except pl.exceptions.InvalidOperationError:
            too_large = column.filter(column.cast(pl.Int64, strict=False).is_null())
            raise wrong("expected whole numbers of 64 bits", too_large) from None
    if wanted == "DOUBLE" and (number or dtype == pl.Null):
        return column.cast(pl.Float64)
    if wanted == "FLOAT" and (number or dtype == pl.Null):
        values = column.cast(pl.Float32)
        finite = values.is_finite()
        return values if finite.all() else values.set(~finite, None)
    if wanted == "TINYINT" and (number or dtype == pl.Null):
        values = column.fill_nan(None) if dtype.is_float() else column.cast(pl.Int64) if dtype == pl.Boolean else column
        value = pl.col(name)
        state = pl.when(value == 0).then(0).when(value == 1).then(1).when(value.is_not_null()).then(_INVALID)
        return values.to_frame().select(state.cast(pl.Int8).alias(name))[name]
    raise wrong(f"expected {_IN_WORDS[wanted]}", column)


def _check_day(typed: pl.DataFrame, received: pl.DataFrame, platform: Platform, file: str, day: date) -> None:
    """Every row has a time stamp and belongs to `day`."""
    nulls = typed["ts"].null_count()
    if nulls:
        raise BadFile(f"{nulls} of {typed.height} rows have no time stamp", file=file, day=day, column="ts")
    if "ds" in received.columns:
        column, days = "ds", received["ds"]
        if days.dtype != pl.Date:
            raise BadFile("expected dates", file=file, day=day, column="ds", received=str(days.dtype))
    else:
        column, ts = "ts", typed["ts"]
        if platform.time_zone != "UTC":
            ts = ts.dt.replace_time_zone("UTC").dt.convert_time_zone(platform.time_zone)
        days = ts.dt.date()
    others = days.filter(days.ne_missing(day))
    if len(others):
        problem = f"{len(others)} of {typed.height} rows are of another day ({platform.time_zone})"
        raise BadFile(problem, file=file, day=day, column=column, received=str(others[0]))


def _check_snapshots(con: "duckdb.DuckDBPyConnection", platform: Platform, file: str, day: date) -> None:
    """The accepted rows of a request agree in what is the request's, those of an item in what is the item's."""
    sides: tuple[Side, ...] = ("query", "item")
    for side in sides:
        features = [f.name for f in platform.features if f.side == side and not f.history]
        problem = varying(con, "accepted_impressions", side, features)
        if problem:
            raise BadFile(problem, file=file, day=day)


# -- faults of rows ----------------------------------------------------------------------------------------------


def _verdicts(typed: pl.DataFrame, platform: Platform) -> pl.Series:
    """Why each row is refused; null for the rows to keep."""
    surface, product = pl.col("surface"), pl.col("product")
    outcomes = [pl.col(f"outcome_{t}") for t in platform.task_names]
    given = [(t.name, t.given) for t in platform.tasks if t.given is not None]
    children = [(pl.col(f"outcome_{t}") == 1) & (pl.col(f"outcome_{parent}") == 0) for t, parent in given]
    outside = surface.is_in(platform.out_of_scope.surfaces) | product.is_in(platform.out_of_scope.products)
    reason = (
        pl.when(outside.fill_null(False))
        .then(pl.lit("out_of_scope"))
        .when(~surface.is_in(platform.surfaces).fill_null(False))
        .then(pl.lit("unknown_surface"))
        .when(~product.is_in(platform.products).fill_null(False))
        .then(pl.lit("unknown_product"))
        .when(pl.any_horizontal(pl.col(IDS).is_null()))
        .then(pl.lit("missing_id"))
        # A child's outcome presupposes its parent's (outcomes are unconditional).
        .when(pl.any_horizontal(*(o == _INVALID for o in outcomes), *children).fill_null(False))
        .then(pl.lit("invalid_outcome"))
    )
    rows = typed.select("impression_id", "ts", reason.alias("reason")).with_row_index("line")
    good = rows.filter(pl.col("reason").is_null())
    if good["impression_id"].n_unique() == good.height:
        return rows["reason"]
    # Of rows with one id the earliest is kept, and of equal times the first in the file.
    kept = good.sort("ts", "line").unique("impression_id", keep="first", maintain_order=True)
    duplicate = pl.col("reason").is_null() & ~pl.col("line").is_in(kept["line"].implode())
    verdict = pl.when(duplicate).then(pl.lit("duplicate_id")).otherwise(pl.col("reason"))
    return rows.select(verdict.alias("reason"))["reason"]


def _columns_of(reason: str, platform: Platform) -> tuple[str, ...]:
    """Where to look in a row that is refused for a reason (`_verdicts`)."""
    if reason == "invalid_outcome":
        return tuple(f"outcome_{t}" for t in platform.task_names)
    return {"unknown_surface": ("surface",), "unknown_product": ("product",), "missing_id": IDS}.get(reason, IDS[:1])


def _leave_rejected(con: "duckdb.DuckDBPyConnection", rows: pl.DataFrame, ids: pl.Series, reasons: pl.Series) -> None:
    """The temp table `log_rejected`, each row's content as received as JSON text."""
    # JSON has no NaN and no infinity: there the value is written as text. A zoned time stamp is text too.
    zoned = [c for c, t in rows.schema.items() if isinstance(t, pl.Datetime) and t.time_zone]
    rows = rows.with_columns(pl.col(zoned).cast(pl.String))
    odd = [c for c, t in rows.schema.items() if t.is_float() and not rows[c].is_finite().all()]
    either = 'CASE WHEN isfinite("{0}") THEN to_json("{0}") ELSE to_json("{0}"::VARCHAR) END AS "{0}"'
    as_text = ", ".join(either.format(c) for c in odd)
    con.register("rejected_rows_as_received", rows)
    con.register("rejected_verdicts", pl.DataFrame({"impression_id": ids, "reason": reasons}))
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE log_rejected AS
        SELECT 'log' AS source, v.impression_id, v.reason, r.row
        FROM rejected_verdicts AS v
        POSITIONAL JOIN (
            SELECT to_json(r)::VARCHAR AS row
            FROM (SELECT * {f"REPLACE ({as_text})" if odd else ""} FROM rejected_rows_as_received) AS r
        ) AS r"""
    )
    con.unregister("rejected_rows_as_received")
    con.unregister("rejected_verdicts")
