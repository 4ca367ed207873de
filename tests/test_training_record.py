"""Records of trainings: what they hold, and that with them another home has the same results without training."""

import re
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from mtmd_assets import study, training_record
from mtmd_assets.assets import experiment_scoring, experiments
from mtmd_assets.faults import Withheld
from mtmd_assets.home import CHECKOUT, Site
from mtmd_model import checkpoint
from tests.studied import DAYS, OF_DAY, TRAINED, quiet
from tests.worlds import Runner, copy_of, query, show_failure


def copied(studied: Any, folder: Path) -> Site:
    """A home of its own with what the study has built, its trainings' folders gone."""
    site = copy_of(studied, folder / "home").site
    for weights in site.experiments.glob("*/"):
        shutil.rmtree(weights)
    return site


def unpublish(site: Site) -> None:
    """Remove what was published of experiments."""
    for table in (*experiment_scoring.TABLES, "improvement_results"):
        for day in DAYS:
            site.warehouse.path(table, day).unlink(missing_ok=True)


def trained_anew(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the trainings that are run from now on, none of which trains."""
    names: list[str] = []
    monkeypatch.setattr(experiments, "train_all", lambda jobs, workers, log: names.extend(job.name for job in jobs))
    return names


def results(site: Site, folder: Path) -> str:
    """The document of all of `TRAINED`."""
    runner = Runner(site)

    def run(job, first, last=None, only=(), config=None):
        result = runner.run(job, first, last, only, config)
        assert result.success, show_failure(result)

    document = folder / "results.md"
    assert study.results(site, TRAINED, document, run, quiet) == 0
    return document.read_text()


def test_a_record_has_what_the_model_predicts_and_no_id_of_the_log(studied):
    with studied.site.warehouse.connect() as con:
        rows = con.sql(f"FROM joined_examples WHERE ds = '{DAYS[0]}' ORDER BY impression_id").to_arrow_table()
        models = con.execute("SELECT model, model_version, scored_data FROM experiment_models WHERE ds = ?", [DAYS[0]])
        published = models.fetchall()
    assert len(published) == 2 * len(OF_DAY[DAYS[0]])
    for model, version, scored_data in published:
        folder = studied.site.experiments / version
        record = training_record.read(folder)
        loaded = checkpoint.load(folder)
        for task, p in loaded.predict(rows).items():
            np.testing.assert_array_equal(record.probabilities[task], p.astype(np.float32))
        assert record.scored_data == scored_data
        assert {(r["tower"], r["domain"]) for r in record.routing} == (
            {(side, d) for side in ("query", "item") for d in loaded.schema.domains(side)} if model == "mtmd" else set()
        )
        assert record.manifest == {name: loaded.manifest[name] for name in training_record.KEPT}
        file = pq.ParquetFile(training_record.path_of(folder))
        assert {f.name: str(f.type) for f in file.schema_arrow} == dict.fromkeys(
            studied.site.platform.task_names, "float"
        )
        assert file.metadata.metadata.keys() == {training_record.ABOUT}
        assert str(studied.site.folder) not in str(file.metadata.metadata), "nothing of the machine"
        assert "encoder" not in record.manifest, "which has the vocabularies"


def test_published_is_what_the_record_says(studied):
    [(version,)] = query(
        studied, "SELECT model_version FROM experiment_models WHERE ds = ? AND model = 'mtmd' AND seed = 1", DAYS[0]
    )
    record = training_record.read(studied.site.experiments / version)
    for task, p in record.probabilities.items():
        found = query(
            studied,
            "SELECT probability FROM experiment_predictions WHERE model_version = ? AND task = ? ORDER BY impression_id",
            version,
            task,
        )
        assert [x for (x,) in found] == p[~np.isnan(p)].tolist()


def test_with_records_another_home_has_the_same_results_without_training(studied, tmp_path, monkeypatch):
    names = trained_anew(monkeypatch)
    homes = [copied(studied, tmp_path / name) for name in ("ours", "theirs")]
    for site in homes:
        unpublish(site)
    ours, theirs = (results(site, site.folder) for site in homes)
    assert names == []
    assert ours == theirs
    of_study = studied.document.read_text()
    assert ours[: ours.index("adworld: ablations")] == of_study[: of_study.index("adworld: ablations")]


def test_what_records_lack_is_trained(studied, tmp_path, monkeypatch):
    site = copied(studied, tmp_path)
    version = "SELECT model_version FROM experiment_models WHERE (ds, model, seed) = (?, 'slice_towers', 1)"
    with site.warehouse.connect() as con:
        [(lost,)] = con.execute(version, [DAYS[1]]).fetchall()
    training_record.path_of(site.experiments / lost).unlink()
    names = trained_anew(monkeypatch)
    windows = {day: site.platform.window(date.fromordinal(day.toordinal() - 1)) for day in DAYS}
    with pytest.raises(FileNotFoundError):  # nothing was trained, nor did it say that it diverged
        experiments.train_models(site, windows, ["mtmd", "slice_towers"], [0, 1], 1, lambda line: None)
    assert names == [lost]


def test_a_record_of_other_rows_is_made_again(studied, tmp_path):
    site = copy_of(studied, tmp_path / "home").site
    with site.warehouse.connect() as con:
        [(version,)] = con.execute(
            "SELECT model_version FROM experiment_models WHERE (ds, model, seed) = (?, 'mtmd', 0)", [DAYS[0]]
        ).fetchall()
    weights = site.experiments / version
    before = training_record.read(weights)
    file = site.warehouse.path("joined_examples", DAYS[0])
    pl.read_parquet(file).head(100).write_parquet(file)
    assert not training_record.is_of(weights, experiment_scoring.scored_data_of(site, DAYS[0]))
    window = site.platform.window(date.fromordinal(DAYS[0].toordinal() - 1))
    trained = [experiment_scoring.Trained("mtmd", 0, version, weights)]
    experiment_scoring.score_day(site, window, DAYS[0], trained, "again", lambda line: None)
    after = training_record.read(weights)
    assert after.scored_data != before.scored_data
    assert {len(p) for p in after.probabilities.values()} == {100}
    assert after.manifest == before.manifest

    shutil.rmtree(weights)
    pl.read_parquet(file).head(50).write_parquet(file)
    with pytest.raises(Withheld, match=f"{version}.parquet is of other rows than the day has now"):
        experiment_scoring.score_day(site, window, DAYS[0], trained, "again", lambda line: None)


def test_how_it_was_trained_is_in_the_record_or_the_folder(studied, tmp_path):
    [(version,)] = query(
        studied, "SELECT model_version FROM experiment_models WHERE (ds, model, seed) = (?, 'mtmd', 0)", DAYS[0]
    )
    folder = tmp_path / version
    assert training_record.manifest_of(folder) is None
    shutil.copytree(studied.site.experiments / version, folder)
    whole = training_record.manifest_of(folder)
    assert whole is not None
    shutil.copy(training_record.path_of(studied.site.experiments / version), tmp_path)
    assert training_record.manifest_of(folder) == {name: whole[name] for name in training_record.KEPT}


@pytest.mark.parametrize("content", ["", "no parquet", None])
def test_a_file_that_is_no_record_is_named(tmp_path, content):
    folder = tmp_path / "2026-01-03-mtmd-0-0123456789"
    path = training_record.path_of(folder)
    if content is None:
        pl.DataFrame({"ctr": [0.5]}).write_parquet(path)
    else:
        path.write_text(content)
    for reading in (training_record.read, training_record.manifest_of):
        with pytest.raises(
            Withheld, match=r"mtmd-0-0123456789.parquet cannot be read as a training's record, remove it"
        ):
            reading(folder)


def test_the_records_that_the_project_brings_are_those_of_its_document():
    """Of the code that docs/results.md names: with others the result would not come out of them."""
    [(of_mtmd, of_others)] = re.findall(
        r"^## kuairand\n\n.*?code of mtmd `(\w+)`, of the others `(\w+)`",
        (CHECKOUT / "docs" / "results.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    records = sorted((CHECKOUT / "docs" / "records" / "kuairand").glob("*.parquet"))
    found = {file.stem: training_record.manifest_of(file.with_suffix("")) for file in records}
    assert len(found) >= 36
    architectures = {name: m and m["train_config"]["architecture"] for name, m in found.items()}
    assert {name: m and m["code_version"] for name, m in found.items()} == {
        name: of_mtmd if architecture == "mtmd" else of_others for name, architecture in architectures.items()
    }
