"""MTMD: the two-tower of domain experts (paper section 2).

Shapes: B rows, T tasks, S surfaces, P products, D width of a task's stored vector.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtmd_model.batch import Batch, TowerInput
from mtmd_model.config import MTMDConfig
from mtmd_model.partial_pooling import Counterpart
from mtmd_model.routing import routing_summary
from mtmd_model.schema import Schema
from mtmd_model.side_by_side import side_by_side
from mtmd_model.towers import Tower
from mtmd_model.two_tower import TwoTower


class MTMD(TwoTower):
    """Query tower over surfaces, item tower over products, a dot product a task.

    A stored vector is emb_deep ∥ emb_shallow ∥ P constant coordinates. The constants fold a learned bias of
    each task and slice into the dot product: the query's are its surface's biases over the products, the
    item's are its product, one-hot. In the paper preset a stored vector is 128 + 64 + P wide for ctr and
    32 + 64 + P for a conditional task, one wider with main effects.

    Args:
        schema: domains, tasks (parents first) and features.
        rows: rows of each categorical feature's vocabulary, by feature (`Encoder.rows`).
        config: sizes and switches.

    Raises:
        ValueError: a task exists where its parent does not, or a domain has no feature or no task.
    """

    def __init__(self, schema: Schema, rows: Mapping[str, int], config: MTMDConfig) -> None:
        super().__init__(schema, config.constrained)
        self.config = config
        self.query_tower = Tower("query", schema, rows, config)
        self.item_tower = Tower("item", schema, rows, config)

    def embed_query(self, query: TowerInput) -> dict[str, Tensor]:
        """Task -> (B, D), the vectors to store: emb_deep ∥ emb_shallow ∥ the surface's biases."""
        return self.bias.append_to_query(self.query_tower(query).embeddings, query.domain)

    def embed_item(self, item: TowerInput) -> dict[str, Tensor]:
        """Task -> (B, D), the vectors to store: emb_deep ∥ emb_shallow ∥ the product, one-hot."""
        return self.bias.append_to_item(self.item_tower(item).embeddings, item.domain)

    def embed(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both sides' vectors of the same rows; in training on a CPU both towers at once (`side_by_side`)."""
        if not self._at_once(batch):
            return super().embed(batch)
        query, item = side_by_side(
            lambda: list(self.embed_query(batch.query).values()), lambda: list(self.embed_item(batch.item).values())
        )
        names = self.query_tower.widths
        return dict(zip(names, query, strict=True)), dict(zip(names, item, strict=True))

    def _at_once(self, batch: Batch) -> bool:
        """Whether the towers gain by it and may: dropout draws from one generator, and a process group hooks into one
        pass backward."""
        return (
            batch.labels.device.type == "cpu"
            and torch.is_grad_enabled()
            and torch.get_num_threads() > 1
            and not self.config.dropout
            and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        )

    def domains(self) -> list[list[dict[str, Counterpart]]]:
        """Each tower's domains, to be pooled in training."""
        return [self.query_tower.counterparts(), self.item_tower.counterparts()]

    def normalisation(self) -> dict[str, Any]:
        """Tower -> domain -> dense feature -> {mean, std, count} of its observed values."""
        return {tower.side: tower.normalisation() for tower in (self.query_tower, self.item_tower)}

    def routing(self, batches: Iterable[Batch]) -> list[dict[str, Any]]:
        """How the experts are weighed: see `routing.routing_summary`."""
        was_training = self.training
        self.eval()
        try:
            return routing_summary(self.query_tower, self.item_tower, batches)
        finally:
            self.train(was_training)
