"""What an experiment's training predicts of its evaluation day, and its manifest: one small file beside its folder.

With it a training can be compared without its weights, on any machine that has the same rows. Its name has the hash of code,
data and settings (`training_pool.TrainJob.name`), so that it stands for the training that anyone would make of these;
it holds no id, score or vocabulary, only probabilities in the order of the rows.

Shapes: N rows of the day.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site

if TYPE_CHECKING:
    import pyarrow as pa

ABOUT = b"mtmd"
"""The key of the file's metadata that holds what is no column."""
LEFT_OUT = ("encoder", "train_files", "validation_files")
"""Of a manifest: vocabularies, which are the log's, and where its files lie on the machine that it was trained on."""


@dataclass(frozen=True)
class TrainingRecord:
    """A training on its evaluation day."""

    rows: str
    """A hash of the rows that it was scored on."""
    manifest: Mapping[str, Any]
    """As `mtmd_model.checkpoint` wrote it, without `LEFT_OUT`."""
    routing: Sequence[Mapping[str, Any]]
    """Who its routers use (`mtmd_model.routing`); nothing of a model without."""
    probabilities: Mapping[str, NDArray[np.float32]]
    """Task -> (N,) P(task | impression) by `impression_id`; NaN where the task does not exist."""


def path_of(folder: Path) -> Path:
    """Where the record of a training lies whose weights are in a folder."""
    return folder.with_name(f"{folder.name}.parquet")


def is_of(folder: Path, rows: str) -> bool:
    """Whether there is a record of a training on these rows.

    Raises:
        Withheld: as `manifest_of`.
    """
    path = path_of(folder)
    return path.is_file() and _about(path)["rows"] == rows


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest in a record.

    Raises:
        Withheld: a file that is none, by its name.
    """
    return dict(_about(path)["manifest"])


def read(path: Path) -> TrainingRecord:
    """A record.

    Raises:
        Withheld: as `manifest_of`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = _about(path)
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as e:
        raise _unreadable(path, e) from e
    return TrainingRecord(**about, probabilities={name: table[name].to_numpy() for name in table.column_names})


def record(folder: Path, rows: "pa.Table", rows_hash: str, *, routing: bool) -> TrainingRecord:
    """A training's record of these rows; made by its weights if there is none.

    Args:
        folder: of its weights.
        rows: the evaluation day's examples by `impression_id`.
        rows_hash: of them.
        routing: whether the model has routers to tell of.

    Raises:
        FileNotFoundError: neither record nor weights.
        Withheld: as `manifest_of`.
        ValueError: as `mtmd_model.checkpoint.load`.
    """
    from mtmd_model import checkpoint

    if not is_of(folder, rows_hash):
        model = checkpoint.load(folder)
        manifest = {name: entry for name, entry in model.manifest.items() if name not in LEFT_OUT}
        probabilities = {task: p.astype(np.float32) for task, p in model.predict(rows).items()}
        _write(
            path_of(folder),
            TrainingRecord(rows_hash, manifest, model.routing(rows) if routing else [], probabilities),
        )
    return read(path_of(folder))


def share(site: Site, shared: Path, first: date, last: date) -> int:
    """Put the records of what is published of some evaluation days where other machines find them; returns how many were
    not there.

    Args:
        shared: a folder for all platforms.
        first: evaluation day.
        last: evaluation day.
    """
    with site.warehouse.connect() as con:
        published = con.execute(
            "SELECT model_version FROM experiment_models WHERE ds BETWEEN ? AND ?", [first, last]
        ).fetchall()
    records = [path_of(site.folder / "experiments" / version) for (version,) in published]
    return _copy([path for path in records if path.is_file()], shared / site.platform.name)


def take(site: Site, shared: Path) -> int:
    """Put what others have shared where this home looks for its own; returns how many it did not have."""
    return _copy(list((shared / site.platform.name).glob("*.parquet")), site.folder / "experiments")


def _copy(files: Sequence[Path], target: Path) -> int:
    """Copy what is not there yet, each file in one step."""
    missing = [path for path in files if not (target / path.name).exists()]
    if missing:
        target.mkdir(parents=True, exist_ok=True)
    for path in missing:
        part = target / f".{path.name}.{os.getpid()}.part"
        shutil.copyfile(path, part)
        part.replace(target / path.name)
    return len(missing)


def _write(path: Path, made: TrainingRecord) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"rows": made.rows, "manifest": made.manifest, "routing": made.routing}
    table = pa.table(dict(made.probabilities)).replace_schema_metadata({ABOUT: json.dumps(about)})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    pq.write_table(table, part, compression="zstd", use_dictionary=False)
    part.replace(path)


def _about(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = json.loads((pq.read_schema(path).metadata or {})[ABOUT])
        return {name: about[name] for name in ("rows", "manifest", "routing")}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: Exception) -> Withheld:
    return Withheld(f"{path} cannot be read as a training's record, remove it: {type(error).__name__}: {error}")
