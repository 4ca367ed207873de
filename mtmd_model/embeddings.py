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
from mtmd_model.vocabulary import UNKNOWN


class FeatureEmbeddings(nn.Module):
    """Ids to vectors. Features of the same width lie in one table, so that a width costs one lookup.

    A missing value is a learned vector of its domain and feature; so is a feature that a domain does not
    have. Everything else (unknown and known values) is shared by the domains.

    A known value that training has not met counts as unknown: its row is still what it was drawn as. Such are values
    that the platform lists and the window lacks, and in the towers of one slice those that only other slices have.

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
    met: Tensor
    """Whether training has met a row, of all tables one after the other; all, until `meet_nothing`."""

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

        self.tables = nn.ParameterDict()
        starts: list[int] = []
        for width, group in by_width.items():
            parts: list[Tensor] = []
            for f in group:
                starts.append(sum(len(part) for part in parts))
                special = torch.zeros(len(domains) + 1, width)
                parts.append(torch.cat([special, std * torch.randn(rows[f.name] - 2, width)]))
            self.tables[f"width={width}"] = nn.Parameter(torch.cat(parts))
        tables = [table for table, size in enumerate(self.sizes) for _ in range(size)]
        before = list(accumulate((len(table) for table in self.tables.values()), initial=0))
        order = [list(features).index(f) for f in self.fields]
        has = [[d in f.domains for f in self.fields] for d in domains]
        self.register_buffer("order_C", torch.tensor(order, dtype=torch.long), persistent=False)
        self.register_buffer("start_C", torch.tensor(starts, dtype=torch.long), persistent=False)
        self.register_buffer("has_DC", torch.tensor(has, dtype=torch.bool), persistent=False)
        self.register_buffer("table_C", torch.tensor([before[t] for t in tables], dtype=torch.long), persistent=False)
        self.register_buffer("met", torch.ones(before[-1], dtype=torch.bool))

    def forward(self, ids_BC: Tensor, domain_B: Tensor) -> Tensor:
        """(B, C) vocabulary rows and (B,) domains -> (B, W)."""
        if not self.fields:
            return torch.zeros(len(ids_BC), 0, device=ids_BC.device)
        ids_BC = ids_BC.index_select(1, self.order_C)
        known_BC = (ids_BC > 0) & self.has_DC[domain_B]
        after_special = len(self.has_DC) - 1
        row_BC = self.start_C + torch.where(known_BC, ids_BC + after_special, domain_B[:, None])
        in_all_BC = self.table_C + row_BC
        if self.training:
            self.met.index_fill_(0, in_all_BC.flatten(), True)
        else:
            new_BC = known_BC & ~self.met[in_all_BC]
            row_BC = torch.where(new_BC, self.start_C + UNKNOWN + after_special, row_BC)
        groups = zip(row_BC.split(self.sizes, 1), self.tables.values(), strict=True)
        return torch.cat([F.embedding(rows, table).flatten(1) for rows, table in groups], 1)

    def meet_nothing(self) -> None:
        """Training begins: no row has been met."""
        self.met.zero_()

    def trained_parameters(self) -> int:
        """Numbers in the rows that training has met."""
        rows = [len(table) for table in self.tables.values()]
        widths = [table.shape[1] for table in self.tables.values()]
        met = self.met.split(rows) if rows else ()
        return sum(int(of_table.sum()) * width for of_table, width in zip(met, widths, strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # models stored before this was kept
        state_dict.setdefault(f"{prefix}met", torch.ones_like(self.met))
        super()._load_from_state_dict(state_dict, prefix, *others)
