"""Fixtures of the model's tests."""

import datetime as dt
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it saves


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[pa.Table], Path]:
    """Write a table as one day of the lake, each as a day of its own."""
    days = count()

    def write(table: pa.Table) -> Path:
        day = dt.date(2026, 1, 1) + dt.timedelta(days=next(days))
        path = tmp_path_factory.mktemp("lake") / f"ds={day}" / "data.parquet"
        path.parent.mkdir()
        pq.write_table(table, path, compression="zstd")
        return path

    return write
