"""One day's impressions meet their heavyweight scores: `sql/score_verdicts.sql`, `sql/joined_examples.sql` and beside.

Every received row ends up in exactly one place: `joined_examples`, or `rejected_rows` with a reason. `check_accounting`
holds that against independent counts at every build.
"""

from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

import sql
from checks.accounting import RowCount
from mtmd_assets.faults import BadFile, Withheld
from mtmd_assets.history import create_history
from mtmd_assets.platform import Platform
from mtmd_assets.warehouse import Stage, Warehouse

if TYPE_CHECKING:
    import duckdb

CHILD_TOLERANCE = 1e-9
"""How far a child's score may exceed its parent's by rounding."""

SCORE_FAULTS = ("orphan", "invalid_score", "child_exceeds_parent")
"""Reasons of score rows that count towards `join.max_rejected`; the others are ordinary."""

TURNED_AWAY = ("out_of_scope", "impression_rejected")
"""Reasons of score rows whose impression the log's intake rejected, and counted: no part of the share here."""

UNSCORED = ("no_score", "only_invalid_scores", "only_late_scores")
"""Reasons of impressions that count towards `join.max_rejected`."""

_INPUTS = {
    "impressions_of_day": "impressions",
    "scores_of_day": "heavyweight_scores",
    "log_rejected_of_day": "log_rejected_rows",
    "log_received_of_day": "log_row_counts",
}


class AccountingError(RuntimeError):
    """Rows got lost or were doubled between two tables: a fault of this code, not of the data."""

    def __init__(self, message: str, counts: tuple[RowCount, ...]):
        """`counts`: what became of each source's rows, as far as it is known."""
        super().__init__(message)
        self.counts = counts


@dataclass(frozen=True)
class Examples:
    """What `build_examples` staged."""

    rows: int
    counts: tuple[RowCount, ...]


def prepare_join(
    con: "duckdb.DuckDBPyConnection",
    platform: Platform,
    warehouse: Warehouse,
    day: date,
    *,
    sample_rate: float | None = None,
    with_history: bool = True,
) -> None:
    """Join a published day in `con`; leaves the temp view `joined`, with the columns of `joined_examples` and more.

    `joined` is read at rate 1 for evaluation days.

    Args:
        con: from `warehouse.connect()`; a later call for another day replaces everything.
        platform: decides lateness, limits and the tasks of each slice.
        warehouse: holds the published day.
        day: the impressions' day.
        sample_rate: share of the impressions to keep; `join.sample_rate` when left out.
        with_history: whether features from history are computed; otherwise they are missing.

    Raises:
        Withheld: if the day's impressions or scores are not published, or an earlier day's that history reads.
        BadFile: if more than `join.max_rejected` of the impressions lack a valid score, or of the score rows are
            invalid or without impression.
    """
    rate = platform.join.sample_rate if sample_rate is None else sample_rate
    unknown = ["impression_id", *(f"NULL::FLOAT AS {f.name}" for f in platform.features if f.history)]
    history = f"SELECT {', '.join(unknown)} FROM impressions_of_day WHERE false"
    if platform.history_days and with_history:
        create_history(con, platform, warehouse, day)
        history = "FROM history"
    for view, table in _INPUTS.items():
        if not warehouse.published(table, day):
            raise Withheld(f"{table} of {day} is not published: build the logs of that day first")
        con.execute(
            f"""CREATE OR REPLACE TEMP VIEW {view} AS SELECT * RENAME (file_row_number AS line)
            FROM read_parquet({sql.quoted(warehouse.path(table, day))}, file_row_number = true, hive_partitioning = false)"""
        )
    _create_slice_tasks(con, platform)
    # Materialised: it is read once for each time `joined` is.
    con.execute(f"CREATE OR REPLACE TEMP TABLE history_of_day AS {history}")
    con.execute(sql.text("sampling"))
    con.execute(f"CREATE OR REPLACE TEMP MACRO example_weight() AS {1 / rate!r}::DOUBLE")
    lateness = timedelta(hours=platform.join.lateness_hours)
    con.execute(sql.text("score_verdicts"), {"lateness": lateness, "sample_rate": rate})
    con.execute(sql.text("unjoined_impressions"))
    limit = platform.join.max_rejected
    _check_share(con, "scores_of_day", "score_verdicts", SCORE_FAULTS, limit, warehouse, day)
    _check_share(con, "impressions_of_day", "unjoined_impressions", UNSCORED, limit, warehouse, day)
    con.execute(f"CREATE OR REPLACE TEMP VIEW joined AS {sql.text('joined_examples')}")


def create_evaluated(con: "duckdb.DuckDBPyConnection", platform: Platform, warehouse: Warehouse, day: date) -> None:
    """Leave the temp view `evaluated`: the day's examples, never down-sampled.

    Raises:
        Withheld: see `prepare_join`.
    """
    if platform.join.sample_rate == 1:
        file = warehouse.path("joined_examples", day)
        con.execute(f"CREATE TEMP VIEW evaluated AS FROM read_parquet({sql.quoted(file)}, hive_partitioning = false)")
        return
    prepare_join(con, platform, warehouse, day, sample_rate=1.0)
    columns = ", ".join(warehouse.tables["joined_examples"])
    con.execute(f"CREATE TEMP TABLE evaluated AS SELECT {columns} FROM joined")


def build_examples(
    con: "duckdb.DuckDBPyConnection",
    platform: Platform,
    stage: Stage,
    day: date,
    *,
    with_history: bool = True,
) -> Examples:
    """Join a day, published or staged, and stage its `joined_examples`, `rejected_rows` and `row_counts`.

    Arguments as of `prepare_join`.

    Raises:
        Withheld: see `prepare_join`.
        BadFile: see `prepare_join`.
        AccountingError: see `check_accounting`.
    """
    prepare_join(con, platform, stage, day, with_history=with_history)
    written = {
        "joined_of_day": stage.write(con, "joined_examples", day, "FROM joined"),
        "rejected_of_day": stage.write(con, "rejected_rows", day, sql.text("rejected_rows")),
    }
    for view, path in written.items():
        con.execute(
            f"CREATE OR REPLACE TEMP VIEW {view} AS FROM read_parquet({sql.quoted(path)}, hive_partitioning = false)"
        )
    con.execute(f"CREATE OR REPLACE TEMP TABLE row_counts_of_day AS {sql.text('row_counts')}")
    stage.write(con, "row_counts", day, "FROM row_counts_of_day")
    counts = check_accounting(con)
    return Examples(counts[1].accepted, counts)


def account_log(con: "duckdb.DuckDBPyConnection", stage: Stage, day: date) -> RowCount:
    """Stage `rejected_rows` and `row_counts` of a day that has a log but can have no scores.

    Raises:
        AccountingError: if the log's rows are not all accepted or rejected.
    """
    stage.write(con, "rejected_rows", day, f"SELECT * FROM log_rejected_rows WHERE ds = '{day}'")
    stage.write(con, "row_counts", day, sql.text("log_row_count"), {"day": day})
    [row] = con.execute(f"SELECT source, received, accepted, rejected FROM row_counts WHERE ds = '{day}'").fetchall()
    count = RowCount(*row)
    if count.received != count.accepted + count.rejected:
        raise AccountingError(f"row_counts: received is not accepted + rejected in {count}", (count,))
    return count


def check_accounting(con: "duckdb.DuckDBPyConnection") -> tuple[RowCount, ...]:
    """Hold what was written against what was received; reads the temp views that `build_examples` leaves.

    Returns:
        The counts of `log`, `impressions` and `heavyweight_scores`.

    Raises:
        AccountingError: unless there is one row of counts a source with received = accepted + rejected, every
            example is of another impression of the day, and exactly one score row was used for each.
    """
    rows = con.execute("SELECT source, received, accepted, rejected FROM row_counts_of_day").fetchall()
    counts = tuple(RowCount(*row) for row in rows)
    if [c.source for c in counts] != ["log", "impressions", "heavyweight_scores"]:
        raise AccountingError(f"row_counts: expected one row a source, received {counts}", counts)
    for c in counts:
        if c.received != c.accepted + c.rejected:
            raise AccountingError(f"row_counts: received is not accepted + rejected in {c}", counts)
    _, impressions, scores = counts
    examples, distinct = con.execute("SELECT count(*), count(DISTINCT impression_id) FROM joined_of_day").fetchall()[0]
    if not examples == distinct == impressions.accepted == scores.accepted:
        raise AccountingError(
            f"joined_examples: {examples} rows of {distinct} impressions, {impressions.accepted} accepted, "
            f"{scores.accepted} scores used",
            counts,
        )
    places = """(
        SELECT impression_id FROM joined_of_day
        UNION ALL SELECT impression_id FROM rejected_of_day WHERE source = 'impressions'
    )"""
    elsewhere = con.execute(
        f"SELECT count(*) FROM impressions_of_day AS i ANTI JOIN {places} AS p ON p.impression_id = i.impression_id"
    ).fetchall()[0][0]
    # As many places as impressions, none of them doubled or empty: each impression is in exactly one.
    if elsewhere:
        raise AccountingError(f"{elsewhere} impressions are neither in joined_examples nor in rejected_rows", counts)
    return counts


def _create_slice_tasks(con: "duckdb.DuckDBPyConnection", platform: Platform) -> None:
    """What the join needs of the platform: the table slice_tasks and the macros slice_scores and score_fault."""
    names = platform.task_names
    flags = [
        f"('{s}', '{p}', {{{', '.join(f'{t}: {str((s, p) in platform.task_slices[t]).lower()}' for t in names)}}})"
        for s, p in platform.slices
    ]
    slices = f"(VALUES {', '.join(flags)}) AS slices(surface, product, has)"
    con.execute(f"CREATE OR REPLACE TEMP TABLE slice_tasks AS FROM {slices}")
    scores = ", ".join(f"score_{t}: CASE WHEN has.{t} THEN s.score_{t} END" for t in names)
    con.execute(f"CREATE OR REPLACE TEMP MACRO slice_scores(s, has) AS {{{scores}}}")
    # NaN is greater than everything in DuckDB, so it fails `< 1`.
    invalid = " OR ".join(
        f"has.{t} AND NOT coalesce(scores.score_{t} > 0 AND scores.score_{t} < 1, false)" for t in names
    )
    above = [
        f"has.{t.name} AND scores.score_{t.name} > scores.score_{t.given} + {CHILD_TOLERANCE}"
        for t in platform.tasks
        if t.given is not None
    ]
    con.execute(
        f"""CREATE OR REPLACE TEMP MACRO score_fault(scores, has) AS CASE
            WHEN {invalid} THEN 'invalid_score'
            WHEN {" OR ".join(above) or "false"} THEN 'child_exceeds_parent'
        END"""
    )


def _check_share(
    con: "duckdb.DuckDBPyConnection",
    received: str,
    verdicts: str,
    faults: tuple[str, ...],
    limit: float,
    warehouse: Warehouse,
    day: date,
) -> None:
    """Refuse the day if too large a share of the rows `received` has one of the reasons `faults` in `verdicts`."""
    table = _INPUTS[received]
    counts = dict(con.execute(f"SELECT reason, count(*) FROM {verdicts} GROUP BY ALL ORDER BY 2 DESC, 1").fetchall())
    rows = con.execute(f"SELECT count(*) FROM {received}").fetchall()[0][0]
    rows -= sum(counts.get(reason, 0) for reason in TURNED_AWAY)
    found = {reason: n for reason, n in counts.items() if reason in faults}
    if sum(found.values()) > limit * rows:
        what = "lack a valid score" if table == "impressions" else "are invalid or of no impression"
        share = f"{sum(found.values()) / rows:.2%} of {rows} rows of {table} {what}"
        most = next(iter(found))
        query = f"FROM {received} SEMI JOIN (FROM {verdicts} WHERE reason = '{most}') AS v USING (line) ORDER BY line LIMIT 1"
        [first] = con.sql(query).pl().iter_rows(named=True)
        shown = ", ".join(f"{c} {v!r}" for c, v in first.items() if c == "impression_id" or c.startswith("score_"))
        problem = f"{share}, the limit is {limit:.2%} (join.max_rejected); the first {most}: {shown}"
        raise BadFile(problem, file=str(warehouse.path(table, day)), day=day, received=found)
