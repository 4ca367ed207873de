"""`benchmarks/other_worlds.py` at a small size."""

from pathlib import Path

import polars as pl
import pytest

from benchmarks import other_worlds
from mtmd_assets.contenders import CONTENDERS
from tests.worlds import small_adworld


def test_means_and_counts_by_hand():
    rows = [
        (c, "s", "p", task, improvement, world)
        for c in CONTENDERS
        for task, improvement, world in [("a", 0.2, 1), ("b", -0.1, 1), ("a", 0.4, 2), ("b", 0.3, 2)]
    ]
    names = ["contender", "surface", "product", "task", "improvement", "world"]
    cells = pl.DataFrame(rows, schema=names, orient="row")
    line = other_worlds.summary(cells).splitlines()[2]
    half = 12.7062 * 0.15  # Student's t of one degree of freedom, times the standard error
    low, high = 0.2 - half, 0.2 + half
    expected = [f"+20.0% [{low:+.1%}, {high:+.1%}]", "+5.0%", "+35.0%", "3 of 4", "2 of 2"]
    assert line.split(" | ")[1:] == [*expected[:-1], f"{expected[-1]} |"]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MTMD_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(other_worlds, "CONTENDERS", ("pooled_towers",))
    training = {"window_days": 2, "max_epochs": 1, "batch_size": 1024, "accelerator": "cpu"}
    base = small_adworld(tmp_path, training=training, experiments={"days": 1})
    shown = other_worlds.study(tmp_path / "home", 1, base)
    header, _, line = shown.splitlines()
    assert f"| {other_worlds.FIRST_SEED} |" in header
    assert line.startswith("| pooled_towers | ")
    assert line.endswith(" of 18 |")
    assert not (tmp_path / "elsewhere").exists()
