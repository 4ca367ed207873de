"""Feed-forward networks of the paper: Linear, LayerNorm, LeakyReLU(0.2) a layer (section 2.1.3).

Shapes: B rows, E experts of one shape that read the same input, D width of a layer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
FEW_ROWS = 256
"""Up to which a CPU too runs experts as batched products: there a call costs as much as its arithmetic."""


class FFN(nn.Module):
    """y = LeakyReLU(LayerNorm(W x + b)), once a layer.

    Args:
        d_in: width of the input.
        widths: width of each layer's output.
        dropout: share of each layer's output dropped in training (the paper has none).

    Example:
        >>> FFN(10, (512, 256, 128, 128))(torch.zeros(3, 10)).shape
        torch.Size([3, 128])
    """

    def __init__(self, d_in: int, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        inputs = (d_in, *widths[:-1])
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in zip(inputs, widths, strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(o) for o in widths)

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, d_in) -> (B, widths[-1])."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x_BD = F.dropout(F.leaky_relu(norm(linear(x_BD)), SLOPE), self.dropout, self.training)
        return x_BD


class GroupedLinear(nn.Module):
    """E linear maps of one shape in one batched product; initialised as `nn.Linear` is."""

    def __init__(self, experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight = nn.Parameter(torch.empty(experts, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, 1, d_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in), read by every expert, or (E, B, d_in), one each -> (E, B, d_out)."""
        if x.dim() == 3:
            return torch.baddbmm(self.bias, x, self.weight)
        experts, d_in, d_out = self.weight.shape
        # one wide product: its backward sums over the experts inside the product, not over E copies of x
        wide = self.weight.transpose(0, 1).reshape(d_in, experts * d_out)
        y = torch.addmm(self.bias.flatten(), x, wide).view(len(x), experts, d_out)
        return y.transpose(0, 1).contiguous()


class GroupedLayerNorm(nn.Module):
    """E LayerNorms of one width, each with its own gain and bias."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(experts, 1, width))
        self.bias = nn.Parameter(torch.zeros(experts, 1, width))

    def forward(self, x_EBD: Tensor) -> Tensor:
        """(E, B, D) -> (E, B, D)."""
        shape = x_EBD.shape[-1:]
        if x_EBD.device.type == "cpu" and x_EBD.shape[1] > FEW_ROWS:
            # the fused kernel, expert by expert: the gradients of gain and bias cost half as much here
            parts = zip(x_EBD.unbind(), self.weight.unbind(), self.bias.unbind(), strict=True)
            return torch.stack([F.layer_norm(x, shape, w[0], b[0]) for x, w, b in parts])
        return torch.addcmul(self.bias, F.layer_norm(x_EBD, shape), self.weight)


class GroupedFFN(nn.Module):
    """E FFNs of one shape that read the same input, as batched products; equal to E separate `FFN`s.

    Args:
        experts: how many.
        d_in: width of the input.
        widths: width of each layer's output.
        d_out: width of one more layer that is linear only (the routing layer's); none if None.
        dropout: as in `FFN`.
    """

    def __init__(
        self, experts: int, d_in: int, widths: Sequence[int], d_out: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.experts, self.dropout = experts, dropout
        inputs = (d_in, *widths[:-1])
        self.linears = nn.ModuleList(GroupedLinear(experts, i, o) for i, o in zip(inputs, widths, strict=True))
        self.norms = nn.ModuleList(GroupedLayerNorm(experts, o) for o in widths)
        self.out = None if d_out is None else GroupedLinear(experts, widths[-1], d_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in) -> (E, B, widths[-1] or d_out)."""
        if x.device.type == "cpu":
            if x.shape[-2] > FEW_ROWS:
                return self._one_by_one(x)
            x = x.expand(self.experts, -1, -1)
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.leaky_relu(norm(linear(x)), SLOPE, inplace=True)
            x = F.dropout(x, self.dropout, self.training)
        return x if self.out is None else self.out(x)

    def _one_by_one(self, x: Tensor) -> Tensor:
        """The same on a CPU: a product of one expert fills it, and what lies in its cache is normalised there."""
        x_E = list(x.unbind()) if x.dim() == 3 else [x] * self.experts
        for linear, norm in zip(self.linears, self.norms, strict=True):
            assert isinstance(linear, GroupedLinear)
            assert isinstance(norm, GroupedLayerNorm)
            parts = (linear.weight, linear.bias, norm.weight, norm.bias)
            layer_E = zip(*(p.unbind() for p in parts), strict=True)
            x_E = [_layer(x, *layer) for x, layer in zip(x_E, layer_E, strict=True)]
            x_E = [F.dropout(x, self.dropout, self.training) for x in x_E]
        if self.out is not None:
            out_E = zip(self.out.weight.unbind(), self.out.bias.unbind(), strict=True)
            x_E = [torch.addmm(bias, x, weight) for x, (weight, bias) in zip(x_E, out_E, strict=True)]
        return torch.stack(x_E)


def _layer(x_BD: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """LeakyReLU(LayerNorm(x W + b)) of one expert."""
    normed = F.layer_norm(torch.addmm(bias, x_BD, weight), gain.shape[-1:], gain[0], shift[0])
    return F.leaky_relu(normed, SLOPE, inplace=True)


def short_projection(d_in: int, width: int) -> nn.Linear:
    """A linear map to a task's vector whose outputs start short, so that the first logits are near the slice's bias:
    dot products start around 0.1 whatever the width."""
    linear = nn.Linear(d_in, width)
    with torch.no_grad():
        linear.weight.mul_(0.5 * width**-0.25)
        linear.bias.zero_()
    return linear
