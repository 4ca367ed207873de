"""The model's step beside the machine's matrix product, its own training loop beside the bare step.

The paper preset, 60 features, batches of 4,096 rows; in fp32 but for one figure.
"""

import statistics
import tempfile
import time
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import synthetic
from benchmarks.figures import Figure, alternating
from mtmd_model.allocator import keep_freed_memory
from mtmd_model.architectures import build
from mtmd_model.batch import Batch
from mtmd_model.compiled import compile_parts
from mtmd_model.feed import CPU, Feed
from mtmd_model.lightning_module import OptimiserConfig, RankerModule
from mtmd_model.mtmd import MTMD, MTMDConfig
from mtmd_model.schema import Schema
from mtmd_model.towers import Tower
from mtmd_model.train import TrainConfig, train
from mtmd_model.two_tower import TwoTower, count_parameters

BATCH = 4096
GEMM = 2048
"""Columns and depth of the matrix product: (batch, gemm) by (gemm, gemm)."""
BATCHES = 4
"""That a bare step takes in turn."""


def figures(
    steps: int = 8, repetitions: int = 3, preset: str = "paper", batch: int = BATCH, gemm: int = GEMM
) -> list[Figure]:
    """The loop, the arithmetic and the domains.

    Args:
        steps: batches of an epoch of the training loop.
        repetitions: runs of each side, in turn; medians count.
        preset: of the model.
        batch: rows of a step, and of the matrix product.
        gemm: columns and depth of the matrix product.
    """
    config = MTMDConfig.preset(preset)
    return [
        *_loop(config, steps, repetitions, batch),
        *_arithmetic(config, repetitions, batch, gemm),
        *_domains(config, repetitions, batch),
    ]


def _loop(config: MTMDConfig, steps: int, repetitions: int, batch: int) -> list[Figure]:
    """Epochs of `train`, in turn with as many bare steps on batches that lie ready."""
    schema, rows = synthetic.platform(), steps * batch
    bare = Step(schema, config, batch)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = synthetic.write_days(schema, Path(folder), 1, rows)
        for name, block_rows in (("in memory", None), ("streamed", 2 * batch)):
            turns = _Turns(bare, steps)
            options = TrainConfig(
                model=config, batch_size=batch, max_epochs=repetitions + 1, block_rows=block_rows, accelerator="cpu"
            )
            train(schema, files, [], options, Path(folder) / "model", turns)
            ratio = statistics.median(turns.ratios)
            reference = f"the bare step: {rows / statistics.median(turns.alone):,.0f} rows/s"
            found.append(Figure.at_least(f"training loop and feed, {name}", ratio, "of the bare step", reference, 0.95))
    return found


class _Turns:
    """Called as an epoch ends, takes as many bare steps, so that each epoch stands between two runs of them."""

    def __init__(self, step: "Step", steps: int) -> None:
        self.step, self.steps, self.last = step, steps, 0.0
        self.alone = list[float]()
        self.ratios = list[float]()

    def __call__(self, entry: object) -> None:
        start = time.perf_counter()
        epoch = start - self.last
        for _ in range(self.steps):
            self.step()
        self.last = time.perf_counter()
        self.alone.append(self.last - start)
        if len(self.alone) > 1:  # the first epoch warms up
            self.ratios.append((self.alone[-2] + self.alone[-1]) / 2 / epoch)


def _arithmetic(config: MTMDConfig, repetitions: int, batch: int, gemm: int) -> list[Figure]:
    """6 x active dense parameters x rows a second, beside fp32 GEMM: two products backward for each one forward.

    Reported too with the experts' products in bf16, beside the same fp32 product.
    """
    names = {"32-true": "fp32", "bf16-mixed": "bf16"}
    steps = [Step(synthetic.platform(), config, batch, precision=precision) for precision in names]
    a, b = torch.randn(batch, gemm), torch.randn(gemm, gemm)
    small_a, small_b = a.bfloat16(), b.bfloat16()
    *own, exact, small = alternating(*steps, lambda: a @ b, lambda: small_a @ small_b, repetitions=2 * repetitions)
    peak, active = 2 * batch * gemm * gemm / exact, active_parameters(steps[0].model)
    found = []
    for name, took in zip(names.values(), own, strict=True):
        rate = 6 * active * batch / took
        reference = (
            f"GEMM {peak / 1e9:.0f} GFLOP/s, in bf16 {peak * exact / small / 1e9:.0f}; "
            f"step {rate / 1e9:.0f}, {batch / took:,.0f} rows/s, "
            f"{active / 1e6:.2f} M active dense parameters"
        )
        what, unit = f"arithmetic of the bare step in {name}", "of the fp32 GEMM rate"
        found.append(
            Figure.at_least(what, rate / peak, unit, reference, 0.6)
            if name == "fp32"
            else Figure.report(what, rate / peak, unit, reference)
        )
    return found


def _domains(config: MTMDConfig, repetitions: int, batch: int) -> list[Figure]:
    """The step with many domains over that with two, of the same rows."""
    two, twenty, modules = ((2, 1), (5, 4), (10, 10))
    steps = [Step(synthetic.platform(*shape), config, batch) for shape in (two, twenty, modules)]
    base, *others = alternating(*steps, repetitions=repetitions)
    names = ("20 ad domains (5 surfaces x 4 products) over 2", "20 domain experts (10 surfaces, 10 products) over 3")
    reference = f"2 surfaces x 1 product: {batch / base:,.0f} rows/s"
    return [
        Figure.at_most(f"step with {name}", other / base, "x", reference, 1.2)
        for name, other in zip(names, others, strict=True)
    ]


class Step:
    """The bare training step, as `train` takes it: loss, gradients, clipping, optimiser, learning rate.

    Args:
        schema: of `synthetic.platform`.
        config: of the model.
        rows: of a batch.
        device: where it runs.
        precision: 32-true or bf16-mixed.
        compiled: with `torch.compile`; the attribute says whether it is.
    """

    def __init__(
        self,
        schema: Schema,
        config: MTMDConfig,
        rows: int = BATCH,
        device: torch.device = CPU,
        precision: str = "32-true",
        compiled: bool = False,
    ) -> None:
        keep_freed_memory()
        torch.manual_seed(0)
        encoder, window = synthetic.window(schema, BATCHES * rows)
        self.device, self.bf16 = device, precision != "32-true"
        self.model = build("mtmd", encoder, config).to(device)
        self.compiled = compiled and compile_parts(self.model, device)
        # several: the number of a domain's rows differs from batch to batch
        self.batches = cycle([batch.to(device) for batch in Feed(window, encoder, rows)])
        self.module = RankerModule(self.model, OptimiserConfig()).to(device)
        # what `configure_optimizers` asks a Trainer for
        self.module.trainer = SimpleNamespace(precision=precision, estimated_stepping_batches=1000)  # type: ignore[assignment]
        made = self.module.configure_optimizers()
        self.optimiser: torch.optim.Optimizer = made["optimizer"]
        self.schedule: Any = made["lr_scheduler"]["scheduler"]

    def __call__(self, batch: Batch | None = None) -> Tensor:
        """One step, on the next batch unless one is given; the loss."""
        self.optimiser.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.module.training_step(batch or next(self.batches), 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        return loss.detach()


def active_parameters(model: TwoTower) -> float:
    """Dense parameters that one row meets: its surface's and its product's modules and what all share, no embeddings."""
    assert isinstance(model, MTMD)
    active = float(count_parameters(model)["dense"])
    for tower in (model.query_tower, model.item_tower):
        counts = [_parameters(tower, domain) for domain in range(len(tower.domains))]
        active += sum(counts) / len(counts) - sum(counts)
    return active


def _parameters(tower: Tower, domain: int) -> int:
    """Of a domain's own modules."""
    return sum(c.parameter.numel() for c in tower.counterparts()[domain].values())
