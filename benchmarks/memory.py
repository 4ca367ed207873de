"""How the memory of a training run grows with its window: each run in a process of its own."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import synthetic
from benchmarks.figures import Figure

SHORT, LONG = 5, 60
"""Days of the two windows."""


def figures(rows_a_day: int = 10_000, block_rows: int = 40_960) -> list[Figure]:
    """Peak memory above the built model of one epoch on 60 days over that on 5, streamed and held in memory.

    Args:
        rows_a_day: of the made-up days; the goal speaks of 200,000 or more.
        block_rows: of the streaming feed.
    """
    schema = synthetic.platform()
    with tempfile.TemporaryDirectory() as folder:
        files = synthetic.write_days(schema, Path(folder), LONG, rows_a_day)
        short, long = (peak(files[:days], block_rows) for days in (SHORT, LONG))
        held_short, held_long = (peak(files[:days], None) for days in (SHORT, LONG))
    name = f"peak memory above the model, {LONG} days over {SHORT}"
    rows = f"{rows_a_day:,} rows a day"
    return [
        Figure.at_most(
            f"{name}, streamed",
            long / short,
            "x",
            f"{long:.0f} over {short:.0f} MiB; {rows}, blocks of {block_rows:,}",
            1.2,
        ),
        Figure.report(
            f"{name}, in memory", held_long / held_short, "x", f"{held_long:.0f} over {held_short:.0f} MiB; {rows}"
        ),
    ]


def peak(files: list[Path], block_rows: int | None) -> float:
    """MiB that training one epoch on these files takes above what there was when the model was built."""
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(block_rows), *map(str, files)]
    # tensors of a tiny model: a second thread would only wait for the first
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    if done.returncode:
        raise RuntimeError(f"the training of {len(files)} days failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def _measure(block_rows: int | None, files: list[str]) -> None:
    from mtmd_model.architectures import build
    from mtmd_model.encoder import fit_encoder
    from mtmd_model.mtmd import MTMDConfig
    from mtmd_model.train import TrainConfig, train

    schema = synthetic.platform()
    # a small model: the epoch is long, and what grows with the window is not the model
    model = MTMDConfig(deep=(32, 16), shallow=(16, 8), router=(16,), width_divisor=8)
    config = TrainConfig(model=model, max_epochs=1, block_rows=block_rows, accelerator="cpu")
    built = build(config.architecture, fit_encoder(schema, []), model)
    before = _memory("VmRSS")
    with tempfile.TemporaryDirectory() as out:
        train(schema, files, [], config, Path(out) / "model")
    del built
    print(_memory("VmHWM") - before)


def _memory(name: str) -> float:
    """MiB that this process has (VmRSS), or the most it has had (VmHWM), which is the one known outside Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage: its peak starts at that of the process that started this one
        return next(int(line.split()[1]) for line in status.open() if line.startswith(name)) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    _measure(json.loads(sys.argv[1]), sys.argv[2:])
