"""The domain expert: a mixture of deep, shallow and shared experts for each task (paper section 2.1).

Shapes: B rows of one domain, T tasks of the domain, H width of an expert's output; D and K as in
`domain_adaptation.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtmd_model.config import MTMDConfig
from mtmd_model.cross import LowRankCross
from mtmd_model.domain_adaptation import Adapted
from mtmd_model.ffn import GroupedFFN, GroupedLayerNorm, short_projection
from mtmd_model.partial_pooling import Counterpart


@dataclass(frozen=True)
class ExpertOutput:
    """One domain's rows."""

    embedding_BW: Tensor
    """The tasks' emb_deep ∥ emb_shallow, one task after another."""
    gates_TBE: Tensor
    """The experts' weights, in the order of `MTMDConfig.mixed`."""

    def first(self, rows: int) -> "ExpertOutput":
        """Of the first rows only."""
        if rows == len(self.embedding_BW):
            return self  # the gradient of a slice is a copy
        return ExpertOutput(self.embedding_BW[:rows], self.gates_TBE[:, :rows])


class DomainExpert(nn.Module):
    """emb_deep = W DCN(LayerNorm(g_1 deep ∥ g_2 task_shared ∥ g_3 domain_shared)), and emb_shallow beside it.

    The deep experts of all tasks and the task-shared expert have one shape and one input: they run as one
    grouped network. The domain-shared expert belongs to the tower, which passes its output in.

    Args:
        widths: emb_deep's width of each task that exists in this domain.
        d_own: width of the domain's own layout.
        d_key: width of its key layout.
        config: widths of the experts, place of the LayerNorm, rank of the cross layers.
    """

    def __init__(self, widths: tuple[int, ...], d_own: int, d_key: int, config: MTMDConfig) -> None:
        super().__init__()
        self.tasks, self.mixed = len(widths), config.mixed
        d_mixed = len(self.mixed) * config.deep[-1]
        tasks = self.tasks
        self.norm_place = config.norm
        self.own_experts = tasks * ("deep" in self.mixed) + ("task_shared" in self.mixed)
        if self.own_experts:
            self.deep_and_task_shared = GroupedFFN(self.own_experts, d_own, config.deep, dropout=config.dropout)
        self.shallow = (
            GroupedFFN(tasks, d_key, config.shallow, dropout=config.dropout) if "shallow" in config.experts else None
        )
        self.router = GroupedFFN(tasks, d_own, config.router, d_out=len(self.mixed)) if config.routing else None
        self.norm = GroupedLayerNorm(tasks, d_mixed) if config.norm != "none" else nn.Identity()
        rank = max(1, round(d_mixed * config.cross_rank))
        self.cross = LowRankCross(tasks, d_mixed, config.cross_layers, rank)
        self.project = nn.ModuleList(short_projection(d_mixed, width) for width in widths)

        if self.router is not None and self.router.out is not None:
            # experts are weighed equally until there is evidence
            nn.init.zeros_(self.router.out.weight)
            nn.init.zeros_(self.router.out.bias)
        if self.shallow is not None:
            # emb_shallow starts short too
            with torch.no_grad():
                last = self.shallow.norms[-1]
                assert isinstance(last, GroupedLayerNorm)
                last.weight.mul_(0.5 * config.shallow[-1] ** -0.5)

    def forward(self, x: Adapted, domain_shared_BH: Tensor) -> ExpertOutput:
        """The adapted rows and the tower's shared expert's output for them."""
        gates_TBE = self.gates(x.own_BD)
        outputs = self._outputs(x.own_BD, domain_shared_BH)
        # in the experts' type: products of bf16 and fp32 would make the cross layers fp32, at twice the time
        weights = gates_TBE.to(outputs[0].dtype).split(1, -1)
        mixed_TBM = torch.cat([g_TB1 * output for g_TB1, output in zip(weights, outputs, strict=True)], -1)

        pre = self.norm_place == "pre"
        crossed_TBM = self.cross(self.norm(mixed_TBM)) if pre else self.norm(self.cross(mixed_TBM))
        parts = [project(crossed_BM) for project, crossed_BM in zip(self.project, crossed_TBM.unbind(), strict=True)]
        if self.shallow is not None:
            # a task's two parts side by side
            parts = [part for pair in zip(parts, self.shallow(x.key_BK).unbind(), strict=True) for part in pair]
        return ExpertOutput(torch.cat(parts, 1), gates_TBE)

    def _outputs(self, own_BD: Tensor, domain_shared_BH: Tensor) -> list[Tensor]:
        """Each kind's output, (T, B, H) or the same for all tasks, (B, H)."""
        own_EBH = self.deep_and_task_shared(own_BD) if self.own_experts else None
        found = {"domain_shared": domain_shared_BH}
        if own_EBH is not None:
            found |= {"deep": own_EBH[: self.tasks], "task_shared": own_EBH[-1]}
        return [found[kind].expand(self.tasks, -1, -1) for kind in self.mixed]

    def counterparts(
        self, tasks: Sequence[int], every_task: int, own_columns: Sequence[int], key_columns: Sequence[int]
    ) -> dict[str, Counterpart]:
        """Its parameters among those of the tower's other domains, by task and feature.

        Args:
            tasks: numbers of its tasks.
            every_task: how many tasks the platform has.
            own_columns: of its own layout in the common one.
            key_columns: of its key layout in the common one.
        """
        first = {"deep_and_task_shared": own_columns, "router": own_columns, "shallow": key_columns}
        out: dict[str, Counterpart] = {}
        for name, p in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "project":
                place, _, kind = rest.partition(".")
                out[f"project.task {tasks[int(place)]}.{kind}"] = Counterpart(p, (None,) * p.dim())
                continue
            networks = tasks
            if part == "deep_and_task_shared":
                networks = [
                    *tasks[: self.tasks * ("deep" in self.mixed)],
                    *[every_task] * ("task_shared" in self.mixed),
                ]
            columns = first[part] if part in first and rest == "linears.0.weight" else None
            out[name] = Counterpart(p, (networks, columns, *(None,) * (p.dim() - 2)))
        return out

    def gates(self, own_BD: Tensor) -> Tensor:
        """(B, D) -> (T, B, experts), each row's weights, in fp32 at least, also under autocast."""
        if self.router is None:
            return own_BD.new_full((self.tasks, len(own_BD), len(self.mixed)), 1 / len(self.mixed))
        with torch.autocast(own_BD.device.type, enabled=False):
            logits_TBE = self.router(own_BD.to(torch.promote_types(own_BD.dtype, torch.float32)))
            return logits_TBE.softmax(-1)
