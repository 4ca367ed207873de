"""The training loss: KL(heavyweight || model), task by task (paper section 2.3).

Shapes: B rows, T tasks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """KL of two Bernoulli distributions, label from the heavyweight ranker, logit from the model.

    bce_with_logits(z, t) - H(t); its gradient is sigmoid(z) - t. Zero, with a zero gradient, where the label
    is NaN. In the logits' precision: sum it in float64, in fp32 it can be a few 1e-8 below zero.

    Args:
        logits_BT: finite.
        labels_BT: in [0, 1] or NaN.
    """
    exists_BT = ~labels_BT.isnan()
    t_BT = torch.where(exists_BT, labels_BT, 0.5)
    z_BT = torch.where(exists_BT, logits_BT, 0.0)
    bce_BT = F.binary_cross_entropy_with_logits(z_BT, t_BT, reduction="none")
    kl_BT = bce_BT - torch.special.entr(t_BT) - torch.special.entr(1 - t_BT)
    return torch.where(exists_BT, kl_BT, 0.0)


def kl_loss(logits_BT: Tensor, labels_BT: Tensor, weight_B: Tensor, task_weight_T: Tensor) -> Tensor:
    """Weighted mean over rows of the weighted sum over tasks of the KL divergence, a scalar.

    Divided by the rows' weights alone: a row pulls equally hard whatever slices share its batch. Zero,
    with a zero gradient, where no row has a weight.
    """
    row_B = kl_divergence(logits_BT, labels_BT) @ task_weight_T
    return (row_B * weight_B).sum() / weight_B.sum().clamp_min(torch.finfo(weight_B.dtype).tiny)
