"""Low-rank DCN-v2 cross layers (paper section 2.1.5).

Shapes: E networks of one shape (one a task), B rows, D width, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mtmd_model.ffn import GroupedLinear


class LowRankCross(nn.Module):
    """x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l, for E independent networks at once.

    Args:
        networks: E.
        width: D.
        layers: number of cross layers; none leaves the input as it is. Two or three are usual.
        rank: R; about D / 4, and below D / 2, or it saves nothing against a full matrix.

    Reference: Wang et al., DCN V2, WWW 2021, https://arxiv.org/abs/2008.13535, equation 2.
    """

    def __init__(self, networks: int, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.downs = nn.ParameterList(GroupedLinear(networks, width, rank).weight for _ in range(layers))
        self.ups = nn.ModuleList(GroupedLinear(networks, rank, width) for _ in range(layers))

    def forward(self, x0_EBD: Tensor) -> Tensor:
        """(E, B, D) -> (E, B, D)."""
        x_EBD = x0_EBD
        for down_EDR, up in zip(self.downs, self.ups, strict=True):
            x_EBD = _AddProduct.apply(x_EBD, x0_EBD, up(torch.bmm(x_EBD, down_EDR)))
        return x_EBD


class _AddProduct(torch.autograd.Function):
    """x + a * b; autograd's own gradients of `addcmul` multiply by its factor of one first, in two more passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.addcmul(x, a, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return gradients[0], gradients[0] * b, gradients[0] * a
