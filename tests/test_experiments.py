"""The experiments at a small size: contenders and ablations trained, scored, compared, written down."""

import json
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mtmd_assets import cli, contenders, model_store, study
from mtmd_assets.contenders import CONTENDERS, Change, change_of, train_config
from mtmd_assets.faults import PlatformError, UsageError, Withheld
from mtmd_assets.in_process import RunFailed
from mtmd_assets.join import create_evaluated
from mtmd_assets.training_pool import TrainJob, train_all
from tests.studied import DAYS, OF_DAY, TRAINED, quiet
from tests.worlds import copy_of, query


def test_the_days_that_lack_are_built_then_the_evaluation_days_are_scored_in_one_run(studied):
    assert [(job, day) for job, day, _ in studied.runs[:3]] == [
        ("data", date(2026, 1, 1)),
        ("experiments", DAYS[0]),
        ("improvements", DAYS[1]),
    ]
    for table in ("experiment_models", "experiment_predictions"):
        assert studied.materialized(table) == {str(d) for d in DAYS}


def test_the_command_writes_the_same_document_and_prints_the_headline(studied, tmp_path, monkeypatch, capsys):
    copy_of(studied, tmp_path / "home")
    monkeypatch.setenv("MTMD_HOME", str(tmp_path / "home"))
    document = tmp_path / "results.md"
    models = ["--models", ",".join(TRAINED[1:])]
    assert cli.main(["results", "--platform", "adworld", "--document", str(document), *models]) == 0
    assert document.read_text() == studied.document.read_text()
    printed = capsys.readouterr().out
    for model in TRAINED[1:]:
        [line] = [line for line in document.read_text().splitlines() if line.startswith(f"| {model} | ")][:1]
        improvement = line.split(" | ")[6 if model in contenders.ABLATIONS else 2]
        assert f"| {model} | 2 | {improvement} |" in printed, model


def test_every_model_is_trained_with_every_seed_on_the_window_before(studied):
    rows = query(studied, "SELECT ds, model, seed, window_start, window_end FROM experiment_models ORDER BY ALL")
    starts = {DAYS[0]: date(2026, 1, 1), DAYS[1]: date(2026, 1, 2)}
    ends = {DAYS[0]: date(2026, 1, 3), DAYS[1]: date(2026, 1, 4)}
    assert rows == sorted((d, m, s, starts[d], ends[d]) for d in DAYS for m in OF_DAY[d] for s in (0, 1))


def test_trainings_of_different_days_have_different_seeds_and_name_their_ranker(studied):
    rows = query(studied, "SELECT model, seed, config, ranker_versions FROM experiment_models")
    seeds = [(model, json.loads(config)["seed"]) for model, _, config, _ in rows]
    assert len(set(seeds)) == len(rows), "of each model, day and seed"
    [(versions,)] = query(studied, "SELECT list(DISTINCT ranker_version ORDER BY ranker_version) FROM joined_examples")
    assert {tuple(v) for *_, v in rows} == {tuple(versions)}


def test_every_model_scores_every_row_with_every_task_of_its_slice(studied):
    counts = query(
        studied,
        "SELECT model, seed, ds, count(*), count(DISTINCT impression_id), min(probability) > 0, max(probability) < 1 "
        "FROM experiment_predictions GROUP BY ALL",
    )
    assert len(counts) == 2 * sum(map(len, OF_DAY.values()))
    for day in DAYS:
        [(examples,)] = query(studied, "SELECT count(*) FROM joined_examples WHERE ds = ?", day)
        assert {c[3:] for c in counts if c[2] == day} == {(3 * examples, examples, True, True)}


def test_an_ablation_is_compared_on_the_days_that_it_was_trained_for(studied):
    rows = query(studied, "SELECT count(*) FROM joined_examples WHERE ds = ? AND surface = 'search'", DAYS[1])
    found = """SELECT sum(rows)::BIGINT FROM improvements
        WHERE contender = 'no_routing' AND surface = 'search' AND task = 'gctr' AND bucket IS NULL"""
    assert query(studied, found) == rows


def test_metrics_of_each_seed_are_its_own(studied):
    [(cells, off)] = query(
        studied,
        """SELECT count(*), count(*) FILTER (abs(m.logmae - p.logmae) > 1e-9)
        FROM experiment_slice_metrics AS m JOIN (
            SELECT ds, model, seed, surface, product, task, avg(abs(ln(greatest(probability, 1e-6)) - ln(greatest(score, 1e-6)))) AS logmae
            FROM experiment_predictions GROUP BY ALL
        ) AS p USING (ds, model, seed, surface, product, task) WHERE m.bucket IS NULL""",
    )
    assert (cells, off) == (sum(map(len, OF_DAY.values())) * 2 * 18, 0), "the constants have no predictions"
    [(smallest, largest)] = query(
        studied,
        "SELECT min(n), max(n) FROM (SELECT count(*) AS n FROM experiment_slice_metrics WHERE bucket IS NOT NULL "
        "GROUP BY ds, model, seed, surface, product, task)",
    )
    assert (smallest, largest) == (10, 10)


def test_the_view_shows_experiments_beside_the_daily_evaluation(studied):
    assert {m for (m,) in query(studied, "SELECT DISTINCT model FROM slice_metrics")} == set(TRAINED)


def test_improvements_equal_a_computation_by_hand(studied):
    errors = """SELECT avg(abs(ln(greatest(probability, 1e-6)) - ln(greatest(score, 1e-6)))) FROM experiment_predictions
        WHERE model = ? AND surface = 'search' AND product = 'standard' AND task = 'gctr' AND seed = ?"""
    logmae = {m: np.mean([query(studied, errors, m, seed)[0][0] for seed in (0, 1)]) for m in ("mtmd", "slice_towers")}
    [(improvement, low, high, rows, seeds)] = query(
        studied,
        """SELECT improvement, low, high, rows, seeds FROM improvements
        WHERE contender = 'slice_towers' AND surface = 'search' AND product = 'standard' AND task = 'gctr' AND bucket IS NULL""",
    )
    assert improvement == pytest.approx(1 - logmae["mtmd"] / logmae["slice_towers"], rel=1e-9)
    assert low < improvement < high
    assert seeds == 2
    assert (
        rows
        == query(
            studied,
            "SELECT count(*) FROM joined_examples WHERE surface = 'search' AND product = 'standard' AND ds >= ?",
            DAYS[0],
        )[0][0]
    )
    assert {c for (c,) in query(studied, "SELECT DISTINCT contender FROM improvements")} == set(TRAINED) - {"mtmd"}


def test_models_that_are_there_are_not_trained_again_and_others_stay(studied, tmp_path):
    runner = copy_of(studied, tmp_path / "home")
    folders = sorted(runner.site.experiments.glob("*/"))
    before = {f: (f / "model.safetensors").stat().st_mtime_ns for f in folders}
    config = {"ops": {"adworld_train_and_score": {"config": {"models": ["no_cross"], "seeds": 1, "workers": 1}}}}
    assert runner.run("experiments", DAYS[1], config=config).success
    assert {f: (f / "model.safetensors").stat().st_mtime_ns for f in before} == before
    models = query(runner, "SELECT DISTINCT model, seed FROM experiment_predictions WHERE ds = ? ORDER BY ALL", DAYS[1])
    assert models == sorted([*((m, seed) for m in TRAINED for seed in (0, 1)), ("no_cross", 0)])
    routed = query(runner, "SELECT DISTINCT seed FROM experiment_routing_metrics WHERE ds = ? ORDER BY ALL", DAYS[1])
    assert routed == [(0,), (1,)]


def test_published_models_of_other_settings_are_left_out(studied, monkeypatch):
    from mtmd_assets.assets import experiment_scoring

    said: list[str] = []
    again = [experiment_scoring.Trained("mtmd", 0, "", studied.site.folder)]

    def kept():
        with studied.site.warehouse.connect() as con:
            create_evaluated(con, studied.site.platform, studied.site.warehouse, DAYS[1])
            scored = experiment_scoring.scored_data(con)
            return experiment_scoring._kept(con, studied.site, DAYS[1], scored, again, said.append)

    others = "SELECT DISTINCT model_version FROM experiment_models WHERE ds = ? AND (model != 'mtmd' OR seed != 0)"
    assert {(version,) for version in kept()} == set(query(studied, others, DAYS[1]))
    assert not said
    monkeypatch.setitem(contenders.ABLATIONS, "no_routing", Change(model={"routing": False, "cross_layers": 1}))
    assert not [version for version in kept() if "no_routing" in version]
    assert "2 published models of other code, settings or data" in said[0]
    monkeypatch.setattr(model_store, "code_version", lambda architecture: "another")
    assert kept() == []


def test_a_contenders_code_is_not_mtmds(monkeypatch, tmp_path):
    from mtmd_model import schema

    monkeypatch.setattr(schema, "__file__", str(tmp_path / "schema.py"))
    (tmp_path / "contenders").mkdir()

    def versions():
        model_store.code_version.cache_clear()
        return [model_store.code_version(architecture) for architecture in ("mtmd", "mmoe_dcn")]

    found = [versions()]
    for file in ("mtmd.py", "contenders/mmoe_dcn.py"):
        (tmp_path / file).write_text("a change")
        found.append(versions())
    monkeypatch.undo()
    model_store.code_version.cache_clear()
    (mtmd, mmoe), (mtmd_2, mmoe_2), (mtmd_3, mmoe_3) = found
    assert mtmd != mtmd_2 == mtmd_3
    assert len({mmoe, mmoe_2, mmoe_3}) == 3


def test_a_training_that_diverges_stops_no_other(studied, tmp_path):
    lost = pooled_job(studied.site, "lost", 0, tmp_path, learning_rate=1e30)
    others = [pooled_job(studied.site, f"other{s}", s, tmp_path) for s in (0, 1)]
    lines: list[str] = []
    train_all([lost, *others], 2, lines.append)
    assert len(lines) == 3
    [line] = [line for line in lines if "diverged" in line]
    assert "lost: diverged, " in line
    assert [job.trained for job in (lost, *others)] == [False, True, True]
    assert "not a finite number" in lost.diverged.read_text()


def test_models_that_diverged_are_left_out_and_not_trained_again(studied, monkeypatch):
    from mtmd_assets.assets import experiments

    site, said, started = studied.site, [], []

    def diverge(jobs, workers, log):
        started.extend(jobs)
        for job in jobs:
            job.diverged.write_text("train_loss of epoch 0 is nan")

    monkeypatch.setattr(experiments, "train_all", diverge)
    window = {DAYS[1]: site.platform.window(DAYS[0])}
    found = []
    try:
        for _ in range(2):
            trained = experiments.train_models(site, window, ["mtmd", "post_norm"], [0, 1], 1, said.append)
            found.append([(t.model, t.seed) for t in trained[DAYS[1]]])
    finally:
        for job in started:
            job.diverged.unlink()
    assert found == [[("mtmd", 0), ("mtmd", 1)]] * 2
    assert len(started) == 2, "the second time none"
    assert sum("post_norm-1" in line and "is left out: it diverged" in line for line in said) == 2


def test_a_day_without_its_window_is_withheld(studied):
    result = studied.run("experiments", date(2026, 1, 20))
    assert not result.success
    [failure] = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert "joined_examples has no 2026-01-17" in failure.user_failure_data.description


def test_a_day_that_is_withheld_fails_alone(studied, capsys):
    next_day = DAYS[1] + timedelta(1)
    published = "SELECT ds, count(*) FROM experiment_predictions GROUP BY ds ORDER BY ds"
    before = query(studied, published)
    result = studied.run("experiments", DAYS[1], next_day)
    [failure] = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert failure.user_failure_data.description.startswith(
        f"not published: {next_day}\n{next_day}: joined_examples has no"
    )
    [newest] = studied.instance.fetch_materializations(studied.key("experiment_predictions"), limit=1).records
    assert (newest.run_id, newest.partition_key) == (result.run_id, str(DAYS[1]))
    assert query(studied, published) == before
    assert "10 of 10 models are trained already" in capsys.readouterr().out


def test_a_task_has_the_improvement_of_all_its_rows_together_beside_the_mean_over_its_cells(studied):
    of_model = """SELECT task, model, sum(rows * logmae) / sum(rows) FROM experiment_slice_metrics
        WHERE bucket IS NULL AND seed IN (0, 1) AND model IN ('mtmd', 'pooled_towers') GROUP BY ALL"""
    logmae = {(task, model): value for task, model, value in query(studied, of_model)}
    found = query(
        studied,
        """SELECT task, by_rows, by_rows_low, by_rows_high FROM improvements
        WHERE contender = 'pooled_towers' AND surface IS NULL AND task IS NOT NULL AND bucket IS NULL""",
    )
    assert {task for task, *_ in found} == {"ctr", "gctr", "octr", "cvr"}
    for task, by_rows, low, high in found:
        assert by_rows == pytest.approx(1 - logmae[task, "mtmd"] / logmae[task, "pooled_towers"])
        assert low < by_rows < high
    others = "SELECT count(by_rows) FROM improvements WHERE surface IS NOT NULL OR task IS NULL"
    assert query(studied, others) == [(0,)], "of a cell it would be the same again"


def test_an_unknown_model_is_refused(studied):
    config = {"ops": {"adworld_train_and_score": {"config": {"models": ["mtmd", "transformer"]}}}}
    result = studied.run("experiments", DAYS[0], config=config)
    [failure] = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert "transformer" in str(failure.user_failure_data or failure.error)
    with pytest.raises(UsageError, match="'transformer' is none of"):
        study.chosen("mtmd,transformer")


def test_a_model_without_all_of_its_days_is_not_compared(studied, tmp_path):
    from mtmd_assets.assets import improvements
    from mtmd_assets.results import comparison

    said: list[str] = []
    longer = studied.site.platform.experiments.model_copy(update={"days": 3})
    runner = copy_of(studied, tmp_path / "home", studied.site.platform.model_copy(update={"experiments": longer}))
    short = runner.site
    days = improvements.compared_days(short.platform, "mmoe_dcn", DAYS[1])
    assert days == [date(2026, 1, 3), *DAYS]
    assert improvements.compared_days(short.platform, "no_cross", DAYS[1]) == [DAYS[1]]
    improvements.compare(short, DAYS[1], "short", said.append)
    assert [line for line in said if line.startswith("mmoe_dcn is left out") and "2026-01-03, 2026-01-04" in line]
    rows = query(runner, "SELECT DISTINCT contender, eval_start, eval_end FROM improvements ORDER BY ALL")
    assert ("no_routing", DAYS[1], DAYS[1]) in rows
    assert not {contender for contender, *_ in rows} & set(CONTENDERS)
    assert "adworld" not in comparison(short, DAYS[1])
    assert "## adworld: ablations" in comparison(short, DAYS[1])["adworld ablations"]
    with pytest.raises(Withheld, match=r"no model has experiments of 2026-01-18 to 2026-01-20"):
        improvements.compare(short, date(2026, 1, 20), "none", said.append)


def test_seeds_that_lack_a_day_are_not_compared():
    from mtmd_assets.assets.improvements import Trained, _seeds_on_all

    def day(mtmd: str, pooled: str) -> list[Trained]:
        return [
            Trained(model, int(seed), "", Path())
            for model, seeds in (("mtmd", mtmd), ("pooled_towers", pooled))
            for seed in seeds
        ]

    first, second = day("012", "02"), day("01", "012")
    assert _seeds_on_all([first, second], "pooled_towers") == [0]
    assert _seeds_on_all([second], "pooled_towers") == [0, 1]
    assert _seeds_on_all([first, second], "mmoe_dcn") == []


def of_other_settings(site: Any) -> Any:
    """The same home, as if mtmd's settings had been changed since."""
    changed = site.platform.experiments.model_copy(
        update={"mtmd": site.platform.experiments.mtmd.model_copy(update={"learning_rate": 0.01})}
    )
    return type(site)(site.platform.model_copy(update={"experiments": changed}), site.folder)


def test_models_that_today_would_be_trained_otherwise_are_not_compared(studied):
    from mtmd_assets.assets import improvements

    said: list[str] = []
    with pytest.raises(Withheld, match="by today's code, settings and data"):
        improvements.compare(of_other_settings(studied.site), DAYS[1], "other", said.append)
    assert any(line.startswith("slice_towers is left out") for line in said), "its own trainings are what they were"


def test_models_that_were_scored_on_other_rows_are_not_compared(studied, tmp_path):
    from mtmd_assets.assets import improvements

    site = copy_of(studied, tmp_path / "home").site
    found, before = improvements._scored(site, DAYS[0])
    assert {(t.model, t.seed) for t in found} == {(m, seed) for m in OF_DAY[DAYS[0]] for seed in (0, 1)}
    file = site.warehouse.path("joined_examples", DAYS[0])
    rows = pl.read_parquet(file)
    rows.sort("impression_id", descending=True).write_parquet(file)
    assert improvements._scored(site, DAYS[0])[1] == before, "their order makes no difference"
    rows.with_columns(score_ctr=pl.when(pl.int_range(pl.len()) == 0).then(0.5).otherwise("score_ctr")).write_parquet(
        file
    )
    found, after = improvements._scored(site, DAYS[0])
    assert found == []
    assert after != before


def test_a_seed_that_a_model_lacks_on_one_day_does_not_enter(studied, tmp_path):
    from mtmd_assets.assets import improvements

    site = copy_of(studied, tmp_path / "home").site
    file = site.warehouse.path("experiment_models", DAYS[0])
    rows = pl.read_parquet(file)
    rows.filter((pl.col("model") != "mmoe_dcn") | (pl.col("seed") == 0)).write_parquet(file)
    improvements.compare(site, DAYS[1], "again", lambda line: None)
    with site.warehouse.connect() as con:
        seeds = dict(con.sql("SELECT contender, max(seeds) FROM improvements GROUP BY contender").fetchall())
        query_ = """SELECT sum(n * e) / sum(n) FROM (SELECT rows AS n, logmae AS e FROM experiment_slice_metrics
            WHERE model = ? AND seed = 0 AND bucket IS NULL AND (surface, product, task) = ('search', 'standard', 'ctr'))"""
        [(error,)] = con.execute(query_, ["mmoe_dcn"]).fetchall()
        [(shown,)] = con.execute(
            """SELECT contender_logmae FROM improvements WHERE contender = 'mmoe_dcn' AND bucket IS NULL
            AND (surface, product, task) = ('search', 'standard', 'ctr')"""
        ).fetchall()
    assert (seeds["mmoe_dcn"], seeds["pooled_towers"]) == (1, 2)
    assert shown == pytest.approx(error)


def test_mtmd_alone_has_nothing_to_be_compared_with(studied):
    with pytest.raises(UsageError, match="name one"):
        study.results(studied.site, ["mtmd"], studied.document, studied.run_step, quiet)


def test_days_that_have_not_ended_are_refused_to_results_and_not_to_the_search(studied):
    experiments = studied.site.platform.experiments.model_copy(update={"last_day": date(2190, 1, 1)})
    site = type(studied.site)(
        studied.site.platform.model_copy(update={"experiments": experiments}), studied.site.folder
    )
    with pytest.raises(UsageError, match="2190-01-01 is needed, and has not ended yet"):
        study.results(site, ["no_routing"], studied.document, studied.run_step, quiet)
    assert study.evaluation_days(site)[-1] == date(2190, 1, 1)


def test_an_earlier_day_that_fails_stops_only_who_needs_it(studied, capsys):
    def run(job, first, last):
        raise RunFailed(f"{job} {first} {last}")

    study.build(studied.site, DAYS[0], DAYS[1], run)
    assert f"{DAYS[0]} to {DAYS[1]} are there all the same" in capsys.readouterr().out
    with pytest.raises(RunFailed, match=f"data {DAYS[0]} {DAYS[1] + timedelta(1)}"):
        study.build(studied.site, DAYS[0], DAYS[1] + timedelta(1), run)


def test_an_ablation_of_what_the_platform_does_not_have_is_left_out(studied, tmp_path, capsys):
    started = []

    def run(job, first, last=None, only=(), config=None):
        started.append((config or {}).get("ops"))

    assert (
        study.results(studied.site, ["last_step", "no_main_effects", "no_bins"], tmp_path / "results.md", run, quiet)
        == 0
    )
    assert started == []
    assert capsys.readouterr().out.startswith("last_step, no_main_effects, no_bins: without what adworld does not have")


def test_as_many_seeds_as_are_asked_for_are_trained(studied, tmp_path):
    asked = []

    def run(job, first, last=None, only=(), config=None):
        if config is not None:
            asked.append(config["ops"]["adworld_train_and_score"]["config"]["seeds"])

    def results(seeds):
        study.results(studied.site, ["no_routing"], tmp_path / "results.md", run, quiet, seeds)

    results(None)
    results(1)
    assert asked == [2, 1]
    with pytest.raises(UsageError, match="--seeds must be 1 or more, got 0"):
        results(0)


def test_the_platform_file_can_name_the_last_evaluation_day(studied):
    platform = studied.site.platform

    def ending(last: date) -> list[date]:
        experiments = platform.experiments.model_copy(update={"last_day": last})
        changed = platform.model_copy(update={"experiments": experiments})
        return study.evaluation_days(type(studied.site)(changed, studied.site.folder))

    assert study.evaluation_days(studied.site) == list(DAYS)
    assert ending(date(2026, 2, 3)) == [date(2026, 2, 2), date(2026, 2, 3)]
    with pytest.raises(
        PlatformError, match=r"experiments\.days is 2, but a model can score 2026-01-04 to 2026-01-04 only"
    ):
        ending(DAYS[0])


def test_a_model_differs_from_the_daily_one_in_what_the_platform_file_says_only(studied):
    platform = studied.site.platform
    daily = train_config(platform, seed=1)
    here = replace(daily, optimiser=replace(daily.optimiser, learning_rate=0.004))
    assert train_config(platform, change_of(platform, "mtmd"), 1) == here
    ours = daily.to_dict()
    pooled = train_config(platform, change_of(platform, "pooled_towers"), 1).to_dict()
    assert pooled["model"]["dropout"] == 0.1
    for same in ("optimiser", "batch_size", "max_epochs", "patience", "seed", "sample_rate", "gradient_clip"):
        assert pooled[same] == ours[same], same


def pooled_job(site: Any, name: str, seed: int, folder: Path, **training: Any) -> TrainJob:
    """One pass over a day of pooled towers, stopped on the next."""
    files = [site.warehouse.path("joined_examples", date(2026, 1, d)) for d in (1, 2)]
    config = train_config(site.platform, change_of(site.platform, "pooled_towers").on(training), seed)
    return TrainJob(name, site.platform.model_schema, (files[0],), (files[1],), config, folder / name, {})


def test_trainings_in_other_processes_give_the_same_weights(studied, tmp_path):
    def jobs(name):
        return [pooled_job(studied.site, f"{name}{s}", s, tmp_path) for s in (0, 1)]

    lines: list[str] = []
    train_all(jobs("alone"), 1, lines.append)
    train_all(jobs("together"), 2, lines.append)
    assert len(lines) == 4
    for s in (0, 1):
        digests = {
            json.loads((tmp_path / f"{name}{s}" / "manifest.json").read_text())["tensors_sha256"]
            for name in ("alone", "together")
        }
        assert len(digests) == 1
