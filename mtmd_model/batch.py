"""What a model reads: rows as columns of tensors, never row by row.

Shapes: B rows, F dense features, C categorical features, T tasks.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

PREDICTED_ROWS = 8192
"""Of a batch without gradients."""


@dataclass(frozen=True)
class DomainGroups:
    """The rows of a batch sorted by domain, so that each domain expert runs on one contiguous block.

    The counts live on the host: splitting a batch needs them there, and asking a GPU for them stalls it.
    """

    order_B: Tensor
    """The batch's row at each sorted position."""
    inverse_B: Tensor
    """The sorted position of each of the batch's rows."""
    counts: tuple[int, ...]
    """Rows of each domain."""

    @classmethod
    def of(cls, domain_B: Tensor, domains: int) -> "DomainGroups":
        """Group by one stable sort; a tensor on a GPU costs one synchronisation.

        On the host by numpy: torch spreads even this over its threads, and waits where another process has their cores.
        """
        if domain_B.device.type == "cpu":
            order = np.argsort(domain_B.numpy().astype(np.uint16), kind="stable")  # a radix sort, at 16 bits
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            counts = np.bincount(domain_B.numpy(), minlength=domains)
            return cls(torch.from_numpy(order), torch.from_numpy(inverse), tuple(counts.tolist()))
        order_B = torch.argsort(domain_B, stable=True)
        inverse_B = torch.empty_like(order_B)
        inverse_B[order_B] = torch.arange(len(order_B), device=order_B.device)
        return cls(order_B, inverse_B, tuple(torch.bincount(domain_B, minlength=domains).tolist()))

    def pin_memory(self) -> "DomainGroups":
        """The same groups in page-locked memory."""
        return DomainGroups(self.order_B.pin_memory(), self.inverse_B.pin_memory(), self.counts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "DomainGroups":
        """The same groups on another device; the counts stay on the host."""
        order_B = self.order_B.to(device, non_blocking=non_blocking)
        return DomainGroups(order_B, self.inverse_B.to(device, non_blocking=non_blocking), self.counts)


@dataclass(frozen=True)
class TowerInput:
    """One tower's side of a batch."""

    dense: Tensor
    """(B, F) float, NaN where missing."""
    ids: Tensor
    """(B, C) rows of the features' vocabularies: 0 missing, 1 unknown (`encoder.py`)."""
    domain: Tensor
    """(B,) int64, index of the row's surface (query) or product (item)."""
    groups: DomainGroups | None = None
    """Rows by domain, if somebody has sorted them already."""

    def __len__(self) -> int:
        return len(self.domain)

    def grouped(self, domains: int) -> DomainGroups:
        """The rows by domain, sorted now unless `prepare` did it."""
        return self.groups if self.groups is not None else DomainGroups.of(self.domain, domains)

    def prepare(self, domains: int) -> "TowerInput":
        """Sort by domain here (on the host), before the batch goes to a device."""
        return replace(self, groups=DomainGroups.of(self.domain, domains))

    def select(self, rows: Tensor) -> "TowerInput":
        """The given rows, by one `index_select` a tensor."""
        return TowerInput(
            self.dense.index_select(0, rows),
            self.ids.index_select(0, rows),
            self.domain.index_select(0, rows),
        )

    def slice(self, start: int, stop: int) -> "TowerInput":
        """Rows start to stop, as views."""
        return TowerInput(self.dense[start:stop], self.ids[start:stop], self.domain[start:stop])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TowerInput":
        """The same input on another device."""
        return TowerInput(
            self.dense.to(device, non_blocking=non_blocking),
            self.ids.to(device, non_blocking=non_blocking),
            self.domain.to(device, non_blocking=non_blocking),
            None if self.groups is None else self.groups.to(device, non_blocking=non_blocking),
        )

    def empty(self, rows: int) -> "TowerInput":
        """As many rows of the same widths and types, to be filled."""
        dense, ids, domain = (x.new_empty(rows, *x.shape[1:]) for x in (self.dense, self.ids, self.domain))
        return TowerInput(dense, ids, domain)

    def copy_(self, other: "TowerInput") -> None:
        """Take over another input's rows."""
        self.dense.copy_(other.dense)
        self.ids.copy_(other.ids)
        self.domain.copy_(other.domain)


@dataclass(frozen=True)
class Batch:
    """Impressions: both towers' inputs, the heavyweight scores and the row weights."""

    query: TowerInput
    item: TowerInput
    labels: Tensor
    """(B, T) float, P(task | impression) of the heavyweight ranker; NaN where the task does not exist."""
    weight: Tensor
    """(B,) float."""

    def __len__(self) -> int:
        return len(self.weight)

    def select(self, rows: Tensor) -> "Batch":
        """The given rows, in that order."""
        labels, weight = self.labels.index_select(0, rows), self.weight.index_select(0, rows)
        return Batch(self.query.select(rows), self.item.select(rows), labels, weight)

    def slice(self, start: int, stop: int) -> "Batch":
        """Rows start to stop, as views."""
        query, item = self.query.slice(start, stop), self.item.slice(start, stop)
        return Batch(query, item, self.labels[start:stop], self.weight[start:stop])

    def prepare(self, surfaces: int, products: int) -> "Batch":
        """Sort both sides by domain on the host."""
        return replace(self, query=self.query.prepare(surfaces), item=self.item.prepare(products))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device (Lightning calls this)."""
        return Batch(
            self.query.to(device, non_blocking),
            self.item.to(device, non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.weight.to(device, non_blocking=non_blocking),
        )

    def empty(self, rows: int) -> "Batch":
        """As many rows of the same widths and types, to be filled."""
        labels, weight = self.labels.new_empty(rows, self.labels.shape[1]), self.weight.new_empty(rows)
        return Batch(self.query.empty(rows), self.item.empty(rows), labels, weight)

    def copy_(self, other: "Batch") -> None:
        """Take over another batch's rows."""
        self.query.copy_(other.query)
        self.item.copy_(other.item)
        self.labels.copy_(other.labels)
        self.weight.copy_(other.weight)
