"""How much of the loss each slice has.

One slice may hold half of all rows and another a hundredth. Every row counting alike, a model shared by all slices
learns the large ones; every slice alike, the noise of the small ones. Tempered weights lie between: a slice's share of
the loss goes with a power of its share of the rows, as corpora of unequal size are mixed.

Shapes: B rows, S surfaces, P products.

Reference: Arivazhagan et al., 2019, https://arxiv.org/abs/1907.05019 (section 4.2, sampling by temperature, as
weights).
"""

import torch
from torch import Tensor

from mtmd_model.batch import Batch


def slice_weights(window: Batch, surfaces: int, products: int) -> Tensor:
    """(S, P) float64, the sum of the rows' weights of each slice."""
    slice_B = window.query.domain * products + window.item.domain
    sums = torch.zeros(surfaces * products, dtype=torch.float64)
    return sums.index_add_(0, slice_B, window.weight.double()).view(surfaces, products)


def slice_factors(weight_SP: Tensor, balance: float) -> Tensor:
    """(S, P) slices' weights -> (S, P) factors of their rows' weights, share^-balance, that leave the sum of all weights
    as it is.

    Args:
        balance: 0 leaves every row as it is, 1 gives every slice the same weight. A slice without rows has factor 1:
            nothing is known of how small it is.
    """
    share_SP = weight_SP / weight_SP.sum()
    factor_SP = torch.where(share_SP > 0, share_SP, 1.0) ** -balance
    return torch.where(share_SP > 0, factor_SP / (share_SP * factor_SP).sum(), 1.0)
