"""Fixtures that several test modules share."""

import os
from datetime import date, datetime

import pytest

from mtmd_assets.home import Home
from tests.studied import small_study, train_and_compare
from tests.worlds import Runner, show_failure, small_adworld

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
# The tests run in two processes, each of which has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Five days of a small adworld, each stage as of its own job; the last day as the daily schedule runs it."""
    folder = tmp_path_factory.mktemp("pipeline")
    runner = Runner(Home(folder / "home").register(str(small_adworld(folder))))
    days = [date(2026, 1, d) for d in range(1, 5)]
    for result in (
        runner.run("data", days[0], days[3]),
        runner.run("models", days[2]),
        runner.run("models", days[3]),
        runner.tick(datetime(2026, 1, 6, 6, 0)),
    ):
        assert result.success, show_failure(result)
    return runner


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Contenders and some ablations trained and compared on two evaluation days, with the document (`tests/studied.py`)."""
    runner = small_study(tmp_path_factory.mktemp("experiments"))
    train_and_compare(runner)
    return runner
