"""The end of a tower: what a main effect is, what centring takes off, and which rows take part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtmd_model import checkpoint
from mtmd_model.architectures import build
from mtmd_model.config import MTMDConfig
from mtmd_model.contenders.mmoe_dcn import MMOEConfig
from mtmd_model.contenders.plain import PlainConfig
from mtmd_model.encoder import fit_encoder
from mtmd_model.main_effects import HORIZON, PRIOR, MainEffects
from mtmd_model.schema import Side
from mtmd_model.train import TrainConfig, train
from tests.mtmd_model.sample import examples, platform

WIDTHS = {"ctr": 5, "gctr": 3, "octr": 3, "cvr": 3}
PLAIN = PlainConfig(widths=(12, 8), width_divisor=8)
TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)
KINDS: dict[str, Any] = {
    "mtmd": TINY,
    "product_mtmd": TINY,
    "slice_towers": PLAIN,
    "soft_slice_towers": PLAIN,
    "pooled_towers": PLAIN,
    "mmoe_dcn": MMOEConfig(widths=(12, 8), width_divisor=8, gate=(6,)),
}


def end(side: Side) -> MainEffects:
    return MainEffects(side, platform(), WIDTHS)


def vectors(rows: int, seed: int = 0, shift: float = 3.0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {task: torch.randn(rows, width) + shift for task, width in WIDTHS.items()}


def test_the_logit_is_two_main_effects_and_an_interaction_of_centred_vectors():
    query, item, nowhere = vectors(200, 1), vectors(200, 2), torch.zeros(200, dtype=torch.long)
    q = end("query")(query, nowhere)["ctr"]
    i = end("item")(item, nowhere)["ctr"]
    assert q.shape == i.shape == (200, 6)
    a, b = (x["ctr"] - x["ctr"].mean(0) for x in (query, item))
    expected = a[:, 0] + b[:, 0] + (a[:, 1:] * b[:, 1:]).sum(1)
    torch.testing.assert_close((q * i).sum(1), expected)


def test_a_step_of_all_rows_alike_moves_no_vector():
    """The level is the slices' biases' alone: the gradients of the sum of all logits cancel."""
    query, item = vectors(100, 1)["ctr"].requires_grad_(), vectors(100, 2)["ctr"].requires_grad_()
    nowhere = torch.zeros(100, dtype=torch.long)
    q = end("query")({**vectors(100), "ctr": query}, nowhere)["ctr"]
    i = end("item")({**vectors(100), "ctr": item}, nowhere)["ctr"]
    z = (q * i).sum(1)
    gradients = torch.autograd.grad(z.sum(), [query, item], retain_graph=True)
    for gradient in gradients:
        torch.testing.assert_close(gradient.sum(0), torch.zeros(5), atol=1e-4, rtol=0)
    # and single rows do move theirs
    assert all(g[0].abs().min() > 0.01 for g in torch.autograd.grad(z[0], [query, item]))


def test_rows_of_a_domain_without_the_task_are_zero_and_take_no_part():
    effects, x = end("item"), vectors(60)
    shopping = torch.arange(60) % 3 == 0  # has no octr
    x["octr"][shopping] = 1e6
    out = effects(x, shopping.long())
    assert not out["octr"][shopping].any()
    rest = x["octr"][~shopping] - x["octr"][~shopping].mean(0)
    torch.testing.assert_close(out["octr"][~shopping][:, 1:], rest)
    assert effects.count_T.tolist() == [60, 60, 40, 20]


def test_a_batch_with_few_rows_is_centred_by_the_running_mean():
    effects = end("query")
    effects.mean_W.fill_(3.0)
    effects.count_T.fill_(1e6)
    [row] = [{task: torch.full((1, width), 5.0, requires_grad=True) for task, width in WIDTHS.items()}]
    out = effects(row, torch.zeros(1, dtype=torch.long))["ctr"]
    taken_off = 3.0 + 2.0 / (1 + PRIOR)
    assert out.tolist() == [pytest.approx([5 - taken_off, 1.0, *[5 - taken_off] * 4])]
    assert effects.mean_W.tolist() == pytest.approx([3.0 + 2.0 / (1 + HORIZON)] * 14)
    # a row alone is its batch's mean: nothing to learn but the biases
    assert not torch.autograd.grad(out.sum(), row["ctr"])[0].any()


def test_running_means_forget_and_serve():
    effects, nowhere = end("query"), torch.zeros(500, dtype=torch.long)
    for step in range(40):
        effects(vectors(500, step, shift=-4.0 if step < 10 else 2.0), nowhere)
    torch.testing.assert_close(effects.mean_W, torch.full((14,), 2.0), atol=0.1, rtol=0)
    effects.eval()
    x, before = vectors(500, 99), effects.mean_W.clone()
    whole = effects(x, nowhere)["ctr"]
    alone = effects({task: v[7:8] for task, v in x.items()}, nowhere[:1])["ctr"]
    assert torch.equal(whole[7:8], alone)
    torch.testing.assert_close(whole[:, 2:], x["ctr"][:, 1:] - effects.mean_W[1:5])
    assert torch.equal(effects.mean_W, before)


def test_every_model_has_them_and_a_switch(write):
    encoder = fit_encoder(platform(), [write(examples(300))])
    batch = encoder.encode(examples(100))
    for name, config in KINDS.items():
        widths = []
        for on in (True, False):
            query, item = build(name, encoder, replace(config, main_effects=on)).embed(batch)
            widths.append(query["ctr"].shape[1])
            assert bool((item["ctr"][:, 0] == 1).all()) == on
        assert widths[0] == widths[1] + 1


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_stored_model_has_its_means(write, tmp_path: Path, name: str):
    config = replace(KINDS[name], main_effects=True)
    trained = train(
        platform(),
        [write(examples(400))],
        [write(examples(150, seed=1))],
        TrainConfig(name, config, batch_size=100, max_epochs=2, averaged_passes=1.0, accelerator="cpu"),
        tmp_path / "v",
    )
    rows = examples(40, seed=2)
    loaded = checkpoint.load(tmp_path / "v")
    means = [m.mean_W for m in loaded.model.modules() if isinstance(m, MainEffects)]
    assert means
    assert all(mean.any() for mean in means)
    for task, p in trained.predictor.predict(rows).items():
        assert np.array_equal(p, loaded.predict(rows)[task], equal_nan=True)
