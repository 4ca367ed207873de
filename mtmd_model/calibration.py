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

PASSES = 2
"""Newton steps, a pass over the days each: from a ratio of 0.9 two come within 1e-5 of 1."""


@torch.no_grad()
def calibrate(model: TwoTower, batches: Callable[[], Iterable[Batch]]) -> Tensor:
    """Move a model's biases until each task's predictions sum to its scores.

    Args:
        model: in evaluation mode.
        batches: the rows of the days to calibrate on, called once a pass; they count by their weight.

    Returns:
        (T,) the sum of the predictions over that of the scores as it was before; NaN of a task without a score.
    """
    before_T = torch.empty(0)
    for n in range(PASSES):
        sums = _Sums.of(model, batches())
        if n == 0:
            before_T = sums.predicted_T / sums.scored_T
        model.bias.logits_TSP.add_(sums.step_T()[:, None, None])
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
        """What a model predicts."""
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

    def step_T(self) -> Tensor:
        """Newton's, for the logarithms of the sums, which are nearly straight lines; a task without a score stays."""
        known_T = (self.scored_T > 0) & (self.predicted_T > 0)
        slope_TT = torch.where(
            known_T[:, None], self.slope_TT / self.predicted_T[:, None], torch.eye(len(known_T)).to(self.slope_TT)
        )
        wanted_T = torch.where(known_T, (self.scored_T / self.predicted_T).log(), 0)
        return torch.linalg.solve(slope_TT, wanted_T).clamp(-1, 1)


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
