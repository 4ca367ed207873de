"""Calibration on days that training has not seen: one constant a task, added to the biases of all slices.

What a model has learned of single users and items it has learned of its training rows. On later days the sum of its
predictions is off by several per cent, alike in most slices, whatever the training loss says; the days that decided
when to stop show by how much. A constant a slice would be fitted to noise: one day's ratio of a slice strays by as much.

Shapes: B rows, T tasks, S surfaces, P products.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtmd_model.batch import Batch
from mtmd_model.two_tower import TwoTower, dot_products

TOLERANCE = 1e-4
"""How far a ratio of sums may be from 1."""
PASSES = 10
"""Over the days, at most: the ratio of a model that has learned is near 1, and two or three do."""


@torch.no_grad()
def calibrate(model: TwoTower, batches: Callable[[], Iterable[Batch]]) -> Tensor:
    """Move a model's biases until each task's predictions sum to its scores, within `TOLERANCE`.

    Args:
        model: in evaluation mode.
        batches: the rows of the days to calibrate on, called once a pass; they count by their weight.

    Returns:
        (T,) the sum of the predictions over that of the scores as it was before; not a finite number where no score is
        above zero: such a task stays as it is.
    """
    sums = _Sums.of(model, batches())
    before_T = sums.ratio_T
    for _ in range(PASSES - 1):
        step_T = sums.step_T()
        if not step_T.any():
            break
        model.bias.logits_TSP.add_(step_T[:, None, None])
        sums = _Sums.of(model, batches())
    return before_T


@dataclass(frozen=True)
class _Sums:
    """Over all rows with a label, in float64."""

    predicted_T: Tensor
    """Of P(task | impression)."""
    scored_T: Tensor
    slope_TT: Tensor
    """d predicted[t] / d constant[a]."""

    @classmethod
    def of(cls, model: TwoTower, batches: Iterable[Batch]) -> "_Sums":
        """Those of a model's predictions."""
        like = model.bias.logits_TSP
        chain_TT = _chains(model).to(like.device)
        predicted_T = like.new_zeros(len(chain_TT), dtype=torch.float64)
        scored_T = torch.zeros_like(predicted_T)
        slope_TT = torch.zeros_like(chain_TT)
        for batch in batches:
            z_BT = dot_products(*model.embed(batch)).double()
            exists_BT = ~batch.labels.isnan()
            weight_BT = batch.weight.double()[:, None] * exists_BT
            # ln P(task | impression) is the sum of ln P(. | given) along the chain
            p_BT = weight_BT * (F.logsigmoid(z_BT) @ chain_TT.T).exp()
            predicted_T += p_BT.sum(0)
            scored_T += (weight_BT * batch.labels.double().nan_to_num()).sum(0)
            slope_TT += p_BT.T @ torch.sigmoid(-z_BT)
        return cls(predicted_T, scored_T, slope_TT * chain_TT)

    @property
    def ratio_T(self) -> Tensor:
        """(T,) predicted over scored."""
        return self.predicted_T / self.scored_T

    def step_T(self) -> Tensor:
        """(T,) Newton's step for the logarithms of the sums, which are nearly straight lines; at most 1 logit.

        Zero for a task without a score, and for all once the ratios are near enough.
        """
        known_T = (self.scored_T > 0) & (self.predicted_T > 0)
        wanted_T = torch.where(known_T, -self.ratio_T.log(), 0)
        if (wanted_T.abs() < TOLERANCE).all():
            return torch.zeros_like(wanted_T)
        straight_TT = self.slope_TT / self.predicted_T[:, None]
        straight_TT = torch.where(known_T[:, None], straight_TT, torch.eye(len(known_T)).to(straight_TT))
        return torch.linalg.solve(straight_TT, wanted_T).clamp(-1, 1)


def _chains(model: TwoTower) -> Tensor:
    """(T, T) float64: 1 where the second task's logit is part of the first's P(task | impression)."""
    tasks = model.schema.tasks
    chain_TT = torch.eye(len(tasks), dtype=torch.float64)
    if model.constrained:
        place = {task.name: n for n, task in enumerate(tasks)}
        for n, task in enumerate(tasks):
            if task.given is not None:
                chain_TT[n] += chain_TT[place[task.given]]
    return chain_TT
