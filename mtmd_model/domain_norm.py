"""Batch normalisation of one domain's dense features, on observed values only (paper section 2.1.2).

Shapes: B rows of the domain, F dense features of the tower.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DomainNorm(nn.Module):
    """y = gain * clip((x - mean) / std) + bias; where x is missing or the feature absent, a learned value.

    The statistics are those of every observed value the domain has shown so far, merged exactly (Chan et al.
    1979): a batch counts by its number of observed values, so that a small domain that shows a few rows a
    batch is estimated as well as if they had come at once. After `horizon` values they forget exponentially.

    Unlike `nn.BatchNorm1d`, training uses the same running statistics as serving, this batch merged in: a
    domain with ten rows in a batch would otherwise be normalised by the noise of ten rows, and scored by
    other numbers than it was trained with. The first batch is normalised exactly as `nn.BatchNorm1d` would.

    A feature of which the domain has shown fewer than two values, or one value only, says nothing yet: it
    counts as missing, so that a value never met in training cannot enter unscaled.

    Args:
        present: for each dense feature of the tower, whether this domain has it.
        clip: bound of the standardised value, in standard deviations.
        horizon: observed values after which the cumulative mean becomes an exponential one.
        floor: variance up to which a feature counts as constant, also relative to the squared mean (times 1e-12:
            above fp32's rounding of the input, below the spread of a day's timestamps).

    Reference: Ioffe and Szegedy, ICML 2015, https://arxiv.org/abs/1502.03167; one a domain as in the paper.
    """

    present: Tensor
    count: Tensor
    mean: Tensor
    var: Tensor

    def __init__(
        self, present: Sequence[bool], clip: float = 5.0, horizon: int = 1_000_000, floor: float = 1e-24
    ) -> None:
        super().__init__()
        features = len(present)
        self.clip, self.horizon, self.floor = clip, horizon, floor
        self.gain = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.missing = nn.Parameter(torch.zeros(features))
        self.register_buffer("present", torch.tensor(present, dtype=torch.bool), persistent=False)
        self.register_buffer("count", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("var", torch.ones(features, dtype=torch.float64))

    @torch.no_grad()
    def _update(self, x_BF: Tensor, observed_BF: Tensor) -> None:
        """Merge the batch's count, mean and variance into the running ones."""
        n_F = observed_BF.sum(0).to(torch.float64)
        divisor_F = n_F.clamp_min(1)
        x_BF = x_BF.to(torch.float64)
        mean_F = (x_BF * observed_BF).sum(0) / divisor_F
        var_F = ((x_BF - mean_F).square() * observed_BF).sum(0) / divisor_F

        old_F = self.count.clamp_max(self.horizon)
        share_F = n_F / (old_F + n_F).clamp_min(1)
        shift_F = mean_F - self.mean
        merged_F = (1 - share_F) * self.var + share_F * var_F + share_F * (1 - share_F) * shift_F.square()
        seen_F = n_F >= 1
        self.var.copy_(torch.where(seen_F, merged_F, self.var))
        self.mean.copy_(torch.where(seen_F, self.mean + share_F * shift_F, self.mean))
        self.count.add_(n_F)

    def forward(self, x_BF: Tensor) -> Tensor:
        """(B, F) with NaN where missing -> (B, F) without NaN, in the dtype of the parameters."""
        observed_BF = ~x_BF.isnan() & self.present
        x_BF = torch.where(observed_BF, x_BF, 0)
        if self.training:
            self._update(x_BF, observed_BF)
        floor_F = (1e-12 * self.mean.square()).clamp_min(self.floor)
        known_F = (self.count >= 2) & (self.var > floor_F)
        std_F = torch.where(known_F, self.var, 1.0).sqrt()
        standard_BF = ((x_BF - self.mean) / std_F).clamp(-self.clip, self.clip).to(self.gain.dtype)
        usable_BF = observed_BF & known_F
        return torch.where(usable_BF, torch.addcmul(self.bias, standard_BF, self.gain), self.missing)
