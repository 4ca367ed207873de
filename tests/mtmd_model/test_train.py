"""A whole training run, its folder, and the loaded model."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtmd_model import checkpoint, metrics
from mtmd_model.data import Feed, load
from mtmd_model.lightning_module import OptimiserConfig
from mtmd_model.loss import kl_loss
from mtmd_model.mtmd import MTMDConfig
from mtmd_model.train import TrainConfig, TrainResult, train
from tests.mtmd_model.sample import examples, platform

CONFIG = TrainConfig(
    model=MTMDConfig(deep=(32, 16), shallow=(8, 4), router=(8,), width_divisor=8),
    optimiser=OptimiserConfig(learning_rate=5e-3),
    batch_size=256,
    max_epochs=5,
    accelerator="cpu",
)
Write = Callable[[pa.Table], Path]


@pytest.fixture(scope="module")
def files(write: Write) -> tuple[list[Path], list[Path]]:
    return [write(examples(2000, 1)), write(examples(2000, 2))], [write(examples(1000, 3))]


@pytest.fixture(scope="module")
def result(files: tuple[list[Path], list[Path]], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    out = tmp_path_factory.mktemp("models") / "v1"
    return train(platform(), *files, CONFIG, out, manifest={"code_version": "abc", "window": ["a", "b"]})


def test_loss_falls_and_beats_the_constant(result: TrainResult):
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < 0.5 * losses[0]
    table = examples(2000, 4)
    p, t = result.predictor.predict(table)["ctr"], np.array(table["score_ctr"])
    constant = np.full_like(t, t.mean())
    assert metrics.measure(p, t).kl < 0.5 * metrics.measure(constant, t).kl
    assert metrics.measure(p, t).calibration == pytest.approx(1, abs=0.1)


def test_a_seed_decides_everything(result: TrainResult, files: tuple[list[Path], list[Path]], tmp_path: Path):
    random_state = torch.random.get_rng_state()
    again = train(platform(), *files, CONFIG, tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert again.history == result.history
    for name, tensor in again.predictor.model.state_dict().items():
        assert torch.equal(tensor, result.predictor.model.state_dict()[name]), name
    other = train(platform(), *files, replace(CONFIG, seed=1, max_epochs=1), tmp_path / "other")
    assert other.history[0] != result.history[0]


def test_nothing_is_left_in_the_working_directory(
    files: tuple[list[Path], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    out = tmp_path / "models" / "v"
    for _ in range(2):  # the second replaces the first
        train(platform(), *files, replace(CONFIG, max_epochs=1), out)
    assert not list((tmp_path / "cwd").iterdir())
    assert sorted(os.listdir(out.parent)) == ["v"]
    assert sorted(os.listdir(out)) == ["manifest.json", "model.safetensors"]


def test_roundtrip_is_exact_and_free_of_pickle(result: TrainResult):
    loaded = checkpoint.load(result.out_dir)
    assert loaded.manifest == result.manifest
    for name, tensor in result.predictor.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    table = examples(100, 5)
    before, after = result.predictor.predict(table), loaded.predict(table)
    for task in before:
        np.testing.assert_array_equal(before[task], after[task])
    raw = (result.out_dir / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + header])["__metadata__"]["fingerprint"] == result.manifest["fingerprint"]


def test_the_manifest_tells_where_the_model_comes_from(result: TrainResult, files: tuple[list[Path], list[Path]]):
    m = result.manifest
    assert m["rows"] == {"train": 4000, "validation": 1000}
    assert m["code_version"] == "abc"
    assert m["data_hashes"] == {
        f"{f.parent.name}/data.parquet": hashlib.sha256(f.read_bytes()).hexdigest() for f in [*files[0], *files[1]]
    }
    assert set(m["params"]) == {"embedding", "dense"}
    assert set(m["normalisation"]["query"]["search"]) == {"q0", "q1", "q2", "query_match"}
    assert "query_match" not in m["normalisation"]["query"]["home"]
    q1 = m["normalisation"]["query"]["home"]["q1"]
    assert q1["mean"] == pytest.approx(10, abs=0.2)
    assert q1["std"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("key", ["schema", "encoder", "model_config"])
def test_a_foreign_manifest_is_refused(result: TrainResult, tmp_path: Path, key: str):
    for name in ("model.safetensors", "manifest.json"):
        (tmp_path / name).write_bytes((result.out_dir / name).read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    if key == "schema":
        manifest["schema"]["surfaces"].reverse()
    elif key == "encoder":
        manifest["encoder"]["item_id"]["values"].reverse()
    else:
        manifest["model_config"]["constrained"] = False
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not the manifest of"):
        checkpoint.load(tmp_path)


def test_predictions_are_those_of_the_stored_vectors(result: TrainResult):
    table = examples(300, 6)
    predictor = replace(result.predictor, batch_size=64)
    got = predictor.predict(table)
    queries = predictor.embed_queries(table.drop_columns(["product"]))
    items = predictor.embed_items(table.drop_columns(["surface"]))
    p = {}
    for task in got:
        q, i = queries[task].vectors.astype(np.float64), items[task].vectors.astype(np.float64)
        p[task] = 1 / (1 + np.exp(-(q * i).sum(1)))
        exists = ~np.isnan(got[task])
        expected = p[task] * (p["ctr"] if task != "ctr" else 1)
        np.testing.assert_allclose(got[task][exists], expected[exists], rtol=1e-5)
        assert (exists <= (queries[task].exists & items[task].exists)).all()
    product = np.array(table["product"])
    assert np.array_equal(np.isnan(got["octr"]), product == "shopping")
    assert np.array_equal(items["octr"].exists, product == "standard")
    child, parent = got["gctr"], got["ctr"]
    assert (child <= parent).all()
    np.testing.assert_allclose(np.exp(predictor.log_probability(table)["ctr"]), parent)


def test_new_ids_and_all_missing_rows_are_scored(result: TrainResult):
    table = examples(20, 7)
    item_ids = pa.array([str(10**9 + i) for i in range(20)])
    table = table.set_column(table.column_names.index("item_id"), "item_id", item_ids)
    assert np.isfinite(result.predictor.predict(table)["ctr"]).all()
    empty = {f.name: pa.nulls(2) for f in platform().features}
    nothing = pa.table({"surface": ["home", "search"], "product": ["standard", "shopping"], **empty})
    assert np.isfinite(result.predictor.predict(nothing)["ctr"]).all()


def test_an_empty_table_gives_empty_predictions(result: TrainResult):
    table = examples(5).slice(0, 0)
    assert all(p.shape == (0,) for p in result.predictor.predict(table).values())
    assert all(len(e.vectors) == 0 for e in result.predictor.embed_items(table).values())


def test_without_validation_the_last_epoch_is_kept(files: tuple[list[Path], list[Path]], tmp_path: Path):
    seen: list[Any] = []
    config = replace(CONFIG, max_epochs=2, optimiser=OptimiserConfig(schedule="constant"), precision="bf16-mixed")
    got = train(platform(), files[0], [], config, tmp_path / "v", on_epoch=seen.append)
    assert got.best_epoch == 1
    assert [entry["epoch"] for entry in seen] == [0, 1]
    assert seen[0]["validation_loss"] is None


def test_training_stops_and_keeps_the_best_epoch(write: Write, tmp_path: Path):
    # few rows and a high learning rate: overfitted after a few epochs
    files = [write(examples(200, 1))], [write(examples(300, 3))]
    optimiser = OptimiserConfig(0.1, "constant")
    config = replace(CONFIG, max_epochs=30, patience=2, batch_size=100, optimiser=optimiser, calibrate=False)
    got = train(platform(), *files, config, tmp_path / "v")
    validation = [entry["validation_loss"] for entry in got.history]
    assert got.best_epoch == int(np.argmin(validation)) == len(validation) - 3
    assert len(validation) < 30
    model, encoder = got.predictor.model, got.predictor.encoder
    window = load(encoder, files[1])
    with torch.no_grad():
        weights = torch.tensor([t.weight for t in encoder.schema.tasks])
        loss = kl_loss(model(window).double(), window.labels.double(), window.weight.double(), weights.double())
    assert loss.item() == pytest.approx(min(validation), rel=1e-5)
    assert min(abs(v - loss.item()) for v in validation[-2:]) > 1e-3 * loss.item()


def test_files_without_rows_are_refused(write: Write, tmp_path: Path):
    with pytest.raises(ValueError, match="no rows in"):
        train(platform(), [write(examples(3).slice(0, 0))], [], CONFIG, tmp_path / "v")


def test_a_feed_gives_every_row_once_in_an_order_of_seed_and_epoch(result: TrainResult, write: Write):
    encoder = result.predictor.encoder
    window = load(encoder, [write(examples(1000, 8))])

    def order(seed: int | None, epoch: int) -> list[float]:
        feed = Feed(window, encoder, 300, seed, lambda: epoch)
        batches = list(feed)
        assert len(batches) == len(feed) == 4
        assert {len(b) for b in batches} == {250}
        return torch.cat([b.labels[:, 0] for b in batches]).tolist()

    first = order(0, 0)
    assert sorted(first) == sorted(window.labels[:, 0].tolist())
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first
    assert order(None, 0) == window.labels[:, 0].tolist()


def test_routing_summary(result: TrainResult, files: tuple[list[Path], list[Path]]):
    encoder = result.predictor.encoder
    window = load(encoder, files[1])
    model: Any = result.predictor.model
    rows = model.routing(Feed(window, encoder, 300))
    cells = {(r["tower"], r["domain"], r["task"]) for r in rows}
    assert len(cells) == 3 * 4 + 2 * 3
    for cell in cells:
        mine = [r for r in rows if (r["tower"], r["domain"], r["task"]) == cell]
        assert [r["expert"] for r in mine] == ["deep", "task_shared", "domain_shared"]
        assert sum(r["mean_gate"] for r in mine) == pytest.approx(1)
        assert sum(r["max_gate_share"] for r in mine) == pytest.approx(1)
        assert 0 <= mine[0]["entropy"] <= mine[0]["entropy_of_mean"] + 1e-9 <= np.log(3) + 1e-6
    whole = model.routing([window])
    for a, b in zip(rows, whole, strict=True):
        assert a["mean_gate"] == pytest.approx(b["mean_gate"], rel=1e-4)


def test_a_predictor_tells_its_schema_and_its_routing(result: TrainResult):
    loaded = checkpoint.load(result.out_dir)
    assert loaded.schema == platform()
    assert len(loaded.routing(examples(500, 9))) == 18 * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"accelerator": "tpu"},
        {"precision": "16"},
        {"gradient_clip": -1.0},
        {"gradient_clip": float("nan")},
        {"patience": 0},
    ],
)
def test_wrong_configurations_are_refused(changes: dict):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(CONFIG, **changes)
