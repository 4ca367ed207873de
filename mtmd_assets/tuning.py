"""The search behind the settings of MTMD and its contenders: the same number of trials for each.

A start and five trials that change one thing each. A trial trains on the days before a tuning day, stops on that day
and is judged on it, as the last day of a window decides when to stop; the tuning days lie before every evaluation day.
What is chosen goes into the platform file by hand: MTMD's into `training`, a contender's into `experiments.contenders`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from mtmd_assets import model_store
from mtmd_assets.contenders import CONTENDERS, Change, train_config
from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site
from mtmd_assets.pictures import markdown_table
from mtmd_assets.training_pool import TrainJob, train_all

if TYPE_CHECKING:
    import polars as pl

JUDGED_ROWS = 67
"""Cells with at least this many rows on a tuning day are judged: a third of the 200 of three evaluation days."""

START: Mapping[str, Any] = {
    "batch_size": 512,
    "max_epochs": 12,
    "patience": 3,
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "deviation": 0.1,
}
"""Where every search starts."""
SIZE = {"mtmd": "half", "slice_towers": "half", "pooled_towers": "paper", "mmoe_dcn": "half"}
"""And with which preset."""
SHARED: Mapping[str, Mapping[str, Any]] = {
    "start": {},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 4e-3": {"learning_rate": 4e-3},
    "dropout 0.1": {"dropout": 0.1},
    "weight decay 0.1": {"weight_decay": 0.1},
}
"""Trials of every model, by what they change."""
OTHER_SIZE = {"mtmd": "small", "slice_towers": "small", "pooled_towers": "half", "mmoe_dcn": "small"}
"""The preset of one more trial of each."""


def trials(model: str) -> dict[str, Change]:
    """A model's trials by name; all models have equally many."""
    start = {**START, "preset": SIZE[model]}
    changes = {**SHARED, f"preset {OTHER_SIZE[model]}": {"preset": OTHER_SIZE[model]}}
    return {name: Change(model, training={**start, **change}) for name, change in changes.items()}


def tune(site: Site, models: Sequence[str], workers: int, log: Callable[[str], None]) -> "pl.DataFrame":
    """Run every trial of some models on every tuning day; one row a trial and day, in the columns of `trials`.

    Raises:
        Withheld: the platform file has no tuning days, or a day of a window is not published.
    """
    import polars as pl

    platform, warehouse = site.platform, site.warehouse
    days = platform.experiments.tuning_days
    if not days:
        raise Withheld(f"{platform.name}: the platform file names no experiments.tuning_days")
    jobs: list[tuple[str, str, date, TrainJob]] = []
    code = model_store.code_version()
    for day in days:
        window = [d for d in platform.window(day) if d >= platform.scored_from]
        holes = [d for d in window if not warehouse.published("joined_examples", d)]
        if holes or len(window) < 2:
            raise Withheld(f"joined_examples has no {', '.join(map(str, holes or [day - timedelta(1)]))}")
        files = [warehouse.path("joined_examples", d) for d in window]
        hashes = [model_store.file_hash(f) for f in files]
        for model in models:
            for name, change in trials(model).items():
                config = train_config(platform, change, seed=0)
                text = json.dumps([config.to_dict(), hashes, code, platform.model_schema.to_dict()], sort_keys=True)
                version = f"{day}-trial-{model}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
                folder = site.folder / "experiments" / version
                schema = platform.model_schema
                job = TrainJob(version, schema, tuple(files[:-1]), (files[-1],), config, folder, {})
                jobs.append((model, name, day, job))
    todo = [job for *_, job in jobs if not (job.folder / "manifest.json").is_file()]
    log(f"{len(jobs) - len(todo)} of {len(jobs)} trials are there already")
    train_all(todo, workers, log)
    return pl.DataFrame([_row(model, name, day, job) for model, name, day, job in jobs])


def _row(model: str, name: str, day: date, job: TrainJob) -> dict[str, Any]:
    manifest = json.loads((job.folder / "manifest.json").read_text())
    cells, logmae = _judge(job)
    return {
        "model": model,
        "trial": name,
        "seed": 0,
        "config": json.dumps(manifest["train_config"]),
        "window_start": date.fromisoformat(job.train_files[0].parent.name.removeprefix("ds=")),
        "window_end": day,
        "cells": cells,
        "logmae": logmae,
        "validation_loss": manifest["history"][manifest["best_epoch"]]["validation_loss"],
        "epochs": len(manifest["history"]),
        "best_epoch": manifest["best_epoch"],
        "seconds": manifest["seconds"]["fit"],
    }


def _judge(job: TrainJob) -> tuple[int, float]:
    """How many cells have `JUDGED_ROWS`, and the unweighted mean of their LogMAE on the tuning day."""
    import numpy as np
    import pyarrow.parquet as pq

    from mtmd_model import checkpoint
    from mtmd_model.metrics import log_error

    [file] = job.validation_files
    with pq.ParquetFile(file) as opened:
        table = opened.read()
    slices = np.array(
        [f"{s} {p}" for s, p in zip(table["surface"].to_pylist(), table["product"].to_pylist(), strict=True)]
    )
    found = []
    for task, p in checkpoint.load(job.folder).predict(table).items():
        t = table[f"score_{task}"].to_numpy().astype(float)
        for name in np.unique(slices):
            rows = (slices == name) & ~np.isnan(t) & ~np.isnan(p)
            if rows.sum() >= JUDGED_ROWS:
                found.append(log_error(p[rows], t[rows]).mean())
    return len(found), float(np.mean(found))


def ranking(table: "pl.DataFrame") -> str:
    """Every trial with its mean LogMAE over the tuning days, the best of a model first, in Markdown."""
    import polars as pl

    days = sorted(table["window_end"].unique())
    mean = (
        table.group_by("model", "trial", maintain_order=True)
        .agg(pl.col("logmae").mean().alias("mean"), pl.col("logmae").sort_by("window_end"), pl.col("seconds").sum())
        .sort(pl.col("model").replace_strict({m: n for n, m in enumerate(("mtmd", *CONTENDERS))}), "mean")
    )
    rows = [
        [r["model"], r["trial"], f"{r['mean']:.4f}", *(f"{v:.4f}" for v in r["logmae"]), f"{r['seconds']:.0f}"]
        for r in mean.iter_rows(named=True)
    ]
    return markdown_table(["model", "trial", "LogMAE", *map(str, days), "seconds"], rows)
