"""What a trial of the search is judged by: its LogMAE in each cell of its tuning day, in a small file beside its folder, as
`training_record` is of an experiment's training.

With it a trial counts as done without its weights, in another home too: its name is a hash of code, data and settings
(`training_pool.TrainJob`).
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mtmd_assets.faults import Withheld
from mtmd_assets.training_pool import TrainJob


@dataclass(frozen=True)
class TrialRecord:
    """A trial on the day that it stopped on."""

    cells: Sequence[tuple[str, str, str, int, float]]
    """(surface, product, task, rows, LogMAE)."""
    validation_loss: float
    """Of the pass whose weights were kept."""
    epochs: int
    best_epoch: int
    """From zero."""
    seconds: float

    def of_cells(self, least_rows: int) -> list[float]:
        """LogMAE of the cells with at least so many rows."""
        return [logmae for *_, rows, logmae in self.cells if rows >= least_rows]


def path_of(job: TrainJob) -> Path:
    """Where the record of a trial lies."""
    return job.folder.with_name(f"{job.name}.json")


def exists(job: TrainJob) -> bool:
    """Whether a trial has a record."""
    return path_of(job).is_file()


def read_or_make(job: TrainJob) -> TrialRecord:
    """A trial's record, made by its weights if there is none.

    Raises:
        Withheld: a file that cannot be read, by its name.
    """
    path = path_of(job)
    if not path.is_file():
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(asdict(_make(job))))
        part.replace(path)
    try:
        read = json.loads(path.read_text())
        return TrialRecord(**{**read, "cells": [tuple(cell) for cell in read["cells"]]})
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise Withheld(f"{path} cannot be read as a trial's record, remove it: {type(e).__name__}: {e}") from e


def _make(job: TrainJob) -> TrialRecord:
    manifest = json.loads((job.folder / "manifest.json").read_text())
    history, best = manifest["history"], manifest["best_epoch"]
    return TrialRecord(
        list(_cells(job)), history[best]["validation_loss"], len(history), best, manifest["seconds"]["fit"]
    )


def _cells(job: TrainJob) -> Iterator[tuple[str, str, str, int, float]]:
    import numpy as np
    import pyarrow.parquet as pq

    from mtmd_model import checkpoint
    from mtmd_model.metrics import log_error

    [file] = job.validation_files
    with pq.ParquetFile(file) as opened:
        table = opened.read()
    slices = np.array(list(zip(table["surface"].to_pylist(), table["product"].to_pylist(), strict=True)))
    for task, p in checkpoint.load(job.folder).predict(table).items():
        t = table[f"score_{task}"].to_numpy().astype(float)
        for surface, product in np.unique(slices, axis=0):
            rows = (slices == (surface, product)).all(1) & ~np.isnan(t) & ~np.isnan(p)
            if rows.any():
                yield str(surface), str(product), task, int(rows.sum()), float(log_error(p[rows], t[rows]).mean())
