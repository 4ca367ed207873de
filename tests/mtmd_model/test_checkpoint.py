"""A model's folder: replaced whole or not at all, and refused by name when damaged."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtmd_model import checkpoint
from mtmd_model.encoder import Encoder, Vocabulary
from mtmd_model.mtmd import MTMD, MTMDConfig
from tests.mtmd_model.sample import platform

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)


def encoder() -> Encoder:
    schema = platform()
    categorical = [f for f in schema.features if f.kind == "categorical"]
    return Encoder(schema, {f.name: Vocabulary(buckets=5) for f in categorical})


def save(out: Path, **manifest: Any) -> MTMD:
    model = MTMD(encoder().schema, encoder().rows, TINY)
    checkpoint.save(out, model, encoder(), "mtmd", TINY, manifest)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "v", note="first")
    return tmp_path / "v"


def failing_replace(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Let the given calls of `os.replace`, from 1, fail."""
    real, count = os.replace, [0]

    def replace(a: Any, b: Any) -> None:
        count[0] += 1
        if count[0] in calls:
            raise OSError("disk on fire")
        real(a, b)

    monkeypatch.setattr(checkpoint.os, "replace", replace)


@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_replacement_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    failing_replace(monkeypatch, call)
    with pytest.raises(OSError, match="disk on fire"):
        save(folder, note="second")
    assert checkpoint.load(folder).manifest["note"] == "first"
    assert os.listdir(folder.parent) == ["v"]


def test_the_old_model_survives_where_it_cannot_be_put_back(folder: Path, monkeypatch: pytest.MonkeyPatch):
    failing_replace(monkeypatch, 2, 3)
    with pytest.raises(OSError, match="disk on fire"):
        save(folder, note="second")
    [old] = folder.parent.glob(".v.*.old")
    assert checkpoint.load(old).manifest["note"] == "first"


def test_leftovers_of_dead_saves_go_with_the_next_one(folder: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, key = socket.gethostname(), "0" * 32
    gone = [f".v.{host}.{dead.pid}.{key}.new", f".v.{host}.{dead.pid}.{key}.old"]
    kept = [
        f".v.{host}.{os.getppid()}.{key}.new",
        f".v.elsewhere.{dead.pid}.{key}.new",
        f".w.{host}.{dead.pid}.{key}.new",
    ]
    for name in (*gone, *kept):
        (folder.parent / name).mkdir()
    save(folder)
    assert sorted(os.listdir(folder.parent)) == sorted([*kept, "v"])


def test_a_save_returns_what_load_reads(folder: Path):
    assert checkpoint.load(folder).manifest["tensors_sha256"] == checkpoint.file_hash(folder / "model.safetensors")


@pytest.mark.parametrize("key", sorted(checkpoint.RESERVED))
def test_a_caller_may_not_overwrite_what_a_model_is_read_by(tmp_path: Path, key: str):
    with pytest.raises(ValueError, match=key):
        save(tmp_path / "v", **{key: 1})
    assert not list(tmp_path.iterdir())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", truncate),
        ("model.safetensors", flip),
        ("model.safetensors", lambda file: file.write_bytes(b"")),
        ("manifest.json", lambda file: file.write_bytes(b"")),
        ("manifest.json", truncate),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, damage: Callable[[Path], None]):
    damage(folder / name)
    with pytest.raises(ValueError, match=f"v/{name}"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100])
def test_tensors_that_are_none_are_named_also_under_their_own_hash(folder: Path, content: bytes):
    (folder / "model.safetensors").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors_sha256"] = checkpoint.file_hash(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"v/model.safetensors cannot be read"):
        checkpoint.load(folder)


def drop(*keys: str) -> Callable[[dict[str, Any]], Any]:
    def change(m: dict[str, Any]) -> Any:
        inner = m
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return m

    return change


MALFORMED: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: [m],
    lambda m: None,
    lambda m: {**m, "format": 1},
    lambda m: {**m, "architecture": "transformer"},
    lambda m: {**m, "architecture": []},
    lambda m: {**m, "schema": None},
    lambda m: {**m, "encoder": {"device": {"values": None, "buckets": None}}},
    lambda m: {**m, "encoder": []},
    lambda m: {**m, "model_config": {**m["model_config"], "heads": 3}},
    lambda m: {**m, "model_config": {**m["model_config"], "deep": "wide"}},
    lambda m: {**m, "schema": {**m["schema"], "tasks": [{"name": "t", "colour": "red", "slices": []}]}},
    *(drop(key) for key in sorted(checkpoint.RESERVED - {"fingerprint"})),
    drop("schema", "tasks"),
    drop("encoder", "device"),
]


@pytest.mark.parametrize("change", MALFORMED)
def test_malformed_manifests_are_named(folder: Path, change: Callable[[dict[str, Any]], Any]):
    manifest = change(json.loads((folder / "manifest.json").read_text()))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"v/manifest\.json"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_missing_file_is_a_missing_file(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(folder)


def test_loading_leaves_the_random_state_alone(folder: Path):
    state = torch.random.get_rng_state()
    checkpoint.load(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
