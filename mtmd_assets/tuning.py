"""The search behind the settings of MTMD and its contenders: the same number of trials for each.

A start and nine trials that change one thing each, on the last tuning day; the best three go on to the other tuning
days. A trial trains on the days before a tuning day, stops on that day and is judged on it, as the last day of a window
decides when to stop; the tuning days lie before every evaluation day. What is chosen goes into the platform file by
hand: MTMD's into `training`, a contender's into `experiments.contenders`.
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
from mtmd_assets.platform import Platform
from mtmd_assets.training_pool import TrainJob, train_all

if TYPE_CHECKING:
    import polars as pl

JUDGED_ROWS = 67
"""Cells with at least this many rows on a tuning day are judged: a third of the 200 of three evaluation days."""

FINALISTS = 3
"""Trials of a model that go on to the other tuning days."""

START: Mapping[str, Any] = {
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "deviation": 0.1,
    "slice_balance": 0.5,
}
"""Where every search starts; the batch, the passes and the size are the platform's own."""
PRESETS = ("small", "half", "paper")
LARGER = ("pooled_towers", "mmoe_dcn")
"""Models that start one preset larger: without an expert a domain they have a fraction of MTMD's parameters."""
SHARED: Mapping[str, Mapping[str, Any]] = {
    "start": {},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 4e-3": {"learning_rate": 4e-3},
    "weight decay 0.1": {"weight_decay": 0.1},
    "dropout 0.1": {"dropout": 0.1},
    "rows weighed alike": {"slice_balance": 0.0},
    "slices weighed alike": {"slice_balance": 1.0},
}
"""Trials of every model, by what they change; three more are in `trials`."""


def trials(platform: Platform, model: str) -> dict[str, Change]:
    """A model's trials by name; all models have equally many.

    Every model is tried with more passes and in two more sizes. MTMD, whose largest size costs most of all, is tried in
    one more, and with another deviation instead.
    """
    training = platform.training
    place = PRESETS.index(training.preset)
    preset = PRESETS[min(place + (model in LARGER), len(PRESETS) - 1)]
    passes = round(training.max_epochs * 5 / 3)
    changes = {**SHARED, f"{passes} passes": {"max_epochs": passes}}
    sizes = [p for p in PRESETS if p != preset]
    if model == "mtmd":
        sizes = sizes[:1]
        changes["deviation 0.3"] = {"deviation": 0.3}
    changes |= {f"preset {size}": {"preset": size} for size in sizes}
    start = {**START, "preset": preset}
    return {name: Change(model, training={**start, **change}) for name, change in changes.items()}


def tune(site: Site, models: Sequence[str], workers: int, log: Callable[[str], None]) -> "pl.DataFrame":
    """Run the search for some models; one row a trial and tuning day that it got to, in the columns of `trials`.

    Raises:
        Withheld: the platform file has no tuning days, or a day of a window is not published.
    """
    import polars as pl

    platform = site.platform
    days = platform.experiments.tuning_days
    if not days:
        raise Withheld(f"{platform.name}: the platform file names no experiments.tuning_days")

    def run(day: date, entries: Mapping[str, Sequence[str]]) -> "pl.DataFrame":
        jobs = [(model, name, _job(site, day, model, name)) for model, names in entries.items() for name in names]
        todo = [job for *_, job in jobs if not (job.folder / "manifest.json").is_file()]
        log(f"{day}: {len(jobs) - len(todo)} of {len(jobs)} trials are there already")
        train_all(todo, workers, log)
        return pl.DataFrame([_row(model, name, day, job) for model, name, job in jobs])

    *others, last = sorted(days)
    tables = [run(last, {model: list(trials(platform, model)) for model in models})]
    best = tables[0].sort("logmae").group_by("model", maintain_order=True).head(FINALISTS)
    finalists = {model: best.filter(pl.col("model") == model)["trial"].to_list() for model in models}
    tables += [run(day, finalists) for day in others]
    return pl.concat(tables)


def _job(site: Site, day: date, model: str, trial: str) -> TrainJob:
    """A trial's training on the days before a tuning day."""
    platform, warehouse = site.platform, site.warehouse
    window = [d for d in platform.window(day) if d >= platform.scored_from]
    holes = [d for d in window if not warehouse.published("joined_examples", d)]
    if holes or len(window) < 2:
        raise Withheld(f"joined_examples has no {', '.join(map(str, holes or [day - timedelta(1)]))}")
    files = [warehouse.path("joined_examples", d) for d in window]
    config = train_config(platform, trials(platform, model)[trial], seed=0)
    hashes = [model_store.file_hash(f) for f in files]
    schema = platform.model_schema
    text = json.dumps([config.to_dict(), hashes, model_store.code_version(), schema.to_dict()], sort_keys=True)
    version = f"{day}-trial-{model}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    folder = site.folder / "experiments" / version
    return TrainJob(version, schema, tuple(files[:-1]), (files[-1],), config, folder, {})


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
    """Every trial in Markdown, best first: those that went on by their mean LogMAE over the tuning days, the others
    after them."""
    import polars as pl

    days = table["window_end"].unique(maintain_order=True).to_list()
    order = {model: n for n, model in enumerate(("mtmd", *CONTENDERS))}
    wide = table.pivot("window_end", index=["model", "trial"], values="logmae", maintain_order=True)
    columns = [str(day) for day in days]
    ranked = wide.with_columns(
        pl.col("model").replace_strict(order, return_dtype=pl.Int64).alias("order"),
        pl.sum_horizontal(pl.col(columns).is_null()).alias("lacks"),
        pl.mean_horizontal(columns).alias("mean"),
    ).sort("order", "lacks", "mean")
    rows = [
        [r["model"], r["trial"], "" if r["lacks"] else f"{r['mean']:.4f}"]
        + ["" if r[day] is None else f"{r[day]:.4f}" for day in columns]
        for r in ranked.iter_rows(named=True)
    ]
    return markdown_table(["model", "trial", "mean LogMAE", *columns], rows)
