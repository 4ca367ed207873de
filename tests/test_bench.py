"""What the benchmarks measure, on tiny sizes, and write down: no time is judged here."""

import importlib
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench import SUBJECTS, write
from benchmarks.figures import Figure, alternating

TINY: dict[str, dict[str, Any]] = {
    "lake": {"rows": 1000, "repetitions": 1, "days": 2},
    "feed": {"rows": 3000, "repetitions": 1},
    "memory": {"rows_a_day": 100, "block_rows": 4096},
    # a processor without bf16 products of its own takes minutes for large ones
    "step": {"steps": 1, "repetitions": 1, "preset": "small", "batch": 256, "gemm": 64},
    "peers": {"rows": 4096, "repetitions": 1},
    "serving": {"rows": 1000, "items": 1000, "preset": "small", "width": 8, "repetitions": 1},
}


def test_every_subject_is_tried_here():
    assert list(TINY) == list(SUBJECTS)


@pytest.mark.parametrize("subject", TINY)
def test_a_subject_measures_what_it_says(subject: str):
    found = importlib.import_module(f"benchmarks.{subject}").figures(**TINY[subject])
    assert len({f.name for f in found}) == len(found) >= 2
    for figure in found:
        skipped = figure.name.endswith("skipped")
        assert math.isnan(figure.value) if skipped else math.isfinite(figure.value), figure
        assert figure.reference, figure
        assert (figure.holds is None) == (figure.goal == ""), figure
    assert any(f.goal for f in found) or subject == "peers"


def test_a_subject_takes_the_place_of_its_earlier_figures(tmp_path: Path):
    path = tmp_path / "home" / "bench.json"
    slow, peer = Figure.at_least("loop", 0.9, "x", "the bare step", 0.95), Figure.report("peer", math.nan, "", "none")
    write("step", [slow, Figure.at_least("old", 1.0, "x", "the bare step", 0.95)], "slow", path)
    write("peers", [peer], "slow", path)
    write("step", [Figure.at_least("loop", 0.97, "x", "the bare step", 0.95)], "2 cores", path)
    of_peers, of_step = json.loads(path.read_text())
    assert (of_peers["subject"], of_peers["name"], of_peers["value"], of_peers["holds"]) == (
        "peers",
        "peer",
        None,
        None,
    )
    assert {k: v for k, v in of_step.items() if k != "at"} == {
        "subject": "step",
        "machine": "2 cores",
        "name": "loop",
        "value": 0.97,
        "unit": "x",
        "reference": "the bare step",
        "goal": "≥ 0.95",
        "holds": True,
    }
    assert datetime.fromisoformat(of_step["at"]).tzinfo


def test_a_bound_is_met_on_it_and_missed_beyond():
    assert Figure.at_least("a", 0.95, "", "", 0.95).holds
    assert not Figure.at_least("a", 0.949, "", "", 0.95).holds
    assert not Figure.at_most("a", 1.21, "", "", 1.2).holds


def test_pieces_of_work_take_turns_after_a_warm_up_each():
    done: list[str] = []
    seconds = alternating(lambda: done.append("a"), lambda: done.append("b"), repetitions=2)
    assert done == ["a", "b", "a", "b", "a", "b"]
    assert all(s >= 0 for s in seconds)
