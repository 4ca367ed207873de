"""The lake beside DuckDB alone: what a published, checked day costs over the bare `COPY` of the same join.

python -m benchmarks.lake                           # a day of 1 M rows x 61 columns, one twice as large, 4 days
python -m benchmarks.lake --growth 10 --days 30     # the goals' own sizes

The bare join reads the same published logs, keeps each impression's latest score and writes the same columns in the
same order with the same compression and row groups; it validates, counts, rejects and checks nothing. CPU seconds are
reported beside seconds, as they tell the same story on a machine that others use.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import sql
from benchmarks.figures import Figure, alternating, seconds, table
from mtmd_assets.home import CHECKOUT, Home, Site
from mtmd_assets.platform_file import SHIPPED

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

DAY = date(2026, 1, 1)
LOGS = ("impressions", "heavyweight_scores", "log_rejected_rows", "log_row_counts")
PUBLISHED, BACKFILL = 1.8, 1.5
"""The bounds: a published day over the bare join, and a backfill over the sum of the bare joins."""


class Metered:
    """A piece of work that notes the seconds and the CPU seconds of each of its runs."""

    def __init__(self, work: Callable[[], object]):
        self.work, self.runs, self.cpu_runs = work, list[float](), list[float]()

    def __call__(self) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        self.work()
        self.runs.append(time.perf_counter() - start)
        self.cpu_runs.append(time.process_time() - cpu)

    @property
    def seconds(self) -> float:
        """Median, the warm-up left out."""
        return statistics.median(self.runs[1:] or self.runs)

    @property
    def cpu(self) -> float:
        """Median CPU seconds, the warm-up left out."""
        return statistics.median(self.cpu_runs[1:] or self.cpu_runs)

    def forget(self) -> None:
        """Start anew."""
        self.runs.clear()
        self.cpu_runs.clear()


def figures(
    rows: int = 1_000_000,
    repetitions: int = 3,
    growth: int = 2,
    days: int = 4,
    backfill_rows: int | None = None,
    folder: Path | None = None,
) -> list[Figure]:
    """Publish a day, a larger day and a backfill, each beside DuckDB's bare join.

    Args:
        rows: impressions of the day.
        repetitions: runs of each side, in turn; medians count.
        growth: how many times larger the larger day is.
        days: length of the backfill.
        backfill_rows: impressions of each of its days; as `rows` when left out.
        folder: where the lakes go; a temporary one when left out.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = _start_up(repetitions)
        found += _logs(world(Path(scratch) / "logs", rows), repetitions)
        found += _day(Path(scratch), rows, repetitions, growth)
        rows = backfill_rows or rows
        return found + _backfill(world(Path(scratch) / "backfill", rows), rows, days, repetitions)


# -- what is measured --------------------------------------------------------------------------------------------


def _start_up(repetitions: int) -> list[Figure]:
    """What a process pays once."""

    def importing(statement: str) -> float:
        return seconds(
            lambda: subprocess.run([sys.executable, "-c", statement], check=True, cwd=CHECKOUT), repetitions, 0
        )

    bare, location = importing("import dagster"), importing("import mtmd_assets.definitions")
    checks = importing("import great_expectations")
    return [
        Figure.report("start-up of a process", location, "s", f"import dagster alone: {bare:.2f} s"),
        Figure.report("start-up of the first check", checks, "s", "import great_expectations, once a process"),
    ]


def _logs(site: Site, repetitions: int) -> list[Figure]:
    """A day of logs as received -> checked and published, beside the bare COPY of the same frames."""
    from mtmd_assets.intake import take_in, write_intake

    log = site.source.read(DAY)
    assert log.scores is not None
    frames = {"impressions": log.impressions, "scores": log.scores}

    def ours() -> None:
        with site.warehouse.stage() as stage, stage.connect() as con:
            take_in(site.platform, log, DAY, con)
            write_intake(con, stage, DAY)
            stage.publish()

    def bare() -> None:
        with _duckdb(site) as con:
            for name, frame in frames.items():
                con.register(name, frame)
                con.execute(f"COPY {name} TO {sql.quoted(site.folder / f'{name}.parquet')} (COMPRESSION zstd)")

    took, alone = alternating(ours, bare, repetitions=repetitions)
    name = f"logs of {log.impressions.height:,} rows x {log.impressions.width} columns checked and published"
    return [Figure.report(name, took / alone, "x", f"bare COPY of the same frames: {alone:.2f} s")]


def _day(scratch: Path, rows: int, repetitions: int, growth: int) -> list[Figure]:
    """A joined day and one that is `growth` times larger."""
    site = _with_logs(world(scratch / "day", rows))
    ours = Metered(lambda: _publish(site))
    bare = Metered(lambda: _bare_join(site))
    unordered = Metered(lambda: _bare_join(site, ordered=False))
    took, alone, loose = alternating(ours, bare, unordered, repetitions=repetitions)
    columns = len(site.warehouse.tables["joined_examples"])
    name = f"joined day of {rows:,} rows x {columns} columns published, checks included"
    rate = rows / took
    found = [
        Figure.at_most(name, took / alone, "x", f"bare COPY of the join, in the log's order: {alone:.2f} s", PUBLISHED),
        Figure.report(f"{name}: CPU", ours.cpu / bare.cpu, "x", f"bare COPY: {bare.cpu:.2f} CPU s"),
        Figure.report(f"{name}: rows a second", rate, "rows/s", f"bare COPY: {rows / alone:,.0f}"),
        Figure.at_most(
            f"{name}, order left open", took / loose, "x", f"COPY without ORDER BY: {loose:.2f} s", PUBLISHED
        ),
        Figure.report(f"{name}, order left open: CPU", ours.cpu / unordered.cpu, "x", f"{unordered.cpu:.2f} CPU s"),
        *_parts(site, took, repetitions),
    ]
    if growth > 1:
        larger = _with_logs(world(scratch / "larger", rows * growth))
        long = Metered(lambda: _publish(larger))
        ours.forget()
        slow, quick = alternating(long, ours, repetitions=max(2, repetitions // 2))
        name = f"a day {growth} times larger, per row"
        reference = f"{quick / rows * 1e6:.2f} s a million rows of the smaller day"
        found.append(Figure.at_most(name, slow / growth / quick, "x", reference, 1.2))
        reference = f"{ours.cpu / rows * 1e6:.2f} CPU s a million rows"
        found.append(Figure.report(f"{name}: CPU", long.cpu / growth / ours.cpu, "x", reference))
    return found


def _parts(site: Site, took: float, repetitions: int) -> list[Figure]:
    """Checks, an empty publish, and the views' price for a reader."""
    from checks.missingness import check_contract
    from mtmd_assets.contract import measure_contract

    warehouse = site.warehouse
    file = warehouse.path("joined_examples", DAY)

    def check() -> None:
        with warehouse.connect() as con:
            check_contract(measure_contract(con, site.platform, DAY, file))

    def publish() -> None:
        with warehouse.stage() as stage, stage.connect() as con:
            stage.write(con, "row_counts", DAY, "SELECT 'x' AS source, 0 AS received, 0 AS accepted, 0 AS rejected")
            stage.publish()

    query = "SELECT surface, avg(score_ctr) FROM {} GROUP BY surface"
    with warehouse.connect() as con:
        parquet = f"read_parquet({sql.quoted(file)}, hive_partitioning = false)"
        through, direct = alternating(
            lambda: con.execute(query.format(f"(FROM joined_examples WHERE ds = '{DAY}')")).fetchall(),
            lambda: con.execute(query.format(parquet)).fetchall(),
            repetitions=3 * repetitions,
        )
    checked = seconds(check, repetitions)
    return [
        Figure.report("contract of the day measured and checked", checked, "s", f"{checked / took:.0%} of the day"),
        Figure.report("connect, stage and publish one row", seconds(publish, repetitions), "s", "per published day"),
        Figure.report(
            "a day's query through the view", through / direct, "x", f"its file read directly: {direct:.3f} s"
        ),
    ]


def _backfill(site: Site, rows: int, days: int, repetitions: int) -> list[Figure]:
    """One run of Dagster over `days` days that have logs, beside the bare joins, less what one run costs at all."""
    import dagster as dg

    from mtmd_assets.assets import examples
    from mtmd_assets.definitions import platform_definitions

    _with_logs(site)
    for later in range(1, days):  # the same logs on every day: what a day holds is no matter here
        for log in LOGS:
            target = site.warehouse.path(log, DAY + timedelta(later))
            target.parent.mkdir(parents=True)
            shutil.copy(site.warehouse.path(log, DAY), target)
    job = platform_definitions(site).resolve_job_def(f"{site.platform.name}_data")
    keys = [dg.AssetKey([site.platform.name, t]) for t in examples.TABLES]
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}

    def run(last: date) -> None:
        span = {"dagster/asset_partition_range_start": str(DAY), "dagster/asset_partition_range_end": str(last)}
        with dg.instance_for_test() as instance:
            assert job.execute_in_process(instance=instance, tags=span, asset_selection=keys, run_config=quiet).success

    one, whole = Metered(lambda: run(DAY)), Metered(lambda: run(DAY + timedelta(days - 1)))
    bare = Metered(lambda: _bare_join(site))
    os.sync()  # else the disk still writes what went before
    # before and after: a machine that slows down meanwhile does so for both sides
    alternating(one, bare, repetitions=repetitions)
    whole()
    os.sync()
    alternating(one, bare, repetitions=repetitions)
    first, alone, took = one.seconds, bare.seconds, whole.seconds

    def start_up(first: float, took: float) -> float:
        """A run of one day is the start-up and a day."""
        return max(0.0, (days * first - took) / (days - 1))

    fixed, fixed_cpu = start_up(first, took), start_up(one.cpu, whole.cpu)
    joins, joins_cpu = days * alone, days * bare.cpu
    busy = whole.cpu / took / (os.cpu_count() or 1)
    name = f"backfill of {days} days of {rows:,} rows in one run, beyond its start-up"
    reference = f"sum of the bare joins: {joins:.2f} s; start-up {fixed:.1f} s"
    return [
        Figure.at_most(name, (took - fixed) / joins, "x", reference, BACKFILL),
        Figure.report("backfill: CPU", (whole.cpu - fixed_cpu) / joins_cpu, "x", f"bare joins: {joins_cpu:.2f} CPU s"),
        Figure.report("backfill: cores kept busy", busy, "of 1", f"{os.cpu_count()} cores"),
    ]


# -- the two sides -----------------------------------------------------------------------------------------------


def world(folder: Path, rows: int) -> Site:
    """A home whose adworld makes days of `rows` impressions."""
    content = yaml.safe_load((SHIPPED / "adworld.yaml").read_text())
    content["source"]["rows_per_day"] = rows
    folder.mkdir(parents=True)
    file = folder / "adworld.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return Home(folder / "home").register(str(file))


def _with_logs(site: Site) -> Site:
    """The site, its first day's logs published."""
    from mtmd_assets.assets import logs

    with site.warehouse.stage() as stage:
        logs.build(site, DAY, stage)
        stage.publish()
    return site


def _publish(site: Site) -> None:
    """The day's examples built, checked and published, as a run does it."""
    from mtmd_assets.assets import examples

    with site.warehouse.stage() as stage:
        examples.build(site, DAY, stage)
        stage.publish()


def _bare_join(site: Site, ordered: bool = True) -> None:
    """The same join without questions: each impression with its latest score, valid or not."""
    tables = site.warehouse.tables
    of_impression = ", ".join(f"i.{c}" for c in tables["joined_examples"] if c in tables["impressions"])
    kept = [*(f"score_{t}" for t in site.platform.task_names), "ranker_version"]
    # a window over all scores takes longer than this
    latest = ", ".join(f"arg_max({column}, scored_at) AS {column}" for column in kept)
    scores = ", ".join(f"s.{column}" for column in kept)
    impressions, heavyweight = (sql.quoted(site.warehouse.path(t, DAY)) for t in LOGS[:2])
    with _duckdb(site) as con:
        con.execute(
            f"""COPY (
                SELECT {of_impression}, {scores}, 1.0::DOUBLE AS weight
                FROM read_parquet({impressions}, file_row_number = true) AS i
                JOIN (
                    SELECT impression_id, {latest} FROM read_parquet({heavyweight}) GROUP BY impression_id
                ) AS s USING (impression_id)
                {"ORDER BY i.file_row_number" if ordered else ""}
            ) TO {sql.quoted(site.folder / "bare.parquet")} (FORMAT parquet, COMPRESSION zstd)"""
        )


@contextmanager
def _duckdb(site: Site) -> "Iterator[DuckDBPyConnection]":
    import duckdb

    with duckdb.connect(config={"temp_directory": str(site.folder / "tmp")}) as con:
        yield con


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--growth", type=int, default=2)
    parser.add_argument("--days", type=int, default=4)
    parser.add_argument("--backfill-rows", type=int)
    parser.add_argument("--folder", type=Path, help="where the lakes go while it runs")
    print(table(figures(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
