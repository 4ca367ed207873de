"""Calibration on the days that training stopped on: a constant a task and slice, added to the biases.

A trained model's sum of predictions is off by several per cent on days that it was not trained on: more for a rare task,
and more in a small slice, which it knows by heart; how much differs from run to run. The days that decided when to stop
show it, but the sums of one slice on one day stray by themselves. Therefore a random-effects model, as in a meta-analysis
(DerSimonian and Laird, 1986): the logarithms of a task's odds ratios, one a slice, lie around the task's own, stray from
day to day, and are observed with the variance of their rows. What is taken off is what a slice's is then expected to be on
another day: of a large slice half way between its own and its task's or nearer to its own, of a small one nearly its task's
(docs/experiments.md says what else was tried).

An odds ratio is that of the mean prediction to the mean score. Where a task is rare it is the ratio of their sums. Where one
is likely that ratio is near 1 whatever is off, while the odds are off by as many logits as anywhere else.

Shapes: B rows, T tasks, Z slices (S surfaces x P products).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtmd_model.batch import Batch
from mtmd_model.constrained import chains
from mtmd_model.two_tower import TwoTower, dot_products

SPREAD, DAY = 0.04, 0.04
"""Standard deviations of the logarithm of the odds ratio: between the slices of a task, at least, and of a slice between
days, however many rows it has."""
NEAR, SHORT = 0.02, 0.1
"""A logarithm of an odds ratio, and a step in logits, from which Newton's ends nearer than 0.001 without looking: what
it leaves is about the half of their product."""
PASSES = 10
"""Over the days, at most: the ratio of a model that has learned is near 1, and one or two do."""


@torch.no_grad()
def calibrate(model: TwoTower, batches: Callable[[], Iterable[Batch]]) -> Tensor:
    """Move a model's biases until what `expected` says is off is taken off, within a thousandth.

    Args:
        model: in evaluation mode.
        batches: the rows of the days to calibrate on, called once a pass; they count by their weight.

    Returns:
        (T,) the sum of the predictions over that of the scores as it was before; not a finite number where no score is
        above zero. Such a task stays as it is, and so does one whose scores are all one.
    """
    sums = _Sums.of(model, batches())
    before_T = sums.predicted_ZT.sum(0) / sums.scored_ZT.sum(0)
    off_ZT = sums.log_odds_ratio_ZT
    # a task of which no slice has two rows is left as it is
    goal_ZT = off_ZT - expected(off_ZT, sums.variance_ZT).nan_to_num()
    for n in range(PASSES):
        sums = _Sums.of(model, batches()) if n else sums
        step_ZT, near = sums.step_ZT(goal_ZT)
        model.bias.logits_TSP.add_(step_ZT.T.reshape(model.bias.logits_TSP.shape))
        if near:
            break
    return before_T


def expected(log_odds_ratio_ZT: Tensor, variance_ZT: Tensor) -> Tensor:
    """(Z, T) what the logarithms of a task's odds ratios are expected to be in each slice, given those seen there.

    Args:
        log_odds_ratio_ZT: as seen; NaN where nothing was.
        variance_ZT: of what was seen, for the rows that it was seen in; infinite where one row cannot tell.

    Returns:
        Between the slice's own and the task's, which is the mean of all by their precision; the task's where nothing was
        seen, and NaN for a task that was nowhere.
    """
    seen_ZT = ~log_odds_ratio_ZT.isnan()
    own_ZT, of_day_ZT = log_odds_ratio_ZT.nan_to_num(), torch.where(seen_ZT, variance_ZT + DAY**2, torch.inf)
    spread_T = _spread(own_ZT, of_day_ZT).clamp_min(SPREAD**2)
    precision_ZT = 1 / (of_day_ZT + spread_T)
    task_T = (precision_ZT * own_ZT).sum(0) / precision_ZT.sum(0)
    return task_T + spread_T * precision_ZT * (own_ZT - task_T)


def _spread(own_ZT: Tensor, of_day_ZT: Tensor) -> Tensor:
    """(T,) the variance between slices by the method of moments (DerSimonian and Laird); 0 for fewer than two."""
    precision_ZT = 1 / of_day_ZT
    total_T = precision_ZT.sum(0)
    mean_T = (precision_ZT * own_ZT).sum(0) / total_T
    beyond_T = (precision_ZT * (own_ZT - mean_T) ** 2).sum(0) - ((precision_ZT > 0).sum(0) - 1)
    return (beyond_T / (total_T - (precision_ZT**2).sum(0) / total_T)).nan_to_num(0, 0, 0)


@dataclass(frozen=True)
class _Sums:
    """Over the rows of each slice that have a label, in float64."""

    predicted_ZT: Tensor
    """Of P(task | impression)."""
    scored_ZT: Tensor
    weight_ZT: Tensor
    moments_ZT33: Tensor
    """Of the products of two of 1, prediction and score, by the square of the weight."""
    slope_ZTT: Tensor
    """d predicted[t] / d constant[a]."""

    @classmethod
    def of(cls, model: TwoTower, batches: Iterable[Batch]) -> "_Sums":
        """Those of a model's predictions."""
        tasks, surfaces, products = model.bias.logits_TSP.shape
        chain_TT = chains(model.schema.tasks, model.constrained).to(model.bias.logits_TSP.device)
        predicted_ZT = chain_TT.new_zeros(surfaces * products, tasks)
        scored_ZT = torch.zeros_like(predicted_ZT)
        weight_ZT = torch.zeros_like(predicted_ZT)
        moments_ZT33 = predicted_ZT.new_zeros(*predicted_ZT.shape, 3, 3)
        slope_ZTT = predicted_ZT.new_zeros(*predicted_ZT.shape, tasks)
        for batch in batches:
            z_BT = dot_products(*model.embed(batch)).double()
            slice_BZ = F.one_hot(batch.query.domain * products + batch.item.domain, surfaces * products).double()
            # ln P(task | impression) is the sum of ln P(. | given) along the chain
            p_BT = (F.logsigmoid(z_BT) @ chain_TT.T).exp()
            weight_BT = batch.weight.double()[:, None] * ~batch.labels.isnan()
            wp_BT, ws_BT = weight_BT * p_BT, weight_BT * batch.labels.double().nan_to_num()
            predicted_ZT += slice_BZ.T @ wp_BT
            scored_ZT += slice_BZ.T @ ws_BT
            weight_ZT += slice_BZ.T @ weight_BT
            weighted_BT3 = torch.stack([weight_BT, wp_BT, ws_BT], dim=-1)
            moments_ZT33 += torch.einsum("bz,bti,btj->ztij", slice_BZ, weighted_BT3, weighted_BT3)
            slope_ZTT += torch.einsum("bz,bt,ba->zta", slice_BZ, wp_BT, torch.sigmoid(-z_BT))
        return cls(predicted_ZT, scored_ZT, weight_ZT, moments_ZT33, slope_ZTT * chain_TT)

    @property
    def means_2ZT(self) -> Tensor:
        """(2, Z, T) mean prediction and mean score."""
        return torch.stack([self.predicted_ZT, self.scored_ZT]) / self.weight_ZT

    @property
    def log_odds_ratio_ZT(self) -> Tensor:
        """(Z, T) ln(odds of the mean prediction / odds of the mean score); NaN without rows, and where all scores are zero
        or all are one."""
        predicted_ZT, scored_ZT = self.means_2ZT.logit()
        off_ZT = predicted_ZT - scored_ZT
        return torch.where(off_ZT.isfinite(), off_ZT, torch.nan)

    @property
    def variance_ZT(self) -> Tensor:
        """(Z, T) of `log_odds_ratio_ZT`, if rows are independent, by the delta method: mean of the squares of
        (p - mean p) / (mean p (1 - mean p)) less the same of scores, over n - 1 for n rows of equal weight; infinite for
        one row."""
        means_2ZT = self.means_2ZT
        by_p_ZT, by_t_ZT = slope_2ZT = 1 / (means_2ZT * (1 - means_2ZT))
        mean_p_ZT, mean_t_ZT = slope_2ZT * means_2ZT
        linear_ZT3 = torch.stack([mean_t_ZT - mean_p_ZT, by_p_ZT, -by_t_ZT], dim=-1)
        squares_ZT = torch.einsum("zti,ztij,ztj->zt", linear_ZT3, self.moments_ZT33, linear_ZT3).clamp_min(0)
        rows_ZT = self.weight_ZT**2 / self.moments_ZT33[:, :, 0, 0]
        alone = rows_ZT < 1 + 1e-9
        return torch.where(alone, torch.inf, squares_ZT / self.weight_ZT**2 * rows_ZT / (rows_ZT - 1))

    def step_ZT(self, goal_ZT: Tensor) -> tuple[Tensor, bool]:
        """(Z, T) Newton's step towards these logarithms of the odds ratios, which are nearly straight lines, at most 1
        logit; and whether it needs no other after it. Where a slice has none, its task's mean step by precision; zero for a
        task that has none anywhere."""
        off_ZT = self.log_odds_ratio_ZT
        known_ZT = ~off_ZT.isnan()
        wanted_ZT = torch.where(known_ZT, goal_ZT - off_ZT, 0)
        straight_ZTT = self.slope_ZTT / (self.predicted_ZT * (1 - self.means_2ZT[0]))[:, :, None]
        alone_TT = torch.eye(known_ZT.shape[1]).to(straight_ZTT)
        straight_ZTT = torch.where(known_ZT[:, :, None], straight_ZTT, alone_TT)
        step_ZT = torch.linalg.solve(straight_ZTT, wanted_ZT).clamp(-1, 1)
        near = bool(((wanted_ZT.abs() < NEAR) & (step_ZT.abs() < SHORT)).all())
        precision_ZT = torch.where(known_ZT, 1 / (self.variance_ZT + DAY**2), 0)
        mean_T = ((precision_ZT * step_ZT).sum(0) / precision_ZT.sum(0)).nan_to_num()
        return torch.where(known_ZT, step_ZT, mean_T), near
