"""Which model was trained on which window, and loading it again.

A version is a folder `models/<version>/` (see `mtmd_model.checkpoint`) and a row of the table `models`. It is named
after its window's last day and a hash of all that went into it and of its weights. Training the same again gives the
same name, unless the machine gives other weights: what an older model predicted is never under a newer one's name.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtmd_assets.faults import Withheld
from mtmd_assets.home import Site

if TYPE_CHECKING:
    from mtmd_model.predict import Predictor


@dataclass(frozen=True)
class ModelRecord:
    """What the table `models` says of a version."""

    version: str
    seed: int
    window_start: date
    window_end: date


def trained_on(site: Site, last_day: date) -> ModelRecord:
    """The promoted MTMD model whose window ends on `last_day`.

    Raises:
        Withheld: if there is none, saying what to run.
    """
    if not site.warehouse.published("models", last_day):
        raise Withheld(
            f"no model is trained through {last_day}: materialise {site.platform.name}/models for {last_day}",
            [last_day],
            "models",
        )
    query = (
        "SELECT model_version, seed, window_start, window_end FROM models WHERE ds = ? AND model = 'mtmd' AND promoted"
    )
    with site.warehouse.connect() as con:
        [row] = con.execute(query, [last_day]).fetchall()
    return ModelRecord(*row)


def load(site: Site, record: ModelRecord) -> "Predictor":
    """The model of a record.

    Raises:
        Withheld: if it was trained under another platform file.
    """
    from mtmd_model import checkpoint

    model = checkpoint.load(site.models / record.version)
    if model.encoder.schema != site.platform.model_schema:
        raise Withheld(
            f"model {record.version} was trained under another platform file (other features, tasks or slices): "
            f"materialise {site.platform.name}/models for {record.window_end} again",
            [record.window_end],
            "models",
        )
    return model


def row_of(
    model: str,
    version: str,
    seed: int,
    window: Sequence[date],
    manifest: Mapping[str, Any],
    rankers: Sequence[str],
    *,
    promoted: bool,
) -> dict[str, Any]:
    """A version's row of `models`.

    Args:
        model: a name in `contenders.MODELS`.
        version: its folder's name.
        seed: of its training.
        window: the days that it was trained on, the last of which decided when to stop.
        manifest: what `mtmd_model.train` wrote of it, with `data` (day -> hash of its examples) and `code_version`.
        rankers: the versions of the rankers that scored the window.
        promoted: whether it is the one that its window's day evaluates and embeds with.
    """
    best = manifest["history"][manifest["best_epoch"]]
    return {
        "model": model,
        "model_version": version,
        "seed": seed,
        "window_start": window[0],
        "window_end": window[-1],
        "rows": manifest["rows"]["train"] + manifest["rows"]["validation"],
        "embedding_params": manifest["params"]["embedding"],
        "dense_params": manifest["params"]["dense"],
        "data_hashes": json.dumps(manifest["data"]),
        "ranker_versions": rankers,
        "code_version": manifest["code_version"],
        "config": json.dumps(manifest["train_config"]),
        "epochs": len(manifest["history"]),
        "best_epoch": manifest["best_epoch"],
        "validation_loss": best["validation_loss"],
        "validation_logmae": best["validation_logmae"],
        "promoted": promoted,
    }


def version_name(last_day: date, ingredients: dict[str, Any]) -> str:
    """`<last day>-<hash of everything that went in, and of the weights>`."""
    return f"{last_day}-{digest(ingredients)}"


def digest(ingredients: object) -> str:
    """A short hash of what can be written as JSON."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()[:10]


def data_hashes(site: Site, window: Sequence[date]) -> dict[str, str]:
    """Day -> hash of its examples' file."""
    return {str(d): file_hash(site.warehouse.path("joined_examples", d)) for d in window}


@cache
def code_version(architecture: str = "mtmd") -> str:
    """A hash of the source that a model is trained and read by: of `mtmd_model`, and for all but MTMD itself of its
    `contenders`, a change of which leaves MTMD as it is.

    Args:
        architecture: a name in `mtmd_model.architectures`.
    """
    from mtmd_model import schema

    folder = Path(schema.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py") if architecture == "mtmd" else folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
