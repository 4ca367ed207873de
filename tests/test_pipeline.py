"""What a run of the whole pipeline leaves, at a small size, through Dagster, as a user runs it."""

import math
import re
from datetime import date

import dagster as dg
import numpy as np
import polars as pl
import pytest
import torch

import sql as sql_files
from checks.training import high_passes
from mtmd_assets import model_store
from mtmd_assets.assets import training
from mtmd_assets.assets.training import train_window
from mtmd_assets.tables import tables
from tests.worlds import cli_output, copy_of, query

EXPERIMENTAL = ("experiment_", "improvement_", "trials")
"""Tables that the daily jobs leave empty (see test_experiments.py)."""
DAY = {n: date(2026, 1, n) for n in range(1, 8)}


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


def test_each_training_says_whether_its_loss_jumped(pipeline, tmp_path, monkeypatch):
    verdicts = pipeline.checks("training_loss", "models")
    assert [v.passed for v in verdicts] == [True] * len(pipeline.materialized("models"))
    assert verdicts[0].description == "the training loss did not jump"
    with_a_jump = [{"epoch": n, "train_loss": loss} for n, loss in enumerate((0.02, 0.05))]
    monkeypatch.setattr(training, "high_passes", lambda history: high_passes(with_a_jump))
    _, verdict = train_window(copy_of(pipeline, tmp_path).site, DAY[3], "again", print)
    assert not verdict.passed
    assert verdict.severity == dg.AssetCheckSeverity.WARN
    assert verdict.description == "epoch 1: training loss 0.05000 after 0.02000"


def test_each_evaluated_day_says_whether_its_routers_are_used(pipeline):
    """After few passes from gates that start equal they still are: a warning, with every router by name."""
    verdicts = pipeline.checks("routing", "routing_metrics")
    assert len(verdicts) == len(pipeline.materialized("routing_metrics"))
    routers = "SELECT DISTINCT ds, tower, domain, task FROM routing_metrics WHERE entropy > 0.99 * ln(3)"
    uniform = len(query(pipeline, routers))
    assert uniform > 0
    assert sum(v.metadata["faults"].value for v in verdicts) == uniform
    assert {(v.passed, v.severity) for v in verdicts} == {(False, dg.AssetCheckSeverity.WARN)}
    assert "every row weighs the experts alike" in verdicts[0].description


def test_metadata_has_pictures_and_previews(pipeline):
    def latest(table):
        record = pipeline.instance.fetch_materializations(pipeline.key(table), limit=1).records[0]
        return record.asset_materialization.metadata

    assert "data:image/png;base64," in latest("models")["loss curve"].value
    assert "data:image/png;base64," in latest("slice_metrics")["LogMAE"].value
    assert "data:image/png;base64," in latest("routing_metrics")["mean gates"].value
    assert "| impression_id |" in latest("joined_examples")["preview"].value
    assert latest("joined_examples")["dagster/row_count"].value > 2_000


# -- the prompt ----------------------------------------------------------------------------------------------------


def test_the_prompt_spills_in_the_home(pipeline):
    spill = pipeline.site.folder / "tmp"
    assert "true" in cli_output(pipeline, "sql", f"SELECT current_setting('temp_directory') = '{spill}'")


@pytest.mark.parametrize("file", sorted((sql_files.FOLDER / "queries").glob("*.sql")), ids=lambda f: f.stem)
def test_the_shipped_queries_answer_in_the_prompt(pipeline, file):
    answer = cli_output(pipeline, "sql", f".read {file}")
    # Nothing was compared here.
    assert bool(re.search(r"\b0 rows", answer)) == (file.stem in ("seed_by_seed", "who_keeps_the_best"))
    if file.stem == "prediction_from_embeddings":
        assert "20 rows" in answer
