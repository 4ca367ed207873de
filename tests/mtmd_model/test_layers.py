"""Layers against hand-computed values (paper section 2.1)."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mtmd_model.cross import LowRankCross
from mtmd_model.ffn import FEW_ROWS, FFN, GroupedFFN, GroupedLayerNorm
from mtmd_model.squeeze_excitation import SqueezeExcitation


def test_ffn_layer_is_linear_then_layer_norm_then_leaky_relu():
    ffn = FFN(2, (2,))
    with torch.no_grad():
        ffn.linears[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        ffn.linears[0].bias.copy_(torch.tensor([0.0, 1.0]))
    # linear: (1, 5); mean 3, std 2: (-1, 1); slope 0.2 below zero
    torch.testing.assert_close(ffn(torch.tensor([[1.0, 2.0]])), torch.tensor([[-0.2, 1.0]]), rtol=0, atol=1e-5)


def test_ffn_has_the_paper_widths():
    ffn = FFN(10, (512, 256, 128, 128))
    assert [(m.in_features, m.out_features) for m in ffn.linears] == [
        (10, 512),
        (512, 256),
        (256, 128),
        (128, 128),
    ]


@pytest.mark.parametrize("rows", [7, FEW_ROWS + 1])
@pytest.mark.parametrize("d_out", [None, 3])
def test_grouped_ffn_equals_separate_ones(d_out: int | None, rows: int):
    torch.manual_seed(0)
    grouped: Any = GroupedFFN(4, 6, (8, 5), d_out)
    for p in grouped.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(rows, 6)
    for e, got in enumerate(grouped(x)):
        y = x
        for linear, norm in zip(grouped.linears, grouped.norms, strict=True):
            y = y @ linear.weight[e] + linear.bias[e]
            y = F.leaky_relu(F.layer_norm(y, y.shape[-1:], norm.weight[e, 0], norm.bias[e, 0]), 0.2)
        if d_out is not None:
            y = y @ grouped.out.weight[e] + grouped.out.bias[e]
        torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)


def test_grouped_layers_start_in_the_range_of_nn_linear():
    torch.manual_seed(0)
    for linear, fan_in in zip(GroupedFFN(30, 100, (64, 32)).linears, (100, 64), strict=True):
        bound = 1 / math.sqrt(fan_in)
        for p in (linear.weight, linear.bias):
            assert 0.9 * bound < p.abs().max() <= bound + 1e-6
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("rows", [4, FEW_ROWS + 1])
def test_grouped_layer_norm_is_the_same_formula_everywhere(rows: int):
    norm = GroupedLayerNorm(3, 5)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, rows, 5)
    torch.testing.assert_close(norm(x), torch.addcmul(norm.bias, F.layer_norm(x, (5,)), norm.weight))


def test_low_rank_cross_by_hand():
    cross = LowRankCross(1, 2, layers=2, rank=1)
    with torch.no_grad():
        for down, up in zip(cross.downs, cross.ups, strict=True):
            down.copy_(torch.tensor([[[1.0], [1.0]]]))
            up.weight.copy_(torch.tensor([[[1.0, 2.0]]]))
            up.bias.copy_(torch.tensor([[[0.0, 1.0]]]))
    # x0 = (1, 2); V x0 = 3; U 3 + b = (3, 7); x1 = x0 * (3, 7) + x0 = (4, 16)
    # V x1 = 20; U 20 + b = (20, 41); x2 = x0 * (20, 41) + x1 = (24, 98)
    torch.testing.assert_close(cross(torch.tensor([[[1.0, 2.0]]])), torch.tensor([[[24.0, 98.0]]]))


def test_low_rank_cross_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    cross = LowRankCross(2, 3, layers=2, rank=1).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: cross(x), (x, *cross.parameters()))


def test_cross_without_layers_is_the_identity():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(LowRankCross(2, 4, layers=0, rank=1)(x), x)


def test_squeeze_excitation_starts_as_the_identity():
    x = torch.randn(5, 6)
    torch.testing.assert_close(SqueezeExcitation((1, 2, 3))(x), x)


def test_squeeze_excitation_by_hand():
    se = SqueezeExcitation((1, 2), reduction=2)
    with torch.no_grad():
        se.squeeze.weight.copy_(torch.tensor([[1.0, 1.0]]))
        se.squeeze.bias.zero_()
        se.excite.weight.copy_(torch.tensor([[1.0], [0.0]]))
        se.excite.bias.copy_(torch.tensor([0.0, -1.0]))
    # means (1, 3); hidden 4; gates 2 sigmoid(4), 2 sigmoid(-1)
    a, b = 2 / (1 + math.exp(-4)), 2 / (1 + math.exp(1))
    torch.testing.assert_close(se(torch.tensor([[1.0, 2.0, 4.0]])), torch.tensor([[a, 2 * b, 4 * b]]))
