"""Ids forgotten at random in training, so that a model does not lean on them alone.

Tomorrow's requests bring users and items that the window never had, and the window is small enough to know its own by
heart. A model that now and then sees a known id as an unknown one learns to do with the other features, and what an
unknown id is worth.

Shapes: B rows, C categorical features of a tower.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mtmd_model.batch import Batch, TowerInput
from mtmd_model.schema import Schema, Side
from mtmd_model.vocabulary import MISSING, UNKNOWN


class IdDropout(nn.Module):
    """Each id of an open-ended feature becomes an unknown one with a probability; nothing in evaluation.

    A feature is open-ended if the platform does not list its values: they are learned from the window or hashed.
    Missing values stay missing.

    Args:
        schema: the features of both towers.
        rate: the probability.

    Reference: Volkovs, Yu and Poutanen, DropoutNet, NeurIPS 2017 (cold start by dropping the preference input).
    """

    query_C: Tensor
    item_C: Tensor

    def __init__(self, schema: Schema, rate: float) -> None:
        super().__init__()
        self.rate = rate
        sides: tuple[Side, Side] = ("query", "item")
        for side in sides:
            open_ended = [f.open_ended for f in schema.side(side) if f.kind == "categorical"]
            self.register_buffer(f"{side}_C", torch.tensor(open_ended, dtype=torch.bool), persistent=False)

    def forward(self, batch: Batch) -> Batch:
        """A batch -> the same with some ids unknown."""
        if not self.training or not self.rate:
            return batch
        return replace(batch, query=self._forget(batch.query, self.query_C), item=self._forget(batch.item, self.item_C))

    def _forget(self, x: TowerInput, open_ended_C: Tensor) -> TowerInput:
        forgotten_BC = (torch.rand(x.ids.shape, device=x.ids.device) < self.rate) & open_ended_C & (x.ids != MISSING)
        return replace(x, ids=torch.where(forgotten_BC, UNKNOWN, x.ids))
