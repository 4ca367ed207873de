"""Failure signature of a training run: a loss that jumps.

At too high a learning rate, or where it rises too fast, the training loss leaps in the middle of a run. Training comes back,
but often to a model that learned less, and goes on as if nothing had been.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

JUMP = 1.5
"""A pass's training loss is high if it is above this multiple of the lowest of the passes before."""


@dataclass(frozen=True)
class HighPass:
    """A pass over the window whose training loss was above `JUMP` times the lowest before it."""

    epoch: int
    """From 0."""
    lowest: float
    """Mean training loss of the best pass before."""
    loss: float
    """Of this one."""

    @property
    def says(self) -> str:
        """For a person to read."""
        return f"epoch {self.epoch}: training loss {self.loss:.5f} after {self.lowest:.5f}"


def high_passes(history: Sequence[Mapping[str, Any]]) -> list[HighPass]:
    """The passes of a training run after its loss jumped, until it was back; none if it did not jump.

    A pass's loss is the mean of its steps: a jump within the first pass does not show, nor one of a small part of a model
    whose parts are trained side by side (a tower pair a slice).

    Args:
        history: an entry a pass with `epoch` and `train_loss`, as a model's manifest has them.
    """
    found = []
    for n, entry in enumerate(history[1:], 1):
        lowest = min(e["train_loss"] for e in history[:n])
        if entry["train_loss"] > JUMP * lowest:
            found.append(HighPass(entry["epoch"], lowest, entry["train_loss"]))
    return found
