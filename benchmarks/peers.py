"""Public frameworks beside ours: the same rows, batch and threads. They are the optional extra `peers`, never needed.

pip install -e '.[peers]'     # better in an environment of its own

torch-rechub: its feed, and its MMOE in its own training loop. fuxictr: its feed; its package holds no model.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import synthetic
from benchmarks.figures import Figure, alternating
from benchmarks.step import BATCH, Step, active_parameters
from mtmd_model.batch import Batch
from mtmd_model.encoder import Encoder
from mtmd_model.feed import Feed
from mtmd_model.mtmd import MTMDConfig
from mtmd_model.schema import Schema

EXPERT = {"dims": [512, 256, 128, 128], "activation": "relu", "dropout": 0.0}
"""A peer's expert, as wide as a deep expert of ours."""


def figures(rows: int = 20_480, repetitions: int = 3) -> list[Figure]:
    """Rows a second of the feeds, and rows a second times active dense parameters of the training loops.

    Args:
        rows: of the window in memory.
        repetitions: runs of each side, in turn; medians count.
    """
    schema = synthetic.platform()
    encoder, window = synthetic.window(schema, rows)
    found = []
    for name, measure in (("torch_rechub", _rechub), ("fuxictr", _fuxictr)):
        if find_spec(name) is None:
            found.append(Figure.report(f"{name}: skipped", nan, "", "not installed; it is in the extra `peers`"))
        else:
            found += measure(schema, encoder, window, repetitions)
    return found


def _rechub(schema: Schema, encoder: Encoder, window: Batch, repetitions: int) -> list[Figure]:
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    columns = _columns(schema, window)
    labels = np.nan_to_num(window.labels.numpy())
    loader, _, _ = DataGenerator(columns, labels).generate_dataloader(
        x_val=columns, y_val=labels, x_test=columns, y_test=labels, batch_size=BATCH
    )
    features = [
        DenseFeature(f.name) if f.kind == "dense" else SparseFeature(f.name, encoder.rows[f.name], f.width)
        for f in schema.features
    ]
    tasks = ["classification"] * len(schema.tasks)
    model = MMOE(features, tasks, len(tasks), EXPERT, [{"dims": [64]}] * len(tasks))
    trainer = MTLTrainer(model, tasks, n_epoch=1)
    active = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding"))

    step, feed = Step(schema, MTMDConfig.preset("paper")), Feed(window, encoder, BATCH, seed=0)

    def ours(batches: Iterable[Batch]) -> None:
        for batch in batches:
            step(batch)

    mine = active_parameters(step.model)
    found = [_feeds("torch-rechub", feed, loader, len(window), repetitions)]
    for what, batches, their_batches in (
        ("steps and feed", feed, loader),
        ("steps on batches that lie ready", list(feed), list(loader)),
    ):
        took, theirs_took = alternating(
            partial(ours, batches), _quietly(trainer.train_one_epoch, their_batches), repetitions=repetitions
        )
        rate, theirs = len(window) / took, len(window) / theirs_took
        reference = f"{theirs:,.0f} rows/s of {active / 1e6:.2f} M parameters; ours {rate:,.0f} of {mine / 1e6:.2f} M"
        name, unit = f"training, {what}: parameters x rows/s", "x torch-rechub's MMOE"
        found.append(Figure.at_least(name, rate * mine / (theirs * active), unit, reference, 1.0))
    return found


def _fuxictr(schema: Schema, encoder: Encoder, window: Batch, repetitions: int) -> list[Figure]:
    from types import SimpleNamespace

    from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader

    columns = _columns(schema, window) | {
        task.name: np.nan_to_num(window.labels[:, t].numpy()) for t, task in enumerate(schema.tasks)
    }
    names = list(columns)
    labels = [task.name for task in schema.tasks]
    # what its loader asks its feature map
    feature_map = SimpleNamespace(
        features=dict.fromkeys(n for n in names if n not in labels), labels=labels, get_column_index=names.index
    )
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "rows.npz", **columns)
        loader = NpzDataLoader(feature_map, f"{folder}/rows", batch_size=BATCH, shuffle=True, num_workers=0)
    return [_feeds("fuxictr", Feed(window, encoder, BATCH, seed=0), loader, len(window), repetitions)]


def _feeds(peer: str, feed: Feed, loader: Iterable[object], rows: int, repetitions: int) -> Figure:
    ours, theirs = alternating(lambda: list(feed), lambda: list(loader), repetitions=repetitions)
    reference = f"{rows / theirs:,.0f} rows/s; ours {rows / ours:,.0f}"
    return Figure.at_least(f"feed beside {peer}'s, memory to batches", theirs / ours, "x", reference, 1.0)


def _columns(schema: Schema, window: Batch) -> dict[str, Any]:
    """The window as the peers take it: a numpy column a feature, nothing missing."""
    columns: dict[str, Any] = {}
    for x, side in ((window.query, schema.side("query")), (window.item, schema.side("item"))):
        dense, ids = np.nan_to_num(x.dense.numpy()), x.ids.numpy().astype(np.int64)
        columns |= {f.name: dense[:, n] for n, f in enumerate(f for f in side if f.kind == "dense")}
        columns |= {f.name: ids[:, n] for n, f in enumerate(f for f in side if f.kind == "categorical")}
    return columns


def _quietly(work: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """Without what it prints."""

    def run() -> object:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return work(*arguments)

    return run
