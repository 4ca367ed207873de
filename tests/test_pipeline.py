"""The whole pipeline at a small size, through Dagster, as a user runs it."""

import errno
import math
import os
import random
import shutil
import subprocess
import sys
import time
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import dagster as dg
import duckdb
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

import sql as sql_files
from mtmd_assets import model_store
from mtmd_assets.assets import waiting
from mtmd_assets.assets.training import train_window
from mtmd_assets.home import Home
from mtmd_assets.platform import SHIPPED
from mtmd_assets.runs import PROCESS, bury_dead
from mtmd_assets.tables import tables
from mtmd_assets.warehouse import Stage
from tests.sources.kuairand_folder import log_row, write_folder
from tests.worlds import KUAIRAND, Runner, show_failure, small_adworld

SCORED = ("predictions", "slice_metrics", "routing_metrics", "item_embeddings", "query_embeddings")
EXPERIMENTAL = ("experiment_", "improvement_", "trials")
"""Tables that the daily jobs leave empty (see test_experiments.py)."""
DAY = {n: date(2026, 1, n) for n in range(1, 8)}


def query(runner, sql, *parameters):
    """What a person's DuckDB shell answers."""
    with duckdb.connect(str(runner.site.warehouse.database), read_only=True) as con:
        return con.execute(sql, parameters).fetchall()


# -- what a run leaves ---------------------------------------------------------------------------------------------


def test_every_table_has_rows_and_its_columns(pipeline):
    for table, columns in tables(pipeline.site.platform).items():
        described = query(pipeline, f"DESCRIBE {table}")
        assert [(c[0], c[1]) for c in described] == [*columns.items(), ("ds", "DATE")], table
        if not table.startswith(EXPERIMENTAL):
            assert query(pipeline, f"SELECT count(*) FROM {table}")[0][0] > 0, table


def test_dagster_shows_each_day_of_each_asset(pipeline):
    scored = {str(DAY[n]) for n in range(1, 6)}
    for table in (
        "impressions",
        "heavyweight_scores",
        "joined_examples",
        "rejected_rows",
        "row_counts",
        "feature_missingness",
    ):
        assert pipeline.materialized(table) == scored, table
    assert pipeline.materialized("models") == {str(DAY[3]), str(DAY[4]), str(DAY[5])}
    for table in ("predictions", "slice_metrics", "routing_metrics", "item_embeddings", "query_embeddings"):
        assert pipeline.materialized(table) == {str(DAY[4]), str(DAY[5])}, table
    assert all(e.passed for name in ("feature_contract", "row_accounting") for e in pipeline.checks(name))


def test_every_row_received_is_accounted_for(pipeline):
    counts = query(pipeline, "SELECT ds, source, received, accepted, rejected FROM row_counts ORDER BY ALL")
    assert len(counts) == 5 * 3
    assert all(received == accepted + rejected for _, _, received, accepted, rejected in counts)
    by_source = query(pipeline, "SELECT ds, source, count(*) FROM rejected_rows GROUP BY ALL")
    rejected = {(ds, source): n for ds, source, n in by_source}
    assert rejected == {(ds, s): r for ds, s, _, _, r in counts if r}
    joined = query(pipeline, "SELECT ds, count(*) FROM joined_examples GROUP BY ds ORDER BY ds")
    assert joined == [(ds, accepted) for ds, s, _, accepted, _ in counts if s == "impressions"]


def test_stored_embeddings_give_the_predictions_in_sql(pipeline):
    """sigma(q . i) along the task chain equals `predictions`: |dp| <= 1e-5 and |d ln p| <= 1e-4."""
    worst = query(
        pipeline,
        """
        WITH conditional AS (
            SELECT j.ds, j.impression_id, q.task, probability(q.embedding, i.embedding) AS p
            FROM joined_examples AS j
            JOIN query_embeddings AS q USING (ds, request_id)
            JOIN item_embeddings AS i ON i.ds = j.ds AND i.item_id = j.item_id AND i.product = j.product AND i.task = q.task
                AND i.model_version = q.model_version
        ), unconditional AS (
            SELECT c.ds, c.impression_id, c.task, c.p * if(c.task = 'ctr', 1, parent.p) AS p
            FROM conditional AS c JOIN conditional AS parent ON parent.task = 'ctr' AND parent.impression_id = c.impression_id AND parent.ds = c.ds
        )
        SELECT count(*), max(abs(u.p - s.probability)), max(abs(ln(u.p) - ln(s.probability)))
        FROM unconditional AS u JOIN predictions AS s USING (ds, impression_id, task)
        """,
    )
    rows, dp, dlnp = worst[0]
    assert rows == query(pipeline, "SELECT count(*) FROM predictions")[0][0]
    assert dp <= 1e-5
    assert dlnp <= 1e-4


def test_predictions_keep_the_task_chain(pipeline):
    above = "SELECT count(*) FROM predictions AS c JOIN predictions AS p USING (ds, impression_id) WHERE p.task = 'ctr' AND c.probability > p.probability"
    assert query(pipeline, above) == [(0,)]


def test_slice_metrics_equal_a_computation_by_hand(pipeline):
    frame = pl.DataFrame(
        query(pipeline, "SELECT surface, product, task, score, probability FROM predictions WHERE ds = '2026-01-04'"),
        schema=["surface", "product", "task", "score", "probability"],
        orient="row",
    )
    found = query(
        pipeline,
        "SELECT surface, product, task, rows, logmae, calibration FROM slice_metrics WHERE model = 'mtmd' AND bucket IS NULL AND ds = '2026-01-04'",
    )
    assert len(found) == 6 * 2 + 3 + 3  # ctr and gctr everywhere, octr on standard, cvr on shopping
    for surface, product, task, rows, logmae, calibration in found:
        cell = frame.filter((pl.col("surface") == surface) & (pl.col("product") == product) & (pl.col("task") == task))
        p, t = np.maximum(cell["probability"].to_numpy(), 1e-6), np.maximum(cell["score"].to_numpy(), 1e-6)
        assert rows == len(cell)
        assert logmae == pytest.approx(np.abs(np.log(p) - np.log(t)).mean(), rel=1e-9)
        assert calibration == pytest.approx(cell["probability"].sum() / cell["score"].sum(), rel=1e-9)


def test_constants_come_from_the_window_only(pipeline):
    found = query(
        pipeline,
        "SELECT surface, product, task, logmae FROM slice_metrics WHERE model = 'constant' AND bucket IS NULL AND task = 'ctr' AND ds = '2026-01-04' ORDER BY ALL",
    )
    window = "SELECT surface, product, avg(score_ctr) FROM joined_examples WHERE ds BETWEEN '2026-01-01' AND '2026-01-03' GROUP BY ALL"
    constant = {(s, p): mean for s, p, mean in query(pipeline, window)}
    for surface, product, _, logmae in found:
        scores = query(
            pipeline,
            "SELECT score_ctr FROM joined_examples WHERE ds = '2026-01-04' AND surface = ? AND product = ?",
            surface,
            product,
        )
        expected = np.mean([abs(math.log(constant[surface, product]) - math.log(t)) for (t,) in scores])
        assert logmae == pytest.approx(expected, rel=1e-9)


def test_buckets_are_tenths_by_heavyweight_score(pipeline):
    rows = query(
        pipeline,
        "SELECT surface, product, task, sum(rows) FILTER (bucket IS NULL), sum(rows) FILTER (bucket IS NOT NULL), max(rows) FILTER (bucket IS NOT NULL) "
        "- min(rows) FILTER (bucket IS NOT NULL) FROM slice_metrics WHERE model = 'mtmd' AND ds = '2026-01-04' GROUP BY ALL",
    )
    assert all(whole == parts and spread <= 1 for *_, whole, parts, spread in rows)


def test_gates_of_a_router_sum_to_one(pipeline):
    sums = query(
        pipeline,
        "SELECT sum(mean_gate), count(*) FROM routing_metrics WHERE ds = '2026-01-04' GROUP BY tower, domain, task",
    )
    assert all(total == pytest.approx(1, abs=1e-6) and experts == 3 for total, experts in sums)


def test_a_checkpoint_knows_what_it_was_made_of(pipeline):
    record = model_store.trained_on(pipeline.site, DAY[3])
    manifest = model_store.load(pipeline.site, record).manifest
    assert (record.window_start, record.window_end) == (DAY[1], DAY[3])
    assert manifest["window"] == [str(DAY[n]) for n in (1, 2, 3)]
    assert manifest["platform"] == "adworld"
    assert manifest["code_version"] == model_store.code_version()
    assert len(manifest["data_hashes"]) == 3
    files = {p.suffix for p in (pipeline.site.models / record.version).iterdir()}
    assert files == {".safetensors", ".json"}, "no pickle"


def copy_of(pipeline, folder):
    """The fixture's home, to do with as one likes."""
    shutil.copytree(pipeline.site.folder, folder / "adworld")
    return Runner(Home(folder).site("adworld"))


def test_a_version_names_its_weights(pipeline, tmp_path, monkeypatch):
    """Training again gives the same name on the same machine, and on one that calculates otherwise another."""
    site = copy_of(pipeline, tmp_path).site
    record = model_store.trained_on(site, DAY[3])
    train_window(site, DAY[3], "again", print)
    assert model_store.trained_on(site, DAY[3]) == record
    seeded = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeded(seed + 1))
    train_window(site, DAY[3], "elsewhere", print)
    other = model_store.trained_on(site, DAY[3])
    assert other.version != record.version
    one, two = (model_store.load(site, r).manifest["tensors_sha256"] for r in (record, other))
    assert one != two, "what predictions name is still there"


def test_metadata_has_pictures_and_previews(pipeline):
    def latest(table):
        record = pipeline.instance.fetch_materializations(pipeline.key(table), limit=1).records[0]
        return record.asset_materialization.metadata

    assert "data:image/png;base64," in latest("models")["loss curve"].value
    assert "data:image/png;base64," in latest("slice_metrics")["LogMAE"].value
    assert "| impression_id |" in latest("joined_examples")["preview"].value
    assert latest("joined_examples")["dagster/row_count"].value > 2_000


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
    file = small_adworld(tmp_path, time_zone="America/New_York")
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    schedule = runner.definitions.get_repository_def().get_schedule_def("adworld_every_day")
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


def test_a_window_with_a_hole_is_not_trained_on(pipeline, tmp_path):
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


# -- the command line ----------------------------------------------------------------------------------------------


def run_cli(home, *arguments, **environment):
    """Run `mtmd` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mtmd_assets.cli", *arguments],
        env={**os.environ, "MTMD_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def cli_output(runner, *arguments):
    """What `mtmd` prints about a runner's home."""
    result = run_cli(runner.site.folder.parent, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


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


def test_the_prompt_spills_in_the_home(pipeline):
    spill = pipeline.site.folder / "tmp"
    assert "true" in cli_output(pipeline, "sql", f"SELECT current_setting('temp_directory') = '{spill}'")


@pytest.mark.parametrize("file", sorted((sql_files.FOLDER / "queries").glob("*.sql")), ids=lambda f: f.stem)
def test_the_shipped_queries_answer_in_the_prompt(pipeline, file):
    answer = cli_output(pipeline, "sql", f".read {file}")
    assert "rows" in answer
    if file.stem == "prediction_from_embeddings":
        assert "20 rows" in answer


# -- real logs -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not KUAIRAND.is_dir(), reason="../shared/data/KuaiRand-Pure is not there")
def test_kuairand_end_to_end(tmp_path):
    """Three days of real logs train the ranker, it scores the next four, and MTMD learns from them."""
    content = yaml.safe_load((SHIPPED / "kuairand.yaml").read_text())
    content["training"] = {"window_days": 2, "max_epochs": 1, "accelerator": "cpu"}
    content["end"] = "2022-04-30"
    file = tmp_path / "kuairand.yaml"
    file.write_text(yaml.safe_dump(content))
    runner = Runner(Home(tmp_path / "home").register(str(file), str(KUAIRAND)))
    start = runner.site.platform.start
    result = runner.run("data", start, date(2022, 4, 30))
    assert result.success, show_failure(result)
    assert runner.materialized("heavyweight_ranker") == {"2022-04-27"}
    assert runner.materialized("joined_examples") == {f"2022-04-{d}" for d in (28, 29, 30)}
    trained = runner.run("models", date(2022, 4, 29), only=("models",))
    assert trained.success, show_failure(trained)
    evaluated = runner.run(
        "models",
        date(2022, 4, 30),
        only=("predictions", "slice_metrics", "routing_metrics", "item_embeddings", "query_embeddings"),
    )
    assert evaluated.success, show_failure(evaluated)
    [(cells, slices)] = query(
        runner,
        "SELECT count(*), count(DISTINCT surface || product) FROM slice_metrics WHERE model = 'mtmd' AND bucket IS NULL",
    )
    assert slices == 20
    assert cells == 60
    scores = runner.instance.fetch_materializations(runner.key("heavyweight_scores"), limit=5).records
    assert {r.partition_key for r in scores} == {f"2022-04-{d}" for d in (28, 29, 30)}
    assert all(0.6 < r.asset_materialization.metadata["AUC click"].value < 0.9 for r in scores)
    assert Path(runner.site.folder) == tmp_path / "home" / "kuairand"
    assert (date(2022, 4, 30) - start) == timedelta(5)


def made_up_kuairand(folder):
    """A small folder of KuaiRand's layout, 25 to 28 April, and a platform file for it."""
    rng = random.Random(0)
    log = [
        log_row(
            user,
            rng.randrange(12),
            f"202204{d}",
            at=datetime(2022, 4, d, 1 + n, user),
            click=int(rng.random() < 0.2 + 0.5 * (user % 2)),
            long_view=rng.randrange(2),
            profile=rng.randrange(2),
            tab=n % 3,
        )
        for d in range(25, 29)
        for user in range(20)
        for n in range(12)
    ]
    content = yaml.safe_load((SHIPPED / "kuairand.yaml").read_text())
    content["ranker"] = {"train_days": 1, "trees": 20, "min_leaf": 10, "cross": [["user_id", "surface"]]}
    content["training"] = {"window_days": 2, "max_epochs": 1, "batch_size": 256, "accelerator": "cpu"}
    content["end"] = "2022-04-28"
    for feature in content["features"]:  # its users are all alike, and know little
        feature["max_missing"] = 1.0
    file = folder / "kuairand.yaml"
    file.write_text(yaml.safe_dump(content))
    return file, write_folder(folder / "KuaiRand-Pure", log)


def test_logs_without_scores_end_to_end(tmp_path):
    """The first day trains the ranker, it scores the next three, and MTMD learns from two and is evaluated on one."""
    file, logs = made_up_kuairand(tmp_path)
    runner = Runner(Home(tmp_path / "home").register(str(file), str(logs)))
    built = runner.run("data", date(2022, 4, 25), date(2022, 4, 28))
    assert built.success, show_failure(built)
    assert runner.materialized("heavyweight_ranker") == {"2022-04-25"}
    scored = {f"2022-04-{d}" for d in (26, 27, 28)}
    assert runner.materialized("heavyweight_scores") == runner.materialized("joined_examples") == scored
    trained = runner.run("models", date(2022, 4, 27), only=("models",))
    assert trained.success, show_failure(trained)
    evaluated = runner.run("models", date(2022, 4, 28), only=SCORED)
    assert evaluated.success, show_failure(evaluated)
    cells = "SELECT DISTINCT task FROM slice_metrics WHERE model = 'mtmd' AND logmae IS NOT NULL ORDER BY task"
    assert query(runner, cells) == [("click",), ("long_view",), ("profile_enter",)]
    [(versions,)] = query(runner, "SELECT list(DISTINCT ranker_version) FROM heavyweight_scores")
    assert query(runner, "SELECT ranker_versions FROM models") == [(versions,)]
    assert "AUC of the heavyweight ranker" in cli_output(runner, "scoreboard", "--platform", "kuairand")
