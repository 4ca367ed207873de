"""A constant a task and slice brings the sums of predictions to those of the scores, as far as these can be trusted."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtmd_model import calibration
from mtmd_model.batch import Batch
from mtmd_model.calibration import DAY, SPREAD, calibrate, expected
from mtmd_model.contenders.mmoe_dcn import MMOEConfig
from mtmd_model.contenders.plain import PlainConfig
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.mtmd import MTMD, MTMDConfig
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


@torch.no_grad()
def cells(model: MTMD, rows: Batch) -> dict[tuple[int, int, int], tuple[float, float]]:
    """(task, surface, product) -> logarithm of the odds ratio of the means, and its variance, where there are scores."""
    p_BT = model(rows).double().sigmoid()
    found = {}
    for t, s, p in zip(*np.nonzero(model.bias.exists_TSP.numpy()), strict=True):
        here = ~rows.labels[:, t].isnan() & (rows.query.domain == int(s)) & (rows.item.domain == int(p))
        if here.any():
            weight = rows.weight[here].double()
            predicted, scored = weight * p_BT[here, t], weight * rows.labels[here, t].double()
            rows_ = float(weight.sum() ** 2 / (weight**2).sum())
            mean_p, mean_t = (x.sum() / weight.sum() for x in (predicted, scored))
            influence = [(x - weight * m) / (m * (1 - m)) for x, m in ((predicted, mean_p), (scored, mean_t))]
            variance = float(((influence[0] - influence[1]) ** 2).sum() / weight.sum() ** 2) * rows_ / (rows_ - 1)
            found[int(t), int(s), int(p)] = float(mean_p.logit() - mean_t.logit()), variance
    return found


@pytest.mark.parametrize("constrained", [True, False])
def test_every_slice_loses_what_it_is_expected_to_be_off(encoder: Encoder, constrained: bool):
    model, rows = model_of(encoder, constrained), encoder.encode(examples(2000, 1))
    predicted_T, scored_T = sums(model, rows)
    was = cells(model, rows)
    assert max(abs(x) for x, _ in was.values()) > 0.2
    before_T = calibrate(model, lambda: [rows])
    torch.testing.assert_close(before_T, predicted_T / scored_T, rtol=1e-5, atol=0)
    now = cells(model, rows)
    for t in range(len(TASKS)):
        of_task = [cell for cell in was if cell[0] == t]
        x, v = np.array([was[cell] for cell in of_task]).T
        off = expected(torch.tensor(x)[:, None], torch.tensor(v)[:, None])[:, 0].numpy()
        np.testing.assert_allclose([now[cell][0] for cell in of_task], x - off, atol=1e-3)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_expected_by_hand(monkeypatch):
    monkeypatch.setattr(calibration, "SPREAD", 0.1)
    monkeypatch.setattr(calibration, "DAY", 0.2)
    # precisions 20 and 10, so the task's is 0.2; of the distance from it 0.01 * 20 and 0.01 * 10 are kept
    got = expected(column(0.3, 0.0, torch.nan), column(0, 0.05, 1))
    torch.testing.assert_close(got, column(0.22, 0.18, 0.2))


def test_slices_that_lie_far_apart_are_taken_at_their_word():
    # variance between slices by moments: of x around its mean 0.75, less that of a day
    far = expected(column(0.0, 1.0, 2.0, 0.0), torch.zeros(4, 1))
    spread = np.var([0, 1, 2, 0], ddof=1) - DAY**2
    kept = spread / (spread + DAY**2)
    torch.testing.assert_close(far, 0.75 + kept * (column(0.0, 1.0, 2.0, 0.0) - 0.75))
    near = expected(column(0.0, 0.01, 0.02, 0.0), torch.zeros(4, 1))
    kept = SPREAD**2 / (SPREAD**2 + DAY**2)
    torch.testing.assert_close(near, 0.0075 + kept * (column(0.0, 0.01, 0.02, 0.0) - 0.0075))


def test_one_slice_is_its_task_and_nothing_seen_is_nothing():
    torch.testing.assert_close(expected(column(torch.nan, 0.3), column(0.1, 0.1)), column(0.3, 0.3))
    assert expected(column(torch.nan, torch.nan), column(0.1, 0.1)).isnan().all()


def test_a_slice_of_one_row_goes_with_its_task(encoder: Encoder):
    rows = encoder.encode(examples(2000, 1))
    here = (rows.query.domain == 0) & (rows.item.domain == 0)
    first = here & (here.cumsum(0) == 1)
    labels_BT = torch.where((here & ~first)[:, None], torch.nan, rows.labels)
    other_BT = torch.where(first[:, None], (3 * rows.labels).clamp_max(0.9), labels_BT)

    def shift_Z(labels: torch.Tensor) -> torch.Tensor:
        model = model_of(encoder)
        old_TSP = model.bias.logits_TSP.detach().clone()
        calibrate(model, lambda: [replace(rows, labels=labels)])
        return (model.bias.logits_TSP - old_TSP)[0].flatten()

    # what its one row says moves nothing
    torch.testing.assert_close(shift_Z(labels_BT), shift_Z(other_BT), atol=2e-3, rtol=0)


def sums_of(*slices: tuple[np.ndarray, np.ndarray]) -> calibration._Sums:
    """Of one task, from each slice's predictions and scores; the slope is that of a constant of the predictions' logits."""
    predicted, scored, weight, moments, slope = zip(
        *(
            (
                p.sum(),
                t.sum(),
                len(p),
                np.stack([np.ones_like(p), p, t]) @ np.stack([np.ones_like(p), p, t]).T,
                p @ (1 - p),
            )
            for p, t in slices
        ),
        strict=True,
    )
    predicted_Z1, scored_Z1, weight_Z1, moments_Z133, slope_Z1 = (
        torch.tensor(np.array(x, dtype=float))[:, None] for x in (predicted, scored, weight, moments, slope)
    )
    return calibration._Sums(predicted_Z1, scored_Z1, weight_Z1, moments_Z133, slope_Z1[:, :, None])


@pytest.mark.parametrize(("mean", "off"), [(0.02, 0.3), (0.5, 0.3), (0.98, 0.6), (0.98, -0.6)])
def test_the_variance_is_that_of_a_bootstrap(mean: float, off: float):
    rng = np.random.default_rng(0)
    z = rng.normal(np.log(mean / (1 - mean)), 1, 300)
    p, t = (1 / (1 + np.exp(-x)) for x in (z + off, z + rng.normal(0, 0.3, 300)))
    picked = rng.integers(0, 300, (4000, 300))
    means = p[picked].mean(1), t[picked].mean(1)
    again = np.log(means[0] / (1 - means[0])) - np.log(means[1] / (1 - means[1]))
    assert float(sums_of((p, t)).variance_ZT) == pytest.approx(again.var(), rel=0.12)


def test_a_slice_without_rows_goes_with_those_that_say_most():
    rng = np.random.default_rng(0)
    sure = np.full(5000, 0.005), np.full(5000, 0.004)
    noisy = np.full(60, 0.5), (rng.random(60) < 0.7).astype(float)
    sums_ = sums_of(sure, noisy, (np.empty(0), np.empty(0)))
    step_Z = sums_.step_ZT(torch.zeros(3, 1, dtype=torch.float64))[0][:, 0]
    assert step_Z[0] < -0.2 < 0.5 < step_Z[1]
    assert noisy[1].sum() > sure[1].sum(), "by scores it would go with the other"
    assert step_Z[2] == pytest.approx(float(step_Z[0]), abs=0.05)


def test_a_task_whose_scores_are_all_one_stays(encoder: Encoder):
    model, rows = model_of(encoder, constrained=False), encoder.encode(examples(1000, 1))
    labels_BT = rows.labels.clone()
    labels_BT[:, 0] = torch.where(labels_BT[:, 0].isnan(), torch.nan, 1.0)
    old_TSP = model.bias.logits_TSP.detach().clone()
    before_T = calibrate(model, lambda: [replace(rows, labels=labels_BT)])
    assert before_T.isfinite().all()
    moved = (model.bias.logits_TSP != old_TSP).flatten(1).any(1)
    assert moved.tolist() == [False, True, True, True]


def test_where_no_slice_has_two_rows_nothing_moves(encoder: Encoder):
    model, rows = model_of(encoder), encoder.encode(examples(1, 1))
    old_TSP = model.bias.logits_TSP.detach().clone()
    calibrate(model, lambda: [rows])
    torch.testing.assert_close(model.bias.logits_TSP, old_TSP, atol=1e-6, rtol=0)


def test_a_slice_without_rows_goes_with_its_task(encoder: Encoder):
    model, rows = model_of(encoder), encoder.encode(examples(2000, 1))
    gone = (rows.query.domain == 0) & (rows.item.domain == 0)
    labels_BT = torch.where(gone[:, None], torch.nan, rows.labels)
    old_TSP = model.bias.logits_TSP.detach().clone()
    calibrate(model, lambda: [replace(rows, labels=labels_BT)])
    shift_TSP = model.bias.logits_TSP - old_TSP
    others_TZ = shift_TSP.flatten(1)[:, 1:][:, model.bias.exists_TSP[0].flatten()[1:]]
    assert others_TZ[0].min() < shift_TSP[0, 0, 0] < others_TZ[0].max()


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


@pytest.mark.parametrize("mean", [0.5, 0.9, 0.999])
def test_what_is_off_by_so_many_logits_is_put_right_however_likely_it_is(encoder: Encoder, mean: float):
    model, rows = model_of(encoder, constrained=False), encoder.encode(examples(2000, 1))
    with torch.no_grad():
        model.bias.logits_TSP.add_(torch.tensor(mean).logit() + 1.5)
        labels_BT = torch.where(rows.labels.isnan(), torch.nan, (model(rows) + 0.3).sigmoid())
    rows = replace(rows, labels=labels_BT)
    old_TSP = model.bias.logits_TSP.detach().clone()
    calibrate(model, lambda: [rows])
    shift_TSP = (model.bias.logits_TSP - old_TSP)[model.bias.exists_TSP]
    torch.testing.assert_close(shift_TSP, torch.full_like(shift_TSP, 0.3), atol=0.01, rtol=0)
    after_T, scored_T = sums(model, rows)
    torch.testing.assert_close(after_T, scored_T, rtol=1e-3, atol=0)


def test_a_rare_slice_says_as_little_of_a_likely_one_as_of_another_rare_one(encoder: Encoder):
    model, rows = model_of(encoder, constrained=False), encoder.encode(examples(2000, 1))
    likely_B = rows.item.domain == 0
    with torch.no_grad():
        model.bias.logits_TSP[:, :, 0] = 6.5
        z_BT = model(rows)
        labels_BT = torch.where(rows.labels.isnan(), torch.nan, (z_BT - 0.04 * ~likely_B[:, None]).sigmoid())
    old_TSP = model.bias.logits_TSP.detach().clone()
    calibrate(model, lambda: [replace(rows, labels=labels_BT)])
    shift_TSP = model.bias.logits_TSP - old_TSP
    assert (shift_TSP.abs() < 0.041).all(), "each between its own and the other's, in logits"


def test_all_but_the_biases_stays(encoder: Encoder):
    model, rows = model_of(encoder), encoder.encode(examples(2000, 1))
    old = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, lambda: [rows])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    assert changed == {"bias.logits_TSP"}


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
    table, model = examples(600, 2), raw.predictor.model
    assert not torch.equal(got.predictor.model.bias.logits_TSP, model.bias.logits_TSP)
    before_T = calibrate(model, lambda: [raw.predictor.encoder.encode(table)])
    assert list(got.manifest["calibration"].values()) == pytest.approx(before_T.tolist(), rel=1e-5)
    torch.testing.assert_close(got.predictor.model.state_dict(), model.state_dict())
    assert raw.manifest["calibration"] is None
    assert got.history == raw.history


def test_without_days_to_stop_on_nothing_is_calibrated(write: Write, tmp_path: Path):
    config = TrainConfig(model=TINY, batch_size=200, max_epochs=1, accelerator="cpu")
    assert train(platform(), [write(examples(300, 1))], [], config, tmp_path / "v").manifest["calibration"] is None
