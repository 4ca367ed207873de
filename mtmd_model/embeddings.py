"""A tower's embedding tables, shared by its domain experts.

Shapes: B rows, C categorical features of the tower, W columns of all of them together.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtmd_model.schema import Feature
from mtmd_model.vocabulary import FIRST, UNKNOWN


class FeatureEmbeddings(nn.Module):
    """Ids to vectors. Features of the same width lie in one table, so that a width costs one lookup.

    A missing value is a learned vector of its domain and feature; so is a feature that a domain does not
    have. Everything else (unknown and known values) is shared by the domains.

    A value with fewer than the feature's `min_count` among the rows that train this table counts as unknown, in training
    and after: values that the platform lists and the window lacks, whose rows would stay what they were drawn as, and in
    the towers of one slice those of other slices.

    Args:
        features: the tower's categorical features.
        rows: rows of each feature's vocabulary, by name, counting 0 (missing) and 1 (unknown).
        domains: the tower's domains.
        std: standard deviation of the initial vectors; those of missing and unknown start at zero, for an
            unknown value's vector may never be trained.
    """

    has_DC: Tensor
    start_C: Tensor
    order_C: Tensor
    table_C: Tensor
    known: Tensor
    """Of the rows of all tables, one after the other, those in use; all, until `keep_counted`."""

    def __init__(
        self, features: Sequence[Feature], rows: Mapping[str, int], domains: Sequence[str], std: float = 0.05
    ) -> None:
        super().__init__()
        by_width: dict[int, list[Feature]] = {}
        for feature in features:
            by_width.setdefault(feature.width, []).append(feature)
        self.fields = tuple(f for group in by_width.values() for f in group)
        """The features in the order of the output's columns."""
        self.sizes = [len(group) for group in by_width.values()]
        self._values = {f.name: rows[f.name] - FIRST for f in features}

        self.tables = nn.ParameterDict()
        starts: list[int] = []
        for width, group in by_width.items():
            parts: list[Tensor] = []
            for f in group:
                starts.append(sum(len(part) for part in parts))
                special = torch.zeros(len(domains) + 1, width)
                parts.append(torch.cat([special, std * torch.randn(self._values[f.name], width)]))
            self.tables[f"width={width}"] = nn.Parameter(torch.cat(parts))
        tables = [table for table, size in enumerate(self.sizes) for _ in range(size)]
        before = list(accumulate((len(table) for table in self.tables.values()), initial=0))
        order = [list(features).index(f) for f in self.fields]
        has = [[d in f.domains for f in self.fields] for d in domains]
        self.register_buffer("order_C", torch.tensor(order, dtype=torch.long), persistent=False)
        self.register_buffer("start_C", torch.tensor(starts, dtype=torch.long), persistent=False)
        self.register_buffer("has_DC", torch.tensor(has, dtype=torch.bool), persistent=False)
        self.register_buffer("table_C", torch.tensor([before[t] for t in tables], dtype=torch.long), persistent=False)
        self.register_buffer("known", torch.ones(before[-1], dtype=torch.bool))
        self.side = self.fields[0].side if self.fields else None
        self._count: Tensor | None = None

    def forward(self, ids_BC: Tensor, domain_B: Tensor) -> Tensor:
        """(B, C) vocabulary rows and (B,) domains -> (B, W)."""
        if not self.fields:
            return torch.zeros(len(ids_BC), 0, device=ids_BC.device)
        ids_BC = ids_BC.index_select(1, self.order_C)
        known_BC = (ids_BC > 0) & self.has_DC[domain_B]
        after_special = len(self.has_DC) - 1
        row_BC = self.start_C + torch.where(known_BC, ids_BC + after_special, domain_B[:, None])
        lost_BC = known_BC & ~self.known[self.table_C + row_BC]
        row_BC = torch.where(lost_BC, self.start_C + UNKNOWN + after_special, row_BC)
        groups = zip(row_BC.split(self.sizes, 1), self.tables.values(), strict=True)
        return torch.cat([F.embedding(rows, table).flatten(1) for rows, table in groups], 1)

    def count(self, ids_BC: Tensor, domain_B: Tensor) -> None:
        """Count the values of some rows that will train the tables; arguments as of `forward`."""
        if self.fields:
            ids_BC = ids_BC.index_select(1, self.order_C)
            row_BC = self.table_C + self.start_C + ids_BC + len(self.has_DC) - 1
            counts = torch.bincount(row_BC[(ids_BC > 0) & self.has_DC[domain_B]], minlength=len(self.known))
            self._count = counts if self._count is None else self._count + counts

    def keep_counted(self) -> None:
        """From now on a value that was counted too seldom is an unknown one."""
        if self._count is None:
            return
        for f, table, start in zip(self.fields, self.table_C.tolist(), self.start_C.tolist(), strict=True):
            first = table + start + len(self.has_DC) + 1
            values = slice(first, first + self._values[f.name])
            self.known[values] = self._count[values] >= (f.min_count or 1)
        self._count = None

    def known_parameters(self) -> int:
        """Numbers in the rows in use."""
        known = self.known.split([len(table) for table in self.tables.values()]) if self.fields else ()
        return sum(int(rows.sum()) * t.shape[1] for rows, t in zip(known, self.tables.values(), strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # models stored before this was kept
        state_dict.setdefault(f"{prefix}known", torch.ones_like(self.known))
        super()._load_from_state_dict(state_dict, prefix, *others)
