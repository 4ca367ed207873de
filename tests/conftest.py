"""Fixtures that several test modules share."""

import os
from datetime import date

import pytest

from mtmd_assets.home import Home
from tests.worlds import Runner, small_adworld

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Six days of a small adworld, through every stage: trained through the 3rd, 4th and 5th, evaluated after."""
    folder = tmp_path_factory.mktemp("pipeline")
    runner = Runner(Home(folder / "home").register(str(small_adworld(folder))))
    days = [date(2026, 1, d) for d in range(1, 7)]
    assert runner.run("data", days[0], days[4]).success
    assert runner.run("models", days[2]).success
    assert runner.run("models", days[3]).success
    return runner
