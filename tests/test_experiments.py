"""The experiments at a small size: contenders and ablations trained, scored, compared, written down, and searched."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from datetime import date

import numpy as np
import polars as pl
import pytest

from checks import routing
from mtmd_assets import cli, contenders, model_store, study, tuning
from mtmd_assets.contenders import CONTENDERS, Change, change_of, train_config
from mtmd_assets.faults import PlatformError, Withheld
from mtmd_assets.home import Home
from mtmd_assets.training_pool import TrainJob, train_all
from tests.worlds import Runner, query, show_failure, small_adworld

DAYS = [date(2026, 1, d) for d in (4, 5)]
TRAINED = ("mtmd", *CONTENDERS, "no_routing", "no_domain_adaptation", "unconstrained")
OF_DAY = {DAYS[0]: ("mtmd", *CONTENDERS), DAYS[1]: TRAINED}
"""Ablations are trained for the last day only."""


@contextmanager
def quiet(title):
    yield


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Two evaluation days with two seeds, and the document."""
    folder = tmp_path_factory.mktemp("experiments")
    settings = {
        "days": 2,
        "seeds": 2,
        "ablation_days": 1,
        "tuning_days": ["2026-01-02", "2026-01-03"],
        "mtmd": {"learning_rate": 0.004},
        "contenders": {"pooled_towers": {"dropout": 0.1}},
    }
    file = small_adworld(
        folder,
        training={"window_days": 3, "max_epochs": 1, "batch_size": 1024, "accelerator": "cpu"},
        experiments=settings,
    )
    runner = Runner(Home(folder / "home").register(str(file)))
    runs = []

    def run(job, first, last=None, only=(), config=None):
        if config is not None:
            config["ops"]["adworld_train_and_score"]["config"]["workers"] = 1
        result = runner.run(job, first, last, only, config)
        runs.append((job, first, result))
        assert result.success, show_failure(result)

    document = folder / "docs" / "results.md"
    assert study.results(runner.site, TRAINED, document, run, quiet) == 0
    runner.document, runner.runs, runner.run_step = document, runs, run
    return runner


def test_the_days_that_lack_are_built_then_each_evaluation_day_is_scored(studied):
    assert [(job, day) for job, day, _ in studied.runs[:4]] == [
        ("data", date(2026, 1, 1)),
        ("experiments", DAYS[0]),
        ("experiments", DAYS[1]),
        ("improvements", DAYS[1]),
    ]


def test_the_command_writes_the_same_document_and_prints_the_headline(studied, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "home"
    shutil.copytree(studied.site.folder.parent, folder)
    monkeypatch.setenv("MTMD_HOME", str(folder))
    document = tmp_path / "results.md"
    models = ["--models", ",".join(TRAINED[1:])]
    assert cli.main(["results", "--platform", "adworld", "--document", str(document), *models]) == 0
    assert document.read_text() == studied.document.read_text()
    printed = capsys.readouterr().out
    for model in TRAINED[1:]:
        [line] = [line for line in document.read_text().splitlines() if line.startswith(f"| {model} | ")][:1]
        improvement = line.split(" | ")[6 if model in contenders.ABLATIONS else 1]
        assert f"| {model} | {improvement} |" in printed, model


def test_every_model_is_trained_with_every_seed_on_the_window_before(studied):
    rows = query(studied, "SELECT ds, model, seed, window_start, window_end FROM experiment_models ORDER BY ALL")
    starts = {DAYS[0]: date(2026, 1, 1), DAYS[1]: date(2026, 1, 2)}
    ends = {DAYS[0]: date(2026, 1, 3), DAYS[1]: date(2026, 1, 4)}
    assert rows == sorted((d, m, s, starts[d], ends[d]) for d in DAYS for m in OF_DAY[d] for s in (0, 1))


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
    assert (cells, off) == (sum(map(len, OF_DAY.values())) * 2 * 18, 0)
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


def test_models_that_are_there_are_not_trained_again_and_others_stay(studied):
    folders = sorted((studied.site.folder / "experiments").iterdir())
    before = {f: (f / "model.safetensors").stat().st_mtime_ns for f in folders}
    config = {"ops": {"adworld_train_and_score": {"config": {"models": ["no_cross"], "seeds": 1}}}}
    studied.run_step("experiments", DAYS[1], config=config)
    assert {f: (f / "model.safetensors").stat().st_mtime_ns for f in before} == before
    models = query(
        studied, "SELECT DISTINCT model, seed FROM experiment_predictions WHERE ds = ? ORDER BY ALL", DAYS[1]
    )
    assert models == sorted([*((m, seed) for m in TRAINED for seed in (0, 1)), ("no_cross", 0)])
    routed = query(studied, "SELECT DISTINCT seed FROM experiment_routing_metrics WHERE ds = ? ORDER BY ALL", DAYS[1])
    assert routed == [(0,), (1,)]


def test_published_models_of_other_settings_are_left_out(studied, monkeypatch):
    from mtmd_assets.assets import experiments

    window, said = studied.site.platform.window(DAYS[0]), []
    again = [experiments.Trained("mtmd", 0, "", studied.site.folder)]

    def kept():
        with studied.site.warehouse.connect() as con:
            return experiments._still_current(con, studied.site, window, DAYS[1], again, said.append)

    others = "SELECT DISTINCT model_version FROM experiment_models WHERE ds = ? AND (model != 'mtmd' OR seed != 0)"
    assert {(version,) for version in kept()} == set(query(studied, others, DAYS[1]))
    assert not said
    monkeypatch.setitem(contenders.ABLATIONS, "no_routing", Change(model={"routing": False, "cross_layers": 1}))
    assert not [version for version in kept() if "no_routing" in version]
    assert "2 published models of other code, data or settings" in said[0]
    monkeypatch.setattr(model_store, "code_version", lambda: "another")
    assert kept() == []


def test_a_day_without_its_window_is_withheld(studied):
    result = studied.run("experiments", date(2026, 1, 20))
    assert not result.success
    assert "joined_examples has no 2026-01-17" in show_failure(result) or "2026-01-17" in str(
        [e.step_failure_data for e in result.all_events if e.is_step_failure]
    )


def test_an_unknown_model_is_refused(studied):
    config = {"ops": {"adworld_train_and_score": {"config": {"models": ["mtmd", "transformer"]}}}}
    result = studied.run("experiments", DAYS[0], config=config)
    [failure] = [e.step_failure_data for e in result.all_events if e.is_step_failure]
    assert "transformer" in str(failure.user_failure_data or failure.error)
    with pytest.raises(PlatformError, match="'transformer' is none of"):
        study.chosen("mtmd,transformer")


def test_the_document_says_what_the_tables_say(studied):
    text = studied.document.read_text()
    [(mean,)] = query(
        studied,
        "SELECT improvement FROM improvements WHERE contender = 'pooled_towers' AND surface IS NULL AND task IS NULL AND bucket IS NULL",
    )
    assert f"| pooled_towers | {mean:+.1%} [" in text
    assert text.count("| search | shopping |") >= 3
    [(impressions,)] = query(studied, "SELECT count(*) FROM joined_examples WHERE ds >= ?", DAYS[0])
    assert f"({impressions:,} impressions)" in text
    [(cells,)] = query(
        studied,
        """SELECT count(*) FROM improvements
        WHERE contender = 'no_routing' AND surface IS NOT NULL AND bucket IS NULL AND rows >= 200""",
    )
    [line] = [line for line in text.splitlines() if line.startswith("| no_routing |")]
    assert line.split(" | ")[-6] == str(cells)
    assert line.endswith(" | 1 | 2 | 0 of 2 |"), "days, seeds and jumps"
    headings = ("Against the contenders", "Every cell", "Parameters", "Calibration", "Who the routers use")
    assert all(f"\n### {heading}\n" in text for heading in headings)
    assert text.count("\n## adworld\n") == text.count("\n## adworld: ablations\n") == 1
    assert "Domain adaptation, by slice:" in text
    assert "Constrained modelling, by task and by slice:" in text
    assert "How unlike the domains are in the 18 dense features" in text
    assert text.count(f"code `{model_store.code_version()}`") == 2


def test_an_ablation_has_an_interval_in_each_bucket_and_its_cells_by_slice(studied):
    text = studied.document.read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| no_routing |")]
    of_bucket = query(
        studied,
        """SELECT improvement, low, high FROM improvements WHERE contender = 'no_routing' AND bucket IS NOT NULL
        AND surface IS NULL AND task IS NULL ORDER BY bucket""",
    )
    assert len(of_bucket) == 5
    shown = [f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]" for mean, low, high in of_bucket]
    assert line.split(" | ")[1:6] == shown
    [(mean, low, high, rows)] = query(
        studied,
        """SELECT improvement, joint_low, joint_high, rows FROM improvements WHERE contender = 'unconstrained'
        AND bucket IS NULL AND (surface, product, task) = ('search', 'standard', 'gctr')""",
    )
    by_slice = text[text.index("Constrained modelling, by task and by slice") :]
    line = next(line for line in by_slice.splitlines() if line.startswith("| search | standard |"))
    assert f"| search | standard | {rows:,} |" in line
    assert line.split(" | ")[4].startswith(f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]")


def test_the_failure_signatures_of_the_routers_are_counted(studied, monkeypatch):
    from mtmd_assets import results

    [(routers,)] = query(
        studied, "SELECT count(DISTINCT (model_version, tower, domain, task)) FROM experiment_routing_metrics"
    )
    assert routers == 4 * ((3 + 2) * 4 - 2), "each task of each domain; cvr and octr have one product each"

    def text():
        with studied.site.warehouse.connect() as con:
            return results._routing(con, DAYS[0], DAYS[-1])

    # after one pass from gates that start equal, they still are
    assert f"in {routers} routers of all days and seeds: {routers} uniform." in text()
    monkeypatch.setattr(routing, "UNIFORM", 1.1)
    assert f"in {routers} routers of all days and seeds: none." in text()


def test_the_trainings_whose_loss_jumped_are_counted(studied, monkeypatch):
    from mtmd_assets import results

    def of_mtmd():
        with studied.site.warehouse.connect() as con:
            lines = results._parameters(con, studied.site, DAYS[0], DAYS[-1]).splitlines()
        [line] = [line for line in lines if line.startswith("| mtmd |")]
        return line.split(" | ")[4]

    assert of_mtmd() == "0 of 4"
    seen = []
    monkeypatch.setattr(results, "high_passes", lambda history: seen.append(history) or len(seen) == 1)
    assert of_mtmd() == "1 of 4"
    assert all(entry["train_loss"] > 0 for history in seen for entry in history)
    assert results._jumped(studied.site, ["a version whose folder is gone"]) == ""


def test_parameters_and_weights_are_those_trained_with(studied):
    from mtmd_assets import results

    with studied.site.warehouse.connect() as con:
        text = results._parameters(con, studied.site, DAYS[0], DAYS[-1])
    assert "Weights of the tasks in everybody's loss: ctr 2, gctr 1, octr 1, cvr 8." in text
    assert results._task_weights(studied.site, ["a version whose folder is gone"]) == ""
    counts = dict(query(studied, "SELECT model, (embedding_params, dense_params) FROM experiment_models"))
    embedding, dense = (a / b for a, b in zip(counts["mtmd"], counts["slice_towers"], strict=True))
    assert f"MTMD has {embedding:.2g} times the embedding parameters" in text
    assert f"and {dense:.2g} times their others" in text
    assert results._beside_slice_towers({"mtmd": (1, 1)}) == ""


def test_each_task_has_the_improvement_over_all_its_rows_beside_the_mean_of_its_cells(studied):
    from mtmd_assets import results

    with studied.site.warehouse.connect() as con:
        words, table = results._tasks(con, studied.site)
    assert "By task" in words
    errors = """SELECT avg(abs(ln(greatest(probability, 1e-6)) - ln(greatest(score, 1e-6))))
        FROM experiment_predictions WHERE model = ? AND task = 'gctr'"""
    mtmd, pooled = (query(studied, errors, model)[0][0] for model in ("mtmd", "pooled_towers"))
    [line] = [line for line in table.splitlines() if line.startswith("| gctr |")]
    assert line.split(" | ")[4] == f"{1 - mtmd / pooled:+.1%}"
    [(mean,)] = query(
        studied,
        "SELECT improvement FROM improvements WHERE contender = 'pooled_towers' AND task = 'gctr' AND surface IS NULL AND bucket IS NULL",
    )
    assert line.split(" | ")[3].startswith(f"{mean:+.1%} [")


def test_calibration_of_every_large_cell_stands_beside_that_of_the_contenders(studied, monkeypatch):
    from mtmd_assets import results

    monkeypatch.setattr(results, "CALIBRATED_ROWS", 200)
    with studied.site.warehouse.connect() as con:
        text = results._calibration(con, DAYS[0], DAYS[-1])
    cells = query(
        studied,
        """SELECT surface, product, task, count(*) // 2 AS n, sum(probability) / sum(score) AS calibration
        FROM experiment_predictions WHERE model = 'mtmd' GROUP BY ALL HAVING n >= 200 ORDER BY ALL""",
    )
    assert len(cells) > 3
    inside = sum(0.95 <= calibration <= 1.05 for *_, calibration in cells)
    assert f"Of the {len(cells)} cells are within 0.95 to 1.05: {inside} of mtmd, " in text
    assert "| mtmd | slice_towers | pooled_towers | mmoe_dcn | soft_slice_towers |" in text
    intervals = [
        tuple(map(float, re.findall(r"\[([\d.]+), ([\d.]+)\]", line)[0])) for line in text.splitlines() if "[" in line
    ]
    outside = sum(low > 1.05 or high < 0.95 for low, high in intervals)
    assert f"of mtmd's, {outside or 'none'} lie wholly outside" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for (*cell, rows, calibration), line in zip(cells, lines, strict=True):
        assert line.startswith(f"| {' | '.join(cell)} | {rows:,} | {calibration:.3f} [")


def test_a_second_writing_replaces_the_sections_and_keeps_others(studied, tmp_path):
    from mtmd_assets.results import write_sections

    document = tmp_path / "results.md"
    before = studied.document.read_text()
    others = [f"<!-- {name} -->\nuntouched\n<!-- end of {name} -->\n" for name in ("other", "adworld search")]
    document.write_text("\n".join([before, *others]))
    write_sections(document, studied.site)
    text = document.read_text()
    assert text.count("## adworld\n") == text.count("## adworld: ablations\n") == 1
    assert text.count("untouched") == 2, "another platform's, and one that this home has no table for"


def test_a_model_without_all_of_its_days_is_not_compared(studied):
    from mtmd_assets.assets import experiments
    from mtmd_assets.results import sections

    site, said = studied.site, []
    longer = site.platform.experiments.model_copy(update={"days": 3})
    short = type(site)(site.platform.model_copy(update={"experiments": longer}), site.folder)
    days = experiments.compared_days(short.platform, "mmoe_dcn", DAYS[1])
    assert days == [date(2026, 1, 3), *DAYS]
    assert experiments.compared_days(short.platform, "no_cross", DAYS[1]) == [DAYS[1]]
    try:
        experiments.compare(short, DAYS[1], "short", said.append)
        assert [line for line in said if line.startswith("mmoe_dcn is left out") and "2026-01-03" in line]
        rows = query(studied, "SELECT DISTINCT contender, eval_start, eval_end FROM improvements ORDER BY ALL")
        assert ("no_routing", DAYS[1], DAYS[1]) in rows
        assert not {contender for contender, *_ in rows} & set(CONTENDERS)
        assert "adworld" not in sections(short)
        assert "## adworld: ablations" in sections(short)["adworld ablations"]
    finally:
        experiments.compare(site, DAYS[1], "again", said.append)
    with pytest.raises(Withheld, match=r"no model has experiments of 2026-01-18 to 2026-01-20"):
        experiments.compare(short, date(2026, 1, 20), "none", said.append)


def test_seeds_that_lack_a_day_are_not_compared():
    from mtmd_assets.assets.experiments import _of_whole_seeds

    def rows(*pairs: tuple[date, int]) -> pl.DataFrame:
        return pl.DataFrame({"day": [d for d, _ in pairs], "seed": [s for _, s in pairs]})

    first, second = DAYS
    mtmd = rows((first, 0), (first, 0), (second, 0), (first, 1), (second, 1), (first, 2))
    contender = rows((first, 0), (second, 0), (second, 1), (first, 2), (second, 2))
    ours, theirs = _of_whole_seeds(mtmd, contender, DAYS)
    assert ours.rows() == [(first, 0), (first, 0), (second, 0)]
    assert theirs.rows() == [(first, 0), (second, 0)]
    assert _of_whole_seeds(mtmd.filter(pl.col("day") == second), contender, [second])[0].rows() == [
        (second, 0),
        (second, 1),
    ]


def test_mtmd_alone_has_nothing_to_be_compared_with(studied):
    with pytest.raises(PlatformError, match="name one"):
        study.results(studied.site, ["mtmd"], studied.document, studied.run_step, quiet)


def test_tuning_joins_the_best_changes_and_trains_the_finalists_for_every_day_and_seed(studied, capsys):
    with pytest.MonkeyPatch.context() as patch:
        small = {"max_epochs": 1, "batch_size": 2048, "preset": "small", "learning_rate": 2e-3}
        changes = {tuning.START: {}, "dropout": {"dropout": 0.5}, "rate": {"learning_rate": 1e-4}}
        patch.setattr(tuning, "start", lambda platform, model: small)
        patch.setattr(tuning, "singles", lambda platform, model: changes)
        patch.setattr(tuning, "FINALISTS", 2)
        patch.setattr(tuning, "train_all", lambda jobs, workers, log: train_all(jobs, 1, log))
        assert study.tune(studied.site, ["mtmd", "pooled_towers"], studied.run_step, quiet) == 0
    rows = query(
        studied, "SELECT model, trial, seed, window_end, logmae, window_start, config FROM trials ORDER BY ALL"
    )
    assert {r[5] for r in rows} == {date(2026, 1, 1)}
    late, early = date(2026, 1, 3), date(2026, 1, 2)
    for model in ("mtmd", "pooled_towers"):
        first = {r[1]: r[4] for r in rows if r[0] == model and r[2:4] == (0, late)}
        pair = " + ".join(sorted(("dropout", "rate"), key=first.__getitem__))
        assert first.keys() == {*changes, pair}
        assert len(set(first.values())) == 4, "four different trainings"
        [config] = [json.loads(r[6]) for r in rows if (r[0], r[1]) == (model, pair)][:1]
        assert (config["model"]["dropout"], config["optimiser"]["learning_rate"]) == (0.5, 1e-4)
        others = {r[1:4] for r in rows if r[0] == model and r[2:4] != (0, late)}
        best = min(first.keys() - {tuning.START}, key=first.__getitem__)
        again = [(1, late), (0, early), (1, early)]
        assert others == {(name, *when) for name in (tuning.START, best) for when in again}
    printed = capsys.readouterr().out
    assert printed.index("| mtmd") < printed.index("| pooled_towers")
    finalist = next(line for line in printed.splitlines() if line.startswith("| mtmd"))
    assert finalist.split("|")[3].strip() == "4", "the finalist is first, with its four trainings"


def test_the_platform_file_can_name_the_last_evaluation_day(studied):
    platform = studied.site.platform

    def ending(last: date, end: date | None = None) -> list[date]:
        experiments = platform.experiments.model_copy(update={"last_day": last})
        changed = platform.model_copy(update={"experiments": experiments, "end": end})
        return study.evaluation_days(type(studied.site)(changed, studied.site.folder))

    assert study.evaluation_days(studied.site) == list(DAYS)
    assert ending(date(2026, 2, 3)) == [date(2026, 2, 2), date(2026, 2, 3)]
    with pytest.raises(PlatformError, match="can score"):
        ending(DAYS[0])
    with pytest.raises(PlatformError, match="2026-02-03 is after the log's end, 2026-02-02"):
        ending(date(2026, 2, 3), date(2026, 2, 2))


def test_a_tuning_day_among_the_evaluation_days_is_refused(studied):
    platform = studied.site.platform
    late = platform.experiments.model_copy(update={"tuning_days": (DAYS[0],)})
    site = type(studied.site)(platform.model_copy(update={"experiments": late}), studied.site.folder)
    with pytest.raises(PlatformError, match="not before the evaluation days"):
        study.evaluation_days(site)
    none = platform.experiments.model_copy(update={"tuning_days": ()})
    site = type(studied.site)(platform.model_copy(update={"experiments": none}), studied.site.folder)
    with pytest.raises(Withheld, match="tuning_days"):
        tuning.tune(site, ["mtmd"], 1, print)


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


def test_trainings_in_other_processes_give_the_same_weights(studied, tmp_path):
    platform, warehouse = studied.site.platform, studied.site.warehouse
    files = [warehouse.path("joined_examples", d) for d in (date(2026, 1, 1), date(2026, 1, 2))]

    def jobs(name):
        change = change_of(platform, "pooled_towers")
        return [
            TrainJob(
                f"{name}{s}",
                platform.model_schema,
                (files[0],),
                (files[1],),
                train_config(platform, change, s),
                tmp_path / f"{name}{s}",
                {},
            )
            for s in (0, 1)
        ]

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
