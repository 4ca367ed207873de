"""Batches of a window: shuffled by seed and epoch, resumable in mid-epoch, ready before they are asked for.

The feeds keep one contract. Each epoch gives every row exactly once; batches differ by at most one row in size, so that
no epoch ends on a handful of rows; the order depends on the seed and the epoch only; and a feed that takes over
another's `state_dict` goes on with the batch after the last that one gave.

* `Feed` holds the window in memory: an epoch is one permutation of all rows.
* `ResidentFeed` is the same with the window on the device, where the batches are gathered.
* `StreamFeed` leaves it in its files: an epoch puts the files' row groups in a random order, cuts that sequence of rows
  into blocks, and permutes the rows within each. One block is used while the next is read: never more than two.

Shapes: N rows of a window or block, B rows of a batch.
"""

import hashlib
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, cycle, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mtmd_model.batch import Batch, DomainGroups, TowerInput
from mtmd_model.encoder import Encoder, group_sizes, read_group

T = TypeVar("T")
CPU = torch.device("cpu")
LEAD = 2
"""Batches that are ready ahead of a GPU."""


class _Passes(ABC):
    """What both feeds have in common: the batches' sizes, and the place in the epoch.

    It is Lightning's protocol of a stateful loader: its checkpoints store the place, and a run that starts from one
    in mid-epoch goes on from there.
    """

    def __init__(
        self,
        rows: int,
        encoder: Encoder,
        batch_size: int,
        seed: int | None,
        epoch: Callable[[], int],
        device: torch.device,
    ) -> None:
        self.rows, self.batch_size, self.seed, self.epoch, self.device = rows, batch_size, seed, epoch, device
        self.domains = len(encoder.schema.surfaces), len(encoder.schema.products)
        self._given = 0, 0  # the epoch, and how many of its batches
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def sizes(self) -> list[int]:
        """Rows of each batch of an epoch, as `torch.tensor_split` splits."""
        size, larger = divmod(self.rows, len(self))
        return [size + (n < larger) for n in range(len(self))]

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """An epoch's batches from that number on."""

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch()
        resume, self._resume = self._resume, None
        first = resume[1] if resume is not None and resume[0] == epoch else 0
        batches = self.batches(epoch, first)
        if self.device.type == "cuda":
            batches = ahead(batches, LEAD)
        for number, batch in enumerate(batches, first + 1):
            self._given = epoch, number
            yield batch

    def gather(self, window: Batch, rows_B: Tensor) -> Batch:
        """These rows as a batch, sorted by domain here, on the host: a GPU would have to be waited for."""
        return gather(window, rows_B, self.domains, pin=self.device.type == "cuda")

    def _order(self) -> dict[str, Any]:
        """What decides the order of the rows."""
        return {"rows": self.rows, "batch_size": self.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of batches that it has given so far, JSON-ready."""
        epoch, batch = self._resume or self._given
        return {"order": self._order(), "epoch": epoch, "batch": batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass, if it is of the state's epoch, go on from there; another epoch starts at its beginning.

        Raises:
            ValueError: the state is of a feed with another order.
        """
        if state["order"] != self._order():
            raise ValueError(f"the state is of a feed with {state['order']}, this one has {self._order()}")
        self._resume = int(state["epoch"]), int(state["batch"])


class Feed(_Passes):
    """Batches of a window in memory.

    Args:
        window: all rows.
        encoder: for the numbers of surfaces and products.
        batch_size: largest number of rows of a batch.
        seed: of the shuffle; None leaves the rows in order.
        epoch: asked at the start of each pass.
        device: where the batches are going: for a GPU they lie in page-locked memory, made in a thread of their own.
    """

    def __init__(
        self,
        window: Batch,
        encoder: Encoder,
        batch_size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(len(window), encoder, batch_size, seed, epoch, device)
        self.window = window

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """An epoch's batches from that number on."""
        if self.seed is None:
            rows_N = torch.arange(self.rows)
        else:
            # an odd factor keeps (seed, epoch) pairs apart: 2**32 seeds, 2**31 epochs
            state = (self.seed + 0x9E3779B97F4A7C15 * (epoch + 1)) % 2**63
            rows_N = torch.randperm(self.rows, generator=torch.Generator().manual_seed(state))
        for rows_B in rows_N.tensor_split(len(self))[first:]:
            yield self.gather(self.window, rows_B)


class ResidentFeed(Feed):
    """The batches of `Feed`, gathered on the device from a window that lies there.

    The host sends the numbers of a batch's rows and their order by domain, which it needs itself: asking a GPU for the
    domains' counts would stall it.
    """

    @cached_property
    def resident(self) -> Batch:
        """The window on the device, copied once; it has to fit beside the model."""
        return self.window.to(self.device)

    def gather(self, window: Batch, rows_B: Tensor) -> Batch:
        """These rows of the resident window as a batch, with the order by domain that the host found."""
        pin = self.device.type == "cuda"

        def groups(x: TowerInput, count: int) -> DomainGroups:
            found = DomainGroups.of(_take(x.domain, rows_B), count)
            return (found.pin_memory() if pin else found).to(self.device, non_blocking=True)

        query, item = groups(window.query, self.domains[0]), groups(window.item, self.domains[1])
        index_B = (rows_B.pin_memory() if pin else rows_B).to(self.device, non_blocking=True)
        batch = self.resident.select(index_B)
        return replace(batch, query=replace(batch.query, groups=query), item=replace(batch.item, groups=item))


class StreamFeed(_Passes):
    """Batches of a window that stays in its files.

    A block is the rows of `block_rows // batch_size` batches. It mixes what its row groups hold: choose it several
    times as large as a row group (the lake's have 122,880 rows), or each batch comes from one day.

    Args:
        window: where the rows lie.
        block_rows: largest number of rows of a block; at least a batch.
        batch_size, seed, epoch, device: as in `Feed`.
    """

    def __init__(
        self,
        window: "FileWindow",
        block_rows: int,
        batch_size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        device: torch.device = CPU,
    ) -> None:
        super().__init__(len(window), window.encoder, batch_size, seed, epoch, device)
        self.window = window
        self.block_batches = max(1, block_rows // batch_size)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """An epoch's batches from that number on; the blocks before it are not read."""
        sizes = self.sizes()
        in_block = [sizes[start : start + self.block_batches] for start in range(0, len(self), self.block_batches)]
        rows = [sum(block) for block in in_block]
        skipped, given = divmod(first, self.block_batches)
        groups = _permutation(len(self.window.groups), self.seed, epoch)
        # one ahead: what it is made in is that of the block before the one in use
        blocks = ahead(self.window.blocks(rows[skipped:], groups.tolist(), sum(rows[:skipped])), 1)
        for number in range(skipped, len(rows)):
            block = next(blocks)
            for rows_B in _permutation(len(block), self.seed, epoch, number).split(in_block[number])[given:]:
                yield self.gather(block, rows_B)
            given = 0

    def _order(self) -> dict[str, Any]:
        groups = [group.rows for group in self.window.groups]
        return {**super()._order(), "block_batches": self.block_batches, "groups": groups}


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file."""

    path: str | Path
    number: int
    size: int
    """Its rows in the file."""
    rows: int
    """Those of them that belong to the window."""


class FileWindow:
    """The rows of some files, left there.

    Args:
        encoder: fitted on the training files.
        files: Parquet files of joined examples.
        share: of the rows that belong to the window, the same share of each row group.
        seed: draws them.

    Raises:
        ValueError: no rows.
    """

    def __init__(self, encoder: Encoder, files: Sequence[str | Path], share: float = 1.0, seed: int = 0) -> None:
        self.encoder, self.files, self.seed = encoder, files, seed
        found = [(path, number, size) for path in files for number, size in enumerate(group_sizes(path))]
        total = sum(size for _, _, size in found)
        if not total:
            raise ValueError(f"no rows in {[str(f) for f in files]}")
        keep = max(1, round(share * total))
        ends = [keep * end // total for end in accumulate((size for _, _, size in found), initial=0)]
        self.groups = [
            RowGroup(*group, stop - start) for group, (start, stop) in zip(found, pairwise(ends), strict=True)
        ]

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def blocks(self, sizes: Sequence[int], order: Sequence[int] | None = None, skip: int = 0) -> Iterator[Batch]:
        """Encoded rows in blocks of these sizes. There is memory for two: the next but one overwrites a block.

        Args:
            sizes: rows of each block.
            order: of the row groups; that of the files if None.
            skip: rows of that sequence to leave out first.

        Raises:
            ValueError: a row group has not the rows that it had, or as `Encoder.encode`.
        """
        tables = self._tables(range(len(self.groups)) if order is None else order, skip)
        table = None
        memory = cycle([self.encoder.empty(max(sizes, default=0)) for _ in range(2)])
        for size in sizes:
            block, filled = next(memory).slice(0, size), 0
            while filled < size:
                table = table if table else next(tables)
                part = table.slice(0, size - filled)
                self.encoder.encode(part, out=block.slice(filled, filled + len(part)))
                table, filled = table.slice(len(part)), filled + len(part)
            yield block

    def _tables(self, order: Sequence[int], skip: int) -> Iterator[pa.Table]:
        """The groups' rows in pieces, without the first ones."""
        for number in order:
            group = self.groups[number]
            if skip >= group.rows:
                skip -= group.rows
                continue
            belongs_N = _permutation(group.size, self.seed, number).numpy() < group.rows
            seen = 0
            for table in read_group(group.path, group.number, self.encoder.columns()):
                seen, mine_N = seen + len(table), belongs_N[seen : seen + len(table)]
                table = table if mine_N.all() else table.filter(pa.array(mine_N))
                table, skip = table.slice(skip), max(0, skip - len(table))
                if table:
                    yield table
            if seen != group.size:
                raise ValueError(
                    f"{group.path}: row group {group.number} has {seen} rows, its footer said {group.size}"
                )


def gather(window: Batch, rows_B: Tensor, domains: tuple[int, int], pin: bool = False) -> Batch:
    """Rows of a window on the host, sorted by domain, in new memory.

    By numpy: torch spreads a copy of this size over its threads, and where another process has one of their cores
    it waits for it at every tensor, many times as long as the copy takes.

    Args:
        rows_B: which.
        domains: numbers of surfaces and products.
        pin: page-locked memory, from which a GPU reads while the host goes on.
    """

    def side(x: TowerInput, count: int) -> TowerInput:
        domain_B = _take(x.domain, rows_B, pin)
        groups = DomainGroups.of(domain_B, count)
        return TowerInput(
            _take(x.dense, rows_B, pin), _take(x.ids, rows_B, pin), domain_B, groups.pin_memory() if pin else groups
        )

    query, item = side(window.query, domains[0]), side(window.item, domains[1])
    return Batch(query, item, _take(window.labels, rows_B, pin), _take(window.weight, rows_B, pin))


def _take(x: Tensor, rows_B: Tensor, pin: bool = False) -> Tensor:
    """Rows of a tensor on the host, in new memory."""
    out = torch.empty(len(rows_B), *x.shape[1:], dtype=x.dtype, pin_memory=pin)
    # `clip` only because `raise` would copy once more: no index is out of bounds
    np.take(x.numpy(), rows_B.numpy(), 0, out=out.numpy(), mode="clip")
    return out


def _permutation(n: int, seed: int | None, *which: int) -> Tensor:
    """(n,) a permutation that depends on these numbers only; 0 to n - 1 without a seed."""
    if seed is None:
        return torch.arange(n)
    digest = hashlib.blake2b(repr((seed, *which)).encode(), digest_size=8).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63))


def ahead(items: Iterator[T], lead: int) -> Iterator[T]:
    """The same items, made by a thread that is at most `lead` ahead: no more than lead + 1 exist at a time.

    An error of theirs is raised here, when its turn comes. The thread ends with this iterator.
    """
    made: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    may_make = threading.Semaphore(lead)
    closed = False

    def make() -> None:
        error: BaseException | None = StopIteration()
        try:
            while may_make.acquire() and not closed:
                made.put((next(items), None))  # not kept here, or it would outlive its use
        except BaseException as e:
            error = e
        made.put((None, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            may_make.release()
            yield cast("T", item)
            del item
    finally:
        closed = True
        may_make.release()
        if not sys.is_finalizing():  # then it does not run any more
            thread.join()
