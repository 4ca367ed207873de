"""Averaged weights: what is validated and kept is an average of the weights of the last passes.

The last steps of a training still move the level of all predictions to and fro. Their average stands still, and is as good
as the end of a longer training.

Reference: Polyak and Juditsky, SIAM J. Control and Optimization 30 (1992); with a memory that fades, as in Tarvainen and
Valpola, NeurIPS 2017.
"""

import torch
from torch import nn


class WeightAverage:
    """Of a model's parameters and statistics (all buffers that are not counts of ids) after each step.

    Args:
        model: whose state is averaged.
        memory: in steps, after which a step's share has fallen to 1/e. Over fewer steps than that all count alike.
    """

    def __init__(self, model: nn.Module, memory: float) -> None:
        self.memory, self.steps, self.is_in = memory, 0, False
        statistics = (b for b in model.buffers() if b.is_floating_point())
        self.live = [*(p.detach() for p in model.parameters()), *statistics]
        self.other = [p.clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights as they are now, after a step."""
        self.steps += 1
        torch._foreach_lerp_(self.other, self.live, max(1 / self.steps, 1 / self.memory))

    def put_in(self) -> None:
        """The model has the average, if there has been a step."""
        if self.steps and not self.is_in:
            self._exchange()

    def take_out(self) -> None:
        """The model has the weights of the last step again."""
        if self.is_in:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for live, other in zip(self.live, self.other, strict=True):
            held = live.clone()
            live.copy_(other)
            other.copy_(held)
        self.is_in = not self.is_in
