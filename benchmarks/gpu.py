"""What a GPU makes of the training: its arithmetic, how long it waits for each feed, and whether bf16 learns as fp32 does.

python -m benchmarks.gpu --model <its folder> --lake <the lake>     # everything, on the GPU
python -m benchmarks.gpu --only feeds --rows 65536                  # some of it

Needs torch, lightning, numpy, pyarrow and safetensors only, so it runs on a GPU machine without Dagster or DuckDB.
`curves` trains a stored model's window again; its files are those of the model's manifest, and `--lake` says where they
lie on this machine. Prints the device and a table as `benchmarks.bench` does; `--out` also writes the table and the
learning curves as JSON. `--accelerator cpu` runs the same code, for a test.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import synthetic
from benchmarks.figures import Figure, table
from benchmarks.step import Step, active_parameters
from mtmd_model.checkpoint import load
from mtmd_model.lightning_module import OptimiserConfig
from mtmd_model.mtmd import MTMDConfig
from mtmd_model.train import TrainConfig, train

SUBJECTS = ("step", "feeds", "curves")
SEEDS = 3


def main(arguments: Sequence[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SUBJECTS), help="subjects with commas between")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--preset", choices=["small", "half", "paper"], default="paper")
    parser.add_argument("--rows", default="4096,65536", help="sizes of a batch; curves take the first")
    parser.add_argument("--steps", type=int, default=60, help="of an epoch of `feeds`")
    parser.add_argument("--model", type=Path, help="the folder of a trained model, for `curves`")
    parser.add_argument("--lake", type=Path, help="the folder that holds joined_examples/, if it was moved")
    parser.add_argument("--epochs", type=int, default=4, help="of `curves`")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - set(SUBJECTS)
    if unknown:
        parser.error(f"--only takes {','.join(SUBJECTS)}, got {','.join(sorted(unknown))}")

    device = torch.device("cuda" if options.accelerator == "gpu" else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, preset {options.preset}")
    config = MTMDConfig.preset(options.preset)
    rows = [int(n) for n in options.rows.split(",")]
    found: list[Figure] = []
    curves: list[dict[str, Any]] = []
    for subject in options.only.split(","):
        if subject == "step":
            found += step_figures(device, config, rows)
        elif subject == "feeds":
            found += [f for size in rows for f in feed_figures(device, config, size, options.steps)]
        elif options.model is None:
            print("curves: no --model, so nothing to train again")
        else:
            curves = learning_curves(device, options.model, options.lake, config, rows[0], options.epochs)
            found += agreement(curves)
    print(table(found))
    if options.out:
        report = {"device": name, "torch": str(torch.__version__), "preset": options.preset}
        figures = [{**asdict(f), "value": None if math.isnan(f.value) else f.value} for f in found]
        options.out.write_text(json.dumps({**report, "figures": figures, "curves": curves}, indent=1))
    return found


def step_figures(device: torch.device, config: MTMDConfig, sizes: Sequence[int]) -> list[Figure]:
    """6 x active dense parameters x rows a second of the bare step, beside bf16 GEMM."""
    peak = gemm_rate(device)
    found = []
    for rows in sizes:
        for name, precision, compiled in (
            ("fp32", "32-true", False),
            ("bf16", "bf16-mixed", False),
            ("bf16, compiled", "bf16-mixed", True),
        ):
            if compiled and device.type == "cpu":
                continue  # minutes of C++
            step = Step(synthetic.platform(), config, rows, device, precision, compiled)
            if step.compiled != compiled:
                continue  # it has warned: there is no compiler, and the figure would be the other one's
            seconds = _seconds(step, device)
            rate = 6 * active_parameters(step.model) * rows / seconds
            reference = f"GEMM {peak / 1e12:,.1f} TFLOP/s; {rows / seconds:,.0f} rows/s"
            what = f"arithmetic of a step of {rows:,} rows, {name}"
            found.append(
                Figure.report(what, rate / peak, "of the bf16 GEMM rate", reference)
                if precision == "32-true"
                else Figure.at_least(what, rate / peak, "of the bf16 GEMM rate", reference, 0.25)
            )
            del step
    return found


def gemm_rate(device: torch.device) -> float:
    """Operations a second of a bf16 product of square matrices."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * n**3 / _seconds(lambda: a @ b, device))


def _seconds(work: Any, device: torch.device, times: int = 20) -> float:
    """Mean seconds of a piece of work that is started without waiting for the one before."""
    times = times if device.type == "cuda" else 2
    for _ in range(3 if device.type == "cuda" else 1):
        work()
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def feed_figures(device: torch.device, config: MTMDConfig, rows: int, steps: int) -> list[Figure]:
    """Rows a second of `train` with each feed, beside the bare step, and the share of an epoch without a kernel, which
    stands beside the bare step's own: what lies between them is waiting for the feed."""
    precision: Literal["bf16-mixed"] = "bf16-mixed"
    schema, found = synthetic.platform(), []
    step = Step(schema, config, rows, device, precision)
    bare = rows / _seconds(step, device)
    bare_idle = _idle_share(step, device)
    options = TrainConfig(
        model=config,
        batch_size=rows,
        max_epochs=3,
        precision=precision,
        accelerator="gpu" if device.type == "cuda" else "cpu",
    )
    feeds: dict[str, dict[str, Any]] = {
        "resident": {"resident": True},
        "in memory": {},
        "streamed": {"block_rows": max(rows, rows * steps // 4)},
    }
    with tempfile.TemporaryDirectory() as folder:
        files = synthetic.write_days(schema, Path(folder), 2, rows * steps // 2)
        for name, changes in feeds.items():
            epochs = _Epochs(device)
            train(schema, files, [], replace(options, **changes), Path(folder) / "model", epochs)
            rate = rows * steps / epochs.seconds[1]
            reference = f"{rate:,.0f} rows/s; the bare step {bare:,.0f}"
            where = f"window {name}, batches of {rows:,}"
            found.append(Figure.report(f"training, {where}", rate / bare, "of the bare step", reference))
            what = f"device idle, {where}"
            found.append(
                Figure.report(what, math.nan, "of an epoch", "measured on a GPU only")
                if device.type == "cpu"
                else Figure.at_most(
                    what,
                    1 - epochs.busy / epochs.seconds[2],
                    "of an epoch",
                    f"time without a kernel; of bare steps {bare_idle:.3f}",
                    0.05,
                )
            )
    return found


def _idle_share(work: Any, device: torch.device, times: int = 20) -> float:
    """Share of the time of a piece of work, done some times over, in which no kernel runs; NaN on a CPU.

    Raises:
        RuntimeError: see `_busy`.
    """
    if device.type == "cpu":
        return math.nan
    profiler = profile(activities=[ProfilerActivity.CUDA])
    profiler.start()
    start = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    took = time.perf_counter() - start
    profiler.stop()
    return 1 - _busy(profiler) / took


def _busy(profiler: profile) -> float:
    """Seconds in which a kernel ran.

    Raises:
        RuntimeError: the profiler has seen none, as where it may not read the device's counters.
    """
    spans = ((e.time_range.start, e.time_range.end) for e in profiler.events() or () if _is_kernel(e))
    busy = 1e-6 * sum(stop - start for start, stop in union(spans))
    if not busy:
        raise RuntimeError("the profiler has seen no kernel, so idle time cannot be told")
    return busy


class _Epochs:
    """Called as an epoch ends: the first warms up, the second is timed, the third is watched by the profiler."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.profiler = profile(activities=[ProfilerActivity.CUDA]) if device.type == "cuda" else None
        self.last = time.perf_counter()
        self.seconds: list[float] = []
        self.busy = 0.0

    def __call__(self, entry: object) -> None:
        _wait(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        if self.profiler is not None and len(self.seconds) == 2:
            self.profiler.start()
        if self.profiler is not None and len(self.seconds) == 3:
            self.profiler.stop()
            self.busy = _busy(self.profiler)
        self.last = time.perf_counter()


def _is_kernel(event: Any) -> bool:
    """Whether it is a kernel: a copy from the host is what waiting for a feed looks like, a named span holds gaps."""
    if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
        return False
    return not event.name.startswith(("Memcpy", "Memset"))


def union(spans: Iterator[tuple[float, float]]) -> list[tuple[float, float]]:
    """The time that any of the spans covers, as spans that do not overlap."""
    out: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(stop, out[-1][1])
        else:
            out.append((start, stop))
    return out


def learning_curves(
    device: torch.device, model: Path, lake: Path | None, config: MTMDConfig, rows: int, epochs: int
) -> list[dict[str, Any]]:
    """Histories of a stored model's window in both precisions, some seeds each, with its optimiser, clip, balance of slices
    and id dropout."""
    manifest = load(model).manifest
    trained = manifest["train_config"]

    def moved(file: str) -> Path:
        path = Path(file)
        return lake.joinpath(*path.parts[-3:]) if lake else path

    train_files, validation_files = ([moved(f) for f in manifest[k]] for k in ("train_files", "validation_files"))
    found = []
    precisions: tuple[Literal["32-true", "bf16-mixed"], ...] = ("32-true", "bf16-mixed")
    for seed in range(SEEDS):
        for precision in precisions:
            options = TrainConfig(
                model=config,
                optimiser=OptimiserConfig(**trained["optimiser"]),
                **{name: trained[name] for name in ("slice_balance", "id_dropout", "gradient_clip")},
                batch_size=rows,
                max_epochs=epochs,
                patience=epochs,
                calibrate=False,
                seed=seed,
                precision=precision,
                accelerator="gpu" if device.type == "cuda" else "cpu",
                resident=device.type == "cuda",
            )
            with tempfile.TemporaryDirectory() as out:
                result = train(load(model).schema, train_files, validation_files, options, Path(out) / "model")
            found.append({"precision": precision, "seed": seed, "history": result.history})
            print(f"{precision}, seed {seed}: LogMAE {result.history[-1]['validation_logmae']:.4f}", flush=True)
    return found


def agreement(curves: Sequence[dict[str, Any]]) -> list[Figure]:
    """How far apart the precisions' mean LogMAEs are: after the last epoch, in standard errors of the seeds, and where
    they are furthest apart, by share."""
    epochs = range(len(curves[0]["history"]))
    values = {
        precision: [
            [c["history"][n]["validation_logmae"] for c in curves if c["precision"] == precision] for n in epochs
        ]
        for precision in ("32-true", "bf16-mixed")
    }
    means = {precision: [statistics.mean(of_seeds) for of_seeds in found] for precision, found in values.items()}
    shares = [b / a - 1 for a, b in zip(means["32-true"], means["bf16-mixed"], strict=True)]
    error = math.sqrt(sum(statistics.variance(found[-1]) / len(found[-1]) for found in values.values()))
    last, full = means["bf16-mixed"][-1], means["32-true"][-1]
    apart = abs(last - full) / error if error else math.nan
    reference = f"LogMAE {last:.4f} in bf16, {full:.4f} in fp32 ({shares[-1]:+.2%}), {SEEDS} seeds each"
    furthest = max(epochs, key=lambda n: abs(shares[n]))
    where = f"after epoch {furthest + 1} of {len(epochs)}"
    return [
        Figure.at_most("bf16 apart from fp32", apart, "standard errors", reference, 2.0),
        Figure.report("bf16 apart from fp32, at most", 100 * abs(shares[furthest]), "% of LogMAE", where),
    ]


if __name__ == "__main__":
    main()
