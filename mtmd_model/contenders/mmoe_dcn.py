"""MMOE-DCN: the two-tower that followed MTMD at Pinterest (engineering post of 2026-02-13).

A mixture of experts shared by all domains, a gate a task; full-rank and low-rank cross layers in each expert; no
domain modules. The post gives no sizes; what the search tries of them is in `mtmd_assets/tuning.py`.

Shapes: B rows, E experts, T tasks, D width of a task's stored vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mtmd_model.batch import TowerInput
from mtmd_model.config import divided, preset_divisor
from mtmd_model.contenders.plain import PlainConfig, PlainInput, PooledTowers, Projections
from mtmd_model.cross import LowRankCross
from mtmd_model.ffn import GroupedFFN, GroupedLinear
from mtmd_model.schema import Schema, Side


@dataclass(frozen=True)
class MMOEConfig(PlainConfig):
    """Sizes of MMOE-DCN; `widths` are those of an expert's layers after its cross layers."""

    experts: int = 4
    """Of each tower."""
    gate: tuple[int, ...] = (128, 64)
    """Widths of a gate before its last, linear layer."""
    full_rank_layers: int = 1
    """Full-rank cross layers of an expert."""
    low_rank_layers: int = 1
    """Low-rank cross layers after them."""
    cross_rank: float = 0.25
    """Their rank, as a share of the input's width."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """As `PlainConfig.preset`; the gates are divided too."""
        return replace(super().preset(name, gate=divided(cls().gate, preset_divisor(name))), **changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 1 or not self.gate or min(self.gate) < 1:
            raise ValueError(f"experts and gate widths must be 1 or more, got {self.experts!r} and {self.gate!r}")
        if min(self.full_rank_layers, self.low_rank_layers) < 0 or not 0 < self.cross_rank <= 1:
            raise ValueError(
                "cross layers must be 0 or more and their rank in (0, 1], got "
                f"{self.full_rank_layers!r}, {self.low_rank_layers!r} and {self.cross_rank!r}"
            )


class FullRankCross(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, for E independent networks at once.

    Reference: Wang et al., DCN V2, WWW 2021, https://arxiv.org/abs/2008.13535, equation 1.
    """

    def __init__(self, networks: int, width: int, layers: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(GroupedLinear(networks, width, width) for _ in range(layers))

    def forward(self, x0_EBD: Tensor) -> Tensor:
        """(E, B, D) -> (E, B, D)."""
        x_EBD = x0_EBD
        for linear in self.linears:
            x_EBD = torch.addcmul(x_EBD, x0_EBD, linear(x_EBD))
        return x_EBD


class MMOETower(nn.Module):
    """vector_t = W_t sum_e gate_t(x)_e FFN_e(low_e(full_e(x))).

    The low-rank layers are a network of their own, whose x_0 is what the full-rank ones put out. One network with the
    features as x_0 throughout was no better on KuaiRand's tuning days, nor was a norm before it (docs/tuning.md).
    """

    def __init__(self, side: Side, schema: Schema, rows: Mapping[str, int], config: MMOEConfig) -> None:
        super().__init__()
        self.experts = config.experts
        self.input = PlainInput(side, schema, rows, config)
        width = self.input.width
        self.full_rank = FullRankCross(config.experts, width, config.full_rank_layers)
        rank = max(1, round(width * config.cross_rank))
        self.low_rank = LowRankCross(config.experts, width, config.low_rank_layers, rank)
        self.ffn = GroupedFFN(config.experts, width, config.widths, dropout=config.dropout)
        self.gate = GroupedFFN(len(schema.tasks), width, config.gate, d_out=config.experts)
        self.end = Projections(side, schema, config)

    def forward(self, x: TowerInput) -> dict[str, Tensor]:
        """Rows -> task -> (B, D), without the bias coordinates."""
        x_BD = self.input(x)
        crossed_EBD = self.low_rank(self.full_rank(x_BD.expand(self.experts, *x_BD.shape)))
        experts_EBH = self.ffn(crossed_EBD)
        gates_TBE = self.gate(x_BD).softmax(-1)
        mixed_TBH = torch.einsum("tbe,ebh->tbh", gates_TBE.to(experts_EBH.dtype), experts_EBH)
        return self.end(mixed_TBH.unbind(), x.domain)


class MMOEDCN(PooledTowers):
    """One mixture-of-experts two-tower for all slices, with surface and product as features."""

    tower = MMOETower
