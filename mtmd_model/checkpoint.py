"""A trained model on disk: `model.safetensors` and `manifest.json`, no pickle.

The manifest says everything else that is needed to use the model or to know where it came from. The tensors
carry a fingerprint of the schema, the vocabularies and the configuration they belong to.
"""

import json
import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch

from mtmd_model.architectures import ARCHITECTURES, build, config_to_dict
from mtmd_model.encoder import Encoder
from mtmd_model.predict import Predictor
from mtmd_model.schema import Schema
from mtmd_model.two_tower import TwoTower

TENSORS, MANIFEST = "model.safetensors", "manifest.json"
FORMAT = 3
_IDENTITY = ("format", "schema", "encoder", "architecture", "model_config")
"""The manifest's entries without which the tensors cannot be read."""
RESERVED = frozenset({*_IDENTITY, "fingerprint", "tensors_sha256"})
"""The manifest's entries that `save` alone writes."""


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

    Raises:
        ValueError: an entry of `RESERVED` is given.
    """
    from safetensors.torch import save_file

    check_entries(manifest)
    identity = {
        "format": FORMAT,
        "schema": encoder.schema.to_dict(),
        "encoder": encoder.to_dict(),
        "architecture": architecture,
        "model_config": config_to_dict(config),
    }
    stamp = fingerprint(identity)
    out_dir = Path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    new = out_dir.with_name(f".{out_dir.name}.{_process()}.{uuid.uuid4().hex}.new")
    new.mkdir()
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, new / TENSORS, metadata={"fingerprint": stamp})
        entries = {**identity, "fingerprint": stamp, "tensors_sha256": file_hash(new / TENSORS), **manifest}
        # through JSON, so that what is returned is what `load` will read
        text = json.dumps(entries, indent=1, allow_nan=False)
        (new / MANIFEST).write_text(text + "\n")
        _replace(new, out_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _sweep(out_dir)
    whole: dict[str, Any] = json.loads(text)
    return whole


def check_entries(manifest: Mapping[str, Any]) -> None:
    """Refuse a caller's entries that would overwrite what a model is read by.

    Raises:
        ValueError: an entry of `RESERVED`.
    """
    taken = sorted(RESERVED & set(manifest))
    if taken:
        raise ValueError(f"the manifest's entries {taken} are written by the checkpoint itself")


def load(model_dir: str | Path, device: str = "cpu") -> Predictor:
    """A stored model, ready to predict.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a file that is damaged, of another format, or not written together with the other.
    """
    from safetensors import SafetensorError

    model_dir = Path(model_dir)
    manifest = _read_manifest(model_dir / MANIFEST)
    try:
        schema = Schema.from_dict(manifest["schema"])
        encoder = Encoder.from_dict(schema, manifest["encoder"])
        config = ARCHITECTURES[manifest["architecture"]].config.from_dict(manifest["model_config"])
        with torch.random.fork_rng(devices=[]):
            model = build(manifest["architecture"], encoder, config)
        expected, stored_hash = fingerprint({key: manifest[key] for key in _IDENTITY}), manifest["tensors_sha256"]
    except _MALFORMED as error:
        raise ValueError(f"{model_dir / MANIFEST} cannot be read: {type(error).__name__}: {error}") from error
    found_hash = file_hash(model_dir / TENSORS)
    if found_hash != stored_hash:
        raise ValueError(
            f"{model_dir / TENSORS} is damaged or another model's: "
            f"its SHA-256 is {found_hash}, that of the manifest {stored_hash}"
        )
    try:
        stored, tensors = _read_tensors(model_dir / TENSORS)
    except (SafetensorError, *_MALFORMED) as error:
        raise ValueError(f"{model_dir / TENSORS} cannot be read: {error}") from error
    if stored != expected:
        raise ValueError(
            f"{model_dir / MANIFEST} is not the manifest of {TENSORS}: "
            f"its schema, vocabularies and configuration make {expected}, the tensors carry {stored}"
        )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{model_dir / TENSORS} does not fit this version of the code: {error}") from None
    return Predictor(model.to(device).eval(), encoder, manifest, device)


_MALFORMED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a file of a wrong form may raise on its way into a model."""


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} must hold an object, got {type(manifest).__name__}")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {manifest.get('format')!r}")
    return manifest


def _read_tensors(path: Path) -> tuple[str | None, dict[str, torch.Tensor]]:
    """The fingerprint that the tensors carry, and the tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("fingerprint")
        return stored, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _replace(new: Path, out_dir: Path) -> None:
    """Put a folder in another's place; if that fails, the other is back where it was."""
    if not out_dir.exists():
        os.replace(new, out_dir)
        return
    old = new.with_suffix(".old")
    os.replace(out_dir, old)
    try:
        os.replace(new, out_dir)
    except BaseException:
        os.replace(old, out_dir)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _process() -> str:
    """Names this process among those that may write into the same folder."""
    return f"{socket.gethostname()}.{os.getpid()}"


def _sweep(out_dir: Path) -> None:
    """Remove what saves of this model left behind whose process, on this machine, has died."""
    start = f".{out_dir.name}.{socket.gethostname()}."
    for path in out_dir.parent.iterdir():
        parts = path.name.removeprefix(start).split(".")
        if not path.name.startswith(start) or len(parts) != 3 or parts[2] not in ("new", "old"):
            continue
        if parts[0].isdecimal() and not _alive(int(parts[0])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 would not be a question
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what the tensors belong to, in a form that a trip through JSON does not change."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
