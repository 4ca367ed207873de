"""Training with `torch.compile`: the same numbers, and where there is no compiler a warning and the same numbers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from mtmd_model import compiled
from mtmd_model.config import MTMDConfig
from mtmd_model.train import TrainConfig, TrainResult, train
from tests.mtmd_model.sample import examples, platform

PLAIN = TrainConfig(model=MTMDConfig.preset("small"), batch_size=128, max_epochs=1, accelerator="cpu")


@pytest.fixture
def trained(write: Callable[[pa.Table], Path], tmp_path: Path) -> Callable[[TrainConfig], TrainResult]:
    days = [write(examples(300, n)) for n in range(2)]
    return lambda config: train(platform(), days[:1], days[1:], config, tmp_path / str(config.compile))


def losses(result: TrainResult) -> list[float]:
    return [result.history[0][name] for name in ("train_loss", "validation_loss", "validation_logmae")]


def test_a_compiled_model_learns_the_same(trained: Any, monkeypatch: pytest.MonkeyPatch):
    # traced and run, but not built: a C++ compiler would take minutes
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    compiled_modules: list[torch.nn.Module] = []
    original = torch.nn.Module.compile

    def spy(module: torch.nn.Module, *args: Any, **options: Any) -> None:
        compiled_modules.append(module)
        original(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", spy)
    ours = trained(replace(PLAIN, compile=True))
    # three surfaces and two products with an expert each, and each tower's shared one
    assert len(compiled_modules) == 7
    assert losses(ours) == pytest.approx(losses(trained(PLAIN)), rel=1e-5)
    assert not any(m._compiled_call_impl for m in ours.predictor.model.modules()), "predictions run as they are written"


def test_without_a_compiler_it_warns_once_and_trains(trained: Any, monkeypatch: pytest.MonkeyPatch):
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", none)
    with pytest.warns(UserWarning, match="goes on without it: no working C\\+\\+ compiler found") as seen:
        ours = trained(replace(PLAIN, compile=True))
    assert len(seen) == 1
    assert ours.history == trained(PLAIN).history
