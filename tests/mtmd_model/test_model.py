"""The two-tower as a whole (paper section 2): who reads what, who learns from what, what is stored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtmd_model.batch import Batch
from mtmd_model.data import slice_logits
from mtmd_model.domain_adaptation import DomainAdaptation
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.loss import kl_loss
from mtmd_model.mtmd import MTMD, MTMDConfig
from mtmd_model.schema import Feature, Schema, Task
from mtmd_model.squeeze_excitation import SqueezeExcitation
from mtmd_model.towers import FILLED, _Permute
from mtmd_model.two_tower import count_parameters, dot_products
from tests.mtmd_model.sample import PRODUCTS, SURFACES, assert_gradients_are_slopes, examples, platform

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)
TASKS = ("ctr", "gctr", "octr", "cvr")


@pytest.fixture(scope="module")
def encoder(write: Callable[[pa.Table], Path]) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


def model_of(encoder: Encoder, config: MTMDConfig = TINY, seed: int = 0, noise: float = 0.1) -> MTMD:
    """A model whose gates, norms and biases are not at their special initial values."""
    torch.manual_seed(seed)
    model = MTMD(encoder.schema, encoder.rows, config)
    model(encoder.encode(examples(500)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def only(encoder: Encoder, surface: str, product: str, rows: int = 400) -> Batch:
    table = examples(rows)
    keep = (np.array(table["surface"]) == surface) & (np.array(table["product"]) == product)
    return encoder.encode(table.filter(pa.array(keep)))


def backward(model: MTMD, batch: Batch, task: str | None = None) -> dict[str, Any]:
    """Gradients of the loss, of one task if given."""
    model.zero_grad()
    weight = torch.tensor([t.weight if task in (None, t.name) else 0.0 for t in model.schema.tasks])
    kl_loss(model(batch), batch.labels, batch.weight, weight).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_stored_widths_of_the_paper(encoder: Encoder):
    model = MTMD(encoder.schema, encoder.rows, MTMDConfig.preset("paper")).eval()
    batch = encoder.encode(examples(4))
    constants = len(PRODUCTS)
    for vectors in model.embed(batch):
        widths = {task: v.shape[1] - constants for task, v in vectors.items()}
        assert widths == {"ctr": 192, "gctr": 96, "octr": 96, "cvr": 96}
    free = MTMD(encoder.schema, encoder.rows, MTMDConfig.preset("paper", constrained=False)).eval()
    assert {v.shape[1] - constants for v in free.embed_item(batch.item).values()} == {128}
    small = MTMD(encoder.schema, encoder.rows, MTMDConfig.preset("small")).eval()
    assert [v.shape[1] - constants for v in small.embed_item(batch.item).values()] == [48, 24, 24, 24]


def test_first_predictions_are_the_slices_means(encoder: Encoder):
    torch.manual_seed(0)
    batch = encoder.encode(examples(3000))
    for preset in ("paper", "small"):
        model = MTMD(encoder.schema, encoder.rows, MTMDConfig.preset(preset))
        model.bias.set(slice_logits(batch, encoder, constrained=True))
        bias_only = model.unconditional(model.bias.logits_TSP[:, batch.query.domain, batch.item.domain].T)
        exists = ~batch.labels.isnan()
        # the biases alone predict each slice's mean score, of the children too
        for s in range(3):
            for p in range(2):
                rows = (batch.query.domain == s) & (batch.item.domain == p)
                w = batch.weight[rows][:, None] * exists[rows]
                mean = (batch.labels[rows].nan_to_num() * w).sum(0) / w.sum(0)
                predicted = torch.sigmoid(bias_only[rows][0])
                torch.testing.assert_close(predicted[exists[rows][0]], mean[exists[rows][0]], rtol=1e-4, atol=1e-6)
        difference = (model(batch) - bias_only)[exists]
        assert difference.abs().mean() < 0.5


def test_the_dot_product_of_stored_vectors_is_the_logit(encoder: Encoder):
    model = model_of(encoder, MTMDConfig(**{**vars(TINY), "constrained": False})).eval()
    batch = encoder.encode(examples(60))
    query, item = model.embed_query(batch.query), model.embed_item(batch.item)
    torch.testing.assert_close(dot_products(query, item), model(batch))
    # the bias is part of it: a change of one slice's bias moves that slice's logits by as much
    before = model(batch)
    with torch.no_grad():
        model.bias.logits_TSP[0, 1, 0] += 1
    moved = (batch.query.domain == 1) & (batch.item.domain == 0)
    torch.testing.assert_close(model(batch)[:, 0] - before[:, 0], moved.float(), atol=1e-5, rtol=0)


def test_a_child_never_exceeds_its_parent(encoder: Encoder):
    model = model_of(encoder).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    logits = model(encoder.encode(examples(500)))
    assert logits[:, 0].max() - logits[:, 0].min() > 5
    assert (logits[:, 1:] <= logits[:, :1]).all()


@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize(("dtype", "on_p", "on_logit"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-12, 1e-12)])
def test_a_row_scores_the_same_alone_as_in_a_batch(
    encoder: Encoder, preset: str, dtype: torch.dtype, on_p: float, on_logit: float
):
    model = model_of(encoder, MTMDConfig.preset(preset), noise=0.01).to(dtype).eval()
    batch = encoder.encode(examples(4096, seed=3))
    rows = torch.arange(0, 4096, 41)
    with torch.inference_mode():
        together = model(batch)
        # no saturated logits, whose probabilities agree whatever the model does
        assert 0.01 < together.std() < 10
        together = together[rows]
        alone = torch.cat([model(batch.select(row)) for row in rows.split(1)])
    assert (alone - together).abs().max() <= on_logit
    assert (torch.sigmoid(alone) - torch.sigmoid(together)).abs().max() <= on_p


def test_the_order_of_rows_does_not_matter(encoder: Encoder):
    model = model_of(encoder).double().eval()
    batch = encoder.encode(examples(200))
    order = torch.randperm(200)
    torch.testing.assert_close(model(batch.select(order)), model(batch)[order])
    torch.testing.assert_close(model(batch.prepare(3, 2)), model(batch))


@pytest.mark.parametrize("domain_norm", [True, False])
def test_rows_filled_up_for_bf16_leave_no_trace(encoder: Encoder, domain_norm: bool):
    config = replace(TINY, domain_norm=domain_norm)
    batch = encoder.encode(examples(200))
    counts = torch.bincount(batch.query.domain)
    assert (counts % FILLED != 0).all(), "every domain is filled up"

    def trained(bf16: bool) -> tuple[MTMD, torch.Tensor]:
        torch.manual_seed(0)
        model = MTMD(encoder.schema, encoder.rows, config).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(batch)
        kl_loss(logits.float(), batch.labels, batch.weight, torch.ones(4)).backward()
        return model, logits

    (exact, logits), (filled, rough) = trained(False), trained(True)
    torch.testing.assert_close(rough.float(), logits, atol=0.03, rtol=0.03)
    buffers = dict(filled.named_buffers())
    for name, value in exact.named_buffers():
        if name.rpartition(".")[2] in ("count", "mean", "var"):
            torch.testing.assert_close(buffers[name], value)
    for (name, p), q in zip(exact.named_parameters(), filled.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            assert (q.grad - p.grad).norm() <= 0.1 * p.grad.norm() + 1e-4, name
    with torch.autocast("cpu", torch.bfloat16):
        gates = filled.query_tower(batch.query).gates
    assert {d: g.shape[1] for d, g in gates.items()} == dict(zip(SURFACES, counts.tolist(), strict=True))


def test_gates_are_a_softmax(encoder: Encoder):
    model = model_of(encoder).eval()
    batch = encoder.encode(examples(100))
    with torch.autocast("cpu", torch.bfloat16):
        gates = model.query_tower(batch.query).gates
    assert set(gates) == set(SURFACES)
    for gate in gates.values():
        assert gate.shape[0] == len(TASKS)
        assert gate.shape[2] == 3
        assert gate.dtype == torch.float32
        assert (gate > 0).all()
        torch.testing.assert_close(gate.sum(-1), torch.ones(gate.shape[:2]))
    assert [g.shape[0] for g in model.item_tower(batch.item).gates.values()] == [3, 3]


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"constrained": False}])
def test_gradients_are_slopes(encoder: Encoder, changes: dict):
    model = model_of(encoder, MTMDConfig(**{**vars(TINY), **changes}))
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):
            # near zero, as they start, the gates would hardly depend on what they read
            torch.nn.init.normal_(module.excite.weight)
    batch = encoder.encode(examples(60))
    assert len(set(zip(batch.query.domain.tolist(), batch.item.domain.tolist(), strict=True))) == 6
    assert_gradients_are_slopes(model, batch)


def test_the_gradient_of_a_permutation_is_its_inverse():
    # a cycle of three is not its own inverse
    order, x = torch.tensor([1, 2, 0, 3]), torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    y = _Permute.apply(x, order, torch.argsort(order))
    assert torch.equal(y, x[order])
    weight = torch.randn(4, 2, dtype=torch.float64)
    (expected,) = torch.autograd.grad((x[order] * weight).sum(), x)
    (got,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(got, expected)


def test_every_domain_has_the_configured_norm(encoder: Encoder):
    config = MTMDConfig(**{**vars(TINY), "norm_clip": 3.0, "norm_horizon": 500, "se_reduction": 4})
    model: Any = MTMD(encoder.schema, encoder.rows, config)
    shared: Any = MTMD(encoder.schema, encoder.rows, replace(config, domain_norm=False))
    for tower in (model.query_tower, model.item_tower):
        for adaptation in tower.adaptation.values():
            assert (adaptation.norm.clip, adaptation.norm.horizon) == (3.0, 500)
            squeeze = adaptation.excitation.squeeze
            assert squeeze.out_features == max(1, squeeze.in_features // 4)
    for tower in (shared.query_tower, shared.item_tower):
        assert (tower.norm.clip, tower.norm.horizon) == (3.0, 500)


def test_only_the_rows_own_experts_learn(encoder: Encoder):
    model = model_of(encoder)
    gradients = backward(model, only(encoder, "search", "standard"))
    for name, gradient in gradients.items():
        others = ("=home", "=related", "=shopping")
        if any(f"{other}." in name for other in others):
            assert gradient is None, name
        elif "tables" not in name and name != "bias.logits_TSP":
            assert gradient is not None, name
    # of every kind of part, something learns
    for part in (
        "query_tower.expert.=search.deep_and_task_shared",
        "query_tower.expert.=search.shallow",
        "query_tower.expert.=search.router",
        "query_tower.expert.=search.cross.downs",
        "query_tower.expert.=search.cross.ups",
        "query_tower.expert.=search.norm",
        "query_tower.expert.=search.project",
        "query_tower.adaptation.=search.norm",
        "query_tower.adaptation.=search.excitation",
        "query_tower.embeddings",
        "query_tower.domain_shared",
        "item_tower.expert.=standard.deep_and_task_shared",
        "item_tower.embeddings",
        "item_tower.domain_shared",
        "bias.logits_TSP",
    ):
        found = [g for n, g in gradients.items() if n.startswith(part)]
        assert found, part
        assert any(g is not None and g.abs().sum() > 0 for g in found), part


def test_statistics_of_other_domains_are_untouched(encoder: Encoder):
    model = MTMD(encoder.schema, encoder.rows, TINY)
    model(only(encoder, "search", "standard"))
    for tower, seen in ((model.query_tower, "search"), (model.item_tower, "standard")):
        for domain in tower.domains:
            counts = tower.statistics(domain)[2]
            assert (max(counts) > 0) == (domain == seen)
    # query_match exists in search, price in shopping only
    assert model.query_tower.statistics("search")[2][3] > 0
    assert model.item_tower.statistics("standard")[2][3] == 0


def test_every_expert_of_a_task_learns_from_it_and_no_other_deep_expert(encoder: Encoder):
    model = model_of(encoder)
    batch = only(encoder, "home", "standard")
    for t, task in enumerate(TASKS[:3]):
        gradients = backward(model, batch, task)
        mine = {0, t}  # a conditional task's loss also moves its parent's
        for part, shared in (("deep_and_task_shared", {4}), ("shallow", set()), ("router", set())):
            for layer in ("linears.0.weight", "norms.0.weight"):
                gradient = gradients[f"query_tower.expert.=home.{part}.{layer}"]
                learning = {e for e, g in enumerate(gradient) if g.abs().sum() > 0}
                assert learning == mine | shared, (task, part, layer)


def test_no_gradient_from_a_task_that_does_not_exist_in_the_slice(encoder: Encoder):
    model = model_of(encoder)
    batch = only(encoder, "home", "shopping")
    octr = backward(model, batch, "octr")
    assert all(g is None or not g.any() for g in octr.values())
    whole = backward(model, batch)
    deep = whole["query_tower.expert.=home.deep_and_task_shared.linears.0.weight"]
    assert not deep[2].any()
    assert deep[[0, 1, 3, 4]].flatten(1).any(1).all()
    assert not whole["bias.logits_TSP"][2].any()
    assert all(g is None or g.isfinite().all() for g in whole.values())


def test_a_domain_has_experts_for_its_own_tasks_only(encoder: Encoder):
    model = MTMD(encoder.schema, encoder.rows, TINY)
    assert model.item_tower.tasks == {"standard": ("ctr", "gctr", "octr"), "shopping": ("ctr", "gctr", "cvr")}
    expert: Any = model.item_tower.expert["=standard"]
    assert len(expert.project) == 3
    vectors = model.embed_item(encoder.encode(examples(50)).item)
    shopping = encoder.encode(examples(50)).item.domain == 1
    assert not vectors["octr"][shopping][:, :-2].any()


def test_the_domain_layout_leaves_absent_features_out_and_the_common_one_fills_them():
    dense = [Feature("x", "item", "dense", ("a", "b")), Feature("y", "item", "dense", ("b",))]
    categorical = [
        Feature("k", "item", "categorical", ("a", "b"), width=2, buckets=2, key=True),
        Feature("n", "item", "categorical", ("b",), width=3, buckets=2, key=True),
    ]
    adaptation = DomainAdaptation("a", dense, categorical, MTMDConfig(norm_horizon=1000)).eval()
    with torch.no_grad():
        adaptation.norm.missing.copy_(torch.tensor([7.0, 9.0]))
        adaptation.norm.count.fill_(2)
    x = adaptation(torch.tensor([[0.5, 4.0], [float("nan"), 4.0]]), torch.arange(10.0).reshape(2, 5))
    assert x.own_BD.tolist() == [[0.5, 0, 1], [7, 5, 6]]
    assert x.key_BK.tolist() == [[0, 1], [5, 6]]
    assert x.common_BS.tolist() == [[0.5, 9, 0, 1, 2, 3, 4], [7, 9, 5, 6, 7, 8, 9]]


def test_values_of_an_absent_feature_are_not_read(encoder: Encoder):
    model = model_of(encoder).eval()
    batch = only(encoder, "home", "standard")
    before = model(batch)
    batch.query.dense[:, 3] = 1e6  # query_match, of search only
    batch.query.ids[:, 1] = 40  # term, of search only
    assert torch.equal(model(batch), before)


def test_the_shallow_expert_reads_key_features_only(encoder: Encoder):
    model = model_of(encoder).eval()
    batch = only(encoder, "home", "standard")
    shallow = slice(128 // 8, 128 // 8 + 4)
    before = model.embed_query(batch.query)["ctr"]
    batch.query.dense[:] += 1
    batch.query.ids[:, 2] = 5  # user_id, not a key feature
    after = model.embed_query(batch.query)["ctr"]
    assert torch.equal(after[:, shallow], before[:, shallow])
    assert not torch.equal(after[:, : shallow.start], before[:, : shallow.start])
    batch.query.ids[:, 0] = 2  # device, a key feature
    assert not torch.equal(model.embed_query(batch.query)["ctr"][:, shallow], after[:, shallow])


def test_a_missing_category_is_a_vector_of_its_domain(encoder: Encoder):
    tables = model_of(encoder).query_tower.embeddings
    ids = torch.zeros(3, 3, dtype=torch.int32)
    vectors = tables(ids, torch.tensor([0, 1, 2]))
    assert len({tuple(v.tolist()) for v in vectors}) == 3
    ids[:] = 1
    unknown = tables(ids, torch.tensor([1, 1, 1]))
    known = tables(torch.full((1, 3), 2, dtype=torch.int32), torch.tensor([1]))
    assert not torch.equal(unknown[0], known[0])
    device = tables(torch.ones(3, 3, dtype=torch.int32), torch.tensor([0, 1, 2]))
    assert torch.equal(device[0, :4], device[2, :4])  # shared by the domains that have the feature
    assert torch.equal(device[1, 4:8], unknown[0, 4:8])
    assert not torch.equal(device[0, 4:8], device[1, 4:8])  # only search has terms


def test_an_expert_without_key_features_and_a_tower_without_categories_work():
    both = tuple((s, p) for s in ("s",) for p in ("p",))
    features = (
        Feature("x", "query", "dense", ("s",)),
        Feature("c", "item", "categorical", ("p",), buckets=3),
    )
    schema = Schema("bare", ("s",), ("p",), (Task("t", None, 1.0, 8, both),), features)
    encoder = fit_encoder(schema, [])
    table = pa.table({"surface": ["s", "s"], "product": ["p", "p"], "x": [1.0, None], "c": [1, None]})
    model = MTMD(schema, encoder.rows, TINY)
    assert model(encoder.encode(table, labels=False)).isfinite().all()


@pytest.mark.parametrize("changes", [{"norm": "post"}, {"norm": "none"}, {"cross_layers": 0}, {"dropout": 0.5}])
def test_ablations_run(encoder: Encoder, changes: dict):
    model = model_of(encoder, MTMDConfig(**{**vars(TINY), **changes}))
    assert all(g is None or g.isfinite().all() for g in backward(model, encoder.encode(examples(50))).values())


def test_post_norm_comes_after_the_cross_layers(encoder: Encoder):
    calls: list[str] = []
    model = model_of(encoder, MTMDConfig(**{**vars(TINY), "norm": "post"}))
    expert: Any = model.item_tower.expert["=standard"]
    expert.norm.register_forward_hook(lambda *_: calls.append("norm"))
    expert.cross.register_forward_hook(lambda *_: calls.append("cross"))
    model(only(encoder, "home", "standard"))
    assert calls == ["cross", "norm"]


def test_parameters_are_counted_apart(encoder: Encoder):
    model = MTMD(encoder.schema, encoder.rows, TINY)
    counts = count_parameters(model)
    rows = encoder.rows
    # per feature: one missing vector a domain instead of row 0
    embedding = 4 * (rows["device"] + rows["term"] + 4) + 8 * (rows["user_id"] + 2)
    embedding += 4 * (rows["category"] + 1) + 8 * (rows["brand"] + rows["item_id"] + 2)
    assert counts == {"embedding": embedding, "dense": sum(p.numel() for p in model.parameters()) - embedding}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deep": ()}, "deep must hold"),
        ({"norm": "batch"}, "norm must be .* got 'batch'"),
        ({"width_divisor": 0}, "width_divisor must be 1 or more, got 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"cross_rank": 0.0}, "cross_rank"),
        ({"cross_layers": -1}, "cross_layers"),
        ({"norm_clip": 0.0}, "norm_clip"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MTMDConfig(**changes)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="got 'huge'"):
        MTMDConfig.preset("huge")


def test_a_task_without_its_parent_is_refused(encoder: Encoder):
    schema = encoder.schema
    tasks = (Task("ctr", None, 1.0, 8, (("home", "standard"),)), *schema.tasks[1:])
    wrong = Schema(schema.platform, schema.surfaces, schema.products, tasks, schema.features)
    with pytest.raises(ValueError, match=r"'gctr' exists in .*, its parent 'ctr' does not"):
        MTMD(wrong, encoder.rows, TINY)
