"""A small study for the tests: two evaluation days of a small adworld with two seeds, and the document."""

from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from mtmd_assets import study
from mtmd_assets.contenders import CONTENDERS
from mtmd_assets.home import Home
from tests.worlds import Runner, show_failure, small_adworld

DAYS = [date(2026, 1, d) for d in (4, 5)]
TRAINED = ("mtmd", *CONTENDERS, "no_routing", "no_domain_adaptation", "unconstrained")
OF_DAY = {DAYS[0]: ("mtmd", *CONTENDERS), DAYS[1]: TRAINED}
"""Ablations are trained for the last day only."""


@contextmanager
def quiet(title):
    yield


def small_study(folder: Path) -> Runner:
    """A platform with two evaluation and two tuning days, of which nothing is there yet; `run_step` runs its jobs as
    `study.results` and `study.tune` want them, `runs` has what it ran, `document` is where results go."""
    settings = {
        "days": 2,
        "seeds": 2,
        "ablation_days": 1,
        "tuning_days": ["2026-01-02", "2026-01-03"],
        "mtmd": {"learning_rate": 0.004},
        "contenders": {"pooled_towers": {"dropout": 0.1}},
    }
    file = small_adworld(
        folder,
        training={"window_days": 3, "max_epochs": 1, "batch_size": 1024, "accelerator": "cpu"},
        experiments=settings,
    )
    runner: Any = Runner(Home(folder / "home").register(str(file)))
    runs = []

    def run(job, first, last=None, only=(), config=None):
        if config is not None:
            config["ops"]["adworld_train_and_score"]["config"]["workers"] = 1
        result = runner.run(job, first, last, only, config)
        runs.append((job, first, result))
        assert result.success, show_failure(result)

    runner.document, runner.runs, runner.run_step = folder / "docs" / "results.md", runs, run
    return runner


def train_and_compare(runner: Any) -> None:
    """Train all of `TRAINED`, compare, write the document."""
    assert study.results(runner.site, TRAINED, runner.document, runner.run_step, quiet) == 0
