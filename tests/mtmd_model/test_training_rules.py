"""The parts of a training run by themselves: devices, data, losses, the optimiser."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtmd_model import metrics
from mtmd_model import train as training
from mtmd_model.batch import Batch
from mtmd_model.data import load, slice_logits
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.lightning_module import OptimiserConfig, RankerModule
from mtmd_model.loss import kl_loss
from mtmd_model.mtmd import MTMD, MTMDConfig
from mtmd_model.train import TrainConfig, resolve_accelerator, train
from tests.mtmd_model.sample import examples, platform

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)
CONFIG = TrainConfig(model=TINY, batch_size=100, max_epochs=1, accelerator="cpu")
Write = Callable[[pa.Table], Path]


@pytest.fixture(scope="module")
def encoder(write: Write) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


def module_of(encoder: Encoder, optimiser: OptimiserConfig | None = None) -> RankerModule:
    torch.manual_seed(0)
    model = MTMD(encoder.schema, encoder.rows, TINY)
    model(encoder.encode(examples(300)))
    return RankerModule(model, optimiser or OptimiserConfig())


@dataclass
class Watched:
    """A run of two epochs, three steps each."""

    files: list[Path]
    labels: list[torch.Tensor]
    """Of the rows of each training step."""
    rates: list[float]
    """The learning rate of each step."""
    optimiser: OptimiserConfig


@pytest.fixture(scope="module")
def watched(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    seen = Watched([write(examples(300))], [], [], OptimiserConfig(warmup_share=0.4))
    real = RankerModule.training_step

    def step(self: RankerModule, batch: Batch, index: int) -> torch.Tensor:
        seen.labels.append(batch.labels[:, 0])
        seen.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return real(self, batch, index)

    config = replace(CONFIG, max_epochs=2, optimiser=seen.optimiser)
    with mock.patch.object(RankerModule, "training_step", step):
        train(platform(), seen.files, [], config, tmp_path_factory.mktemp("watched") / "v")
    return seen


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("name", "cuda", "expected"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("gpu", True, "cuda"), ("cpu", True, "cpu")],
)
def test_a_mac_gpu_is_never_taken(name: str, cuda: bool, expected: str):
    with (
        mock.patch("torch.cuda.is_available", return_value=cuda),
        mock.patch("torch.backends.mps.is_available", return_value=True),
    ):
        assert resolve_accelerator(name) == expected


def test_a_gpu_that_is_not_there_is_refused(write: Write, tmp_path: Path):
    with mock.patch("torch.cuda.is_available", return_value=False), pytest.raises(ValueError, match="no CUDA GPU"):
        train(platform(), [write(examples(10))], [], replace(CONFIG, accelerator="gpu"), tmp_path / "v")


def test_lightning_is_told_the_resolved_accelerator(write: Write, tmp_path: Path):
    with (
        mock.patch.object(training, "resolve_accelerator", return_value="cpu") as resolve,
        mock.patch.object(training.L, "Trainer", wraps=training.L.Trainer) as trainer,
    ):
        train(
            platform(),
            [write(examples(50))],
            [],
            replace(CONFIG, accelerator="auto", gradient_clip=0.5),
            tmp_path / "v",
        )
    resolve.assert_called_once_with("auto")
    assert trainer.call_args.kwargs["accelerator"] == "cpu"
    assert trainer.call_args.kwargs["gradient_clip_val"] == 0.5


@pytest.mark.parametrize("when", ["fit_encoder", "WindowData"])
def test_a_file_that_changes_while_it_is_read_is_named(write: Write, tmp_path: Path, when: str):
    files, late = [write(examples(60))], write(examples(60, 1))
    real = getattr(training, when)

    def change(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        pq.write_table(examples(60, 2), late)
        return out

    with mock.patch.object(training, when, change), pytest.raises(RuntimeError, match=f"{late} changed"):
        train(platform(), files, [late], CONFIG, tmp_path / "v")


def test_every_epoch_has_an_order_of_its_own(watched: Watched, encoder: Encoder):
    in_files = load(encoder, watched.files).labels[:, 0].tolist()
    first, second = (torch.cat(watched.labels[n : n + 3]).tolist() for n in (0, 3))
    assert sorted(first) == sorted(second) == sorted(in_files)
    assert first != second
    assert in_files not in (first, second)


def test_the_learning_rate_is_set_at_every_step(watched: Watched):
    # two steps of warm-up, then the cosine
    expected = [watched.optimiser.learning_rate * watched.optimiser.share(step, 6) for step in range(6)]
    assert len(set(expected)) == 5
    assert watched.rates == pytest.approx(expected)


def test_biases_start_at_the_logits_of_the_training_days(write: Write, tmp_path: Path):
    days, low = examples(300), examples(300, 1)
    for name in ("score_ctr", "score_gctr", "score_octr", "score_cvr"):
        low = put(low, name, np.array(low[name]) ** 2)
    files, last = [write(days)], [write(low)]
    still = replace(CONFIG, optimiser=OptimiserConfig(learning_rate=1e-9), calibrate=False)
    predictor = train(platform(), files, last, still, tmp_path / "v").predictor
    start, other = (slice_logits(load(predictor.encoder, f), predictor.encoder, True) for f in (files, last))
    assert (start - other).abs().min() > 0.1
    torch.testing.assert_close(predictor.model.bias.logits_TSP.detach(), start, atol=1e-6, rtol=0)


def test_vocabularies_are_of_the_training_days_only(write: Write, tmp_path: Path):
    first, last = examples(200), examples(200, 1)
    new = put(last, "item_id", [10**9] * 200)
    predictor = train(platform(), [write(first)], [write(new)], CONFIG, tmp_path / "v").predictor
    assert set(predictor.encoder.vocabularies["item_id"].lookup(pa.array([10**9])).tolist()) == {1}
    assert predictor.encoder == fit_encoder(platform(), [write(first)])


@pytest.mark.parametrize("column", ["score", "weight"])
@pytest.mark.parametrize("place", ["training", "validation"])
def test_a_window_without_a_label_is_refused(write: Write, tmp_path: Path, column: str, place: str):
    table = examples(40)
    for name in table.column_names:
        if name.startswith(column):
            table = put(table, name, [0.0] * 40 if column == "weight" else pa.nulls(40, pa.float64()))
    good, bad = write(examples(40)), write(table)
    files = ([bad], [good]) if place == "training" else ([good], [bad])
    with pytest.raises(ValueError, match=f"no {place} row has both"):
        train(platform(), *files, CONFIG, tmp_path / "v")


def test_a_batch_of_weight_zero_has_loss_zero_and_gradient_zero(encoder: Encoder):
    module = module_of(encoder)
    batch = replace(encoder.encode(examples(20)), weight=torch.zeros(20))
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in module.model.parameters())
    assert module.train_sum.tolist() == [0, 0]


def test_some_batches_of_weight_zero_do_not_stop_a_run(write: Write, tmp_path: Path):
    weight = np.zeros(100)
    weight[3] = 2.0
    file = write(put(examples(100), "weight", weight))
    got = train(platform(), [file], [file], replace(CONFIG, batch_size=10, max_epochs=2), tmp_path / "v")
    assert all(math.isfinite(e["train_loss"]) and math.isfinite(e["validation_loss"]) for e in got.history)


@pytest.mark.parametrize("training_loss", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run(write: Write, tmp_path: Path, training_loss: bool):
    def broken(self: MTMD, batch: Any) -> torch.Tensor:
        return real(self, batch) * (float("nan") if self.training == training_loss else 1)

    real = MTMD.forward
    file, name = write(examples(100)), "train_loss" if training_loss else "validation_loss"
    with mock.patch.object(MTMD, "forward", broken), pytest.raises(RuntimeError, match=f"{name} of epoch 0 is nan"):
        train(platform(), [file], [file], CONFIG, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_identity_keys_are_refused_before_training(tmp_path: Path):
    with pytest.raises(ValueError, match="schema"):
        train(platform(), ["nowhere"], [], CONFIG, tmp_path / "v", manifest={"schema": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_learning_rates_that_are_none_are_refused(value: float):
    with pytest.raises(ValueError, match="learning_rate"):
        OptimiserConfig(learning_rate=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_embedding_rates_that_are_none_are_refused(value: float):
    with pytest.raises(ValueError, match="embedding_rate"):
        OptimiserConfig(embedding_rate=value)


def test_weight_decay_nan_is_refused():
    with pytest.raises(ValueError, match="weight decays"):
        OptimiserConfig(weight_decay=float("nan"))


def test_learning_rate_shares_by_hand():
    cosine = OptimiserConfig(warmup_share=0.1, final_share=0.02)
    # ten of a hundred steps of warm-up, the first at a tenth; then 90 steps of half a cosine
    assert cosine.share(0, 100) == pytest.approx(0.1)
    assert cosine.share(9, 100) == pytest.approx(1.0)
    assert cosine.share(10, 100) == pytest.approx(1.0)
    assert cosine.share(55, 100) == pytest.approx(0.51)
    assert cosine.share(100, 100) == pytest.approx(0.02)
    assert cosine.share(99, 100) == pytest.approx(0.02 + 0.98 * (1 - math.cos(math.pi / 90)) / 2)
    level = OptimiserConfig(schedule="constant", warmup_share=0.1)
    assert [level.share(step, 100) for step in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]


def test_parameter_groups_by_name(encoder: Encoder):
    module = module_of(encoder, OptimiserConfig(weight_decay=0.3, embedding_weight_decay=0.2))
    module._trainer = mock.Mock(precision="32-true", estimated_stepping_batches=10)
    groups = module.configure_optimizers()["optimizer"].param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(module.model.named_parameters())
    assert len(decay) == len(names) == sum(len(group["params"]) for group in groups)
    for name, p in names.items():
        leaf = name.split(".")[-1]
        matrix = (leaf == "weight" and ".norm" not in name) or ".downs." in name
        expected = 0.2 if ".tables." in name else 0.3 if matrix else 0.0
        assert decay[id(p)] == expected, name
    expert = "query_tower.expert.=home"
    for name in (
        "cross.downs.0",
        "cross.ups.0.weight",
        "project.0.weight",
        "router.out.weight",
        "shallow.linears.1.weight",
    ):
        assert decay[id(names[f"{expert}.{name}"])] == 0.3
    for name in ("norm.weight", "cross.ups.0.bias", "project.0.bias", "router.out.bias", "shallow.norms.1.weight"):
        assert decay[id(names[f"{expert}.{name}"])] == 0.0
    adaptation = "item_tower.adaptation.=standard"
    assert [decay[id(names[f"{adaptation}.norm.{n}"])] for n in ("gain", "bias", "missing")] == [0, 0, 0]
    assert decay[id(names["bias.logits_TSP"])] == 0
    assert decay[id(names[f"{adaptation}.excitation.squeeze.weight"])] == 0.3


@pytest.mark.parametrize("deviation", [None, 0.1])
def test_tables_learn_at_their_own_rate(encoder: Encoder, deviation: float | None):
    config = OptimiserConfig(learning_rate=0.01, embedding_rate=5.0, schedule="constant", deviation=deviation)
    module = module_of(encoder, config)
    module._trainer = mock.Mock(precision="32-true", estimated_stepping_batches=10)
    optimiser = module.configure_optimizers()["optimizer"]
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    for p in module.model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()
    for table in (n for n in before if ".tables." in n):
        # Adam's first step is the learning rate; decay takes 0.05 of 0.01 of a weight besides
        moved = before[table] * (1 - 0.05 * 0.01) - dict(module.model.named_parameters())[table]
        torch.testing.assert_close(moved.detach(), torch.full_like(moved, 0.05))
    bias = dict(module.model.named_parameters())["bias.logits_TSP"] - before["bias.logits_TSP"]
    torch.testing.assert_close(bias.detach(), torch.full_like(bias, -0.01))


def test_the_training_step_is_the_weighted_kl_by_hand(encoder: Encoder):
    module = module_of(encoder).eval()
    batch = replace(encoder.encode(examples(5)), weight=torch.tensor([0.5, 1.0, 2.0, 0.0, 4.0]))
    with torch.no_grad():
        p, loss = torch.sigmoid(module.model(batch).double()).numpy(), module.training_step(batch, 0).item()
    t, weights, total = batch.labels.double().numpy(), (2.0, 1.0, 1.0, 1.0), 0.0
    for row in range(5):
        for task in range(4):
            if not np.isnan(t[row, task]):
                a, b = t[row, task], p[row, task]
                kl = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
                total += batch.weight[row].item() * weights[task] * kl
    assert loss == pytest.approx(total / 7.5, rel=1e-4)
    assert module.train_sum.tolist() == pytest.approx([loss * 7.5, 7.5])


def test_slice_factors_multiply_the_rows_weights_in_both_losses(encoder: Encoder):
    """And leave LogMAE, a mean over cells, as it is."""
    plain, batch = module_of(encoder).eval(), encoder.encode(examples(200))
    factor_SP = torch.arange(1.0, 7.0).view(3, 2)
    factored = RankerModule(plain.model, OptimiserConfig(), factor_SP).eval()
    weighted = replace(batch, weight=batch.weight * factor_SP[batch.query.domain, batch.item.domain])
    logged: list[dict[str, float]] = []
    for module, rows in ((factored, batch), (plain, weighted), (plain, batch)):
        found: dict[str, float] = {}
        module.log = lambda name, value, into=found, **_: into.update({name: value.item()})  # type: ignore[method-assign]
        with torch.no_grad():
            found["train_loss"] = module.training_step(rows, 0).item()
            module.on_validation_epoch_start()
            module.validation_step(rows, 0)
            module.on_validation_epoch_end()
        logged.append(found)
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)
    assert logged[0]["validation_loss"] != pytest.approx(logged[2]["validation_loss"], rel=1e-2)


def test_validation_logmae_is_the_mean_over_cells(encoder: Encoder):
    module = module_of(encoder).eval()
    # below the floor: the model's cvr in one slice, labels in another
    module.model.bias.set(torch.zeros(4, 3, 2).index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(-20.0)))
    table = examples(400, 3)
    low = np.array(table["score_octr"])
    table = put(table, "score_octr", pa.array(np.where(np.arange(400) % 3, low, 1e-8), mask=np.isnan(low)))
    batch, logged = encoder.encode(table), {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})  # type: ignore[method-assign]
    module.on_validation_epoch_start()
    with torch.no_grad():
        for start in (0, 150):
            module.validation_step(batch.slice(start, start + 150 if not start else 400), 0)
        module.on_validation_epoch_end()
        z = module.model(batch).double()
    p, t, w = torch.sigmoid(z).numpy(), batch.labels.double().numpy(), batch.weight.numpy()
    cells = []
    for surface in range(3):
        for product in range(2):
            rows = ((batch.query.domain == surface) & (batch.item.domain == product)).numpy()
            for task in range(4):
                here = rows & ~np.isnan(t[:, task])
                if here.any():
                    cells.append(metrics.measure(p[here, task], t[here, task], w[here]).logmae)
    assert logged["validation_logmae"] == pytest.approx(np.mean(cells), rel=1e-6)
    expected = kl_loss(z, batch.labels.double(), batch.weight.double(), module.task_weight_T.double())
    assert logged["validation_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_validation_is_exact_also_under_autocast(encoder: Encoder):
    module = module_of(encoder).eval()
    batch, sums = encoder.encode(examples(50)), []
    for enabled in (False, True):
        module.on_validation_epoch_start()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            module.validation_step(batch, 0)
        sums.append(module.slice_sum.tolist())
    assert sums[0] == sums[1]


def test_a_window_is_its_files_rows_in_order(write: Write, encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    tables = [examples(70, 1), examples(0, 2), examples(45, 3)]
    monkeypatch.setattr("mtmd_model.encoder.READ_ROWS", 32)
    window = load(encoder, [write(t) for t in tables])
    whole = encoder.encode(pa.concat_tables(tables))
    assert len(window) == 115
    for side in ("query", "item"):
        for name in ("dense", "ids", "domain"):
            got, expected = getattr(getattr(window, side), name), getattr(getattr(whole, side), name)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(window.labels, whole.labels, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(window.weight, whole.weight)
