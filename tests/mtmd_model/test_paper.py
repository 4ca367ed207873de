"""Section 2 of the paper, written out naively, against the modules as they are built."""

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from mtmd_model.batch import Batch
from mtmd_model.domain_adaptation import Adapted, DomainAdaptation
from mtmd_model.domain_expert import DomainExpert
from mtmd_model.encoder import Encoder
from mtmd_model.ffn import FFN, GroupedFFN
from mtmd_model.mtmd import MTMD, MTMDConfig
from mtmd_model.schema import Feature, Schema
from mtmd_model.two_tower import TwoTower
from mtmd_model.vocabulary import Vocabulary
from tests.mtmd_model.sample import examples, platform

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)


def encoder() -> Encoder:
    categorical = [f for f in platform().features if f.kind == "categorical"]
    return Encoder(platform(), {f.name: Vocabulary(buckets=5) for f in categorical})


def noisy(module: torch.nn.Module) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double().eval()


def layers(ffn: Any, e: int, x: torch.Tensor) -> torch.Tensor:
    """Linear, LayerNorm, LeakyReLU(0.2) a layer, of the e-th network."""
    for linear, norm in zip(ffn.linears, ffn.norms, strict=True):
        y = F.linear(x, linear.weight[e].T, linear.bias[e, 0])
        x = F.leaky_relu(F.layer_norm(y, y.shape[-1:], norm.weight[e, 0], norm.bias[e, 0]), 0.2)
    return x if ffn.out is None else F.linear(x, ffn.out.weight[e].T, ffn.out.bias[e, 0])


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_a_domain_expert_is_the_papers_formula(norm: Literal["pre", "post", "none"]):
    config = MTMDConfig(deep=(10, 6), shallow=(5, 3), router=(7, 4), norm=norm, cross_rank=0.2)
    expert: Any = noisy(DomainExpert((4, 2), d_own=9, d_key=5, config=config))
    own, key, shared = (torch.randn(11, d, dtype=torch.float64) for d in (9, 5, 6))
    # the common layout belongs to the domain-shared expert, which the tower runs
    got = expert(Adapted(own, key, torch.full((11, 20), float("nan"))), shared)

    task_shared, parts = layers(expert.deep_and_task_shared, 2, own), []
    for t, width in enumerate((4, 2)):
        gate = F.softmax(layers(expert.router, t, own), -1)
        experts = (layers(expert.deep_and_task_shared, t, own), task_shared, shared)
        x = torch.cat([gate[:, [e]] * y for e, y in enumerate(experts)], -1)

        def normalised(x: torch.Tensor, t: int = t) -> torch.Tensor:
            return F.layer_norm(x, (18,), expert.norm.weight[t, 0], expert.norm.bias[t, 0])

        x0 = x = normalised(x) if norm == "pre" else x
        for down, up in zip(expert.cross.downs, expert.cross.ups, strict=True):
            x = x0 * F.linear(F.linear(x, down[t].T), up.weight[t].T, up.bias[t, 0]) + x
        x = normalised(x) if norm == "post" else x
        deep = F.linear(x, expert.project[t].weight, expert.project[t].bias)
        assert deep.shape == (11, width)
        parts += [deep, layers(expert.shallow, t, key)]
        torch.testing.assert_close(got.gates_TBE[t], gate)
    torch.testing.assert_close(got.embedding_BW, torch.cat(parts, 1))


def test_both_layouts_hold_the_gated_features():
    dense = [Feature("x", "item", "dense", ("a", "b")), Feature("y", "item", "dense", ("b",))]
    categorical = [
        Feature("k", "item", "categorical", ("a", "b"), width=2, buckets=2, key=True),
        Feature("n", "item", "categorical", ("b",), width=3, buckets=2, key=True),
    ]
    adaptation: Any = noisy(DomainAdaptation("a", dense, categorical, MTMDConfig(norm_horizon=1000)))
    adaptation.norm.count.fill_(2)
    adaptation.norm.var.fill_(4.0)
    x, embedded = torch.tensor([[0.5, 4.0], [1.5, 4.0]]).double(), torch.randn(2, 5).double()
    got = adaptation(x, embedded)
    norm, se = adaptation.norm, adaptation.excitation
    first = norm.gain[0] * x[:, :1] / 2 + norm.bias[0]
    absent = norm.missing[1].expand(2, 1)
    means = torch.cat([first, embedded[:, :2].mean(1, keepdim=True)], 1)
    hidden = F.relu(F.linear(means, se.squeeze.weight, se.squeeze.bias))
    gate = 2 * torch.sigmoid(F.linear(hidden, se.excite.weight, se.excite.bias))
    a, b = gate[:, :1] * first, gate[:, 1:] * embedded[:, :2]
    assert (gate - 1).abs().min() > 1e-3
    torch.testing.assert_close(got.own_BD, torch.cat([a, b], 1))
    torch.testing.assert_close(got.key_BK, embedded[:, :2])
    torch.testing.assert_close(got.common_BS, torch.cat([a, absent, b, embedded[:, 2:]], 1))


def widths(ffn: Any) -> list[int]:
    out = [linear.out_features if isinstance(ffn, FFN) else linear.weight.shape[-1] for linear in ffn.linears]
    return out if getattr(ffn, "out", None) is None else [*out, ffn.out.weight.shape[-1]]


def test_the_paper_preset_has_the_papers_widths():
    model: Any = MTMD(platform(), encoder().rows, MTMDConfig.preset("paper"))
    for tower in (model.query_tower, model.item_tower):
        assert widths(tower.domain_shared) == [512, 256, 128, 128]
        for domain in tower.domains:
            expert, tasks = tower.expert[f"={domain}"], tower.tasks[domain]
            assert widths(expert.deep_and_task_shared) == [512, 256, 128, 128]
            assert widths(expert.shallow) == [128, 64]
            assert widths(expert.router) == [128, 64, 3]
            groups = [len(f.linears[0].weight) for f in (expert.deep_and_task_shared, expert.shallow, expert.router)]
            assert groups == [len(tasks) + 1, len(tasks), len(tasks)]
            assert [tuple(d.shape) for d in expert.cross.downs] == [(len(tasks), 384, 96)] * 2
            assert [tuple(u.weight.shape) for u in expert.cross.ups] == [(len(tasks), 96, 384)] * 2
            assert [p.out_features for p in expert.project] == [128 if t == "ctr" else 32 for t in tasks]


def test_dropout_is_active_in_training_only():
    ffn = GroupedFFN(2, 6, (64, 64), dropout=0.5)
    x = torch.randn(50, 6)
    dropped = (ffn(x) == 0).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))
    assert (ffn(x) == 0).float().mean().item() < 0.01
    model: Any = MTMD(platform(), encoder().rows, MTMDConfig(**{**vars(TINY), "dropout": 0.5}))
    expert = model.query_tower.expert["=home"]
    assert {expert.deep_and_task_shared.dropout, expert.shallow.dropout, model.query_tower.domain_shared.dropout} == {
        0.5
    }
    assert expert.router.dropout == 0


def test_gates_are_the_same_under_autocast():
    expert: Any = noisy(DomainExpert((4, 2), d_own=9, d_key=5, config=TINY)).float()
    own, key, shared = torch.randn(11, 9), torch.randn(11, 5), torch.randn(11, 8)
    exact = expert(Adapted(own, key, own), shared).gates_TBE
    with torch.autocast("cpu", torch.bfloat16):
        gates = expert(Adapted(own, key, own), shared).gates_TBE
    assert gates.dtype == torch.float32
    assert torch.equal(gates, exact)


def test_experts_are_weighed_equally_at_first_and_the_router_still_learns():
    torch.manual_seed(0)
    expert: Any = DomainExpert((4, 2), d_own=9, d_key=5, config=TINY)
    own, key, shared = torch.randn(11, 9), torch.randn(11, 5), torch.randn(11, 8)
    torch.testing.assert_close(expert.gates(own), torch.full((2, 11, 3), 1 / 3))
    optimiser = torch.optim.AdamW(expert.parameters(), lr=0.01)
    for _ in range(5):
        optimiser.zero_grad()
        expert(Adapted(own, key, own), shared).embedding_BW.square().sum().backward()
        optimiser.step()
    moved = expert.gates(own) - 1 / 3
    assert moved.abs().max() > 1e-4
    assert moved.std(1).max() > 1e-5, "a weight a row"


def test_no_rows_give_no_vectors():
    model = MTMD(platform(), encoder().rows, TINY)
    batch = encoder().encode(examples(3)).slice(0, 0)
    for mode in (True, False):
        model.train(mode)
        assert {t: tuple(v.shape) for t, v in model.embed_query(batch.query).items()} == {
            "ctr": (0, 22), "gctr": (0, 10), "octr": (0, 10), "cvr": (0, 10)
        }  # fmt: skip
        assert model(batch).shape == (0, 4)
    assert model.routing([batch]) == []


class Plain(TwoTower):
    """A contender without routing or normalisation."""

    def embed(self, batch: Batch) -> Any:
        raise NotImplementedError


def test_a_model_without_routing_says_so():
    schema: Schema = platform()
    assert Plain(schema, True).normalisation() == {}
    with pytest.raises(ValueError, match="Plain has no routing layers"):
        Plain(schema, True).routing([])
