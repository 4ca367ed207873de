"""A team's own logs: a platform file and folders of Parquet, through every stage, with no code."""

import os
import subprocess
import sys
import time
from datetime import date, timedelta

import dagster as dg
import duckdb
import polars as pl
import pytest
import yaml

from mtmd_assets.home import Home
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.sources.adworld import Adworld
from tests.worlds import SCORED, Runner, show_failure, small_adworld

FIRST = date(2026, 1, 1)
DAYS = [FIRST + timedelta(n) for n in range(4)]


def own_platform(folder, scores=True):
    """Logs of adworld written as a team would have them: text ids, other column names, a file a day."""
    world = parse_platform(small_adworld(folder).read_text(), "small_adworld.yaml")
    source = Adworld(world)
    ids = ["impression_id", "request_id", "user_id", "item_id"]
    for day in DAYS:
        log = source.read(day)
        mine = log.impressions.with_columns(pl.col(ids).cast(pl.String)).rename({"item_id": "ad", "ts": "shown_at"})
        path = folder / "impressions" / f"ds={day}" / "part-0.parquet"
        path.parent.mkdir(parents=True)
        mine.with_columns(internal_note=pl.lit("not ours")).write_parquet(path)
        if scores:
            path = folder / "scores" / f"{day}.parquet"
            path.parent.mkdir(exist_ok=True)
            assert log.scores is not None
            log.scores.with_columns(pl.col("impression_id").cast(pl.String)).write_parquet(path)
    content = yaml.safe_load(small_adworld(folder).read_text())
    content.update(name="ours", id_type="text")
    del content["experiments"]  # of adworld's days
    content["source"] = {
        "kind": "parquet",
        "impressions": str(folder / "impressions"),
        "columns": {"item_id": "ad", "ts": "shown_at"},
    }
    content["training"] = {"window_days": 2, "max_epochs": 1, "accelerator": "cpu"}
    if scores:
        content["source"]["heavyweight_scores"] = str(folder / "scores")
    else:
        content["ranker"] = {"train_days": 1, "trees": 20}
        content["end"] = str(DAYS[-1])
    file = folder / "ours.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("scores", [True, False], ids=["with their scores", "scored by the built-in ranker"])
def test_own_logs_through_every_stage(tmp_path, scores):
    runner = Runner(Home(tmp_path / "home").register(str(own_platform(tmp_path, scores))))
    built = runner.run("data", DAYS[0], DAYS[-1])
    assert built.success, show_failure(built)
    scored_from = DAYS[0] if scores else DAYS[1]
    assert runner.site.warehouse.days("joined_examples") == [d for d in DAYS if d >= scored_from]
    trained = runner.run("models", DAYS[2], only=("models",))
    assert trained.success, show_failure(trained)
    evaluated = runner.run("models", DAYS[3], only=SCORED)
    assert evaluated.success, show_failure(evaluated)
    with duckdb.connect(str(runner.site.warehouse.database), read_only=True) as con:
        [(cells, rows)] = con.execute(
            "SELECT count(*), sum(rows) FROM slice_metrics WHERE model = 'mtmd' AND bucket IS NULL"
        ).fetchall()
        [(kind,)] = con.execute("SELECT DISTINCT typeof(impression_id) FROM joined_examples").fetchall()
        counted = con.execute("SELECT source, received - accepted - rejected FROM row_counts WHERE ds = ?", [DAYS[0]])
        assert dict(counted.fetchall()) == dict.fromkeys(
            ("log", "impressions", "heavyweight_scores") if scores else ("log",), 0
        ), "every row of every day is accounted for, scored or not"
        versions = con.execute("SELECT DISTINCT ranker_version FROM joined_examples").fetchall()
    assert cells == 18
    assert rows > 3 * 4_000
    assert kind == "VARCHAR"
    assert (versions == [("hw-1",)]) == scores


def test_a_truncated_file_refuses_its_day_only(tmp_path):
    runner = Runner(Home(tmp_path / "home").register(str(own_platform(tmp_path))))
    broken = tmp_path / "impressions" / f"ds={DAYS[1]}" / "part-0.parquet"
    broken.write_bytes(broken.read_bytes()[:-100])
    result = runner.run("data", DAYS[0], DAYS[2])
    assert not result.success
    said = show_failure(result)
    assert str(broken) in said
    assert str(DAYS[1]) in said
    assert runner.site.warehouse.days("impressions") == [DAYS[0], DAYS[2]]
    assert runner.materialized("joined_examples") == {str(DAYS[0]), str(DAYS[2])}


def test_down_sampling_weighs_training_and_spares_evaluation(tmp_path):
    file = own_platform(tmp_path)
    content = yaml.safe_load(file.read_text())
    content["join"] = {"sample_rate": 0.5}
    file.write_text(yaml.safe_dump(content))
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    assert runner.run("data", DAYS[0], DAYS[2]).success
    assert runner.run("models", DAYS[1], only=("models",)).success
    evaluated = runner.run("models", DAYS[2], only=SCORED)
    assert evaluated.success, show_failure(evaluated)
    with duckdb.connect(str(runner.site.warehouse.database), read_only=True) as con:
        [(kept, weights)] = con.execute(
            "SELECT count(*), list(DISTINCT weight) FROM joined_examples WHERE ds = ?", [DAYS[2]]
        ).fetchall()
        [(left_out,)] = con.execute(
            "SELECT count(*) FROM rejected_rows WHERE ds = ? AND reason = 'sampled_out'", [DAYS[2]]
        ).fetchall()
        [(predicted,)] = con.execute(
            "SELECT count(*) FROM predictions WHERE ds = ? AND task = 'ctr'", [DAYS[2]]
        ).fetchall()
        [(requests, embedded)] = con.execute(
            """SELECT (SELECT count(DISTINCT request_id) FROM impressions WHERE ds = $day AND impression_id IN
                (SELECT impression_id FROM predictions)),
                (SELECT count(*) FROM query_embeddings WHERE ds = $day AND task = 'ctr')""",
            {"day": DAYS[2]},
        ).fetchall()
    assert weights == [2.0]
    assert 0.45 < kept / (kept + left_out) < 0.55
    assert predicted == kept + left_out
    assert embedded == requests


@pytest.mark.parametrize(("feature", "day"), [("ad_age_days", DAYS[0]), ("query_length", DAYS[1])])
def test_features_that_vary_within_an_item_or_a_request_refuse_their_day(tmp_path, feature, day):
    file = own_platform(tmp_path)
    path = tmp_path / "impressions" / f"ds={day}" / "part-0.parquet"
    row = pl.int_range(pl.len()).cast(pl.Float32)
    pl.read_parquet(path).with_columns(row.alias(feature)).write_parquet(path)
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    result = runner.run("data", DAYS[0], DAYS[1])
    assert not result.success
    assert f"differ in ['{feature}']" in show_failure(result)
    assert str(path) in show_failure(result)
    assert runner.site.warehouse.days("impressions") == [d for d in DAYS[:2] if d != day]


def test_refused_scores_name_the_file_they_came_in(tmp_path):
    file = own_platform(tmp_path)
    path = tmp_path / "scores" / f"{DAYS[0]}.parquet"
    pl.read_parquet(path).with_columns(score_ctr=pl.lit(2.0)).write_parquet(path)
    result = Runner(Home(tmp_path / "home").register(str(file))).run("data", DAYS[0])
    assert not result.success
    assert f"{path}, day {DAYS[0]}: " in show_failure(result)
    assert ".staging" not in show_failure(result)


# -- a lost day ----------------------------------------------------------------------------------------------------


def with_history(folder):
    """The same logs, with a feature that looks one day back, and without the second day."""
    file = own_platform(folder)
    content = yaml.safe_load(file.read_text())
    history = {"by": ["item_id"], "of": "ctr", "per": "impressions", "days": 1}
    content["features"].append({"name": "item_ctr", "side": "item", "kind": "dense", "history": history})
    file.write_text(yaml.safe_dump(content))
    lost = folder / "impressions" / f"ds={DAYS[1]}"
    lost.rename(folder / "lost")
    return file, lost


def test_a_lost_day_costs_the_examples_of_its_look_back_only(tmp_path):
    file, lost = with_history(tmp_path)
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    warehouse = runner.site.warehouse
    result = runner.run("data", DAYS[0], DAYS[3])
    assert not result.success
    assert f"history of {DAYS[2]} needs the impressions of {DAYS[1]}" in show_failure(result)
    assert f"the log of {DAYS[2]} is checked and published, joined_examples is not" in show_failure(result)
    assert warehouse.days("impressions") == warehouse.days("heavyweight_scores") == [DAYS[0], DAYS[2], DAYS[3]]
    assert warehouse.days("joined_examples") == [DAYS[0], DAYS[3]]
    assert runner.materialized("impressions") == {str(d) for d in (DAYS[0], DAYS[2], DAYS[3])}
    assert runner.materialized("joined_examples") == {str(DAYS[0]), str(DAYS[3])}
    with warehouse.connect() as con:
        counted = con.execute("SELECT source, received - accepted - rejected FROM row_counts WHERE ds = ?", [DAYS[2]])
        assert counted.fetchall() == [("log", 0)], "no account of examples that are not there"
        rules = "SELECT count(*), count(*) FILTER (feature = 'item_ctr') FROM feature_contract WHERE ds = ?"
        [(checked, of_history)] = con.execute(rules, [DAYS[2]]).fetchall()
    assert checked > 0
    assert of_history == 0
    # the lost day is found, and the day that it withheld built again
    (tmp_path / "lost").rename(lost)
    built = runner.run("data", DAYS[1], DAYS[2])
    assert built.success, show_failure(built)
    assert warehouse.days("joined_examples") == DAYS


@pytest.mark.parametrize("table", ["impressions", "scores"])
def test_a_faulty_log_beside_a_lost_day_is_not_published(tmp_path, table):
    file, _ = with_history(tmp_path)
    if table == "impressions":
        path, fault = tmp_path / "impressions" / f"ds={DAYS[2]}" / "part-0.parquet", pl.lit(None, pl.String)
        pl.read_parquet(path).with_columns(device=fault).write_parquet(path)
        said = "the feature contract is broken"
    else:
        path = tmp_path / "scores" / f"{DAYS[2]}.parquet"
        pl.read_parquet(path).with_columns(score_ctr=pl.lit(2.0)).write_parquet(path)
        said = f"{path}, day {DAYS[2]}: "
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    result = runner.run("data", DAYS[0], DAYS[2])
    assert not result.success
    assert said in show_failure(result)
    assert runner.site.warehouse.days("impressions") == [DAYS[0]]


def test_a_rebuild_that_lacks_an_earlier_day_leaves_the_day_as_it_was(tmp_path):
    file, lost = with_history(tmp_path)
    (tmp_path / "lost").rename(lost)
    runner = Runner(Home(tmp_path / "home").register(str(file)))
    warehouse = runner.site.warehouse
    assert runner.run("data", DAYS[0], DAYS[2]).success
    warehouse.path("impressions", DAYS[1]).unlink()
    files = [p for t in warehouse.tables if (p := warehouse.path(t, DAYS[2])).exists()]
    before = [p.stat().st_mtime_ns for p in files]
    assert not runner.run("data", DAYS[2]).success
    assert [p.stat().st_mtime_ns for p in files] == before


def test_logs_whose_ranker_is_not_trained_yet_are_published(tmp_path):
    runner = Runner(Home(tmp_path / "home").register(str(own_platform(tmp_path, scores=False))))
    assert not runner.run("data", DAYS[2]).success
    assert runner.site.warehouse.days("impressions") == [DAYS[2]]
    assert runner.site.warehouse.days("joined_examples") == []
    built = runner.run("data", DAYS[0], DAYS[2])
    assert built.success, show_failure(built)


def test_a_backfill_waits_for_days_that_another_one_is_building(tmp_path, monkeypatch):
    """The days 3 and 4 need the ranker that the backfill of the days 1 and 2 trains."""
    home = Home(tmp_path / "home")
    site = home.register(str(own_platform(tmp_path, scores=False)))
    environment = {**os.environ, "MTMD_HOME": str(home.root)}
    monkeypatch.setenv("DAGSTER_HOME", "")  # restored afterwards
    home.prepare_dagster()
    command = [sys.executable, "-m", "mtmd_assets.cli", "backfill", "--platform", "ours"]
    log = (tmp_path / "log").open("w+")
    first = subprocess.Popen([*command, str(DAYS[0]), str(DAYS[1])], env=environment, stdout=log, stderr=log)
    with dg.DagsterInstance.get() as instance:
        while first.poll() is None and not instance.get_runs():
            time.sleep(0.05)
    second = subprocess.Popen([*command, str(DAYS[2]), str(DAYS[3])], env=environment, stdout=log, stderr=log)
    codes = [first.wait(timeout=120), second.wait(timeout=120)]
    log.seek(0)
    assert codes == [0, 0], log.read()
    assert site.warehouse.days("joined_examples") == DAYS[1:]


def test_a_backfill_does_not_wait_for_days_that_nobody_builds(tmp_path):
    runner = Runner(Home(tmp_path / "home").register(str(own_platform(tmp_path, scores=False))))
    result = runner.run("data", DAYS[2])
    assert not result.success
    assert "run ours_data for these days first" in show_failure(result)
