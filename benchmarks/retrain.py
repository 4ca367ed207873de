"""Train a stored model's window again, on any accelerator: what a GPU changes in speed and what in the loss.

Needs torch, lightning, numpy, pyarrow and safetensors only, so it runs on a GPU machine without Dagster or DuckDB:

    python benchmarks/retrain.py .mtmd/adworld/models/<version> --accelerator gpu --preset paper --precision bf16-mixed

The window's files are those of the model's manifest; `--lake` says where they lie if they were moved. Prints one line
an epoch, then one JSON object: device, rows a second over whole epochs, parameters, loss and LogMAE by epoch, and the
same of the stored model for comparison.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from mtmd_model.checkpoint import load
from mtmd_model.lightning_module import OptimiserConfig
from mtmd_model.mtmd import MTMDConfig
from mtmd_model.train import TrainConfig, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of a trained model")
    parser.add_argument("--lake", type=Path, help="the folder that holds joined_examples/, if it was moved")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--preset", choices=["small", "paper"], default="small")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4096)
    options = parser.parse_args()

    stored = load(options.model)
    manifest = stored.manifest

    def moved(file: str) -> Path:
        path = Path(file)
        return options.lake.joinpath(*path.parts[-3:]) if options.lake else path

    config = TrainConfig(
        model=MTMDConfig.preset(options.preset),
        optimiser=OptimiserConfig(),
        batch_size=options.batch_size,
        max_epochs=options.epochs,
        patience=options.epochs,
        accelerator=options.accelerator,
        precision=options.precision,
    )
    ends = [time.perf_counter()]

    def on_epoch(entry: object) -> None:
        ends.append(time.perf_counter())
        print(entry, f"{ends[-1] - ends[-2]:.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as out:
        result = train(
            stored.schema,
            [moved(f) for f in manifest["train_files"]],
            [moved(f) for f in manifest["validation_files"]],
            config,
            Path(out) / "model",
            on_epoch,
        )
    rows = sum(result.manifest["rows"].values())
    # The first epoch warms up; with one epoch there is nothing else.
    seconds = [b - a for a, b in pairwise(ends)][1:] or [ends[1] - ends[0]]
    gpu = options.accelerator != "cpu" and torch.cuda.is_available()
    summary = {
        "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "preset": options.preset,
        "precision": options.precision,
        "batch_size": options.batch_size,
        "parameters": result.manifest["params"],
        "rows_per_epoch": rows,
        "rows_per_second": round(rows / min(seconds)),
        "history": result.history,
        "stored_history": manifest["history"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
