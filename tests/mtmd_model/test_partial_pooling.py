"""Partial pooling of the domain experts in training."""

import copy

import torch
from torch import nn

from mtmd_model.batch import Batch
from mtmd_model.config import MTMDConfig
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.mtmd import MTMD
from mtmd_model.partial_pooling import Counterpart, PartialPooling
from tests.mtmd_model import sample

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=16)


def pair(share: float, lr: float = 0.1, decay: float = 0.0) -> tuple[list[nn.Parameter], PartialPooling]:
    """Two domains' weights: the second lacks the first's middle column."""
    wide, narrow = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Parameter(torch.tensor([7.0, 9.0]))
    alone = nn.Parameter(torch.tensor([5.0]))
    domains = [{"w": Counterpart(wide, (None,))}, {"w": Counterpart(narrow, ((0, 2),))}]
    groups = [{"params": [wide, narrow, alone], "weight_decay": decay}]
    return [wide, narrow, alone], PartialPooling(groups, [domains], lr, share, fused=False)


def test_domains_start_equal_where_they_correspond():
    (wide, narrow, alone), _ = pair(share=1.0)
    assert wide.tolist() == [1.0, 2.0, 3.0]
    assert narrow.tolist() == [1.0, 3.0]
    assert alone.tolist() == [5.0]


def test_the_common_part_follows_the_sum_of_gradients_and_deviations_their_own():
    (wide, narrow, alone), optimiser = pair(share=0.25)
    # opposite gradients of column 0, the narrow domain's larger; column 2 agrees
    wide.grad, narrow.grad, alone.grad = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-3.0, 2.0]), torch.tensor([1.0])
    optimiser.step()
    # Adam's first step is the learning rate, against the gradient's sign: 0.1 common, 0.025 a deviation
    torch.testing.assert_close(wide.data, torch.tensor([1.0 + 0.1 - 0.025, 2.0 - 0.125, 3.0 - 0.125]))
    torch.testing.assert_close(narrow.data, torch.tensor([1.0 + 0.1 + 0.025, 3.0 - 0.125]))
    torch.testing.assert_close(alone.data, torch.tensor([4.9]))


def test_a_domain_without_rows_moves_with_the_common_part_only():
    (wide, narrow, _), optimiser = pair(share=1.0)
    wide.grad = torch.tensor([1.0, 1.0, 1.0])
    optimiser.step()
    torch.testing.assert_close(wide.data, torch.tensor([0.8, 1.8, 2.8]))
    torch.testing.assert_close(narrow.data, torch.tensor([0.9, 2.9]))


def test_deviations_decay_towards_the_common_part():
    (wide, narrow, _), optimiser = pair(share=1.0, decay=0.5)
    wide.grad, narrow.grad = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([-1.0, 1.0])
    optimiser.step()
    gap = (wide[0] - narrow[0]).item()
    for _ in range(60):
        wide.grad, narrow.grad = torch.zeros(3), torch.zeros(2)
        optimiser.step()
    assert abs((wide[0] - narrow[0]).item()) < 0.5 * abs(gap)


def test_deviations_decay_as_fast_as_the_common_part_though_they_learn_slower():
    (wide, narrow, alone), optimiser = pair(share=0.1, lr=1e-3, decay=100.0)
    block = optimiser.blocks[0]
    with torch.no_grad():
        block.common.fill_(1.0)
        for deviation in block.deviations:
            deviation.fill_(1.0)
    wide.grad, narrow.grad, alone.grad = torch.zeros(3), torch.zeros(2), torch.zeros(1)
    optimiser.step()
    torch.testing.assert_close(block.common.data, torch.full((3,), 0.9))
    torch.testing.assert_close(block.deviations[0].data, torch.full((3,), 0.9))


def test_the_learning_rate_follows_the_schedule():
    (wide, _, _), optimiser = pair(share=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5**step)
    seen = []
    for _ in range(3):
        before = wide[1].item()
        wide.grad = torch.tensor([1.0, 1.0, 1.0])
        optimiser.step()
        schedule.step()
        seen.append(before - wide[1].item())
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([0.1, 0.05, 0.025]))


def mtmd(write) -> tuple[MTMD, Batch, Encoder]:
    table = sample.examples(400)
    encoder = fit_encoder(sample.platform(), [write(table)])
    torch.manual_seed(0)
    return MTMD(encoder.schema, encoder.rows, TINY), encoder.encode(table), encoder


def optimiser_of(model: MTMD, share: float) -> PartialPooling:
    return PartialPooling(
        [{"params": list(model.parameters()), "weight_decay": 0.0}], model.domains(), 0.01, share, False
    )


def test_every_expert_parameter_is_pooled_and_no_other(write):
    model, _, _ = mtmd(write)
    pooled = [id(c.parameter) for tower in model.domains() for d in tower for c in d.values()]
    assert len(pooled) == len(set(pooled))
    for name, p in model.named_parameters():
        assert (id(p) in pooled) == (".expert." in name or ".adaptation." in name), name


def test_weights_correspond_by_task_and_feature(write):
    model, _, _ = mtmd(write)
    optimiser_of(model, share=0.0)
    tower = model.item_tower
    first = {d: tower.expert[f"={d}"].deep_and_task_shared.linears[0].weight for d in ("standard", "shopping")}
    columns = {d: tower.adaptation[f"={d}"].own_columns for d in first}
    assert columns["standard"] != columns["shopping"]
    both = [c for c in columns["standard"] if c in columns["shopping"]]
    # networks: ctr, gctr, octr, task-shared of standard; ctr, gctr, cvr, task-shared of shopping
    for standard, shopping, same in ((0, 0, True), (1, 1, True), (3, 3, True), (2, 2, False)):
        for c in both:
            a = first["standard"][standard, columns["standard"].index(c)]
            b = first["shopping"][shopping, columns["shopping"].index(c)]
            assert torch.equal(a, b) == same
    project = {d: tower.expert[f"={d}"].project for d in first}
    assert torch.equal(project["standard"][1].weight, project["shopping"][1].weight)
    assert not torch.equal(project["standard"][2].weight, project["shopping"][2].weight)


def test_with_share_zero_domains_stay_equal_and_learn(write):
    model, batch, _ = mtmd(write)
    optimiser = optimiser_of(model, share=0.0)
    start = model.query_tower.expert["=home"].deep_and_task_shared.linears[0].bias.clone()
    for _ in range(3):
        optimiser.zero_grad()
        model(batch)[:, 0].square().mean().backward()
        optimiser.step()
    home, search = (model.query_tower.expert[f"={d}"].deep_and_task_shared.linears[0].bias for d in ("home", "search"))
    assert torch.equal(home[0], search[0])
    assert not torch.equal(home, start)


def test_with_a_share_domains_part(write):
    model, batch, _ = mtmd(write)
    optimiser = optimiser_of(model, share=0.5)
    optimiser.zero_grad()
    model(batch)[:, 0].square().mean().backward()
    optimiser.step()
    home, search = (model.query_tower.expert[f"={d}"].deep_and_task_shared.linears[0].bias for d in ("home", "search"))
    assert not torch.equal(home[0], search[0])


def test_it_goes_on_from_its_state_as_if_never_stopped(write):
    model, batch, _ = mtmd(write)
    optimiser = optimiser_of(model, share=0.5)

    def steps(model: MTMD, optimiser: PartialPooling, count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad()
            model(batch).square().mean().backward()
            optimiser.step()

    steps(model, optimiser, 2)
    kept = copy.deepcopy((model.state_dict(), optimiser.state_dict()))
    steps(model, optimiser, 2)

    again, _, _ = mtmd(write)
    resumed = optimiser_of(again, share=0.5)
    again.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    steps(again, resumed, 2)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
