"""The feed alone, without a model: from rows in memory, and from the lake's Parquet, to shuffled batches."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks import synthetic
from benchmarks.figures import Figure, alternating
from mtmd_model.batch import Batch
from mtmd_model.data import load
from mtmd_model.encoder import fit_encoder, read_tables
from mtmd_model.feed import Feed, FileWindow, StreamFeed

BATCH = 4096


def figures(rows: int = 250_000, repetitions: int = 5) -> list[Figure]:
    """Rows a second of both feeds, beside a plain copy and a plain read of the same columns.

    Args:
        rows: of each of two files, and of the window in memory.
        repetitions: runs of each side, in turn; medians count.
    """
    schema = synthetic.platform()
    with tempfile.TemporaryDirectory() as folder:
        files = synthetic.write_days(schema, Path(folder), 2, rows)
        encoder = fit_encoder(schema, files)
        window = load(encoder, files[:1])
        held = Feed(window, encoder, BATCH, seed=0)
        streamed = StreamFeed(FileWindow(encoder, files), rows, BATCH, seed=0)
        tables = list(read_tables(files[:1], encoder.columns()))
        matrix = np.ones((rows, _bytes(window) // (4 * rows)), np.float32)
        copy_of = np.ones_like(matrix)  # touched: a fresh one costs its pages

        def copied() -> list[object]:
            np.copyto(copy_of, matrix)
            return []

        def decoded() -> Feed:
            """As `load` does it, all rows shuffled."""
            block, filled = encoder.empty(rows), 0
            for table in tables:
                encoder.encode(table, out=block.slice(filled, filled + len(table)))
                filled += len(table)
            return Feed(block, encoder, BATCH, seed=0)

        works = [
            Work(rows, lambda: held),
            Work(rows, copied),
            Work(rows, lambda: (encoder.encode(table) for table in tables)),
            Work(rows, decoded),
            Work(2 * rows, lambda: streamed),
            Work(2 * rows, lambda: read_tables(files, encoder.columns())),
        ]
        seconds = alternating(*works, repetitions=repetitions)
    batches, copy, encode, from_decoded, stream, read = (
        work.rows / s / 1e6 for work, s in zip(works, seconds, strict=True)
    )
    per_core = [f"{work.per_core_second:.2f} a core" for work in works]
    unit = "M rows/s"
    beside = f"a copy of as many bytes {copy:.2f}"
    return [
        Figure.at_least("rows in memory to batches", batches, unit, f"{beside}; {per_core[0]}", 1.0),
        Figure.report("decoded Arrow to encoded rows", encode, unit, f"{beside}; {per_core[2]}"),
        Figure.at_least("decoded Arrow to batches", from_decoded, unit, f"{beside}; {per_core[3]}", 1.0),
        Figure.at_least(
            "Parquet to batches, streamed",
            stream,
            unit,
            f"reading the columns alone {read:.2f}; {per_core[4]}",
            0.4,
        ),
    ]


class Work:
    """Asks for every item and keeps none, and notes the processor time, which other processes do not lengthen.

    Args:
        rows: of all items together.
        items: starts over.
    """

    def __init__(self, rows: int, items: Callable[[], Iterable[object]]) -> None:
        self.rows, self.items, self.core_seconds = rows, items, list[float]()

    def __call__(self) -> None:
        start = time.process_time()
        for _ in self.items():
            pass
        self.core_seconds.append(time.process_time() - start)

    @property
    def per_core_second(self) -> float:
        """Millions of rows, the median over all runs."""
        return self.rows / statistics.median(self.core_seconds) / 1e6


def _bytes(window: Batch) -> int:
    sides = (window.query, window.item)
    tensors = [window.labels, window.weight, *(x for s in sides for x in (s.dense, s.ids, s.domain))]
    return sum(x.numel() * x.element_size() for x in tensors)
