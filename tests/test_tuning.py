"""The search: what it tries, what it joins, whom it trains again."""

import json
import math
import shutil
from datetime import date

import numpy as np
import polars as pl
import pytest

from mtmd_assets import model_store, study, tuning
from mtmd_assets.contenders import CONTENDERS, Change, change_of, train_config
from mtmd_assets.faults import PlatformError, UsageError, Withheld
from mtmd_assets.platform_file import shipped_platform
from mtmd_assets.training_pool import train_all
from tests.studied import DAYS, quiet, small_study
from tests.worlds import copy_of, query


def test_changes_of_one_setting_are_not_joined():
    changes = {"start": {}, "a": {"x": 1}, "b": {"x": 2}, "c": {"y": 1}, "d": {"z": 1}, "e": {"w": 1}}
    found = tuning.joined(changes, ["b", "start", "a", "d", "c", "e"])
    assert found == {
        "b + d": {"x": 2, "z": 1},
        "b + d + c": {"x": 2, "z": 1, "y": 1},
        "b + d + c + e": {"x": 2, "z": 1, "y": 1, "w": 1},
    }


@pytest.mark.parametrize("passes", [(), (6, 8)])
@pytest.mark.parametrize("preset", tuning.PRESETS)
@pytest.mark.parametrize("own", [{}, {"weight_decay": 0.0, "deviation": None, "warmup_share": 0.5, "id_dropout": 0.3}])
def test_every_model_has_equally_many_trials_and_all_differ(own, preset, passes):
    adworld = shipped_platform("adworld")
    mtmd = adworld.experiments.mtmd.model_copy(update={"preset": preset})
    experiments = adworld.experiments.model_copy(update={"tuned_epochs": passes, "mtmd": mtmd, "max_epochs": 6})
    platform = adworld.model_copy(
        update={"experiments": experiments, "training": adworld.training.model_copy(update=own)}
    )
    for model in ("mtmd", *CONTENDERS):
        now = tuning.start(platform, model)
        changes = tuning.singles(platform, model)
        configs = {str(train_config(platform, Change(model).on({**now, **c}))) for c in changes.values()}
        assert len(configs) == len(changes) == 16 + len(passes[1:])


@pytest.mark.parametrize("name", ["adworld", "kuairand"])
@pytest.mark.parametrize("model", ["mtmd", *CONTENDERS])
def test_a_search_starts_from_what_the_platform_file_says(name, model):
    platform = shipped_platform(name)
    here = train_config(platform, change_of(platform, model), 0)
    assert train_config(platform, Change(model).on(tuning.start(platform, model)), 0) == here


def test_a_search_tries_smaller_and_larger_values_of_a_setting():
    platform = shipped_platform("adworld")
    now = tuning.start(platform, "mmoe_dcn")
    tried = tuning.singles(platform, "mmoe_dcn").values()
    for setting in ("learning_rate", "weight_decay", "embedding_rate"):
        smaller, larger = sorted(change[setting] for change in tried if setting in change)
        assert smaller < now[setting] < larger
    assert {"experts": 8} in tried
    assert {"low_rank_layers": 2} in tried


def test_the_start_of_a_search_is_always_a_finalist():
    for ranked, expected in (
        (["a", "b", tuning.START, "c"], [tuning.START, "a", "b"]),
        (["a", "b", "c", tuning.START], [tuning.START, "a", "b"]),
        ([tuning.START, "a", "b", "c"], [tuning.START, "a", "b"]),
    ):
        assert tuning._finalists(ranked) == expected


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory):
    """A platform of which nothing is there yet."""
    return small_study(tmp_path_factory.mktemp("search"))


def small_search(patch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """Two changes, one finalist beside the start, trainings of one pass; the changes of the first round."""
    small = {"max_epochs": 1, "batch_size": 2048, "preset": "small", "learning_rate": 2e-3}
    changes = {tuning.START: {}, "dropout": {"dropout": 0.5}, "rate": {"learning_rate": 1e-4}}
    patch.setattr(tuning, "start", lambda platform, model: small)
    patch.setattr(tuning, "singles", lambda platform, model: changes)
    patch.setattr(tuning, "FINALISTS", 2)
    patch.setattr(tuning, "train_all", lambda jobs, workers, log: train_all(jobs, 1, log))
    return changes


def test_tuning_joins_the_best_changes_and_trains_the_finalists_for_every_day_and_seed(searched, capsys):
    with pytest.MonkeyPatch.context() as patch:
        changes = small_search(patch)
        assert study.tune(searched.site, ["mtmd"], searched.document, searched.run_step, quiet) == 0
        assert study.tune(searched.site, ["pooled_towers"], searched.document, searched.run_step, quiet) == 0, (
            "keeps the trials of mtmd"
        )
        assert study.tune(searched.site, ["mtmd", "pooled_towers"], searched.document, searched.run_step, quiet) == 0, (
            "and replaces both"
        )
    rows = query(
        searched, "SELECT model, trial, seed, window_end, logmae, window_start, config FROM trials ORDER BY ALL"
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
    assert len(rows) == 2 * (4 + 2 * 3)
    printed = capsys.readouterr().out.split("| model |")[1:]
    of_one, of_both, again = ([line for line in text.splitlines() if line.startswith("|")] for text in printed)
    models = [
        [line.split("|")[1].strip() for line in lines if not line.startswith("|--")] for lines in (of_one, of_both)
    ]
    assert models == [["mtmd"] * 4, ["mtmd"] * 4 + ["pooled_towers"] * 4]
    assert of_both == again
    finalist = next(line for line in of_both if line.startswith("| mtmd"))
    assert finalist.split("|")[3].strip() == "4", "the finalist is first, with its four trainings"


def test_an_interrupted_search_of_a_model_without_trials_has_published_the_rounds_that_ended(searched, monkeypatch):
    changes = small_search(monkeypatch)
    assert study.tune(searched.site, ["mtmd"], searched.document, searched.run_step, quiet) == 0
    rounds = []

    def train_one_round(jobs, workers, log):
        rounds.append(jobs)
        if len(rounds) > 1:
            raise KeyboardInterrupt
        train_all(jobs, 1, log)

    monkeypatch.setattr(tuning, "train_all", train_one_round)
    ended = "FROM trials WHERE model = 'mtmd' ORDER BY ALL"
    before = query(searched, ended)
    with pytest.raises(KeyboardInterrupt):
        study.tune(searched.site, ["mtmd", "mmoe_dcn"], searched.document, searched.run_step, quiet)
    rows = query(searched, "SELECT trial, seed, window_end FROM trials WHERE model = 'mmoe_dcn'")
    assert sorted(rows) == sorted((name, 0, date(2026, 1, 3)) for name in changes)
    assert "## adworld: the search of mmoe_dcn" in searched.document.read_text()
    assert query(searched, ended) == before, "a search that ended stays until another has"


def test_what_a_person_tries_is_trained_beside_the_start_and_kept_beside_other_trials(searched, capsys, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        small = {"max_epochs": 1, "batch_size": 2048, "preset": "small", "learning_rate": 2e-3}
        patch.setattr(tuning, "start", lambda platform, model: small)
        patch.setattr(tuning, "train_all", lambda jobs, workers, log: train_all(jobs, 1, log))
        for text in ("main_effects=true", "learning_rate=1e-4 dropout=0.5"):
            assert (
                study.tune(searched.site, ["pooled_towers"], searched.document, searched.run_step, quiet, [text]) == 0
            )
    rows = query(
        searched,
        "SELECT trial, window_end, seed, config FROM trials WHERE model = 'pooled_towers' AND trial LIKE '%=%'",
    )
    found = {trial: json.loads(config) for trial, _, _, config in rows}
    tried = {"main_effects=true", "learning_rate=1e-4 dropout=0.5"}
    days = (date(2026, 1, 2), date(2026, 1, 3))
    assert {row[:3] for row in rows} == {(trial, day, seed) for trial in tried for day in days for seed in (0, 1)}
    assert len(rows) == 8
    assert found["main_effects=true"]["model"]["main_effects"] is True
    assert found["learning_rate=1e-4 dropout=0.5"]["optimiser"]["learning_rate"] == 1e-4
    assert found["learning_rate=1e-4 dropout=0.5"]["model"]["dropout"] == 0.5
    assert "| pooled_towers | main_effects=true | 4 |" in capsys.readouterr().out
    text = searched.document.read_text()
    assert "| pooled_towers | main_effects=true | 4 |" in text
    with searched.site.warehouse.connect() as con:
        table = tuning.published(con, searched.site.platform)
    for model, trainings in table.group_by("model").agg(pl.col("training").n_unique()).iter_rows():
        section = text[
            text.index(f"<!-- adworld search {model} -->") : text.index(f"<!-- end of adworld search {model} -->")
        ]
        assert f"Trainings: {trainings}. Code: `{model_store.code_version(model)}`." in section
        rows_of_model = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert rows_of_model
        assert all(line.startswith(f"| {model} |") for line in rows_of_model)
    assert tuning.current(searched.site, table).equals(table)
    monkeypatch.setattr(model_store, "code_version", lambda architecture: "another")
    assert tuning.current(searched.site, table).is_empty(), "trials of other code are not kept"


def test_a_search_goes_on_in_another_home_by_the_records_of_its_trials_alone(searched, tmp_path):
    study.build_lacking(searched.site, date(2026, 1, 1), date(2026, 1, 3), searched.run_step, quiet)
    tries = ["dropout=0.2"]
    [trained] = tuning.tune(searched.site, ["pooled_towers"], 1, lambda line: None, tries)
    other = copy_of(searched, tmp_path).site
    for weights in other.experiments.glob("*/"):
        shutil.rmtree(weights)
    said = []
    [again] = tuning.tune(other, ["pooled_towers"], 1, said.append, tries)
    assert again.equals(trained)
    assert said == ["8 of 8 trials are there already"]

    damaged = other.experiments / f"{trained['training'][0]}.json"
    judged = json.loads(damaged.read_text())
    for text in (json.dumps(judged)[:-1], json.dumps({**judged, "cells": None}), "[]"):
        damaged.write_text(text)
        with pytest.raises(Withheld, match=f"{damaged} cannot be read as a trial's record"):
            next(tuning.tune(other, ["pooled_towers"], 1, said.append, tries))


def test_a_trial_is_judged_by_the_cells_with_enough_rows(searched, monkeypatch):
    study.build_lacking(searched.site, date(2026, 1, 1), date(2026, 1, 3), searched.run_step, quiet)

    def mean() -> tuple[int, float]:
        [trained] = tuning.tune(searched.site, ["pooled_towers"], 1, lambda line: None, ["dropout=0.2"])
        row = trained.row(0, named=True)
        file = searched.site.experiments / f"{row['training']}.json"
        cells.append([(rows, logmae) for *_, rows, logmae in json.loads(file.read_text())["cells"]])
        return row["cells"], row["logmae"]

    cells: list[list[tuple[int, float]]] = []
    assert mean() == (18, pytest.approx(np.mean([logmae for _, logmae in cells[0]])))
    least = sorted(rows for rows, _ in cells[0])[9]
    monkeypatch.setattr(tuning, "JUDGED_ROWS", least)
    large = [logmae for rows, logmae in cells[0] if rows >= least]
    assert len(large) < 18
    assert mean() == (len(large), pytest.approx(np.mean(large)))


def test_a_trial_that_diverges_comes_last(searched):
    site = searched.site
    study.build_lacking(site, date(2026, 1, 1), date(2026, 1, 3), searched.run_step, quiet)
    [found] = tuning.tune(site, ["pooled_towers"], 1, lambda line: None, ["learning_rate=1e30"])
    assert set(found.filter(pl.col("trial") != tuning.START)["logmae"]) == {math.inf}
    first, last = tuning.ranking(found).splitlines()[2:]
    assert first.startswith(f"| pooled_towers | {tuning.START} | 4 | ")
    assert "inf" not in first
    assert last == "| pooled_towers | learning_rate=1e30 | 4 | inf | inf | inf |"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weight_decy=1", "weight_decy: no such key \\(received 1\\)"),
        ("dropout=2", "dropout: expected less than 1"),
        ("dropout", "a change is setting=value"),
        ("", "a change is setting=value"),
        ("experts=3", "experts: no such key"),
        ("preset=[", "not YAML"),
        ("dropout=null", "changes nothing"),
        ("dropout=0.1 dropout=0.2", "changes nothing"),
    ],
)
def test_a_change_that_the_platform_file_could_not_have_is_refused(text, words):
    with pytest.raises(UsageError, match=words) as error:
        tuning.given(shipped_platform("adworld"), "mtmd", [text])
    assert repr(text) in str(error.value)
    assert tuning.given(shipped_platform("adworld"), "mmoe_dcn", ["experts=3"]) == {
        tuning.START: {},
        "experts=3": {"experts": 3},
    }
    assert tuning.given(shipped_platform("adworld"), "mtmd", ["deviation=null"])["deviation=null"] == {
        "deviation": None
    }


def test_a_tuning_day_among_the_evaluation_days_is_refused(searched):
    platform = searched.site.platform
    late = platform.experiments.model_copy(update={"tuning_days": (DAYS[0],)})
    site = type(searched.site)(platform.model_copy(update={"experiments": late}), searched.site.folder)
    with pytest.raises(PlatformError, match="not before the evaluation days"):
        study.evaluation_days(site)
    none = platform.experiments.model_copy(update={"tuning_days": ()})
    site = type(searched.site)(platform.model_copy(update={"experiments": none}), searched.site.folder)
    with pytest.raises(UsageError, match=r"names no experiments\.tuning_days"):
        study.tune(site, ["mtmd"], searched.document, searched.run_step, quiet)


def test_a_tuning_day_without_a_large_cell_is_said_before_anything_is_trained(searched, monkeypatch):
    study.build_lacking(searched.site, date(2026, 1, 1), date(2026, 1, 3), searched.run_step, quiet)
    [(largest,)] = query(
        searched,
        "SELECT max(n) FROM (SELECT count(*) AS n FROM joined_examples WHERE ds = ? GROUP BY surface, product)",
        date(2026, 1, 2),
    )
    monkeypatch.setattr(tuning, "train_all", lambda *_: pytest.fail("nothing is to be trained"))
    monkeypatch.setattr(tuning, "JUDGED_ROWS", largest + 1)
    with pytest.raises(
        Withheld, match=f"2026-01-02: no slice x task has the {largest + 1} rows .* the largest {largest}"
    ):
        next(tuning.tune(searched.site, ["mtmd"], 1, print))


def test_a_setting_of_another_model_is_refused():
    for model, text in (
        ("pooled_towers", "experts=4"),
        ("slice_towers", "deviation=0.3"),
        ("mmoe_dcn", "deviation=0.3"),
    ):
        with pytest.raises(UsageError, match=f"{text.split('=')[0]}: no such key"):
            tuning.given(shipped_platform("adworld"), model, [text])
    assert tuning.given(shipped_platform("adworld"), "soft_slice_towers", ["deviation=0.3"])["deviation=0.3"] == {
        "deviation": 0.3
    }


def test_a_model_that_is_not_searched_is_refused(searched):
    with pytest.raises(UsageError, match="'no_cross' is not searched, only mtmd, slice_towers"):
        study.tune(searched.site, ["mtmd", "no_cross"], searched.document, searched.run_step, quiet)
