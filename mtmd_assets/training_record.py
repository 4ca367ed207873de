"""What an experiment's training predicts of its evaluation day, and how it was trained: a small file beside its folder.

With it a training is compared without its weights. It has the training's name, which is a hash of code, data and settings
(`training_pool.TrainJob`), so that a copy of it in another home counts there as the training itself; another kind of
processor would have given numbers a little different. Of the log it has no id, no score and no vocabulary, but statistics
of dense features and numbers of rows by domain.

Shapes: N rows of the day.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtmd_assets.faults import Withheld

if TYPE_CHECKING:
    import pyarrow as pa

ABOUT = b"mtmd"
"""The key of the file's metadata that holds what is no column."""
KEPT = (
    "train_config",
    "code_version",
    "data",
    "rows",
    "params",
    "history",
    "best_epoch",
    "normalisation",
)
"""Entries of a manifest."""


@dataclass(frozen=True)
class TrainingRecord:
    """A training on its evaluation day."""

    scored_data: str
    """A hash of the rows that it was scored on."""
    manifest: Mapping[str, Any]
    """`KEPT` of what `mtmd_model.train` wrote."""
    routing: Sequence[Mapping[str, Any]]
    """Who its routers use (`mtmd_model.routing`); empty of a model without."""
    probabilities: Mapping[str, NDArray[np.float32]]
    """Task -> (N,) P(task | impression) by `impression_id`; NaN where the task does not exist."""


def path_of(folder: Path) -> Path:
    """Where the record of a training lies whose weights are in a folder."""
    return folder.with_name(f"{folder.name}.parquet")


def is_of(folder: Path, scored_data: str) -> bool:
    """Whether the training of a folder has a record, on the rows of a hash.

    Raises:
        Withheld: as `read`.
    """
    path = path_of(folder)
    return path.is_file() and _about(path)["scored_data"] == scored_data


def read(folder: Path) -> TrainingRecord:
    """The record of the training of a folder.

    Raises:
        Withheld: a file that cannot be read, by its name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = path_of(folder)
    about = _about(path)
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as e:
        raise _unreadable(path, e) from e
    return TrainingRecord(**about, probabilities={name: table[name].to_numpy() for name in table.column_names})


def read_or_make(folder: Path, rows: "pa.Table", scored_data: str, *, routing: bool) -> TrainingRecord:
    """A training's record of these rows, made by its weights if there is none.

    Args:
        folder: of its weights.
        rows: the evaluation day's examples by `impression_id`.
        scored_data: a hash of them.
        routing: whether the model has routers to tell of.

    Raises:
        Withheld: neither a record of these rows nor weights; or as `read`.
        ValueError: as `mtmd_model.checkpoint.load`.
    """
    from mtmd_model import checkpoint

    if not is_of(folder, scored_data):
        if not folder.is_dir():
            raise Withheld(
                f"{path_of(folder)} is of other rows than the day has now, and its weights are not here: run again to train it"
            )
        model = checkpoint.load(folder)
        manifest = {name: model.manifest[name] for name in KEPT}
        probabilities = {task: p.astype(np.float32) for task, p in model.predict(rows).items()}
        _write(
            path_of(folder),
            TrainingRecord(scored_data, manifest, model.routing(rows) if routing else [], probabilities),
        )
    return read(folder)


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a training's record, or its folder, says of how it was trained; None where both have gone.

    Raises:
        Withheld: as `read`.
    """
    path, written = path_of(folder), folder / "manifest.json"
    if path.is_file():
        return dict(_about(path)["manifest"])
    return dict(json.loads(written.read_text())) if written.is_file() else None


def _write(path: Path, record: TrainingRecord) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"scored_data": record.scored_data, "manifest": record.manifest, "routing": record.routing}
    table = pa.table(dict(record.probabilities))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # small: no Arrow schema beside Parquet's, which would hold the metadata again; a number's like bytes together
    options: dict[str, Any] = {"store_schema": False, "use_dictionary": False, "use_byte_stream_split": True}
    with pq.ParquetWriter(part, table.schema, compression="zstd", **options) as file:
        file.write_table(table)
        file.add_key_value_metadata({ABOUT: json.dumps(about)})
    part.replace(path)


def _about(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = json.loads((pq.read_metadata(path).metadata or {})[ABOUT])
        return {name: about[name] for name in ("scored_data", "manifest", "routing")}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: Exception) -> Withheld:
    return Withheld(f"{path} cannot be read as a training's record, remove it: {type(error).__name__}: {error}")
