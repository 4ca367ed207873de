"""Calibration on the days that training stopped on: one constant a task, added to the biases of all slices.

The level of a trained model wanders: the sum of its predictions is off by several per cent, alike in most slices, on the
days it was trained on too, and with a sign that differs from run to run, whatever the training loss says. The days that
decided when to stop show by how much. Constants of each slice, or those of the training days, were tried and predict
later days as well, within the noise (docs/experiments.md).

Shapes: B rows, T tasks, S surfaces, P products.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtmd_model.batch import Batch
from mtmd_model.constrained import chains
from mtmd_model.two_tower import TwoTower, dot_products

NEAR, SHORT = 0.03, 0.1
"""A logarithm of a ratio of sums, and a step in logits, from which Newton's ends nearer than 0.001 without looking: what
it leaves is about the half of their product."""
PASSES = 10
"""Over the days, at most: the ratio of a model that has learned is near 1, and one or two do."""


@torch.no_grad()
def calibrate(model: TwoTower, batches: Callable[[], Iterable[Batch]]) -> Tensor:
    """Move a model's biases until each task's predictions sum to its scores, within a thousandth.

    Args:
        model: in evaluation mode.
        batches: the rows of the days to calibrate on, called once a pass; they count by their weight.

    Returns:
        (T,) the sum of the predictions over that of the scores as it was before; not a finite number where no score is
        above zero: such a task stays as it is.
    """
    before_T = None
    for _ in range(PASSES):
        sums = _Sums.of(model, batches())
        before_T = sums.ratio_T if before_T is None else before_T
        step_T, near = sums.step_T()
        model.bias.logits_TSP.add_(step_T[:, None, None])
        if near:
            break
    assert before_T is not None
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
        chain_TT = chains(model.schema.tasks, model.constrained).to(like.device)
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

    def step_T(self) -> tuple[Tensor, bool]:
        """(T,) Newton's step for the logarithms of the sums, which are nearly straight lines, at most 1 logit and zero
        for a task without a score; and whether it needs no other after it."""
        known_T = (self.scored_T > 0) & (self.predicted_T > 0)
        wanted_T = torch.where(known_T, -self.ratio_T.log(), 0)
        straight_TT = self.slope_TT / self.predicted_T[:, None]
        straight_TT = torch.where(known_T[:, None], straight_TT, torch.eye(len(known_T)).to(straight_TT))
        step_T = torch.linalg.solve(straight_TT, wanted_T).clamp(-1, 1)
        return step_T, bool(((wanted_T.abs() < NEAR) & (step_T.abs() < SHORT)).all())
