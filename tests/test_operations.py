"""Days in time: ticks, runs that wait for each other, backfills at once, refused and broken days, killed runs."""

import errno
import os
import subprocess
import sys
import time
from datetime import date, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import dagster as dg
import polars as pl
import pytest
import yaml
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from mtmd_assets.assets import waiting
from mtmd_assets.home import Home
from mtmd_assets.runs import PROCESS, bury_dead
from mtmd_assets.tables import tables
from mtmd_assets.warehouse import Stage
from tests.worlds import SCORED, Runner, cli_output, copy_of, query, show_failure, small_adworld

DAY = {n: date(2026, 1, n) for n in range(1, 8)}


# -- time --------------------------------------------------------------------------------------------------------


def test_a_tick_on_day_d_trains_through_d_minus_1_and_evaluates_the_model_of_d_minus_2(pipeline):
    """The fixture's last run is the schedule's tick on 2026-01-06."""
    assert query(pipeline, "SELECT max(ds) FROM joined_examples") == [(DAY[5],)]
    # the model it trained: window through D-1
    assert query(pipeline, "SELECT window_start, window_end FROM models WHERE ds = '2026-01-05'") == [(DAY[3], DAY[5])]
    # the model it evaluated and embedded with: trained through D-2, on D-1
    [(of_d_minus_2,)] = query(pipeline, "SELECT model_version FROM models WHERE window_end = '2026-01-04'")
    for table in ("slice_metrics", "predictions", "item_embeddings", "query_embeddings"):
        used = query(pipeline, f"SELECT DISTINCT model_version FROM {table} WHERE ds = '2026-01-05'")
        assert used == [(of_d_minus_2,)], table


def test_a_tick_is_in_the_platforms_own_time_zone(tmp_path):
    """The morning after New York's clocks went forward, 6:00 there runs the day before."""
    logs = {"kind": "parquet", "impressions": "here", "heavyweight_scores": "there"}
    file = small_adworld(tmp_path, name="ours", time_zone="America/New_York", source=logs)
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    schedule = runner.definitions.get_repository_def().get_schedule_def("ours_every_day")
    assert schedule.execution_timezone == "America/New_York"
    at = datetime(2026, 3, 9, 6, 0, tzinfo=ZoneInfo("America/New_York"))
    context = dg.build_schedule_context(scheduled_execution_time=at, instance=runner.instance)
    assert [r.partition_key for r in schedule.evaluate_tick(context).run_requests] == ["2026-03-08"]


WAITS = [
    ("models", DAY[4], "adworld_models", SCORED),
    ("joined_examples", DAY[5], "adworld_daily", SCORED),
    ("joined_examples", DAY[4], "adworld_data", ("models",)),
]


def without(runner, table, day, job, status):
    """Take a published day away, with another run that is to build it; returns what puts it back."""
    origin = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "repository"), job)
    other = dg.DagsterRun(job, tags={"dagster/partition": str(day)}, status=status, remote_job_origin=origin)
    runner.instance.add_run(other)
    file = runner.site.warehouse.path(table, day)
    aside = file.rename(file.with_suffix(".aside"))

    def publish():
        aside.rename(file)
        runner.instance.report_run_canceled(other)

    return publish


@pytest.mark.parametrize(("table", "day", "job", "only"), WAITS)
def test_models_and_evaluation_wait_for_what_another_run_is_building(
    pipeline, tmp_path, monkeypatch, table, day, job, only
):
    runner = copy_of(pipeline, tmp_path)
    publish = without(runner, table, day, job, dg.DagsterRunStatus.STARTED)
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            publish()

    monkeypatch.setattr(waiting.time, "sleep", sleep)
    result = runner.run("models", DAY[5], only=only)
    assert result.success, show_failure(result)
    assert len(pauses) == 2


@pytest.mark.parametrize(("table", "day", "job", "only"), WAITS)
def test_nobody_waits_for_a_model_that_is_queued_behind(pipeline, tmp_path, monkeypatch, table, day, job, only):
    runner = copy_of(pipeline, tmp_path)
    without(runner, table, day, job, dg.DagsterRunStatus.QUEUED)
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: pytest.fail("waits"))
    result = runner.run("models", DAY[5], only=only)
    assert not result.success
    assert str(day) in show_failure(result)


def test_a_window_with_a_hole_is_not_trained_on(tmp_path):
    runner = Runner(Home(tmp_path / "home").register(str(small_adworld(tmp_path))))
    assert runner.run("data", DAY[1]).success
    assert runner.run("data", DAY[3]).success
    result = runner.run("models", DAY[3], only=("models",))
    assert not result.success
    assert "joined_examples has no 2026-01-02" in show_failure(result)
    assert runner.site.warehouse.days("models") == []


def test_days_before_the_first_window_are_passed_over(tmp_path):
    runner = Runner(Home(tmp_path / "home").register(str(small_adworld(tmp_path))))
    assert runner.run("models", DAY[2]).success
    assert runner.site.warehouse.days("models") == []
    assert runner.materialized("models") == set()
    assert runner.checks("training_loss", "models") == []


def test_days_built_in_any_order_give_identical_tables(tmp_path):
    homes = []
    for order in ((1, 2, 3), (3, 1, 2)):
        folder = tmp_path / "".join(map(str, order))
        folder.mkdir()
        runner = Runner(Home(folder / "home").register(str(small_adworld(folder))))
        for n in order:
            assert runner.run("data", DAY[n]).success
        homes.append(runner)
    first, second = homes
    for table in tables(first.site.platform):
        for day in first.site.warehouse.days(table):
            one, other = (pl.read_parquet(r.site.warehouse.path(table, day), hive_partitioning=False) for r in homes)
            assert one.equals(other), (table, day)
    assert query(first, "FROM feature_missingness ORDER BY ALL") == query(
        second, "FROM feature_missingness ORDER BY ALL"
    )
    assert query(first, "SELECT count(*) FROM feature_missingness WHERE rule = 'drift'")[0][0] > 0


# -- two backfills and a reader ------------------------------------------------------------------------------------

READER = """
import duckdb, sys, time
from pathlib import Path
database, stop = sys.argv[1:]
reads = 0
while not Path(stop).exists():
    with duckdb.connect(database, read_only=True) as con:
        for ds, rows, distinct in con.execute("SELECT ds, count(*), count(DISTINCT impression_id) FROM joined_examples GROUP BY ds").fetchall():
            assert rows == distinct, ds
        con.execute("SELECT count(*) FROM feature_missingness WHERE NOT passed").fetchall()
    reads += 1
print(reads)
"""


def test_two_backfills_at_once_while_another_process_queries(tmp_path):
    home = Home(tmp_path / "home")
    site = home.register(str(small_adworld(tmp_path)))
    site.warehouse.create()
    stop = tmp_path / "stop"
    environment = {**os.environ, "MTMD_HOME": str(home.root)}
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(site.warehouse.database), str(stop)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    backfills = [
        subprocess.Popen(
            [sys.executable, "-m", "mtmd_assets.cli", "backfill", "2026-01-01", "2026-01-03"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ),
        subprocess.Popen(
            [sys.executable, "-m", "mtmd_assets.cli", "backfill", "2026-01-04", "2026-01-06"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ),
    ]  # fmt: skip
    outputs = [b.communicate(timeout=240)[0] for b in backfills]
    time.sleep(0.5)
    stop.touch()
    reads, reader_errors = reader.communicate(timeout=60)
    assert [b.returncode for b in backfills] == [0, 0], "\n".join(outputs)
    assert reader.returncode == 0, reader_errors
    assert int(reads) > 2
    assert site.warehouse.days("joined_examples") == [DAY[n] for n in range(1, 7)]


# -- faults ------------------------------------------------------------------------------------------------------


def test_a_day_that_breaks_the_contract_is_not_published_and_says_why(tmp_path, monkeypatch):
    runner = Runner(Home(tmp_path / "home").register(str(small_adworld(tmp_path))))
    source = runner.site.source
    read = source.read

    def with_a_hole(day):
        log = read(day)
        if day != DAY[2]:
            return log
        hole = pl.when(pl.col("surface") == "search").then(None).otherwise(pl.col("query_length")).alias("query_length")
        return type(log)(log.impressions.with_columns(hole), log.scores, log.impressions_file, log.scores_file)

    monkeypatch.setattr(source, "read", with_a_hole)
    result = runner.run("data", DAY[1], DAY[3])
    assert not result.success
    assert "query_length" in show_failure(result)
    # the other days of the run stand, the refused one does not
    assert runner.site.warehouse.days("joined_examples") == [DAY[1], DAY[3]]
    assert runner.materialized("joined_examples") == {"2026-01-01", "2026-01-03"}
    # the check says which slice, which feature, what was expected and what was seen
    [evaluation] = runner.checks("feature_contract")
    assert not evaluation.passed
    said = "".join(str(v.value) for v in evaluation.metadata.values())
    assert "search" in said
    assert "query_length" in said
    assert "100 %" in said
    # and SQL says it too
    broken = query(
        runner, "SELECT DISTINCT surface, feature, ds FROM feature_missingness WHERE NOT passed AND rule <> 'drift'"
    )
    assert broken == [("search", "query_length", DAY[2])]
    # nothing trains on the hole
    trained = runner.run("models", DAY[3], only=("models",))
    assert not trained.success
    assert "2026-01-02" in show_failure(trained)


def test_a_refused_rebuild_leaves_the_published_day_as_it_was(tmp_path, monkeypatch):
    """Every table of it, the impressions too: a day is published whole or not at all."""
    runner = Runner(Home(tmp_path / "home").register(str(small_adworld(tmp_path))))
    assert runner.run("data", DAY[1]).success
    warehouse = runner.site.warehouse
    files = [p for t in warehouse.tables if (p := warehouse.path(t, DAY[1])).exists()]
    assert len(files) == 8
    before = [p.read_bytes() for p in files]
    source = runner.site.source
    read = source.read

    def without_a_feature(day):
        log = read(day)
        emptied = log.impressions.with_columns(device=pl.lit(None, pl.String))
        return type(log)(emptied, log.scores, log.impressions_file, log.scores_file)

    monkeypatch.setattr(source, "read", without_a_feature)
    assert not runner.run("data", DAY[1]).success
    assert [p.read_bytes() for p in files] == before
    assert not runner.checks("feature_contract")[0].passed


def test_a_day_on_which_the_join_loses_rows_is_refused(tmp_path, monkeypatch):
    """A fault of the join's own, planted: on one day what is rejected is written nowhere. The day after it stands."""
    runner = Runner(Home(tmp_path / "home").register(str(small_adworld(tmp_path))))
    real = Stage.write

    def forgetful(self, con, table, day, query, *rest):
        lost = table == "rejected_rows" and day == DAY[1]
        return real(self, con, table, day, f"FROM ({query}) WHERE false" if lost else query, *rest)

    monkeypatch.setattr(Stage, "write", forgetful)
    assert not runner.run("data", DAY[1], DAY[2]).success
    [check] = runner.checks("row_accounting")
    assert not check.passed
    assert check.description.startswith("2026-01-01: row_counts: received is not accepted + rejected")
    assert check.metadata["failing days"].value == 1
    assert [d for (d,) in query(runner, "SELECT DISTINCT ds FROM impressions")] == [DAY[2]]


def test_days_of_one_run_that_stand_are_reported_whatever_ends_it(tmp_path, monkeypatch):
    """The disk fills up on the second of three days: the first is published, checked and shown."""
    runner = Runner(Home(tmp_path / "home").register(str(small_adworld(tmp_path))))
    real = Stage.write

    def full(self, con, table, day, *rest):
        if day == DAY[2]:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path(table, day)))
        return real(self, con, table, day, *rest)

    monkeypatch.setattr(Stage, "write", full)
    result = runner.run("data", DAY[1], DAY[3])
    assert not result.success
    assert "No space left on device" in show_failure(result)
    assert runner.materialized("joined_examples") == {str(DAY[1])}
    assert [c.passed for c in runner.checks("feature_contract")] == [True]
    assert list(runner.site.warehouse.staging.iterdir()) == []


def test_a_full_disk_keeps_the_old_day(tmp_path, monkeypatch):
    runner = Runner(Home(tmp_path / "home").register(str(small_adworld(tmp_path))))
    assert runner.run("data", DAY[1]).success
    before = query(runner, "SELECT sum(score_ctr) FROM joined_examples")
    real = Stage.write

    def full(self, con, table, day, *rest):
        if table == "rejected_rows":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path(table, day)))
        return real(self, con, table, day, *rest)

    monkeypatch.setattr(Stage, "write", full)
    assert not runner.run("data", DAY[1]).success
    assert query(runner, "SELECT sum(score_ctr) FROM joined_examples") == before
    assert list(runner.site.warehouse.staging.iterdir()) == []


def test_a_slice_that_the_window_never_saw_is_evaluated_without_a_constant(tmp_path, monkeypatch):
    file = small_adworld(tmp_path, contract={"empty_slices": "allow"})
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    source = runner.site.source
    read = source.read

    def search_starts_late(day):
        log = read(day)
        seen = log.impressions.filter((pl.col("surface") != "search") | (day == DAY[4]))
        scores = log.scores.join(seen.select("impression_id").unique(), on="impression_id", how="semi")
        return type(log)(seen, scores, log.impressions_file, log.scores_file)

    monkeypatch.setattr(source, "read", search_starts_late)
    built = runner.run("data", DAY[1], DAY[4])
    assert built.success, show_failure(built)
    assert runner.run("models", DAY[3], only=("models",)).success
    evaluated = runner.run("models", DAY[4], only=SCORED)
    assert evaluated.success, show_failure(evaluated)
    assert "search" in cli_output(runner, "scoreboard")


def test_a_changed_platform_file_asks_for_the_days_to_be_built_again(tmp_path):
    home = Home(tmp_path / "home")
    runner = Runner(home.register(str(small_adworld(tmp_path))))
    assert runner.run("data", DAY[1], DAY[4]).success
    file = small_adworld(tmp_path)
    content = yaml.safe_load(file.read_text())
    content["features"] = [f for f in content["features"] if f["name"] != "user_taste_5"]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    changed = Runner(home.register(str(file)))
    refused = changed.run("models", DAY[3], only=("models",))
    assert not refused.success
    assert "under another platform file" in show_failure(refused)
    assert query(changed, "SELECT count(*) > 0 FROM joined_examples") == [(True,)], "the views still answer"
    assert changed.run("data", DAY[1], DAY[3]).success
    assert changed.run("models", DAY[3], only=("models",)).success
    stale = changed.run("models", DAY[4], only=SCORED)
    assert not stale.success
    assert "2026-01-04 was built under another platform file" in show_failure(stale)


def test_a_run_whose_process_was_killed_does_not_stay_in_the_queue(tmp_path, monkeypatch):
    home = Home(tmp_path / "home")
    home.register(str(small_adworld(tmp_path)))
    monkeypatch.setenv("DAGSTER_HOME", "")  # restored afterwards
    home.prepare_dagster()
    command = [sys.executable, "-m", "mtmd_assets.cli", "backfill", "2026-01-01", "2026-01-20"]
    with dg.DagsterInstance.get() as instance:
        victim = subprocess.Popen(command, env={**os.environ, "MTMD_HOME": str(home.root)})
        while not any(PROCESS in r.tags for r in instance.get_runs()):
            assert victim.poll() is None
            time.sleep(0.05)
        victim.kill()
        victim.wait()
        [run] = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.STARTED
        assert [r.run_id for r in bury_dead(instance)] == [run.run_id]
        assert instance.get_runs()[0].status == dg.DagsterRunStatus.FAILURE
        assert list(bury_dead(instance)) == []


POOL_SCRIPT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from mtmd_assets.training_pool import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 60).result()
"""


def test_workers_end_with_the_process_that_started_them_even_if_it_is_killed(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL_SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert _running(worker)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while _running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _running(worker)


def _running(process: int) -> bool:
    """Whether there is such a process; one that has ended and waits for its parent to notice does not count."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
