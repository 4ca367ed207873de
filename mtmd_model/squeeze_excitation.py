"""Squeeze-and-excitation over a domain's feature fields (paper section 2.1.2).

Shapes: B rows, F fields, D columns of all fields together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """field_f <- 2 sigmoid(W2 relu(W1 z + b1) + b2)_f * field_f, where z_f is the mean of field f's columns.

    The last layer starts at zero, so that every gate starts at one and no field can start switched off.

    Args:
        widths: columns of each field, in the order of the layout.
        reduction: F / reduction hidden units.

    Reference: Jiang et al., Adaptive Domain Interest Network, CIKM 2022, https://arxiv.org/abs/2206.09672.
    """

    spread_DF: Tensor

    def __init__(self, widths: Sequence[int], reduction: int = 2) -> None:
        super().__init__()
        fields = len(widths)
        hidden = max(1, fields // reduction)
        self.squeeze = nn.Linear(fields, hidden)
        self.excite = nn.Linear(hidden, fields)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)
        width_F = torch.tensor(widths)
        spread_DF = torch.eye(fields).repeat_interleave(width_F, dim=0)
        self.register_buffer("spread_DF", spread_DF, persistent=False)
        self.register_buffer("mean_DF", spread_DF / width_F, persistent=False)

    mean_DF: Tensor

    def gate(self, x_BD: Tensor) -> Tensor:
        """(B, D) -> (B, F), each in (0, 2)."""
        z_BF = x_BD @ self.mean_DF
        return 2 * torch.sigmoid(self.excite(torch.relu(self.squeeze(z_BF))))

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        # a product with a 0/1 matrix spreads the gates: its backward is a product too, not a scatter
        return x_BD * (self.gate(x_BD) @ self.spread_DF.T)
