"""`benchmarks/calibration_study.py` at a small size."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks import calibration_study
from tests.worlds import small_adworld


def test_what_each_way_leaves_by_hand():
    cells = {"surface": ["s", "q"], "product": ["p", "p"], "task": ["t", "t"]}
    stop = pl.DataFrame(
        {**cells, "rows": [3, 1], "predicted": [0.2, 0.5], "scored": [0.2, 0.25], "variance": [0.0, 1e9]}
    )
    later = pl.DataFrame({**cells, "rows": [1_000, 999], "predicted": [0.5, 0.2], "scored": [0.4, 0.2]})
    [left] = calibration_study.judge(stop, later, 1_000).iter_rows(named=True)
    # means of all rows: 0.275 and 0.2125
    task = (0.275 / 0.725) / (0.2125 / 0.7875)

    def by(odds: float) -> float:
        return np.log(odds / (1 + odds) / 0.4)

    assert left["surface"] == "s"
    assert [left[way] for way in calibration_study.WAYS] == pytest.approx(
        [by(1), by(1 / task), by(1), by(task**-0.5), by(1)]
    )
    counted = calibration_study.summary({1: calibration_study.judge(stop, later, 0)})
    assert counted.splitlines()[1].split() == ["nothing", "15.78%", "1/2", "15.78%", "1/2"]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"DAYS": 3, "STOP": 2, "JUDGED_DAYS": (3,)}.items():
        monkeypatch.setattr(calibration_study, name, value)
    base = small_adworld(tmp_path, experiments={"max_epochs": 1})
    shown = calibration_study.study(tmp_path / "home", 1, base, least_rows=50)
    header, *lines = shown.splitlines()
    assert header.split() == ["constant", "all", "ctr", "cvr", "gctr", "octr"]
    assert [line[:22].strip() for line in lines] == list(calibration_study.WAYS)
    assert "/18" in lines[0]
