"""Averaged weights: what they are by hand, and that they are what is validated and kept."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from mtmd_model.averaging import WeightAverage
from mtmd_model.config import MTMDConfig
from mtmd_model.contenders.plain import PlainConfig
from mtmd_model.lightning_module import OptimiserConfig
from mtmd_model.train import TrainConfig, train
from tests.mtmd_model.sample import examples, platform

MODELS: dict[str, Any] = {
    "mtmd": MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8),
    "slice_towers": PlainConfig(widths=(12, 8), width_divisor=8),
}


def test_steps_count_alike_up_to_the_memory_and_fade_after_it():
    model = nn.Linear(1, 1)
    average = WeightAverage(model, memory=4.0)
    expected = 0.0
    for step, value in enumerate([1.0, 3.0, 8.0, 4.0, 9.0, 2.0], 1):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        average.update()
        expected += (value - expected) / min(step, 4)
    average.put_in()
    average.put_in()
    assert [p.item() for p in model.parameters()] == pytest.approx([expected] * 2)
    average.take_out()
    average.take_out()
    assert [p.item() for p in model.parameters()] == [2.0, 2.0]


def test_before_the_first_step_there_is_nothing_to_put_in():
    model = nn.Linear(1, 1)
    average = WeightAverage(model, memory=4.0)
    with torch.no_grad():
        model.weight.fill_(5.0)
    average.put_in()
    assert model.weight.item() == 5.0


class Seen(WeightAverage):
    """Keeps the weights and statistics of every step, and the steps that had been taken at the end of each epoch."""

    steps_taken: ClassVar[list[list[torch.Tensor]]]
    ends: ClassVar[list[int]]
    memory_given: ClassVar[float]

    def __init__(self, model: nn.Module, memory: float) -> None:
        super().__init__(model, memory)
        Seen.steps_taken, Seen.ends, Seen.memory_given = [], [], memory

    def update(self) -> None:
        super().update()
        Seen.steps_taken.append([p.clone() for p in self.live])

    def take_out(self) -> None:
        Seen.ends.append(len(Seen.steps_taken))
        super().take_out()


def by_hand(steps: int, memory: float) -> list[torch.Tensor]:
    expected = [torch.zeros_like(p) for p in Seen.steps_taken[0]]
    for n, now in enumerate(Seen.steps_taken[:steps], 1):
        expected = [e + (p - e) * max(1 / n, 1 / memory) for e, p in zip(expected, now, strict=True)]
    return expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("validated", [False, True])
def test_the_average_is_validated_and_kept(write, tmp_path: Path, monkeypatch, name: str, validated: bool):
    monkeypatch.setattr("mtmd_model.lightning_module.WeightAverage", Seen)
    config = TrainConfig(
        name,
        MODELS[name],
        OptimiserConfig(learning_rate=0.01, schedule="constant"),
        averaged_passes=1.5,
        batch_size=100,
        max_epochs=3,
        accelerator="cpu",
        calibrate=False,
    )
    files = [write(examples(150, seed=1))] if validated else []
    result = train(platform(), [write(examples(400))], files, config, tmp_path / "v")
    assert len(Seen.steps_taken) == 12
    assert Seen.memory_given == 6.0, "passes of four steps"
    assert Seen.ends == [4, 8, 12]
    steps = Seen.ends[result.best_epoch] if validated else 12
    model = result.predictor.model
    kept = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    if name == "mtmd" or not validated:  # each of the slice towers has its own best pass
        for p, expected in zip(kept, by_hand(steps, 6.0), strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)
        last = Seen.steps_taken[steps - 1]
        assert any(not torch.allclose(p, q) for p, q in zip(kept, last, strict=True))


def test_training_goes_on_from_its_own_weights(write, tmp_path: Path):
    """With and without an average the steps are the same, so that the losses of training are."""
    losses = []
    for averaged in (0.0, 2.0):
        config = TrainConfig(
            "mtmd", MODELS["mtmd"], averaged_passes=averaged, batch_size=100, max_epochs=3, accelerator="cpu"
        )
        files = [write(examples(400))], [write(examples(150, seed=1))]
        history = train(platform(), *files, config, tmp_path / "v").history
        losses.append([entry["train_loss"] for entry in history])
        validation = [entry["validation_loss"] for entry in history]
        losses.append(validation)
    assert losses[0] == losses[2]
    assert losses[1] != losses[3]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_memories_that_are_none_are_refused(value: float):
    with pytest.raises(ValueError, match="averaged_passes must be 0 or more"):
        TrainConfig(averaged_passes=value)
