"""`benchmarks/gpu.py` at a small size on a CPU: what a GPU machine runs, but for the kernels' times."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, synthetic
from benchmarks.step import Step
from mtmd_model.mtmd import MTMDConfig
from mtmd_model.train import TrainConfig, train

CPU = torch.device("cpu")


def test_time_under_several_kernels_counts_once():
    spans = [(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (6.0, 6.5), (7.0, 8.0)]
    assert gpu.union(iter(spans)) == [(0.0, 3.0), (5.0, 8.0)]


def test_a_step_without_a_compiler_is_not_called_compiled(monkeypatch: pytest.MonkeyPatch):
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", none)
    with pytest.warns(UserWarning, match="goes on without it"):
        step = Step(synthetic.platform(2, 1), MTMDConfig.preset("small"), 16, compiled=True)
    assert not step.compiled


def test_steps_of_both_precisions_are_measured_beside_a_bf16_product():
    figures = gpu.step_figures(CPU, MTMDConfig.preset("small"), [64])
    assert [f.name.rpartition(", ")[2] for f in figures] == ["fp32", "bf16"], "no compiling on a CPU"
    assert all(f.value > 0 for f in figures)
    assert [f.goal for f in figures] == ["", "≥ 0.25"]


def test_a_copy_is_no_kernel():
    names = ("ampere_bf16_gemm", "Memcpy HtoD (Pinned -> Device)", "Memset (Device)")
    events = [SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, name=n) for n in names]
    events.append(SimpleNamespace(device_type=torch.autograd.DeviceType.CPU, name="aten::mm"))
    assert [gpu._is_kernel(e) for e in events] == [True, False, False, False]


def test_every_feed_is_timed_beside_the_bare_step():
    figures = gpu.feed_figures(CPU, MTMDConfig.preset("small"), rows=64, steps=4)
    windows = ("resident", "in memory", "streamed")
    assert [f.name for f in figures[::2]] == [f"training, window {n}, batches of 64" for n in windows]
    assert all(f.value > 0 for f in figures[::2])
    assert all(math.isnan(f.value) and f.holds is None for f in figures[1::2]), "a CPU has no kernels to watch"


def test_precisions_agree_by_the_spread_of_their_seeds():
    def curves(bf16: list[float], first: float = 0.5) -> list[dict]:
        fp32 = [0.10, 0.11, 0.12]
        found = [("32-true", 0.4, e) for e in fp32] + [("bf16-mixed", first, e) for e in bf16]
        return [{"precision": p, "history": [{"validation_logmae": x} for x in pass_]} for p, *pass_ in found]

    # standard error of a mean 0.01 / sqrt(3), of the difference 0.01 * sqrt(2 / 3)
    same, furthest = gpu.agreement(curves([0.12, 0.11, 0.13]))
    assert same.value == pytest.approx(0.01 / (0.01 * math.sqrt(2 / 3)))
    assert same.holds
    assert furthest.value == pytest.approx(25)
    assert furthest.reference == "after epoch 1 of 2"
    assert not gpu.agreement(curves([0.14, 0.13, 0.15]))[0].holds


def test_a_profiler_that_sees_no_kernel_says_so():
    with pytest.raises(RuntimeError, match="has seen no kernel"):
        gpu._busy(SimpleNamespace(events=lambda: []))


def test_a_stored_model_is_trained_again_in_both_precisions(tmp_path: Path, capsys: pytest.CaptureFixture):
    schema = synthetic.platform(2, 1)
    files = synthetic.write_days(schema, tmp_path / "lake" / "joined_examples", 2, 60)
    options = TrainConfig(model=MTMDConfig.preset("small"), batch_size=64, max_epochs=1, accelerator="cpu")
    train(schema, files[:1], files[1:], options, tmp_path / "model")
    (tmp_path / "lake").rename(tmp_path / "moved")
    arguments = ["--only", "curves", "--accelerator", "cpu", "--preset", "small", "--rows", "64", "--epochs", "1"]
    places = ["--model", str(tmp_path / "model"), "--lake", str(tmp_path / "moved"), "--out", str(tmp_path / "out")]
    [figure, _] = gpu.main([*arguments, *places])
    assert "bf16 apart from fp32" in capsys.readouterr().out
    report = json.loads((tmp_path / "out").read_text())
    assert [(c["precision"], c["seed"]) for c in report["curves"]] == [
        (p, s) for s in range(gpu.SEEDS) for p in ("32-true", "bf16-mixed")
    ]
    assert report["figures"][0]["value"] == pytest.approx(figure.value)
