"""Which model was trained on which window, and loading it again.

A version is a folder `models/<version>/` (see `mtmd_model.checkpoint`) and a row of the table `models`. It is named
after its window's last day and a hash of all that went into it and of its weights. Training the same again gives the
same name, unless the machine gives other weights: what an older model predicted is never under a newer one's name.
"""

import hashlib
import json
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


def version_name(last_day: date, ingredients: dict[str, Any]) -> str:
    """`<last day>-<hash of everything that went in, and of the weights>`."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return f"{last_day}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


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
