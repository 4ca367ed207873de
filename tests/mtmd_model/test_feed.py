"""Every row once, in an order that seed and epoch decide, resumed where it stopped, in the memory of two blocks."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtmd_model.batch import Batch
from mtmd_model.data import WindowData, load, slice_logits
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.feed import Feed, FileWindow, ResidentFeed, StreamFeed, ahead, gather
from mtmd_model.lightning_module import OptimiserConfig
from mtmd_model.mtmd import MTMDConfig
from mtmd_model.train import TrainConfig, train
from tests.mtmd_model.sample import examples, platform

SIZES = (50, 1, 70, 33, 46)
"""Rows of the window's row groups, in two files."""
ROWS = sum(SIZES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    table = examples(ROWS)
    # the weight is the row's number: it tells which rows a batch holds
    table = table.set_column(table.column_names.index("weight"), "weight", pa.array(np.arange(ROWS, dtype=np.float64)))
    paths, start = [], 0
    for groups in (SIZES[:3], SIZES[3:]):
        path = tmp_path_factory.mktemp("window") / "data.parquet"
        with pq.ParquetWriter(path, table.schema) as writer:
            for size in groups:
                writer.write_table(table.slice(start, size), row_group_size=size)
                start += size
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def encoder(files: list[Path]) -> Encoder:
    return fit_encoder(platform(), files)


def rows(batches: Iterator[Batch] | Feed | StreamFeed) -> list[list[int]]:
    """Which rows each batch holds."""
    return [batch.weight.int().tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.fixture(scope="module")
def make(files: list[Path], encoder: Encoder) -> Callable[..., Feed | StreamFeed]:
    """A feed in memory (no `block_rows`) or a streaming one."""
    window, lake = load(encoder, files), FileWindow(encoder, files)

    def make(block_rows: int | None, batch_size: int, seed: int | None, epoch: int = 0) -> Feed | StreamFeed:
        if block_rows is None:
            return Feed(window, encoder, batch_size, seed, lambda: epoch)
        return StreamFeed(lake, block_rows, batch_size, seed, lambda: epoch)

    return make


blocks = st.none() | st.integers(1, 2 * ROWS)
batch_sizes = st.integers(2, ROWS + 1)


@settings(max_examples=20, deadline=None)
@given(blocks, batch_sizes, st.integers(0, 2**32), st.integers(0, 100))
def test_an_epoch_gives_every_row_once(make: Any, block_rows: int | None, batch_size: int, seed: int, epoch: int):
    feed = make(block_rows, batch_size, seed, epoch)
    got = rows(feed)
    assert sorted(flat(got)) == list(range(ROWS))
    sizes = [len(batch) for batch in got]
    assert len(sizes) == len(feed)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert rows(feed) == rows(make(block_rows, batch_size, seed, epoch)) == got


@settings(max_examples=20, deadline=None)
@given(blocks, batch_sizes, st.integers(0, 100), st.integers(0, ROWS))
def test_a_state_goes_on_where_it_was_taken(make: Any, block_rows: int | None, batch_size: int, epoch: int, stop: int):
    whole = rows(make(block_rows, batch_size, 3, epoch))
    stopped, resumed = make(block_rows, batch_size, 3, epoch), make(block_rows, batch_size, 3, epoch)
    stop = min(stop, len(whole))
    iterator = iter(stopped)
    before = rows(next(iterator) for _ in range(stop))
    state = json.loads(json.dumps(stopped.state_dict()))
    if stop:
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
    assert before + rows(resumed) == whole
    assert rows(resumed) == whole  # the next pass is whole again


@pytest.mark.parametrize("block_rows", [None, 60])
def test_seeds_and_epochs_have_orders_of_their_own(make: Any, block_rows: int | None):
    orders = [flat(rows(make(block_rows, 20, seed, epoch))) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert flat(rows(make(block_rows, 20, None, 1))) == list(range(ROWS))


def test_a_block_mixes_its_row_groups_and_no_other(make: Any):
    feed = make(100, 25, 5)
    starts = np.cumsum([0, *SIZES])
    order, got, taken = [], rows(feed), 0
    for batch in got:
        for row in batch:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            order += [] if group in order else [group]
    # cut in the order of the groups, each block holds the next rows of that sequence
    for start in range(0, len(got), 4):
        block = flat(got[start : start + 4])
        assert block != sorted(block)
        taken += len(block)
        sequence = flat([list(range(starts[g], starts[g + 1])) for g in block_order(make, feed)])
        assert set(block) == set(sequence[taken - len(block) : taken])


def block_order(make: Any, feed: StreamFeed) -> list[int]:
    """The order of the row groups, from the unshuffled first rows of blocks as long as a batch of one row."""
    seen = flat(rows(make(1, 1, feed.seed)))
    starts = np.cumsum([0, *SIZES])
    return list(dict.fromkeys(int(np.searchsorted(starts, row, side="right")) - 1 for row in seen))


def test_a_block_as_large_as_the_window_is_an_exact_shuffle(make: Any):
    """Each row is as likely in one place as in another: chi-squared over places of the first batch."""
    counts = np.zeros(ROWS)
    for seed in range(200):
        counts[rows(make(ROWS + 50, 50, seed))[0]] += 1
    expected = counts.sum() / ROWS
    assert ((counts - expected) ** 2 / expected).sum() < ROWS + 6 * (2 * ROWS) ** 0.5


def test_a_stream_holds_the_same_rows_as_memory(files: list[Path], encoder: Encoder, make: Any):
    window = load(encoder, files)
    for batch in make(60, 20, 1):
        assert batch.query.groups is not None
        same = gather(window, batch.weight.long(), (3, 2))
        for ours, theirs in ((batch.query, same.query), (batch.item, same.item)):
            torch.testing.assert_close(ours.dense, theirs.dense, equal_nan=True, rtol=0, atol=0)
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.domain, theirs.domain)
        torch.testing.assert_close(batch.labels, same.labels, equal_nan=True, rtol=0, atol=0)


def test_gathered_batches_are_selected_and_prepared_ones(files: list[Path], encoder: Encoder):
    window = load(encoder, files)
    rows_B = torch.randperm(ROWS)[:77]
    ours, theirs = gather(window, rows_B, (3, 2)), window.select(rows_B).prepare(3, 2)
    assert_same(ours, theirs)


def assert_same(ours: Batch, theirs: Batch) -> None:
    for a, b in ((ours.query, theirs.query), (ours.item, theirs.item)):
        assert a.groups is not None
        assert b.groups is not None
        assert torch.equal(a.groups.order_B, b.groups.order_B)
        assert torch.equal(a.groups.inverse_B, b.groups.inverse_B)
        assert a.groups.counts == b.groups.counts
        torch.testing.assert_close(a.dense, b.dense, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(a.ids, b.ids)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.labels.nan_to_num(-1), theirs.labels.nan_to_num(-1))


def test_a_resident_window_gives_the_batches_of_one_in_memory(files: list[Path], encoder: Encoder):
    window = load(encoder, files)
    for seed in (None, 5):
        pairs = zip(ResidentFeed(window, encoder, 33, seed), Feed(window, encoder, 33, seed), strict=True)
        for ours, theirs in pairs:
            assert_same(ours, theirs)


@pytest.mark.parametrize("changes", [{"batch_size": 21}, {"seed": 8}, {"block_rows": 40}, {"block_rows": None}])
def test_the_state_of_another_feed_is_refused(make: Any, changes: dict[str, Any]):
    ours = {"block_rows": 60, "batch_size": 20, "seed": 7}
    state = make(**ours).state_dict()
    make(**ours).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of a feed with"):
        make(**{**ours, **changes}).load_state_dict(state)


@pytest.mark.parametrize("wait", [0.0, 0.02])
def test_an_epoch_has_memory_for_two_blocks(
    encoder: Encoder, files: list[Path], monkeypatch: pytest.MonkeyPatch, wait: float
):
    made: list[int] = []
    real = Encoder.empty

    def counted(self: Encoder, size: int) -> Batch:
        made.append(size)
        return real(self, size)

    monkeypatch.setattr(Encoder, "empty", counted)
    seen: list[int] = []
    for batch in StreamFeed(FileWindow(encoder, files), 20, 10, 0):
        time.sleep(wait)  # the reader slower, then faster than its user: it overwrites nothing that is in use
        seen += batch.weight.int().tolist()
    assert made == [20, 20]
    assert sorted(seen) == list(range(ROWS))


def test_what_is_made_ahead_never_exceeds_its_lead():
    done, made = 0, 0

    def numbers() -> Iterator[int]:
        nonlocal made
        for n in range(200):
            made += 1
            assert made - done <= 2  # the one in use and the one after it
            yield n

    for n in ahead(numbers(), 1):
        done = n + 1


def test_a_resumed_stream_reads_no_block_before_its_place(
    encoder: Encoder, files: list[Path], monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    real = Encoder.encode

    def counted(self: Encoder, table: pa.Table, **options: Any) -> Batch:
        read.append(len(table))
        return real(self, table, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    feed = StreamFeed(FileWindow(encoder, files), 40, 20, 0)
    feed.load_state_dict({**feed.state_dict(), "batch": 6})
    list(feed)
    assert sum(read) == ROWS - 6 * 20


@settings(max_examples=10, deadline=None)
@given(st.floats(0.001, 1.0), st.integers(0, 5))
def test_a_sample_takes_its_share_of_every_row_group(files: list[Path], encoder: Encoder, share: float, seed: int):
    window = FileWindow(encoder, files, share, seed)
    assert len(window) == max(1, round(share * ROWS))
    for group in window.groups:
        assert abs(group.rows - len(window) / ROWS * group.size) < 1
    got = flat(rows(window.blocks([len(window)])))
    assert got == sorted(set(got))
    assert flat(rows(StreamFeed(window, 30, 10))) == got
    assert sorted(flat(rows(StreamFeed(window, 30, 10, 1)))) == got


def test_a_row_group_that_lost_rows_is_refused(encoder: Encoder, tmp_path: Path):
    path = tmp_path / "data.parquet"
    pq.write_table(examples(20), path)
    feed = StreamFeed(FileWindow(encoder, [path]), 10, 5)
    pq.write_table(examples(19), path)
    with pytest.raises(ValueError, match="row group 0 has 19 rows, its footer said 20"):
        list(feed)
    with pytest.raises(ValueError, match="no rows in"):
        FileWindow(encoder, [])


def test_what_is_made_ahead_ends_with_its_use():
    made = []

    def numbers() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n
        raise OSError("the disk is gone")

    threads = threading.active_count()
    iterator = ahead(numbers(), 3)
    assert next(iterator) == 0
    while len(made) < 4:
        time.sleep(0.001)
    time.sleep(0.01)
    assert made == [0, 1, 2, 3]
    iterator.close()
    assert threading.active_count() == threads
    assert list(ahead(iter(range(50)), 1)) == list(range(50))
    with pytest.raises(OSError, match="the disk is gone"):
        list(ahead(numbers(), 1))
    assert threading.active_count() == threads


def test_slice_logits_of_blocks_are_those_of_the_window(files: list[Path], encoder: Encoder):
    data = WindowData(encoder, files, [], 20, 0, block_rows=30)
    for constrained in (True, False):
        whole = slice_logits(load(encoder, files), encoder, constrained)
        assert torch.equal(slice_logits(data.blocks(data.window), encoder, constrained), whole)


TINY = TrainConfig(
    model=MTMDConfig(deep=(16, 8), shallow=(8, 4), router=(8,), width_divisor=8),
    optimiser=OptimiserConfig(learning_rate=5e-3),
    batch_size=100,
    max_epochs=3,
    accelerator="cpu",
)


def test_training_from_files_learns_as_from_memory(write: Callable[[pa.Table], Path], tmp_path: Path):
    days = [write(examples(800, n)) for n in range(3)]
    held = train(platform(), days[:2], days[2:], TINY, tmp_path / "held")
    streamed = train(platform(), days[:2], days[2:], replace(TINY, block_rows=1000), tmp_path / "streamed")
    assert streamed.manifest["rows"] == held.manifest["rows"] == {"train": 1600, "validation": 800}
    start = (held.history[0]["validation_loss"], streamed.history[0]["validation_loss"])
    assert start[0] == pytest.approx(start[1], rel=0.2)
    ends = held.history[-1]["validation_loss"], streamed.history[-1]["validation_loss"]
    assert max(ends) < 0.9 * min(start)
    assert ends[0] == pytest.approx(ends[1], rel=0.2)
    again = train(platform(), days[:2], days[2:], replace(TINY, block_rows=1000), tmp_path / "again")
    assert again.history == streamed.history
    share = train(platform(), days[:2], [], replace(TINY, block_rows=200, sample_rate=0.25), tmp_path / "share")
    assert share.manifest["rows"] == {"train": 400, "validation": 0}


def test_training_with_the_window_on_the_device_learns_the_same(write: Callable[[pa.Table], Path], tmp_path: Path):
    days = [write(examples(400, n)) for n in range(2)]
    ours, theirs = (
        train(platform(), days[:1], days[1:], replace(TINY, resident=resident), tmp_path / str(resident))
        for resident in (True, False)
    )
    assert ours.history == theirs.history
    with pytest.raises(ValueError, match="choose one"):
        replace(TINY, resident=True, block_rows=1000)


def test_a_file_that_changes_in_training_is_named(write: Callable[[pa.Table], Path], tmp_path: Path):
    day = write(examples(300))
    with pytest.raises(RuntimeError, match=f"{day} changed"):
        train(
            platform(),
            [day],
            [],
            replace(TINY, block_rows=100, max_epochs=1),
            tmp_path / "v",
            on_epoch=lambda _: pq.write_table(examples(300, 1), day),
        )


def test_a_stream_without_labels_or_with_small_blocks_is_refused(write: Callable[[pa.Table], Path], tmp_path: Path):
    table = examples(50)
    unlabelled = table.set_column(table.column_names.index("weight"), "weight", pa.array(np.zeros(50)))
    with pytest.raises(ValueError, match="no training row has both"):
        train(platform(), [write(unlabelled)], [], replace(TINY, block_rows=100), tmp_path / "v")
    with pytest.raises(ValueError, match="block_rows must be None or at least batch_size"):
        replace(TINY, block_rows=99)


class Listener(L.LightningModule):
    """Remembers which rows it saw; its weight depends on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(batch.weight.int().tolist())
        return (self.weight * batch.weight.mean()).sin()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("block_rows", [None, 40])
@pytest.mark.parametrize("stop", [7, 10, 13])
def test_a_lightning_checkpoint_resumes_in_mid_epoch(
    files: list[Path], encoder: Encoder, tmp_path: Path, block_rows: int | None, stop: int
):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    def fit(ckpt_path: Path | None = None) -> Listener:
        module = Listener()
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=3,
            callbacks=[Save()],
            limit_val_batches=0,
            enable_checkpointing=False,
            **quiet,
        )
        trainer.fit(module, datamodule=WindowData(encoder, files, [], 20, 0, block_rows), ckpt_path=ckpt_path)
        return module

    whole = fit()
    assert len(whole.seen) == 30
    resumed = fit(tmp_path / "stopped.ckpt")
    assert resumed.seen == whole.seen[stop:]
    assert torch.equal(resumed.weight, whole.weight)
