"""What a benchmark writes down."""

import json
import math

from benchmarks.bench import write
from benchmarks.figures import Figure, alternating


def test_figures_are_known_by_their_names_and_others_stay(tmp_path):
    path = tmp_path / "home" / "bench.json"
    write([Figure.at_least("loop", 0.9, "x", "the bare step", 0.95), Figure.report("peer", math.nan, "", "none")], path)
    write(
        [Figure.at_least("loop", 0.97, "x", "the bare step", 0.95), Figure.at_most("memory", 1.1, "x", "", 1.2)], path
    )
    loop, peer, memory = json.loads(path.read_text())
    assert loop == {
        "name": "loop",
        "value": 0.97,
        "unit": "x",
        "reference": "the bare step",
        "goal": "≥ 0.95",
        "holds": True,
    }
    assert (peer["value"], peer["holds"]) == (None, None)
    assert (memory["goal"], memory["holds"]) == ("≤ 1.2", True)


def test_a_bound_is_met_on_it_and_missed_beyond():
    assert Figure.at_least("a", 0.95, "", "", 0.95).holds
    assert not Figure.at_least("a", 0.949, "", "", 0.95).holds
    assert not Figure.at_most("a", 1.21, "", "", 1.2).holds


def test_pieces_of_work_take_turns_after_a_warm_up_each():
    done: list[str] = []
    seconds = alternating(lambda: done.append("a"), lambda: done.append("b"), repetitions=2)
    assert done == ["a", "b", "a", "b", "a", "b"]
    assert all(s >= 0 for s in seconds)
