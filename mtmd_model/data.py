"""The rows of a training run: held in memory, or left in their files and read block by block.

Shapes: N rows of the window, T tasks, S surfaces, P products, Z slices.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from mtmd_model.batch import PREDICTED_ROWS, Batch
from mtmd_model.encoder import Encoder, group_sizes, read_tables
from mtmd_model.feed import CPU, Feed, FileWindow, ResidentFeed, StreamFeed


def load(encoder: Encoder, files: Sequence[str | Path]) -> Batch:
    """All rows of the files.

    Raises:
        ValueError: no rows.
    """
    total = sum(sum(group_sizes(path)) for path in files)
    if not total:
        raise ValueError(f"no rows in {[str(f) for f in files]}")
    # filled piece by piece: a list of pieces and their concatenation would hold every row twice
    window, filled = encoder.empty(total), 0
    for table in read_tables(files, encoder.columns()):
        if filled + len(table) <= total:
            encoder.encode(table, out=window.slice(filled, filled + len(table)))
        filled += len(table)
    if filled != total:
        raise ValueError(f"{[str(f) for f in files]} have {filled} rows, their footers say {total}")
    return window


class WindowData(L.LightningDataModule):
    """The training window and the validation days of one training run.

    Args:
        encoder: fitted on the training files.
        train_files: Parquet files of joined examples.
        validation_files: likewise; none leaves validation out.
        batch_size: rows of a training batch.
        seed: of the shuffle.
        block_rows: rows of a block (`StreamFeed`); None holds all rows in memory (`Feed`).
        resident: hold them on the device (`ResidentFeed`).
    """

    def __init__(
        self,
        encoder: Encoder,
        train_files: Sequence[str | Path],
        validation_files: Sequence[str | Path],
        batch_size: int,
        seed: int,
        block_rows: int | None = None,
        resident: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.batch_size, self.seed = encoder, batch_size, seed
        self.block_rows, self.resident = block_rows, resident

        def rows(files: Sequence[str | Path]) -> Batch | FileWindow:
            return load(encoder, files) if block_rows is None else FileWindow(encoder, files)

        self.window = rows(train_files)
        self.validation = rows(validation_files) if validation_files else None

    def sample(self, rate: float) -> None:
        """Keep this share of the training rows, drawn by the seed, in their order.

        Held in memory they are drawn from all rows, else from each row group.
        """
        if rate == 1:
            return
        if isinstance(self.window, FileWindow):
            self.window = FileWindow(self.encoder, self.window.files, rate, self.seed)
        else:
            keep = max(1, round(rate * len(self.window)))
            generator = torch.Generator().manual_seed(self.seed)
            self.window = self.window.select(torch.randperm(len(self.window), generator=generator)[:keep].sort().values)

    def blocks(self, window: Batch | FileWindow) -> Iterator[Batch]:
        """The window's rows in order, in parts that fit in memory."""
        if isinstance(window, Batch):
            yield window
        else:
            assert self.block_rows is not None
            whole, rest = divmod(len(window), self.block_rows)
            yield from window.blocks([self.block_rows] * whole + [rest] * (rest > 0))

    def train_dataloader(self) -> Feed | StreamFeed:
        """Shuffled anew every epoch."""
        return self._feed(self.window, self.batch_size, self.seed)

    def val_dataloader(self) -> Feed | StreamFeed | list[Batch]:
        """In order."""
        if self.validation is None:
            return []
        rows = max(self.batch_size, PREDICTED_ROWS)
        return self._feed(self.validation, rows if self.block_rows is None else min(rows, self.block_rows))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Without waiting for the copy: the feed has put the batch into page-locked memory."""
        return batch.to(device, non_blocking=True)

    def _feed(self, window: Batch | FileWindow, rows: int, seed: int | None = None) -> Feed | StreamFeed:
        device = self.trainer.strategy.root_device if self.trainer is not None else CPU
        if isinstance(window, Batch):
            feed = ResidentFeed if self.resident else Feed
            return feed(window, self.encoder, rows, seed, self._epoch, device)
        assert self.block_rows is not None
        return StreamFeed(window, self.block_rows, rows, seed, self._epoch, device)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0


def slice_logits(window: Batch | Iterable[Batch], encoder: Encoder, constrained: bool) -> Tensor:
    """(T, S, P) logit of each slice's mean P(task | given), to start a model's biases from.

    The mean of the conditional probability is that of the task over that of its parent, so that a model
    which only has the biases predicts every slice's mean score. A slice without the task's labels gets the
    mean over the others.

    Args:
        window: all rows, or blocks of them, of which one is held at a time.
        constrained: if not, the mean of P(task | impression).
    """
    schema = encoder.schema
    surfaces, products = len(schema.surfaces), len(schema.products)
    place = {task.name: t for t, task in enumerate(schema.tasks)}
    above_TZ = torch.zeros(len(schema.tasks), surfaces * products, dtype=torch.float64)
    below_TZ = torch.zeros_like(above_TZ)
    for block in [window] if isinstance(window, Batch) else window:
        slice_N = block.query.domain * products + block.item.domain
        for t, task in enumerate(schema.tasks):
            label_N = block.labels[:, t].double()
            given_N = torch.ones_like(label_N)
            if constrained and task.given is not None:
                given_N = block.labels[:, place[task.given]].double()
            weight_N = block.weight.double() * ~(label_N.isnan() | given_N.isnan())
            above_TZ[t].index_add_(0, slice_N, label_N.nan_to_num() * weight_N)
            below_TZ[t].index_add_(0, slice_N, given_N.nan_to_num() * weight_N)
    out = []
    for above, below in zip(above_TZ, below_TZ, strict=True):
        overall = above.sum() / below.sum() if below.sum() > 0 else torch.tensor(0.5, dtype=torch.float64)
        mean = torch.where(below > 0, above / below.clamp_min(1e-300), overall).clamp(1e-6, 1 - 1e-6)
        out.append(mean.logit().reshape(surfaces, products))
    return torch.stack(out).float()
