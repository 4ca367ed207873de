"""A trained model on disk: `model.safetensors` and `manifest.json`, no pickle.

The manifest says everything else that is needed to use the model or to know where it came from. The tensors
carry a fingerprint of the schema, the vocabularies and the configuration they belong to.
"""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from mtmd_model.architectures import ARCHITECTURES, build, config_to_dict
from mtmd_model.encoder import Encoder
from mtmd_model.predict import Predictor
from mtmd_model.schema import Schema
from mtmd_model.two_tower import TwoTower

TENSORS, MANIFEST = "model.safetensors", "manifest.json"
FORMAT = 1
_IDENTITY = ("format", "schema", "encoder", "architecture", "model_config")
"""The manifest's entries without which the tensors cannot be read."""


def save(
    out_dir: str | Path,
    model: TwoTower,
    encoder: Encoder,
    architecture: str,
    config: Any,
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a model's folder, whole or not at all; an older folder of that name is replaced.

    Args:
        manifest: further JSON-ready entries.

    Returns:
        The whole manifest.
    """
    from safetensors.torch import save_file

    identity = {
        "format": FORMAT,
        "schema": encoder.schema.to_dict(),
        "encoder": encoder.to_dict(),
        "architecture": architecture,
        "model_config": config_to_dict(config),
    }
    # through JSON, so that what is returned is what `load` will read
    entries = {**identity, "fingerprint": fingerprint(identity), **manifest}
    whole: dict[str, Any] = json.loads(json.dumps(entries))
    out_dir = Path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    new = out_dir.with_name(f".{out_dir.name}.{uuid.uuid4().hex}.new")
    old = new.with_suffix(".old")
    new.mkdir()
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, new / TENSORS, metadata={"fingerprint": whole["fingerprint"]})
        (new / MANIFEST).write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(new, out_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return whole


def load(model_dir: str | Path, device: str = "cpu") -> Predictor:
    """A stored model, ready to predict.

    Raises:
        FileNotFoundError: no such model.
        ValueError: the manifest is not that of the tensors beside it, or of another format.
    """
    from safetensors import safe_open

    model_dir = Path(model_dir)
    manifest = json.loads((model_dir / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{model_dir / MANIFEST} must have format {FORMAT}, got {manifest.get('format')!r}")
    with safe_open(model_dir / TENSORS, framework="pt") as file:
        stored = (file.metadata() or {}).get("fingerprint")
        expected = fingerprint({key: manifest[key] for key in _IDENTITY})
        if stored != expected:
            raise ValueError(
                f"{model_dir / MANIFEST} is not the manifest of {TENSORS}: "
                f"its schema, vocabularies and configuration make {expected}, the tensors carry {stored}"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    schema = Schema.from_dict(manifest["schema"])
    encoder = Encoder.from_dict(schema, manifest["encoder"])
    config = ARCHITECTURES[manifest["architecture"]].read_config(manifest["model_config"])
    with torch.random.fork_rng(devices=[]):
        model = build(manifest["architecture"], encoder, config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{model_dir / TENSORS} does not fit this version of the code: {error}") from None
    return Predictor(model.to(device).eval(), encoder, manifest, device)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what the tensors belong to, in a form that a trip through JSON does not change."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
