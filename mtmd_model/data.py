"""Lake files to batches: every file is read and encoded once, then batches are gathered column-wise.

Shapes: N rows of the window, T tasks, S surfaces, P products.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mtmd_model.batch import Batch
from mtmd_model.encoder import Encoder, read_tables


def blocks(encoder: Encoder, files: Sequence[str | Path], labels: bool = True) -> Iterator[Batch]:
    """The files' rows in order, encoded, a few hundred thousand at a time.

    A feed that does not hold the window in memory starts from here.
    """
    for table in read_tables(files, encoder.columns(labels)):
        yield encoder.encode(table, labels)


def load(encoder: Encoder, files: Sequence[str | Path]) -> Batch:
    """All rows of the files.

    Raises:
        ValueError: no rows.
    """
    total = 0
    for path in files:
        with pq.ParquetFile(path) as file:
            total += file.metadata.num_rows
    if not total:
        raise ValueError(f"no rows in {[str(f) for f in files]}")
    # filled block by block: a list of blocks and their concatenation would hold every row twice
    window: Batch | None = None
    start = 0
    for block in blocks(encoder, files):
        if window is None:
            window = block.empty(total)
        window.slice(start, start + len(block)).copy_(block)
        start += len(block)
    if window is None or start != total:
        raise ValueError(f"{[str(f) for f in files]} have {start} rows, their footers say {total}")
    return window


class Feed:
    """Batches of a window in memory, one `index_select` a tensor and batch.

    Batches differ by at most one row in size, so that no epoch ends on a handful of rows. The order depends
    on the seed and the epoch only.

    Args:
        window: all rows.
        encoder: for the numbers of surfaces and products.
        batch_size: largest number of rows of a batch.
        seed: of the shuffle; None leaves the rows in order.
        epoch: asked at the start of each pass.
    """

    def __init__(
        self,
        window: Batch,
        encoder: Encoder,
        batch_size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.window, self.batch_size, self.seed, self.epoch = window, batch_size, seed, epoch
        self.domains = len(encoder.schema.surfaces), len(encoder.schema.products)

    def __len__(self) -> int:
        return -(-len(self.window) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.seed is None:
            rows_N = torch.arange(len(self.window))
        else:
            # an odd factor keeps (seed, epoch) pairs apart: 2**32 seeds, 2**31 epochs
            state = (self.seed + 0x9E3779B97F4A7C15 * (self.epoch() + 1)) % 2**63
            rows_N = torch.randperm(len(self.window), generator=torch.Generator().manual_seed(state))
        for rows_B in rows_N.tensor_split(len(self)):
            # sorted by domain here, on the host: a GPU would have to be waited for
            yield self.window.select(rows_B).prepare(*self.domains)


class WindowData(L.LightningDataModule):
    """The training window and the validation days of one training run.

    Args:
        encoder: fitted on the training files.
        train_files: Parquet files of joined examples.
        validation_files: likewise; none leaves validation out.
        batch_size: rows of a batch.
        seed: of the shuffle.
    """

    def __init__(
        self,
        encoder: Encoder,
        train_files: Sequence[str | Path],
        validation_files: Sequence[str | Path],
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.encoder, self.batch_size, self.seed = encoder, batch_size, seed
        self.window = load(encoder, train_files)
        self.validation = load(encoder, validation_files) if validation_files else None

    def sample(self, rate: float) -> None:
        """Keep this share of the training rows, drawn by the seed, in their order."""
        if rate < 1:
            keep = max(1, round(rate * len(self.window)))
            generator = torch.Generator().manual_seed(self.seed)
            self.window = self.window.select(torch.randperm(len(self.window), generator=generator)[:keep].sort().values)

    def train_dataloader(self) -> Feed:
        """Shuffled anew every epoch."""
        return Feed(self.window, self.encoder, self.batch_size, self.seed, self._epoch)

    def val_dataloader(self) -> Feed | list[Batch]:
        """In order."""
        if self.validation is None:
            return []
        return Feed(self.validation, self.encoder, self.batch_size)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0


def slice_logits(window: Batch, encoder: Encoder, constrained: bool) -> Tensor:
    """(T, S, P) logit of each slice's mean P(task | given), to start a model's biases from.

    The mean of the conditional probability is that of the task over that of its parent, so that a model
    which only has the biases predicts every slice's mean score. A slice without the task's labels gets the
    mean over the others.

    Args:
        constrained: if not, the mean of P(task | impression).
    """
    schema = encoder.schema
    surfaces, products = len(schema.surfaces), len(schema.products)
    slice_N = window.query.domain * products + window.item.domain
    place = {task.name: t for t, task in enumerate(schema.tasks)}

    def sums(value_N: Tensor) -> Tensor:
        return torch.zeros(surfaces * products, dtype=torch.float64).index_add_(0, slice_N, value_N)

    out = []
    for t, task in enumerate(schema.tasks):
        label_N = window.labels[:, t].double()
        given_N = torch.ones_like(label_N)
        if constrained and task.given is not None:
            given_N = window.labels[:, place[task.given]].double()
        weight_N = window.weight.double() * ~(label_N.isnan() | given_N.isnan())
        above, below = sums(label_N.nan_to_num() * weight_N), sums(given_N.nan_to_num() * weight_N)
        overall = above.sum() / below.sum() if below.sum() > 0 else torch.tensor(0.5, dtype=torch.float64)
        mean = torch.where(below > 0, above / below.clamp_min(1e-300), overall).clamp(1e-6, 1 - 1e-6)
        out.append(mean.logit().reshape(surfaces, products))
    return torch.stack(out).float()
