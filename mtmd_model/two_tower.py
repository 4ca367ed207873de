"""What every two-tower ranker here has in common: stored vectors, their dot product, the chain of tasks.

Training, checkpoints and predictions know this class only, so that a contender is one more subclass.

Shapes: B rows, T tasks, D width of a task's stored vector.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtmd_model.batch import Batch, TowerInput
from mtmd_model.constrained import joint_logits
from mtmd_model.cross import LowRankCross
from mtmd_model.embeddings import FeatureEmbeddings
from mtmd_model.ffn import GroupedLinear
from mtmd_model.partial_pooling import Counterpart
from mtmd_model.schema import Schema
from mtmd_model.slice_bias import SliceBias


class TwoTower(nn.Module):
    """logit of P(task | given) = query vector . item vector, and nothing else.

    A subclass implements `embed_query` and `embed_item`; one whose vectors depend on both sides' domains (a tower pair
    a slice) overrides `embed` instead.

    Args:
        schema: domains, tasks and features.
        constrained: whether a task's dot product is conditional on its parent; if not, the logit of
            P(task | impression) itself.
    """

    def __init__(self, schema: Schema, constrained: bool) -> None:
        super().__init__()
        self.schema = schema
        self.constrained = constrained
        self.bias = SliceBias(schema)

    def embed_query(self, query: TowerInput) -> dict[str, Tensor]:
        """Task -> (B, D), the vectors to store; needs no item.

        Raises:
            NotImplementedError: a model whose vectors depend on both sides' domains.
        """
        raise NotImplementedError(f"{type(self).__name__} has a query vector a product: score whole rows")

    def embed_item(self, item: TowerInput) -> dict[str, Tensor]:
        """Task -> (B, D), the vectors to store; needs no query.

        Raises:
            NotImplementedError: as `embed_query`.
        """
        raise NotImplementedError(f"{type(self).__name__} has an item vector a surface: score whole rows")

    def embed(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both sides' vectors of the same rows."""
        return self.embed_query(batch.query), self.embed_item(batch.item)

    def separate_parts(self) -> dict[str, Sequence[tuple[int, int]]]:
        """Parts that share nothing with the rest: prefix of the parameters' names -> its (surface, product) numbers.

        Each is stopped on its own slices; the rest on all. None unless a subclass says so.
        """
        return {}

    def embedding_tables(self) -> list[nn.Parameter]:
        """The parameters that are embedding tables; all others count as dense."""
        return [p for m in self.feature_embeddings() for p in m.tables.parameters()]

    def feature_embeddings(self) -> list[FeatureEmbeddings]:
        """What holds the tables, one a tower."""
        return [m for m in self.modules() if isinstance(m, FeatureEmbeddings)]

    def count_ids(self, block: Batch) -> None:
        """Count the ids of some rows of the window for the tables that will learn from them: those of a separate part from
        its slices only."""
        products = len(self.schema.products)
        slice_B = block.query.domain * products + block.item.domain
        parts = self.separate_parts()
        for name, module in self.named_modules():
            if isinstance(module, FeatureEmbeddings):
                x = block.query if module.side == "query" else block.item
                # a table of one domain takes all rows for that one's
                domain_B = x.domain if len(module.has_DC) > 1 else torch.zeros_like(x.domain)
                part = next((slices for prefix, slices in parts.items() if name.startswith(prefix)), None)
                ids_BC = x.ids
                if part is not None:
                    mine_B = torch.isin(slice_B, torch.tensor([s * products + p for s, p in part]))
                    ids_BC, domain_B = ids_BC[mine_B], domain_B[mine_B]
                module.count(ids_BC, domain_B)

    def keep_counted_ids(self) -> None:
        """The window is counted: ids that a part has too seldom are unknown to it."""
        for embeddings in self.feature_embeddings():
            embeddings.keep_counted()

    def matrices(self) -> list[nn.Parameter]:
        """The weight matrices of the linear maps, the parameters that decay."""
        found: list[nn.Parameter] = []
        for module in self.modules():
            if isinstance(module, nn.Linear | GroupedLinear):
                assert isinstance(module.weight, nn.Parameter)
                found.append(module.weight)
            elif isinstance(module, LowRankCross):
                found.extend(module.downs.parameters())
        return found

    def domains(self) -> list[list[dict[str, Counterpart]]]:
        """Parameters that several domains have each for itself, by tower and domain, for `partial_pooling`.

        None unless a subclass says so.
        """
        return []

    def normalisation(self) -> dict[str, Any]:
        """What its parts normalise by, JSON-ready, for people to read; nothing unless a subclass says so."""
        return {}

    def routing(self, batches: Iterable[Batch]) -> list[dict[str, Any]]:
        """How it weighs its experts on some rows, one entry an expert.

        Raises:
            ValueError: a model without routing layers.
        """
        raise ValueError(f"{type(self).__name__} has no routing layers")

    def unconditional(self, logits_BT: Tensor) -> Tensor:
        """(B, T) logits of the dot products -> (B, T) logits of P(task | impression)."""
        return joint_logits(logits_BT, self.schema.tasks) if self.constrained else logits_BT

    def forward(self, batch: Batch) -> Tensor:
        """(B, T) logits of P(task | impression); of no meaning where the row's slice lacks the task."""
        query, item = self.embed(batch)
        return self.unconditional(dot_products(query, item))


def dot_products(query: Mapping[str, Tensor], item: Mapping[str, Tensor]) -> Tensor:
    """Two mappings task -> (B, D) -> (B, T), in fp32 at least."""
    exact = torch.promote_types(next(iter(query.values())).dtype, torch.float32)
    return torch.stack([(query[t].to(exact) * item[t].to(exact)).sum(-1) for t in query], 1)


def count_parameters(model: TwoTower) -> dict[str, int]:
    """{"embedding": numbers in the rows of embedding tables that are in use, "dense": all outside of tables}."""
    in_tables = sum(p.numel() for p in model.embedding_tables())
    in_use = sum(m.known_parameters() for m in model.feature_embeddings())
    return {"embedding": in_use, "dense": sum(p.numel() for p in model.parameters()) - in_tables}
