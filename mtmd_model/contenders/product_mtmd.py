"""One MTMD a product, nothing shared between them: what followed at Pinterest trains standard and shopping ads apart.

Shapes: B rows, D width of a task's stored vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mtmd_model.batch import Batch, DomainGroups
from mtmd_model.config import MTMDConfig
from mtmd_model.mtmd import MTMD
from mtmd_model.partial_pooling import Counterpart
from mtmd_model.schema import Schema
from mtmd_model.towers import module_key
from mtmd_model.two_tower import TwoTower


class ProductMTMD(TwoTower):
    """An MTMD for each product, trained side by side in one run on that product's rows only.

    Each keeps the weights of its own best epoch. A query's vector belongs to a product, so that both sides must be
    known.
    """

    def __init__(self, schema: Schema, rows: Mapping[str, int], config: MTMDConfig) -> None:
        super().__init__(schema, config.constrained)
        self.models = nn.ModuleDict({module_key(p): MTMD(of_product(schema, p), rows, config) for p in schema.products})
        self.widths: dict[str, int] = {}
        for model in self.models.values():
            assert isinstance(model, MTMD)
            self.widths |= model.query_tower.stored_widths
            model.bias.logits_TSP.requires_grad_(False)  # this model's own bias serves

    def embed(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both sides' vectors of the same rows, each by its product's own model."""
        groups = DomainGroups.of(batch.item.domain, len(self.schema.products))
        ordered = batch.select(groups.order_B)
        query: list[dict[str, Tensor]] = []
        item: list[dict[str, Tensor]] = []
        start = 0
        for product, count in zip(self.schema.products, groups.counts, strict=True):
            if count:
                block = ordered.slice(start, start + count)
                model = self.models[module_key(product)]
                assert isinstance(model, MTMD)
                query.append(model.query_tower(block.query).embeddings)
                alone = replace(block.item, domain=torch.zeros_like(block.item.domain))
                item.append(model.item_tower(alone).embeddings)
                start += count
        together = [self._together(parts, groups) for parts in (query, item)]
        return (
            self.bias.append_to_query(together[0], batch.query.domain),
            self.bias.append_to_item(together[1], batch.item.domain),
        )

    def separate_parts(self) -> dict[str, Sequence[tuple[int, int]]]:
        """Each product's model stops on its own slices."""
        return {
            f"models.{module_key(product)}.": [(s, p) for s in range(len(self.schema.surfaces))]
            for p, product in enumerate(self.schema.products)
        }

    def domains(self) -> list[list[dict[str, Counterpart]]]:
        """Each model's towers; nothing is pooled between products."""
        found: list[list[dict[str, Counterpart]]] = []
        for model in self.models.values():
            assert isinstance(model, MTMD)
            found += model.domains()
        return found

    def _together(self, parts: list[dict[str, Tensor]], groups: DomainGroups) -> dict[str, Tensor]:
        """Rows back in their places; zeros for a task that a product does not have."""
        out = {}
        for task in self.schema.tasks:
            rows = []
            for part in parts:
                like = next(iter(part.values()))
                rows.append(part.get(task.name, like.new_zeros(len(like), self.widths[task.name])))
            out[task.name] = torch.cat(rows).index_select(0, groups.inverse_B)
        return out


def of_product(schema: Schema, product: str) -> Schema:
    """A platform with this product only; the features keep their columns.

    A surface without a task for it has the first one, a root, for every domain needs an expert: rows that lack the label
    teach it nothing, and are not scored.
    """
    of_tasks = [(t, [s for s in t.slices if s[1] == product]) for t in schema.tasks]
    first, *others = [(t, slices) for t, slices in of_tasks if slices]
    idle = [(s, product) for s in schema.surfaces if not any((s, product) in slices for _, slices in of_tasks)]
    tasks = [replace(t, slices=tuple(slices)) for t, slices in [(first[0], [*first[1], *idle]), *others]]
    features = [
        f if f.side == "query" else replace(f, domains=tuple(d for d in f.domains if d == product))
        for f in schema.features
    ]
    return replace(schema, products=(product,), tasks=tuple(tasks), features=tuple(features))
