"""The rankers that MTMD is measured against: who reads what, who learns from what, what is stored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from mtmd_model import checkpoint
from mtmd_model.architectures import build
from mtmd_model.batch import Batch
from mtmd_model.contenders.mmoe_dcn import MMOEDCN, FullRankCross, MMOEConfig
from mtmd_model.contenders.plain import PlainConfig, PooledTowers, SliceTowers, SoftSliceTowers
from mtmd_model.contenders.product_mtmd import ProductMTMD
from mtmd_model.data import load
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.lightning_module import OptimiserConfig, RankerModule
from mtmd_model.loss import kl_divergence, kl_loss
from mtmd_model.mtmd import MTMD, MTMDConfig
from mtmd_model.train import TrainConfig, TrainResult, _BestEpoch, train
from mtmd_model.two_tower import TwoTower
from tests.mtmd_model.sample import PRODUCTS, SURFACES, assert_gradients_are_slopes, examples, platform

PLAIN = PlainConfig(widths=(12, 8), width_divisor=8)
MMOE = MMOEConfig(widths=(12, 8), width_divisor=8, experts=3, gate=(6,), full_rank_layers=2)
CONFIGS: dict[str, Any] = {
    "pooled_towers": PLAIN,
    "slice_towers": PLAIN,
    "soft_slice_towers": PLAIN,
    "mmoe_dcn": MMOE,
    "product_mtmd": MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8),
}
EACH = pytest.mark.parametrize("name", CONFIGS)
ONE_FOR_ALL = pytest.mark.parametrize("name", ["pooled_towers", "mmoe_dcn"])
SLICES = [(s, p) for s in range(3) for p in range(2)]
Write = Callable[[pa.Table], Path]


@pytest.fixture(scope="module")
def encoder(write: Write) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


def noisy(model: TwoTower, encoder: Encoder) -> Any:
    """With statistics, and without the special initial values of norms and biases."""
    model(encoder.encode(examples(500)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def model_of(encoder: Encoder, name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return noisy(build(name, encoder, replace(CONFIGS[name], **changes)), encoder)


def in_slice(batch: Batch, s: int, p: int) -> torch.Tensor:
    return ((batch.query.domain == s) & (batch.item.domain == p)).nonzero()[:, 0]


@EACH
def test_a_row_scores_the_same_alone_as_in_a_batch(encoder: Encoder, name: str):
    model = model_of(encoder, name).double().eval()
    batch = encoder.encode(examples(200, seed=3))
    together = model(batch)
    assert together.std() > 0.01
    alone = torch.cat([model(batch.select(row)) for row in torch.arange(200).split(1)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
    order = torch.randperm(200)
    torch.testing.assert_close(model(batch.select(order)), together[order], rtol=0, atol=1e-12)


@EACH
def test_the_dot_product_of_the_vectors_is_the_logit(encoder: Encoder, name: str):
    model = model_of(encoder, name, constrained=False).double().eval()
    batch = encoder.encode(examples(100))
    query, item = model.embed(batch)
    by_hand = torch.stack([torch.einsum("bd,bd->b", query[t], item[t]) for t in ("ctr", "gctr", "octr", "cvr")], 1)
    torch.testing.assert_close(by_hand, model(batch))
    # the bias is part of it: a change of one slice's bias moves that slice's logits by as much
    with torch.no_grad():
        model.bias.logits_TSP[0, 1, 0] += 1
    moved = torch.zeros(100, 4, dtype=torch.float64)
    moved[in_slice(batch, 1, 0), 0] = 1
    torch.testing.assert_close(model(batch) - by_hand, moved)


@EACH
def test_gradients_are_slopes(encoder: Encoder, name: str):
    assert_gradients_are_slopes(model_of(encoder, name), encoder.encode(examples(60)))


def test_stored_vectors_are_as_wide_as_those_of_mtmd(encoder: Encoder):
    batch = encoder.encode(examples(20))
    for preset, widths in (("paper", [192, 96, 96, 96]), ("small", [48, 24, 24, 24])):
        models: list[TwoTower] = [MTMD(encoder.schema, encoder.rows, MTMDConfig.preset(preset))]
        models += [
            kind(encoder.schema, encoder.rows, PlainConfig.preset(preset)) for kind in (PooledTowers, SliceTowers)
        ]
        models.append(MMOEDCN(encoder.schema, encoder.rows, MMOEConfig.preset(preset)))
        with torch.no_grad():
            for model in models:
                for vectors in model.eval().embed(batch):
                    assert [v.shape[1] - len(PRODUCTS) for v in vectors.values()] == widths


@EACH
def test_dense_features_are_normalised_as_configured(encoder: Encoder, name: str):
    model = build(name, encoder, replace(CONFIGS[name], norm_clip=3.0, norm_horizon=500))
    norms = [m for m in model.modules() if type(m).__name__ == "DomainNorm"]
    assert norms
    assert {(m.clip, m.horizon) for m in norms} == {(3.0, 500)}


@ONE_FOR_ALL
def test_surface_and_product_are_features(encoder: Encoder, name: str):
    model = model_of(encoder, name).eval()
    torch.nn.init.zeros_(model.bias.logits_TSP)
    batch = encoder.encode(examples(50))
    before = model(batch)
    moved = (
        replace(batch, query=replace(batch.query, domain=(batch.query.domain + 1) % 3)),
        replace(batch, item=replace(batch.item, domain=1 - batch.item.domain)),
    )
    for other in moved:
        assert (model(other) - before).abs().amax(1).min() > 1e-4


def test_slice_towers_learn_from_their_own_slice_only(encoder: Encoder):
    torch.manual_seed(0)
    model = SliceTowers(encoder.schema, encoder.rows, PLAIN)
    batch = encoder.encode(examples(500))
    for s, p in SLICES:
        mine = batch.select(in_slice(batch, s, p))
        model.zero_grad()
        counts = {name: b.clone() for name, b in model.named_buffers() if name.endswith("norm.count")}
        kl_loss(model(mine), mine.labels, mine.weight, torch.ones(4)).backward()
        prefix = f"towers.={SURFACES[s]} x {PRODUCTS[p]}."
        for name, parameter in model.named_parameters():
            if name.startswith("towers."):
                learns = parameter.grad is not None and bool(parameter.grad.any())
                assert not learns or name.startswith(prefix), name
        for side in ("query", "item"):
            gradient = dict(model.named_parameters())[f"{prefix}{side}.ffn.linears.0.weight"].grad
            assert gradient is not None
            assert gradient.any()
        for name, count in counts.items():
            assert torch.equal(count, dict(model.named_buffers())[name]) != name.startswith(prefix), name
        assert model.bias.logits_TSP.grad is not None
        assert model.bias.logits_TSP.grad.any(0).nonzero().tolist() == [[s, p]]


@pytest.mark.parametrize(("share", "alike"), [(0.0, True), (0.5, False)])
def test_soft_slice_towers_are_a_common_tower_and_deviations(
    encoder: Encoder, write: Write, tmp_path: Path, share: float, alike: bool
):
    config = TrainConfig(
        "soft_slice_towers",
        PLAIN,
        OptimiserConfig(deviation=share),
        batch_size=100,
        max_epochs=1,
        accelerator="cpu",
    )
    model = train(encoder.schema, [write(examples(400))], [], config, tmp_path / "v").predictor.model
    assert isinstance(model, SoftSliceTowers)
    first, *others = (dict(towers.named_parameters()) for towers in model.towers.values())
    for name, parameter in first.items():
        if name.endswith("weight"):
            same = all(torch.equal(parameter, other[name]) for other in others)
            assert same == alike, name


def test_slice_towers_do_not_read_what_their_slice_lacks(encoder: Encoder):
    model = model_of(encoder, "slice_towers").eval()
    batch = encoder.encode(examples(200))
    batch = batch.select(in_slice(batch, 0, 0))
    before = model(batch)
    batch.query.dense[:, 3] = 1.0  # query_match and term, of search only
    batch.query.ids[:, 1] = 40
    batch.item.dense[:, 3] = 1.0  # price and brand, of shopping only
    batch.item.ids[:, 1] = 2
    assert torch.equal(model(batch), before)


def epochs(model: TwoTower, losses: list[dict[tuple[int, int], float]]) -> _BestEpoch:
    """Epochs that end with these losses of the slices, one row each; every parameter is its epoch's number."""
    module, best = RankerModule(model, OptimiserConfig()), _BestEpoch(None)
    for epoch, loss in enumerate(losses):
        module.slice_sum.zero_()
        for (s, p), value in loss.items():
            module.slice_sum[:, s * 2 + p] = torch.tensor([value, 1.0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(epoch)
        mean = sum(loss.values()) / len(loss)
        entry = {"epoch": epoch, "train_loss": 0.0, "validation_loss": mean}
        with mock.patch.object(module, "finish_epoch", return_value=entry):
            best.on_train_epoch_end(mock.Mock(), module)
    return best


def test_rows_of_a_slice_without_a_task_are_left_alone(write: Write, tmp_path: Path):
    whole = platform()
    gone = ("related", "shopping")
    kept = [replace(t, slices=tuple(s for s in t.slices if s != gone)) for t in whole.tasks]
    schema = replace(whole, tasks=tuple(kept))
    table = examples(400, 1, schema)
    config = TrainConfig("slice_towers", PLAIN, batch_size=100, max_epochs=1, accelerator="cpu")
    predictor = train(schema, [write(table)], [write(examples(400, 2, schema))], config, tmp_path / "v").predictor
    assert len(predictor.model.separate_parts()) == len(SLICES) - 1
    nowhere = np.array(table["surface"]) == gone[0]
    nowhere &= np.array(table["product"]) == gone[1]
    assert nowhere.any()
    for task, probability in predictor.predict(table).items():
        has_score = ~np.isnan(table[f"score_{task}"].to_numpy(zero_copy_only=False).astype(float))
        np.testing.assert_array_equal(np.isnan(probability), ~has_score)
    alone = predictor.predict(table.filter(nowhere))
    assert all(np.isnan(probability).all() for probability in alone.values())


def test_each_slice_keeps_its_own_best_epoch(encoder: Encoder):
    # the whole is best in epoch 2, and so is what has no validation rows
    best = epochs(
        SliceTowers(encoder.schema, encoder.rows, PLAIN),
        [
            {(0, 0): 3.0, (0, 1): 1.0, (1, 0): 3.0, (2, 0): 2.0},
            {(0, 0): 2.0, (0, 1): 5.0, (1, 0): 2.0, (2, 0): 1.0},
            {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 1.0, (2, 0): 1.0},
            {(0, 0): 9.0, (0, 1): 9.0, (1, 0): 0.5, (2, 0): 9.0},
        ],
    )
    expected = {(0, 0): 2, (0, 1): 0, (1, 0): 3, (2, 0): 1, (1, 1): 2, (2, 1): 2}
    assert best.epoch == 2
    assert best.weights is not None
    for (s, p), epoch in expected.items():
        prefix = f"towers.={SURFACES[s]} x {PRODUCTS[p]}."
        found = [w for name, w in best.weights.items() if name.startswith(prefix) and ".linears." in name]
        assert found
        assert all((w == epoch).all() for w in found), prefix
        assert (best.weights["bias.logits_TSP"][:, s, p] == epoch).all()


def test_a_model_of_one_part_keeps_the_best_epoch_of_all_slices(encoder: Encoder):
    model = PooledTowers(encoder.schema, encoder.rows, PLAIN)
    best = epochs(model, [{(0, 0): 1.0, (1, 0): 5.0}, {(0, 0): 2.0, (1, 0): 2.0}, {(0, 0): 3.0, (1, 0): 3.0}])
    assert best.epoch == 1
    assert best.weights is not None
    assert all((best.weights[name] == 1).all() for name, _ in model.named_parameters())


def test_a_product_keeps_the_best_epoch_of_its_slices(encoder: Encoder):
    losses = [{(0, 0): 1.0, (1, 0): 5.0, (0, 1): 1.0}, {(0, 0): 2.0, (1, 0): 2.0, (0, 1): 3.0}]
    best = epochs(ProductMTMD(encoder.schema, encoder.rows, CONFIGS["product_mtmd"]), losses)
    assert best.weights is not None
    for product, epoch in (("standard", 1), ("shopping", 0)):
        weight = best.weights[f"models.={product}.item_tower.domain_shared.linears.0.weight"]
        assert (weight == epoch).all()
        assert (best.weights["bias.logits_TSP"][:, :, PRODUCTS.index(product)] == epoch).all()


def test_a_trained_slice_has_its_lowest_validation_loss(write: Write, tmp_path: Path):
    files, seen = ([write(examples(300, 1))], [write(examples(300, 2))]), list[list[float]]()
    real = RankerModule.finish_epoch

    def finish(self: RankerModule) -> dict[str, Any]:
        seen.append([self.slice_loss([one]) for one in SLICES])
        return real(self)

    config = TrainConfig(
        "slice_towers",
        PLAIN,
        OptimiserConfig(0.05, "constant"),
        batch_size=60,
        max_epochs=4,
        accelerator="cpu",
        calibrate=False,
    )
    with mock.patch.object(RankerModule, "finish_epoch", finish):
        predictor = train(platform(), *files, config, tmp_path / "v").predictor
    window = load(predictor.encoder, files[1])
    with torch.no_grad():
        task_weight = torch.tensor([t.weight for t in predictor.schema.tasks]).double()
        loss_B = kl_divergence(predictor.model(window).double(), window.labels.double()) @ task_weight
    rows = [in_slice(window, s, p) for s, p in SLICES]
    got = [((loss_B * window.weight)[r].sum() / window.weight[r].sum()).item() for r in rows]
    assert got == pytest.approx(np.min(seen, axis=0).tolist(), rel=1e-4)
    # not because all were best in one epoch
    assert len(set(np.argmin(seen, axis=0).tolist())) > 1


def test_full_rank_cross_by_hand():
    torch.manual_seed(0)
    cross: Any = FullRankCross(2, 3, layers=2)
    x0 = torch.randn(2, 5, 3)
    got = cross(x0)
    for e in range(2):
        x = x0[e]
        for linear in cross.linears:
            x = x0[e] * (x @ linear.weight[e] + linear.bias[e]) + x
        torch.testing.assert_close(got[e], x)
    assert torch.equal(FullRankCross(2, 3, layers=0)(x0), x0)


def test_mmoe_weighs_its_experts_by_each_tasks_softmax(encoder: Encoder):
    tower = model_of(encoder, "mmoe_dcn").query_tower.double().eval()
    x = encoder.encode(examples(30)).query
    logits_TBE = []
    tower.gate.register_forward_hook(lambda module, args, output: logits_TBE.append(output))
    got = tower(x)
    x_BD = tower.input(x)
    assert logits_TBE[0].shape == (4, 30, 3)
    experts = []
    for e in range(3):
        crossed = x_BD
        for linear in tower.full_rank.linears:
            crossed = x_BD * (crossed @ linear.weight[e] + linear.bias[e]) + crossed
        start = crossed  # the low-rank layers cross the output of the full-rank ones with itself
        for down, up in zip(tower.low_rank.downs, tower.low_rank.ups, strict=True):
            crossed = start * (crossed @ down[e] @ up.weight[e] + up.bias[e]) + crossed
        for linear, norm in zip(tower.ffn.linears, tower.ffn.norms, strict=True):
            crossed = crossed @ linear.weight[e] + linear.bias[e]
            crossed = F.layer_norm(crossed, crossed.shape[-1:], norm.weight[e, 0], norm.bias[e, 0])
            crossed = F.leaky_relu(crossed, 0.2)
        experts.append(crossed)
    for t, task in enumerate(("ctr", "gctr", "octr", "cvr")):
        odds = torch.exp(logits_TBE[0][t])
        mixed = sum(odds[:, e, None] / odds.sum(1, keepdim=True) * experts[e] for e in range(3))
        torch.testing.assert_close(got[task], tower.end.project[t](mixed))


@EACH
def test_separate_parts_are_clipped_by_a_norm_of_their_own(encoder: Encoder, name: str):
    model = model_of(encoder, name)
    parts = list(model.separate_parts())
    for n, parameter in model.named_parameters():
        large = not parts or n.startswith(parts[0])
        parameter.grad = torch.full_like(parameter, 10.0 if large else 1e-6)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    RankerModule(model, OptimiserConfig()).configure_gradient_clipping(mock.Mock(), 0.5)
    clipped = {n: p.grad for n, p in model.named_parameters() if not torch.equal(p.grad, before[n])}
    assert clipped.keys() == {n for n in before if not parts or n.startswith(parts[0])}
    assert torch.cat([g.flatten() for g in clipped.values()]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_without_a_clip_gradients_stay(encoder: Encoder):
    model = model_of(encoder, "slice_towers")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    RankerModule(model, OptimiserConfig()).configure_gradient_clipping(mock.Mock(), None)
    assert all((p.grad == 1e3).all() for p in model.parameters())


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request: pytest.FixtureRequest, write: Write, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    config = TrainConfig(request.param, CONFIGS[request.param], batch_size=100, max_epochs=1, accelerator="cpu")
    files = [write(examples(300, 1))], [write(examples(100, 2))]
    return train(platform(), *files, config, tmp_path_factory.mktemp("models") / "v")


def test_a_loaded_model_predicts_the_same(trained: TrainResult):
    loaded = checkpoint.load(trained.out_dir)
    assert type(loaded.model) is type(trained.predictor.model)
    table = examples(100, 5)
    before, after = trained.predictor.predict(table), loaded.predict(table)
    assert list(before) == ["ctr", "gctr", "octr", "cvr"]
    for task, p in before.items():
        np.testing.assert_array_equal(p, after[task])
        exists = np.isfinite(np.array(table[f"score_{task}"], float))
        assert np.array_equal(np.isfinite(p), exists)


def test_each_side_alone_gives_the_vectors_that_predict(trained: TrainResult):
    predictor, table = trained.predictor, examples(100, 6)
    if isinstance(predictor.model, SliceTowers | ProductMTMD):
        # their vectors depend on both domains
        with pytest.raises(NotImplementedError):
            predictor.embed_queries(table)
        return
    queries = predictor.embed_queries(table.drop_columns(["product"]))
    items = predictor.embed_items(table.drop_columns(["surface"]))
    given = {}
    for task, got in predictor.predict(table).items():
        q, i = queries[task].vectors.astype(np.float64), items[task].vectors.astype(np.float64)
        given[task] = 1 / (1 + np.exp(-(q * i).sum(1)))
        exists = ~np.isnan(got)
        expected = given[task] * (1 if task == "ctr" else given["ctr"])
        np.testing.assert_allclose(got[exists], expected[exists], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "widths must hold"),
        ({"width_divisor": 0}, "width_divisor must be 1 or more, got 0"),
        ({"norm_clip": 0.0}, "norm_clip"),
        ({"dropout": 1.0}, "dropout"),
        ({"experts": 0}, "experts"),
        ({"gate": (0,)}, "gate"),
        ({"cross_rank": 1.5}, "rank"),
        ({"low_rank_layers": -1}, "cross layers"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(MMOE, **changes)
