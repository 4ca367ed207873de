"""The training and validation step of any two-tower ranker.

Shapes: B rows, T tasks, S surfaces, P products.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from mtmd_model.averaging import WeightAverage
from mtmd_model.batch import Batch
from mtmd_model.id_dropout import IdDropout
from mtmd_model.loss import kl_divergence, kl_loss
from mtmd_model.metrics import FLOOR
from mtmd_model.partial_pooling import PartialPooling
from mtmd_model.two_tower import TwoTower


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its learning rate.

    Raises:
        ValueError: a value that no run can have.
    """

    learning_rate: float = 2e-3
    """Highest learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to `final_share` at the last epoch, or level."""
    warmup_share: float = 0.05
    """Share of all steps in which the learning rate rises from zero."""
    final_share: float = 0.02
    """The cosine's last learning rate, as a share of the highest."""
    weight_decay: float = 0.01
    """Of the matrices; norms and biases have none."""
    embedding_weight_decay: float = 0.01
    """Of the embedding tables."""
    embedding_rate: float = 1.0
    """Learning rate of the embedding tables, as a multiple of `learning_rate`; AdamW's decay grows with it."""
    deviation: float | None = 0.1
    """Learning rate at which a domain's expert leaves the one common to all, as a share of the common one's
    (`partial_pooling`); None trains the experts without regard to each other. A model without domain modules has
    nothing to pool."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above 0, got {self.learning_rate!r}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', got {self.schedule!r}")
        for name in ("warmup_share", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        both = self.weight_decay, self.embedding_weight_decay
        if not all(0 <= decay < math.inf for decay in both):
            raise ValueError(f"weight decays must be 0 or more, got {both}")
        if not 0 < self.embedding_rate < math.inf:
            raise ValueError(f"embedding_rate must be a finite number above 0, got {self.embedding_rate!r}")
        if self.deviation is not None and not 0 <= self.deviation < math.inf:
            raise ValueError(f"deviation must be None or 0 or more, got {self.deviation!r}")

    def share(self, step: int, steps: int) -> float:
        """The learning rate at a step out of all, as a share of the highest."""
        warmup = max(1, round(self.warmup_share * steps))
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * done)) / 2


class RankerModule(L.LightningModule):
    """KL to the heavyweight scores; validation by KL and by mean LogMAE over the slice x task cells.

    Args:
        model: any two-tower ranker.
        optimiser: AdamW and its learning rate.
        slice_factor_SP: (S, P) factors of the rows' weights in the losses (`slice_balance`); 1 if None.
        id_dropout: probability that training takes a known id for an unknown one (`id_dropout`).
        averaged_passes: memory of the averaged weights that are validated and stay at the end (`averaging`); 0 for those
            of the last step.
    """

    def __init__(
        self,
        model: TwoTower,
        optimiser: OptimiserConfig,
        slice_factor_SP: Tensor | None = None,
        id_dropout: float = 0.0,
        averaged_passes: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.averaged_passes = averaged_passes
        self.average: WeightAverage | None = None
        self.id_dropout = IdDropout(model.schema, id_dropout)
        self.optimiser = optimiser
        self.history: list[dict[str, Any]] = []
        """One entry an epoch: epoch, train_loss, validation_loss, validation_logmae."""
        schema = model.schema
        weights = torch.tensor([t.weight for t in schema.tasks])
        slices = len(schema.surfaces) * len(schema.products)
        factor_S = torch.ones(slices) if slice_factor_SP is None else slice_factor_SP.flatten().float()
        self.register_buffer("task_weight_T", weights, persistent=False)
        self.register_buffer("slice_factor_S", factor_S, persistent=False)
        # sums over the epoch stay on the device: a number asked for at every step would stall it
        self.register_buffer("train_sum", torch.zeros(2, dtype=torch.float64), persistent=False)
        self.register_buffer("slice_sum", torch.zeros(2, slices, dtype=torch.float64), persistent=False)
        cells = torch.zeros(2, slices, len(schema.tasks), dtype=torch.float64)
        self.register_buffer("cell_sum", cells, persistent=False)

    task_weight_T: Tensor
    slice_factor_S: Tensor
    train_sum: Tensor
    slice_sum: Tensor
    """Loss times weight, and weight, of each slice."""
    cell_sum: Tensor

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The batch's loss, a scalar."""
        weight_B = batch.weight * self.slice_factor_S[self._slice(batch)]
        loss = kl_loss(self.model(self.id_dropout(batch)).float(), batch.labels, weight_B, self.task_weight_T)
        weight = weight_B.sum()
        self.train_sum += torch.stack([loss.detach() * weight, weight])
        return loss

    def on_train_start(self) -> None:
        """The parameters are where they are trained, and the number of steps is known."""
        if self.averaged_passes:
            steps = max(1.0, float(self.trainer.num_training_batches))
            self.average = WeightAverage(self.model, max(1.0, self.averaged_passes * steps))

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        """A step is done."""
        if self.average is not None:
            self.average.update()

    def on_train_epoch_end(self) -> None:
        """The callbacks have seen the epoch's weights: training goes on with its own."""
        if self.average is not None:
            self.average.take_out()

    def on_train_end(self) -> None:
        """Without validation the weights at the end are kept; after this they leave the device."""
        if self.average is not None:
            self.average.put_in()
            self.average = None

    def on_validation_epoch_start(self) -> None:
        """Start the sums; what is validated is what would be kept."""
        if self.average is not None:
            self.average.put_in()
        self.slice_sum.zero_()
        self.cell_sum.zero_()

    def validation_step(self, batch: Batch, index: int) -> None:
        """Add the batch to the sums."""
        with torch.autocast(self.device.type, enabled=False):
            z_BT, t_BT = self.model(batch).double(), batch.labels.double()
        exists_BT = ~t_BT.isnan()
        weight_B = batch.weight.double()
        weight_B1 = weight_B[:, None]
        loss_B = kl_divergence(z_BT, t_BT) @ self.task_weight_T.double()
        error_BT = (F.logsigmoid(z_BT).clamp_min(math.log(FLOOR)) - t_BT.clamp_min(FLOOR).log()).abs()
        slice_B = self._slice(batch)
        in_loss_B = weight_B * self.slice_factor_S[slice_B]
        self.slice_sum[0].index_add_(0, slice_B, loss_B * in_loss_B)
        self.slice_sum[1].index_add_(0, slice_B, in_loss_B)
        self.cell_sum[0].index_add_(0, slice_B, torch.where(exists_BT, error_BT, 0) * weight_B1)
        self.cell_sum[1].index_add_(0, slice_B, exists_BT * weight_B1)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's validation loss and LogMAE."""
        errors, weights = self.cell_sum
        cell_logmae = (errors / weights)[weights > 0]
        loss, weight = self.slice_sum.sum(1)
        self.log("validation_loss", loss / weight, prog_bar=True)
        self.log("validation_logmae", cell_logmae.mean(), prog_bar=True)

    def _slice(self, batch: Batch) -> Tensor:
        """(B,) the number of each row's slice."""
        return batch.query.domain * len(self.model.schema.products) + batch.item.domain

    def slice_loss(self, slices: Sequence[tuple[int, int]]) -> float:
        """The last validation loss of some slices, given by the numbers of surface and product; NaN without rows."""
        products = len(self.model.schema.products)
        loss, weight = self.slice_sum[:, [s * products + p for s, p in slices]].sum(1).tolist()
        return loss / weight if weight else math.nan

    def finish_epoch(self) -> dict[str, Any]:
        """Add the epoch to the history and return its entry; called once, when it and its validation end."""
        entry: dict[str, Any] = {"epoch": self.current_epoch}
        entry["train_loss"] = (self.train_sum[0] / self.train_sum[1]).item()
        for name in ("validation_loss", "validation_logmae"):
            value = self.trainer.callback_metrics.get(name)
            entry[name] = None if value is None else value.item()
        self.history.append(entry)
        self.train_sum.zero_()
        return entry

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient by its norm; that of each separate part (`TwoTower.separate_parts`) by its own."""
        if gradient_clip_val is not None:
            for parameters in self._clipped_together():
                torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def _clipped_together(self) -> list[list[torch.nn.Parameter]]:
        """Each part's parameters, and the rest."""
        prefixes = tuple(self.model.separate_parts())
        of_part: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            of_part.setdefault(next((p for p in prefixes if name.startswith(p)), ""), []).append(parameter)
        return list(of_part.values())

    def configure_optimizers(self) -> Any:
        """AdamW, with the learning rate set at every step."""
        tables, matrices = self.model.embedding_tables(), self.model.matrices()
        decaying = {id(p) for p in [*tables, *matrices]}
        others = [p for p in self.model.parameters() if id(p) not in decaying]
        lr = self.optimiser.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.optimiser.weight_decay},
            {
                "params": tables,
                "weight_decay": self.optimiser.embedding_weight_decay,
                "lr": lr * self.optimiser.embedding_rate,
            },
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        fused = self.device.type in ("cpu", "cuda")
        towers = self.model.domains()
        adamw: torch.optim.Optimizer
        if towers and self.optimiser.deviation is not None:
            adamw = PartialPooling(groups, towers, lr, self.optimiser.deviation, fused)
        else:
            # Lightning does not clip the gradients of torch's fused AdamW under mixed precision
            adamw = torch.optim.AdamW(groups, lr=lr, fused=fused and self.trainer.precision == "32-true")
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: self.optimiser.share(step, steps))
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
