"""`benchmarks/calibration_study.py` at a small size."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks import calibration_study
from tests.worlds import small_adworld


def test_what_each_way_leaves_by_hand():
    cells = {"surface": ["s", "q"], "product": ["p", "p"], "task": ["t", "t"]}
    stop = pl.DataFrame({**cells, "scored": [3.0, 1.0], "log_ratio": [0.0, np.log(3)], "variance": [0.0, 1e9]})
    later = pl.DataFrame({**cells, "rows": [1_000, 999], "log_ratio": [0.5, 0.1]})
    [left] = calibration_study.judge(stop, later, 1_000).iter_rows(named=True)
    task = np.log((3 * 1 + 1 * 3) / 4)
    assert left["surface"] == "s"
    assert [left[way] for way in calibration_study.WAYS] == pytest.approx([0.5, 0.5 - task, 0.5, 0.5 - task / 2, 0.5])
    counted = calibration_study.summary({1: calibration_study.judge(stop, later, 0)})
    assert counted.splitlines()[1].split() == ["nothing", "36.06%", "2/2", "36.06%", "2/2"]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"DAYS": 3, "STOP": 2, "JUDGED_DAYS": (3,)}.items():
        monkeypatch.setattr(calibration_study, name, value)
    base = small_adworld(tmp_path, experiments={"max_epochs": 1})
    shown = calibration_study.study(tmp_path / "home", 1, base, least_rows=50)
    header, *lines = shown.splitlines()
    assert header.split() == ["constant", "all", "ctr", "cvr", "gctr", "octr"]
    assert [line[:22].strip() for line in lines] == list(calibration_study.WAYS)
    assert "/18" in lines[0]
