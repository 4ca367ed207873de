"""The query and the item tower: one domain expert a surface or a product (paper section 2.2).

Shapes: B rows of a batch, T tasks, D width of a task's embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtmd_model.batch import TowerInput
from mtmd_model.config import MTMDConfig
from mtmd_model.domain_adaptation import DomainAdaptation
from mtmd_model.domain_expert import DomainExpert
from mtmd_model.domain_norm import DomainNorm
from mtmd_model.embeddings import FeatureEmbeddings
from mtmd_model.ffn import FFN
from mtmd_model.main_effects import tower_end
from mtmd_model.partial_pooling import Counterpart
from mtmd_model.schema import Schema, Side
from mtmd_model.slices import tasks_of

FILLED = 64
"""In bf16 on a CPU a domain's rows are filled up to a multiple of it: oneDNN prepares a product anew for every number of
rows, which takes longer than the product."""


def module_key(name: str) -> str:
    """A name as a key of a ModuleDict, which takes no dot and no attribute of its own (`items`, `type` …)."""
    return "=" + name.replace("%", "%25").replace(".", "%2E")


@dataclass(frozen=True)
class TowerOutput:
    """What a tower makes of a batch."""

    embeddings: dict[str, Tensor]
    """Task -> (B, D) emb_deep ∥ emb_shallow, behind the end of the tower (`main_effects`); zero for a task that the row's
    domain does not have."""
    gates: dict[str, Tensor]
    """Domain -> (tasks of the domain, rows of the domain, experts), of the domains that have rows."""


class Tower(nn.Module):
    """Rows sorted by domain, each run by its own domain's expert only, and put back in their places.

    A domain without rows is not touched, and no gradient reaches it. The domain-shared expert runs once, on
    all rows.

    Args:
        side: query (a domain is a surface) or item (a product).
        schema: domains, tasks and features.
        rows: rows of each categorical feature's vocabulary, by feature.
        config: widths and sizes.
    """

    def __init__(self, side: Side, schema: Schema, rows: Mapping[str, int], config: MTMDConfig) -> None:
        super().__init__()
        self.side = side
        self.domains = schema.domains(side)
        self.tasks = {d: tuple(t.name for t in tasks_of(schema, side, d)) for d in self.domains}
        deep_width = {t.name: config.embedding_width(t) for t in schema.tasks}
        shallow_width = config.shallow[-1] if "shallow" in config.experts else 0
        self.widths = {task: deep + shallow_width for task, deep in deep_width.items()}
        self.effects = tower_end(side, schema, self.widths, config.main_effects)
        self.stored_widths = self.effects.widths
        """Task -> columns of its vector, without the bias coordinates."""

        features = schema.side(side)
        self.dense = dense = tuple(f for f in features if f.kind == "dense")
        categorical = tuple(f for f in features if f.kind == "categorical")
        self.embeddings = FeatureEmbeddings(categorical, rows, self.domains, config.embedding_std)
        self.adaptation = nn.ModuleDict()
        self.expert = nn.ModuleDict()
        for d in self.domains:
            adaptation = DomainAdaptation(d, dense, self.embeddings.fields, config)
            deep_widths = tuple(deep_width[t] for t in self.tasks[d])
            self.adaptation[module_key(d)] = adaptation
            self.expert[module_key(d)] = DomainExpert(deep_widths, adaptation.d_own, adaptation.d_key, config)
        self.mixed = config.mixed
        self.domain_shared = None
        if "domain_shared" in config.mixed:
            self.domain_shared = FFN(adaptation.d_common, config.deep, config.dropout)
        # the ablation: one normalisation for all rows, whatever their domain
        self.norm = (
            None if config.domain_norm else DomainNorm([True] * len(dense), config.norm_clip, config.norm_horizon)
        )

    def forward(self, x: TowerInput) -> TowerOutput:
        """(B, ...) columns -> every task's embedding."""
        if not len(x):
            like = next(self.parameters())
            return TowerOutput({task: like.new_zeros(0, width) for task, width in self.stored_widths.items()}, {})
        groups = x.grouped(len(self.domains))
        dense_BF = x.dense.index_select(0, groups.order_B)
        if self.norm is not None:
            dense_BF = self.norm(dense_BF)
        ids_BC = x.ids.index_select(0, groups.order_B)
        embedded_BW = self.embeddings(ids_BC, x.domain.index_select(0, groups.order_B))

        counts = list(groups.counts)
        blocks = zip(self.domains, dense_BF.split(counts), embedded_BW.split(counts), strict=True)
        adapted = {
            d: self.adaptation[module_key(d)](*self._filled(dense, embedded))
            for d, dense, embedded in blocks
            if len(dense)
        }
        common_BS = torch.cat([a.common_BS for a in adapted.values()])
        shared_BH = common_BS[:, :0] if self.domain_shared is None else self.domain_shared(common_BS)
        shared = dict(zip(adapted, shared_BH.split([len(a.own_BD) for a in adapted.values()]), strict=True))
        rows = dict(zip(self.domains, counts, strict=True))
        outputs = {d: self.expert[module_key(d)](adapted[d], shared[d]).first(rows[d]) for d in adapted}

        sorted_BW = torch.cat([self._all_tasks(d, out.embedding_BW) for d, out in outputs.items()])
        embedding_BW = _Permute.apply(sorted_BW, groups.inverse_B, groups.order_B)
        parts = embedding_BW.split(list(self.widths.values()), 1)
        embeddings = self.effects(dict(zip(self.widths, parts, strict=True)), x.domain)
        return TowerOutput(embeddings, {d: out.gates_TBE for d, out in outputs.items()})

    def counterparts(self) -> list[dict[str, Counterpart]]:
        """Each domain's parameters by the part they play (see `partial_pooling`)."""
        numbers = {task: n for n, task in enumerate(self.widths)}
        out = []
        for d in self.domains:
            adaptation, expert = self.adaptation[module_key(d)], self.expert[module_key(d)]
            assert isinstance(adaptation, DomainAdaptation)
            assert isinstance(expert, DomainExpert)
            tasks = [numbers[t] for t in self.tasks[d]]
            of_expert = expert.counterparts(tasks, len(numbers), adaptation.own_columns, adaptation.key_columns)
            out.append(
                {f"adaptation.{n}": c for n, c in adaptation.counterparts().items()}
                | {f"expert.{n}": c for n, c in of_expert.items()}
            )
        return out

    def statistics(self, domain: str) -> tuple[list[float], list[float], list[float]]:
        """Mean, variance and count of each of the tower's dense features in a domain."""
        norm = self.adaptation[module_key(domain)].norm if self.norm is None else self.norm
        assert isinstance(norm, DomainNorm)
        return norm.mean.tolist(), norm.var.tolist(), norm.count.tolist()

    def normalisation(self) -> dict[str, dict[str, dict[str, float]]]:
        """Domain -> dense feature that it has -> {mean, std, count} of its observed values, for people to read."""
        return {
            domain: {
                f.name: {"mean": mean, "std": var**0.5, "count": int(count)}
                for f, mean, var, count in zip(self.dense, *self.statistics(domain), strict=True)
                if domain in f.domains
            }
            for domain in self.domains
        }

    def _filled(self, dense_BF: Tensor, embedded_BW: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, on a CPU in bf16 with rows of nothing after them up to a multiple of `FILLED`."""
        if dense_BF.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return dense_BF, embedded_BW
        lack = (0, 0, 0, -len(dense_BF) % FILLED)
        # missing values are in no statistics; behind the norm that all domains share a number has to stand
        missing = math.nan if self.norm is None else 0.0
        return F.pad(dense_BF, lack, value=missing), F.pad(embedded_BW, lack)

    def _all_tasks(self, domain: str, embedding_BW: Tensor) -> Tensor:
        """A domain's embeddings among zeros for the tasks it lacks, so that all domains have one width."""
        have = self.tasks[domain]
        if len(have) == len(self.widths):
            return embedding_BW
        parts = dict(zip(have, embedding_BW.split([self.widths[t] for t in have], 1), strict=True))
        rows = len(embedding_BW)
        return torch.cat([parts.get(t, embedding_BW.new_zeros(rows, w)) for t, w in self.widths.items()], 1)


class _Permute(torch.autograd.Function):
    """x[order]; the gradient is g[inverse], a gather, where autograd would scatter row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None
