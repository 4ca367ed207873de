"""The end of a tower: each vector's first column becomes its main effect, the others are left with interactions.

The dot product of two networks' vectors has no place of its own for what a viewer or an item is worth by itself: towers
write it into columns that carry interactions too, and every step that mends a slice moves the level of all rows. So a
query's vector becomes [u, 1, q - mean q] and an item's [1, v, i - mean i]: the logit is u + v + (q - mean q) . (i - mean i).
u and v are centred as well, which leaves the level to the slices' biases.

References: Rendle, Factorization Machines, ICDM 2010 (first-order terms beside centred interactions); Salimans and Kingma,
Weight Normalization, NeurIPS 2016, https://arxiv.org/abs/1602.07868, section 4 (mean-only batch normalisation).

Shapes: B rows, T tasks, W columns of all tasks' vectors together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtmd_model.schema import Schema, Side
from mtmd_model.slices import tasks_of

PRIOR = 50.0
"""Rows that a running mean counts for beside the batch's rows: a slice may have one row a batch."""
HORIZON = 2_000.0
"""Rows after which a running mean forgets."""


def tower_end(
    side: Side, schema: Schema, widths: Mapping[str, int], main_effects: bool
) -> "MainEffects | NoMainEffects":
    """What a tower's vectors go through last; arguments as of `MainEffects`."""
    return MainEffects(side, schema, widths) if main_effects else NoMainEffects(widths)


class NoMainEffects(nn.Module):
    """The vectors without main effects, as in the paper."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.widths = dict(widths)
        """Task -> columns that come out."""

    def forward(self, vectors: Mapping[str, Tensor], domain_B: Tensor) -> dict[str, Tensor]:
        """The same vectors."""
        return dict(vectors)


class MainEffects(nn.Module):
    """Task -> (B, D) vectors of one side -> task -> (B, D + 1), centred by the mean over the rows that have the task.

    In training the mean is the batch's, together with a running one as far as the batch has few rows; its gradient is the
    batch's, for a step must not move what the next one will take away. Afterwards it is the running mean, so that a row's
    vector does not depend on the rows beside it. A vector of a task that the row's domain lacks is zero.

    Args:
        side: of the tower.
        schema: which task exists where.
        widths: task -> D.
    """

    has_DT: Tensor
    mean_W: Tensor
    count_T: Tensor

    def __init__(self, side: Side, schema: Schema, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.side = side
        self.widths_in = dict(widths)
        self.widths = {task: width + 1 for task, width in widths.items()}
        """Task -> columns that come out."""
        of_domain = [{t.name for t in tasks_of(schema, side, d)} for d in schema.domains(side)]
        has_DT = torch.tensor([[float(task in has) for task in widths] for has in of_domain])
        self.register_buffer("has_DT", has_DT, persistent=False)
        self.register_buffer("mean_W", torch.zeros(sum(widths.values())))
        self.register_buffer("count_T", torch.zeros(len(widths)))

    def forward(self, vectors: Mapping[str, Tensor], domain_B: Tensor) -> dict[str, Tensor]:
        """(B,) domains beside the vectors, in the order of the tasks."""
        x_BW = torch.cat([vectors[task] for task in self.widths_in], 1)
        x_BW = x_BW.to(torch.promote_types(x_BW.dtype, self.mean_W.dtype))
        has_BT = self.has_DT[domain_B]
        has_BW = self._columns(has_BT)
        mean_W = self._batch_mean(x_BW, has_BT, has_BW) if self.training else self.mean_W
        parts = ((x_BW - mean_W) * has_BW).split(list(self.widths_in.values()), 1)
        ones = has_BT.to(x_BW.dtype).split(1, 1)
        return {task: self._placed(*columns) for task, *columns in zip(self.widths_in, parts, ones, strict=True)}

    def _placed(self, part_BD: Tensor, one_B1: Tensor) -> Tensor:
        effect_B1, rest = part_BD[:, :1], part_BD[:, 1:]
        return torch.cat([effect_B1, one_B1, rest] if self.side == "query" else [one_B1, effect_B1, rest], 1)

    def _batch_mean(self, x_BW: Tensor, has_BT: Tensor, has_BW: Tensor) -> Tensor:
        """(W,) what to take off in this step; the running mean goes on."""
        rows_T = has_BT.sum(0)
        batch_W = (x_BW * has_BW).sum(0) / self._columns(rows_T).clamp_min(1)
        with torch.no_grad():
            share_W = self._columns(rows_T / (rows_T + self.count_T.clamp_max(PRIOR)).clamp_min(1))
            used_W = torch.lerp(self.mean_W, batch_W, share_W)
            share_W = self._columns(rows_T / (rows_T + self.count_T.clamp_max(HORIZON)).clamp_min(1))
            self.mean_W.lerp_(batch_W, share_W)
            self.count_T += rows_T
        return used_W + (batch_W - batch_W.detach())

    def _columns(self, x: Tensor) -> Tensor:
        """(..., T) -> (..., W), each task's number in all of its columns."""
        return torch.cat(
            [x[..., n : n + 1].expand(*x.shape[:-1], w) for n, w in enumerate(self.widths_in.values())], -1
        )
