"""A constant a task makes the sums of predictions those of the scores."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtmd_model.batch import Batch
from mtmd_model.calibration import calibrate
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.mmoe_dcn import MMOEConfig
from mtmd_model.mtmd import MTMD, MTMDConfig
from mtmd_model.plain import PlainConfig
from mtmd_model.train import TrainConfig, train
from tests.mtmd_model.sample import examples, platform

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)
TASKS = [t.name for t in platform().tasks]
Write = Callable[[pa.Table], Path]


@pytest.fixture(scope="module")
def encoder(write: Write) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


def model_of(encoder: Encoder, constrained: bool = True) -> MTMD:
    torch.manual_seed(0)
    model = MTMD(encoder.schema, encoder.rows, replace(TINY, constrained=constrained))
    model(encoder.encode(examples(300)))  # statistics
    with torch.no_grad():
        model.bias.logits_TSP.normal_(-1.5, 0.5)
    return model.eval()


@torch.no_grad()
def sums(model: MTMD, rows: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) weighted sums of predictions and scores where there is a score."""
    weight_BT = rows.weight.double()[:, None] * ~rows.labels.isnan()
    p_BT = model(rows).double().sigmoid()
    return (weight_BT * p_BT).sum(0), (weight_BT * rows.labels.double().nan_to_num()).sum(0)


@pytest.mark.parametrize("constrained", [True, False])
def test_sums_of_predictions_become_those_of_the_scores(encoder: Encoder, constrained: bool):
    model, rows = model_of(encoder, constrained), encoder.encode(examples(2000, 1))
    predicted_T, scored_T = sums(model, rows)
    assert ((predicted_T / scored_T).log().abs() > 0.05).any()
    before_T = calibrate(model, lambda: [rows])
    torch.testing.assert_close(before_T, predicted_T / scored_T, rtol=1e-5, atol=0)
    after_T, _ = sums(model, rows)
    torch.testing.assert_close(after_T, scored_T, rtol=1e-3, atol=0)


def test_near_by_two_passes_do(encoder: Encoder):
    model, rows = model_of(encoder), encoder.encode(examples(2000, 1))
    predicted_T, _ = sums(model, rows)
    scale_T = torch.tensor([1 / 0.9, 1.1, 0.95, 1.05])
    with torch.no_grad():
        labels_BT = torch.where(rows.labels.isnan(), torch.nan, scale_T * model(rows).sigmoid())
    passes: list[int] = []

    def batches() -> list[Batch]:
        passes.append(1)
        return [replace(rows, labels=labels_BT)]

    before_T = calibrate(model, batches)
    assert len(passes) == 2
    torch.testing.assert_close(before_T, 1 / scale_T.double(), rtol=1e-5, atol=0)
    after_T, _ = sums(model, rows)
    torch.testing.assert_close(after_T, predicted_T * scale_T, rtol=1e-3, atol=0)
    del passes[:]
    calibrate(model, batches)
    assert len(passes) == 1, "nothing is left to do but to look"


@pytest.mark.parametrize("mean", [0.5, 0.9, 0.97])
def test_a_ratio_near_one_says_little_where_all_is_likely(encoder: Encoder, mean: float):
    model, rows = model_of(encoder, constrained=False), encoder.encode(examples(2000, 1))
    with torch.no_grad():
        model.bias.logits_TSP.add_(torch.tensor(mean).logit() + 1.5)
        labels_BT = torch.where(rows.labels.isnan(), torch.nan, (1.02 * model(rows).sigmoid()).clamp_max(1))
    rows = replace(rows, labels=labels_BT)
    calibrate(model, lambda: [rows])
    after_T, scored_T = sums(model, rows)
    torch.testing.assert_close(after_T, scored_T, rtol=1e-3, atol=0)


def test_slices_keep_their_distances_and_all_else_stays(encoder: Encoder):
    model, rows = model_of(encoder), encoder.encode(examples(2000, 1))
    old = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, lambda: [rows])
    for name, value in model.state_dict().items():
        if name == "bias.logits_TSP":
            shift_TZ = (value - old[name]).flatten(1)
            torch.testing.assert_close(shift_TZ, shift_TZ[:, :1].expand_as(shift_TZ))
            assert (shift_TZ[:, 0] != 0).all()
        else:
            assert torch.equal(value, old[name]), name


def test_how_rows_are_batched_makes_no_difference(encoder: Encoder):
    rows = encoder.encode(examples(500, 1))
    whole, parted = model_of(encoder), model_of(encoder)

    def batches() -> Iterator[Batch]:
        return (rows.slice(n, min(n + 70, len(rows))) for n in range(0, len(rows), 70))

    torch.testing.assert_close(calibrate(whole, lambda: [rows]), calibrate(parted, batches), rtol=1e-5, atol=0)
    torch.testing.assert_close(whole.bias.logits_TSP, parted.bias.logits_TSP)


@pytest.mark.parametrize("nothing", [torch.nan, 0.0])
def test_a_task_without_a_score_stays(encoder: Encoder, nothing: float):
    model, rows = model_of(encoder), encoder.encode(examples(1000, 1))
    labels_BT = rows.labels.clone()
    labels_BT[:, TASKS.index("cvr")] = nothing
    old_TSP = model.bias.logits_TSP.detach().clone()
    before_T = calibrate(model, lambda: [replace(rows, labels=labels_BT)])
    assert before_T.isfinite().tolist() == [True, True, True, False]
    moved = (model.bias.logits_TSP != old_TSP).flatten(1).any(1)
    assert moved.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_rows": 250},
        {"architecture": "slice_towers", "model": PlainConfig(widths=(8,), width_divisor=16)},
        {"architecture": "pooled_towers", "model": PlainConfig(widths=(8,), width_divisor=16)},
        {"architecture": "mmoe_dcn", "model": MMOEConfig(widths=(8,), gate=(4,), width_divisor=16)},
        {"architecture": "product_mtmd"},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values()))[:30] or "mtmd",
)
def test_training_calibrates_every_model_on_the_days_that_stop_it(write: Write, tmp_path: Path, changes: dict):
    files, stop = [write(examples(600, 1))], write(examples(600, 2))
    config = replace(TrainConfig(model=TINY, batch_size=200, max_epochs=2, accelerator="cpu"), **changes)
    got = train(platform(), files, [stop], config, tmp_path / "calibrated")
    raw = train(platform(), files, [stop], replace(config, calibrate=False), tmp_path / "raw")
    table = examples(600, 2)
    weight = np.array(table["weight"])
    before, after = raw.predictor.predict(table), got.predictor.predict(table)
    for task in TASKS:
        score = table[f"score_{task}"].to_numpy(zero_copy_only=False).astype(float)
        here = ~np.isnan(score)
        ratio = (weight * before[task])[here].sum() / (weight * score)[here].sum()
        assert got.manifest["calibration"][task] == pytest.approx(ratio, rel=1e-5)
        assert (weight * after[task])[here].sum() == pytest.approx((weight * score)[here].sum(), rel=1e-3)
    assert raw.manifest["calibration"] is None
    assert got.history == raw.history


def test_without_days_to_stop_on_nothing_is_calibrated(write: Write, tmp_path: Path):
    config = TrainConfig(model=TINY, batch_size=200, max_epochs=1, accelerator="cpu")
    assert train(platform(), [write(examples(300, 1))], [], config, tmp_path / "v").manifest["calibration"] is None
