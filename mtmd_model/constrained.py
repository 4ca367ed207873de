"""Constrained modelling: P(child) = P(child | parent) P(parent), in logits (paper section 2.3).

Shapes: B rows, T tasks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtmd_model.schema import Task


def joint_logit(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sigmoid(a) * sigmoid(b), exactly: -logsumexp([-a, -b, -a - b]).

    1 / (sigmoid(a) sigmoid(b)) = (1 + e^-a)(1 + e^-b), and a logit is -ln(1/p - 1). Never above a or b, also
    after rounding; no clamp, no branch, finite gradients.
    """
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), 0)


def joint_logits(logits_BT: Tensor, tasks: Sequence[Task]) -> Tensor:
    """(B, T) logits of P(task | given) -> (B, T) logits of P(task | impression). Parents come first."""
    joint: dict[str, Tensor] = {}
    for task, logit_B in zip(tasks, logits_BT.unbind(1), strict=True):
        joint[task.name] = logit_B if task.given is None else joint_logit(joint[task.given], logit_B)
    return torch.stack(list(joint.values()), 1)


def chains(tasks: Sequence[Task], constrained: bool = True) -> Tensor:
    """(T, T) float64: 1 where the second task's logit is part of the first's P(task | impression), else 0.

    ln P(task | impression) is then the sum of ln sigmoid over a row. Without constraints, the identity.
    """
    chain_TT = torch.eye(len(tasks), dtype=torch.float64)
    place = {task.name: n for n, task in enumerate(tasks)}
    for n, task in enumerate(tasks):
        if constrained and task.given is not None:
            chain_TT[n] += chain_TT[place[task.given]]
    return chain_TT
