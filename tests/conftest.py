"""Fixtures that several test modules share."""

import functools
import os
import re
from datetime import date, datetime
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from mtmd_assets.home import Home
from tests.studied import small_study, train_and_compare
from tests.worlds import Runner, show_failure, small_adworld

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
# The tests run in two processes, each of which has a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


SHARED = ("studied", "pipeline")
"""Fixtures that take most of a minute to build."""


class ByFixture(LoadFileScheduling):
    """A file's tests run in one process, and so do all files that need the same of `SHARED`: else each process builds it."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return _shared(self.config.rootpath / file) or file


@functools.cache
def _shared(file: Path) -> str | None:
    """Which of `SHARED` a test of the file asks for."""
    text = file.read_text()
    return next((name for name in SHARED if re.search(rf"def test_\w+\([^)]*\b{name}\b", text)), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFixture | None:
    """Decides which process runs what, where it is to be by file."""
    return ByFixture(config, log) if config.getvalue("dist") == "loadfile" else None


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
