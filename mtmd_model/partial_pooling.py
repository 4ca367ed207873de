"""Partial pooling: a domain's expert is trained as an expert common to all domains plus a deviation of its own.

A domain with few rows cannot learn millions of weights, and its embeddings have to meet those of the other tower,
which learns from every domain. So theta_d = theta_0 + delta_d for each of its weights: theta_0 follows the sum of all
domains' gradients at the full learning rate, delta_d its own domain's at a share of it, from zero. Share 0 is one
expert for all domains (each with its own statistics), a large one the unrelated experts of the paper.

It is a way to train. The model holds the sums only, and is the paper's when it is stored and when it serves.

Reference: Evgeniou and Pontil, Regularized multi-task learning, KDD 2004, https://doi.org/10.1145/1014052.1014067
(section 2: w_t = w_0 + v_t).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Axis = Sequence[int] | None
"""The common layout's number of each entry along one dimension; None if they are numbered alike."""


@dataclass(frozen=True)
class Counterpart:
    """A parameter of one domain, and where its entries lie in the layout common to all domains.

    Domains may lack features and tasks that others have: a weight of one has its counterpart where feature, task and
    unit are the same.
    """

    parameter: nn.Parameter
    axes: tuple[Axis, ...]

    def indices(self) -> list[Tensor]:
        """One vector of numbers a dimension."""
        sizes = zip(self.axes, self.parameter.shape, strict=True)
        return [torch.arange(size) if axis is None else torch.tensor(axis) for axis, size in sizes]


Domain = Mapping[str, Counterpart]
"""A domain's parameters by the name of the part they play, the same in every domain."""


class PartialPooling(torch.optim.Optimizer):
    """AdamW over theta_0 and delta_d; over all other parameters as they are.

    A domain without rows in a batch leaves its deviation untouched.

    Args:
        groups: all parameters as AdamW takes them, each group with a weight decay.
        towers: each tower's domains.
        lr: learning rate of the common weights.
        share: the deviations' learning rate, as a share of it.
        fused: AdamW's fused kernel.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        towers: Sequence[Sequence[Domain]],
        lr: float,
        share: float,
        fused: bool,
    ) -> None:
        super().__init__([dict(g) for g in groups], {"lr": lr})
        self.blocks: list[_Block] = []
        inner: list[dict[str, Any]] = []
        for group in groups:
            of_group = {id(p) for p in group["params"]}
            pooled: set[int] = set()
            for domains in towers:
                mine = [{n: c for n, c in d.items() if id(c.parameter) in of_group} for d in domains]
                if any(mine):
                    block = _Block(mine)
                    pooled |= {id(c.parameter) for d in mine for c in d.values()}
                    self.blocks.append(block)
                    decay = group["weight_decay"]
                    inner.append({"params": [block.common], "weight_decay": decay, "share": 1.0})
                    inner.append({"params": block.deviations, "weight_decay": decay, "share": share})
            alone = [p for p in group["params"] if id(p) not in pooled]
            if alone:
                inner.append({"params": alone, "weight_decay": group["weight_decay"], "share": 1.0})
        self.inner = torch.optim.AdamW(inner, lr=lr, fused=fused)
        for block in self.blocks:
            block.write()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of AdamW, after which each domain's parameters are the new sums."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for block in self.blocks:
            block.read_gradients()
        lr = self.param_groups[0]["lr"]
        for group in self.inner.param_groups:
            group["lr"] = lr * group["share"]
        self.inner.step()
        for block in self.blocks:
            block.write()
        return loss


class _Block:
    """Some parameters of a tower's domains, flat: the common ones, and each domain's deviations."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self.parameters = [[c.parameter for c in d.values()] for d in domains]
        device = next(p.device for parameters in self.parameters for p in parameters)
        indices = [{name: c.indices() for name, c in d.items()} for d in domains]
        start, places = 0, [dict[str, Tensor]() for _ in domains]
        for name in dict.fromkeys(name for d in domains for name in d):
            have = [(place, found[name]) for place, found in zip(places, indices, strict=True) if name in found]
            shape = [max(int(i.max()) + 1 for i in axis) for axis in zip(*(i for _, i in have), strict=True)]
            for place, index in have:
                place[name] = start + _flat(index, shape)
            start += int(torch.tensor(shape).prod())
        ordered = [[place[name] for name in d] for d, place in zip(domains, places, strict=True)]
        self.places = [torch.cat(p).to(device) if p else torch.zeros(0, dtype=torch.long) for p in ordered]
        # a domain that lacks nothing has the common layout itself: no gather, which would cost as much as the model
        self.whole = [torch.equal(place, torch.arange(start, device=place.device)) for place in self.places]
        with torch.no_grad():
            common = torch.zeros(start, device=device)
            # the first domain that has an entry decides where all start
            for parameters, flat in reversed(list(zip(self.parameters, self.places, strict=True))):
                if parameters:
                    common[flat] = torch.cat([p.flatten() for p in parameters])
        self.common = nn.Parameter(common)
        self.deviations = [nn.Parameter(torch.zeros(len(place), device=device)) for place in self.places]

    def read_gradients(self) -> None:
        """delta_d's gradient is its domain's, theta_0's the sum of all."""
        total: Tensor | None = None
        for d, (parameters, deviation) in enumerate(zip(self.parameters, self.deviations, strict=True)):
            deviation.grad = None
            if any(p.grad is not None for p in parameters):
                parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
                deviation.grad = torch.cat(parts)
                total = torch.zeros_like(self.common) if total is None else total
                if self.whole[d]:
                    total += deviation.grad
                else:
                    total.index_add_(0, self.places[d], deviation.grad)
        self.common.grad = total

    @torch.no_grad()
    def write(self) -> None:
        """Each domain's parameters become theta_0 + delta_d."""
        for d, (parameters, deviation) in enumerate(zip(self.parameters, self.deviations, strict=True)):
            if parameters:
                common = self.common if self.whole[d] else self.common[self.places[d]]
                sums = (common + deviation).split([p.numel() for p in parameters])
                for p, value in zip(parameters, sums, strict=True):
                    p.copy_(value.view_as(p))


def _flat(indices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Row-major places of the grid of these indices in an array of this shape, as one vector."""
    flat = torch.zeros(1, dtype=torch.long)
    for index, size in zip(indices, shape, strict=True):
        flat = (flat[:, None] * size + index).flatten()
    return flat
