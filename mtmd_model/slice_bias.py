"""A learned bias of every task and slice, folded into the dot product.

Shapes: B rows, T tasks, S surfaces, P products.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtmd_model.schema import Schema
from mtmd_model.slices import existing_slices


class SliceBias(nn.Module):
    """Constant coordinates of the stored vectors: the query's are its surface's biases over the products, the
    item's are its product, one-hot; their dot product is the slice's bias.

    Every contender has one, so that serving stays a pure dot product and none has to learn a slice's level.

    Raises:
        ValueError: see `slices.existing_slices`.
    """

    exists_TSP: Tensor

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        exists_TSP = existing_slices(schema)
        self.logits_TSP = nn.Parameter(torch.zeros(exists_TSP.shape))
        self.register_buffer("exists_TSP", exists_TSP, persistent=False)

    def set(self, logits_TSP: Tensor) -> None:
        """Start from these logits of P(task | given)."""
        with torch.no_grad():
            self.logits_TSP.copy_(logits_TSP)

    def append_to_query(self, vectors: Mapping[str, Tensor], surface_B: Tensor) -> dict[str, Tensor]:
        """Task -> (B, D) and (B,) surfaces -> task -> (B, D + P); the bias of a task that does not exist is zero."""
        bias_TBP = (self.logits_TSP * self.exists_TSP)[:, surface_B]
        pairs = zip(vectors.items(), bias_TBP.unbind(), strict=True)
        return {task: torch.cat([e_BD, b_BP], 1) for (task, e_BD), b_BP in pairs}

    def append_to_item(self, vectors: Mapping[str, Tensor], product_B: Tensor) -> dict[str, Tensor]:
        """Task -> (B, D) and (B,) products -> task -> (B, D + P)."""
        one_hot_BP = F.one_hot(product_B, self.logits_TSP.shape[2]).to(self.logits_TSP.dtype)
        return {task: torch.cat([e_BD, one_hot_BP], 1) for task, e_BD in vectors.items()}
