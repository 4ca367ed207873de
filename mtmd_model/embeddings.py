"""A tower's embedding tables, shared by its domain experts.

Shapes: B rows, C categorical features of the tower, W columns of all of them together.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtmd_model.schema import Feature


class FeatureEmbeddings(nn.Module):
    """Ids to vectors. Features of the same width lie in one table, so that a width costs one lookup.

    A missing value is a learned vector of its domain and feature; so is a feature that a domain does not
    have. Everything else (unknown and known values) is shared by the domains.

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
        order = [list(features).index(f) for f in self.fields]
        has = [[d in f.domains for f in self.fields] for d in domains]
        self.register_buffer("order_C", torch.tensor(order, dtype=torch.long), persistent=False)
        self.register_buffer("start_C", torch.tensor(starts, dtype=torch.long), persistent=False)
        self.register_buffer("has_DC", torch.tensor(has, dtype=torch.bool), persistent=False)

    def forward(self, ids_BC: Tensor, domain_B: Tensor) -> Tensor:
        """(B, C) vocabulary rows and (B,) domains -> (B, W)."""
        if not self.fields:
            return torch.zeros(len(ids_BC), 0, device=ids_BC.device)
        ids_BC = ids_BC.index_select(1, self.order_C)
        known_BC = (ids_BC > 0) & self.has_DC[domain_B]
        after_special = len(self.has_DC) - 1
        row_BC = self.start_C + torch.where(known_BC, ids_BC + after_special, domain_B[:, None])
        groups = zip(row_BC.split(self.sizes, 1), self.tables.values(), strict=True)
        return torch.cat([F.embedding(rows, table).flatten(1) for rows, table in groups], 1)
