"""The switches of MTMDConfig: every ablation builds, trains on every task, and lacks what it says."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtmd_model.config import KINDS, MTMDConfig
from mtmd_model.contenders.product_mtmd import ProductMTMD
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.loss import kl_loss
from mtmd_model.mtmd import MTMD
from mtmd_model.predict import Predictor
from mtmd_model.schema import Task
from mtmd_model.train import TrainConfig, train
from tests.mtmd_model.sample import EVERYWHERE, examples, platform

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=16)
SWITCHES: dict[str, dict[str, Any]] = {
    "whole": {},
    "no domain norm": {"domain_norm": False},
    "no excitation": {"excitation": False},
    "no domain adaptation": {"domain_norm": False, "excitation": False},
    "no routing": {"routing": False},
    "no cross layers": {"cross_layers": 0},
    "post-norm": {"norm": "post"},
    "no norm": {"norm": "none"},
    "unconstrained": {"constrained": False},
    "width 48": {"deep_width": 48},
    **{f"no {kind}": {"experts": tuple(k for k in KINDS if k != kind)} for kind in KINDS},
    "only domain-shared": {"experts": ("domain_shared",)},
}


@pytest.fixture(scope="module")
def encoder(write: Callable[[pa.Table], Path]) -> Encoder:
    return fit_encoder(platform(), [write(examples(500))])


def model_of(encoder: Encoder, changes: dict[str, Any]) -> MTMD:
    torch.manual_seed(0)
    return MTMD(encoder.schema, encoder.rows, dataclasses.replace(TINY, **changes))


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_parameter_learns_and_a_row_scores_alone_as_in_a_batch(encoder: Encoder, changes: dict[str, Any]):
    model = model_of(encoder, changes)
    batch = encoder.encode(examples(500))
    torch.nn.init.normal_(model.bias.logits_TSP)
    weights = torch.ones(len(encoder.schema.tasks))
    for _ in range(2):  # the excitation's first layer learns only once its last has left zero
        model.zero_grad()
        kl_loss(model(batch), batch.labels, batch.weight, weights).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad if p.grad is not None else 0)
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [n for n in idle if "router" not in n or changes.get("experts") != ("domain_shared",)]
    model.eval()
    torch.testing.assert_close(model(batch.slice(7, 8)), model(batch)[7:8], atol=1e-5, rtol=1e-5)


def test_an_ablation_lacks_what_it_says(encoder: Encoder):
    def names(**changes: Any) -> str:
        return "\n".join(n for n, _ in model_of(encoder, changes).named_parameters())

    assert ".excitation." not in names(excitation=False)
    assert ".router." not in names(routing=False)
    assert ".shallow." not in names(experts=("deep", "task_shared", "domain_shared"))
    assert ".domain_shared." not in names(experts=("deep", "task_shared", "shallow"))
    assert ".cross." not in names(cross_layers=0)
    one_norm = names(domain_norm=False)
    assert "query_tower.norm.gain" in one_norm
    assert "adaptation.=home.norm" not in one_norm


def test_without_an_expert_the_grouped_network_has_one_fewer_a_task(encoder: Encoder):
    def networks(*experts: str) -> int:
        model = model_of(encoder, {"experts": experts})
        return len(model.query_tower.expert["=home"].deep_and_task_shared.linears[0].weight)  # type: ignore[union-attr, index]

    assert networks("deep", "task_shared") == 5  # four tasks and the task-shared
    assert networks("deep") == 4
    assert networks("task_shared") == 1


def test_equal_gates_without_routing(encoder: Encoder):
    model = model_of(encoder, {"routing": False}).eval()
    gates = model.query_tower(encoder.encode(examples(50)).query).gates
    assert all(torch.equal(g, torch.full_like(g, 1 / 3)) for g in gates.values())


def test_one_normalisation_for_all_domains_sees_every_row(encoder: Encoder):
    model = model_of(encoder, {"domain_norm": False})
    table = examples(300)
    model(encoder.encode(table))
    means = [model.query_tower.statistics(d)[0] for d in ("home", "search", "related")]
    assert means[0] == means[1] == means[2]
    observed = torch.tensor(table["q1"].drop_null().to_numpy())
    assert means[0][1] == pytest.approx(observed.mean().item(), rel=1e-5)


def test_deep_width_replaces_the_platforms(encoder: Encoder):
    model = model_of(encoder, {"deep_width": 48})
    assert set(model.query_tower.widths.values()) == {48 // 16 + 4}


@pytest.mark.parametrize("experts", [("shallow",), ("deep", "wide"), ()])
def test_impossible_experts_are_refused(experts: tuple[str, ...]):
    with pytest.raises(ValueError, match="experts must be among"):
        MTMDConfig(experts=experts)


def test_one_model_a_product_learns_from_its_own_rows_only(encoder: Encoder):
    torch.manual_seed(0)
    model = ProductMTMD(encoder.schema, encoder.rows, TINY)
    table = examples(300)
    batch = encoder.encode(table)
    standard = batch.select((batch.item.domain == 0).nonzero()[:, 0])
    kl_loss(model(standard), standard.labels, standard.weight, torch.ones(4)).backward()
    learned = {n.split(".")[1] for n, p in model.named_parameters() if n.startswith("models") and p.grad is not None}
    assert learned == {"=standard"}
    predictor = Predictor(model.eval(), encoder, {})
    alone, whole = predictor.predict(table.slice(5, 1)), predictor.predict(table)
    for task, p in alone.items():
        assert p[0] == pytest.approx(whole[task][5], abs=1e-6, nan_ok=True)


def test_one_model_a_product_where_a_product_has_no_task_on_a_surface(
    write: Callable[[pa.Table], Path], tmp_path: Path
):
    whole = platform()
    at_home = tuple(s for s in EVERYWHERE if s[0] == "home")
    tasks = (
        Task("ctr", None, 1.0, 32, at_home),
        Task("cvr", None, 1.0, 32, tuple((s, "shopping") for s in ("search", "related"))),
    )
    schema = dataclasses.replace(whole, tasks=tasks)
    table = examples(300, 1, schema)
    config = TrainConfig("product_mtmd", TINY, batch_size=100, max_epochs=1, accelerator="cpu")
    predictor = train(schema, [write(table)], [write(examples(100, 2, schema))], config, tmp_path / "v").predictor
    for task, probability in predictor.predict(table).items():
        has_score = np.isfinite(np.array(table[f"score_{task}"], float))
        assert has_score.any()
        np.testing.assert_array_equal(np.isfinite(probability), has_score)
