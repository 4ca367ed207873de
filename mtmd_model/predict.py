"""A trained model at work: probabilities and the vectors to store.

Shapes: N rows, D width of a task's stored vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtmd_model.batch import PREDICTED_ROWS
from mtmd_model.encoder import Encoder
from mtmd_model.schema import Schema, Side
from mtmd_model.slices import existing_slices, tasks_of
from mtmd_model.two_tower import TwoTower


class Embeddings(NamedTuple):
    """One task's vectors of one side."""

    vectors: NDArray[np.float32]
    """(N, D)."""
    exists: NDArray[np.bool_]
    """(N,), whether the row's surface or product has the task; elsewhere the vector means nothing."""


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode, its encoder, and the manifest it was stored with.

    A row's numbers do not depend on the rows beside it.
    """

    model: TwoTower
    encoder: Encoder
    manifest: Mapping[str, Any]
    device: str = "cpu"
    batch_size: int = PREDICTED_ROWS

    @property
    def schema(self) -> Schema:
        """Of the platform it was trained for."""
        return self.encoder.schema

    def routing(self, table: pa.Table) -> list[dict[str, Any]]:
        """How the experts are weighed on a table's rows: see `routing.routing_summary`.

        Raises:
            ValueError: as `Encoder.encode`, or a model without routing layers.
        """
        rows = self.encoder.encode(table, labels=False)
        starts = range(0, len(rows), self.batch_size)
        return self.model.routing(rows.slice(s, s + self.batch_size) for s in starts)

    def predict(self, table: pa.Table) -> dict[str, NDArray[np.float64]]:
        """Task -> (N,) P(task | impression), NaN where the task does not exist in the row's slice.

        From the float32 vectors that are stored, by a dot product in float64: SQL over stored vectors gives
        the same numbers.

        Raises:
            ValueError: as `Encoder.encode`.
        """
        return {task: np.exp(log_p) for task, log_p in self.log_probability(table).items()}

    def log_probability(self, table: pa.Table) -> dict[str, NDArray[np.float64]]:
        """Task -> (N,) ln P(task | impression), NaN where the task does not exist; exact near zero."""
        rows = self.encoder.encode(table, labels=False)
        exists_TN = existing_slices(self.encoder.schema)[:, rows.query.domain, rows.item.domain].numpy()
        logits: dict[str, list[NDArray[np.float64]]] = {t.name: [] for t in self.encoder.schema.tasks}
        with torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                batch = rows.slice(start, start + self.batch_size)
                query, item = self.model.embed(batch.to(self.device))
                for task, parts in logits.items():
                    q, i = _stored(query[task]), _stored(item[task])
                    parts.append(np.einsum("nd,nd->n", q.astype(np.float64), i.astype(np.float64)))

        out: dict[str, NDArray[np.float64]] = {}
        for spec, exists_N in zip(self.encoder.schema.tasks, exists_TN, strict=True):
            z_N = np.concatenate(logits[spec.name]) if len(rows) else np.zeros(0)
            log_N = -np.logaddexp(0, -z_N)
            if self.model.constrained and spec.given is not None:
                log_N = log_N + out[spec.given]
            out[spec.name] = np.where(exists_N, log_N, np.nan)
        return out

    def embed_queries(self, table: pa.Table) -> dict[str, Embeddings]:
        """Task -> the query vectors to store; needs `surface` and the query features only."""
        return self._embed(table, "query")

    def embed_items(self, table: pa.Table) -> dict[str, Embeddings]:
        """Task -> the item vectors to store; needs `product` and the item features only."""
        return self._embed(table, "item")

    def _embed(self, table: pa.Table, side: Side) -> dict[str, Embeddings]:
        rows = self.encoder.encode_side(table, side)
        embed = self.model.embed_query if side == "query" else self.model.embed_item
        schema = self.encoder.schema
        found: dict[str, NDArray[np.float32]] = {}
        with torch.inference_mode():
            # an empty batch too, so that the widths are known without rows
            for start in range(0, max(1, len(rows)), self.batch_size):
                vectors = embed(rows.slice(start, start + self.batch_size).to(self.device))
                for task in (t.name for t in schema.tasks):
                    block = _stored(vectors[task])
                    whole = found.setdefault(task, np.empty((len(rows), block.shape[1]), np.float32))
                    whole[start : start + len(block)] = block
        has = {d: {t.name for t in tasks_of(schema, side, d)} for d in schema.domains(side)}
        domain_N = rows.domain.numpy()
        out = {}
        for task, vectors_ND in found.items():
            known = np.array([task in has[d] for d in schema.domains(side)])
            out[task] = Embeddings(vectors_ND, known[domain_N])
        return out


def _stored(vector: Tensor) -> NDArray[np.float32]:
    """What the embedding tables hold."""
    return vector.float().cpu().numpy()
