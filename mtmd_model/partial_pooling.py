"""Partial pooling: a domain's expert is trained as an expert common to all domains plus a deviation of its own.

A domain with few rows cannot learn millions of weights, and its embeddings have to meet those of the other tower,
which learns from every domain. So theta_d = theta_0 + delta_d for each of its weights: theta_0 follows the sum of all
domains' gradients at the full learning rate, delta_d its own domain's at a share of it, from zero. Share 0 is one
expert for all domains (each with its own statistics), a large one the unrelated experts of the paper. Deviations learn
slower but decay as fast as the common weights: what a domain's rows do not keep asking for goes back to zero.

It is a way to train. The model holds the sums only, and is the paper's when it is stored and when it serves.

Reference: Evgeniou and Pontil, Regularized multi-task learning, KDD 2004, https://doi.org/10.1145/1014052.1014067
(section 2: w_t = w_0 + v_t).
"""

import math
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
        groups: all parameters as AdamW takes them, each group with a weight decay and, if it is not `lr`, a rate.
        towers: each tower's domains.
        lr: learning rate of the groups that name none.
        share: the deviations' learning rate, as a share of their group's.
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
        for n, group in enumerate(groups):
            of_group = {id(p) for p in group["params"]}
            pooled: set[int] = set()
            for domains in towers:
                mine = [{n: c for n, c in d.items() if id(c.parameter) in of_group} for d in domains]
                if any(mine):
                    block = _Block(mine)
                    pooled |= {id(c.parameter) for d in mine for c in d.values()}
                    self.blocks.append(block)
                    decay = group["weight_decay"]
                    inner.append({"params": [block.common], "weight_decay": decay, "share": 1.0, "of": n})
                    # AdamW multiplies the decay by the learning rate, of which deviations have a share
                    of_deviations = decay / share if share else 0.0
                    inner.append({"params": block.deviations, "weight_decay": of_deviations, "share": share, "of": n})
            alone = [p for p in group["params"] if id(p) not in pooled]
            if alone:
                inner.append({"params": alone, "weight_decay": group["weight_decay"], "share": 1.0, "of": n})
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
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[group["of"]]["lr"] * group["share"]
        self.inner.step()
        for block in self.blocks:
            block.write()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As any optimiser's, with AdamW's moments and each block's common weights and deviations."""
        blocks = [[block.common.detach(), *(d.detach() for d in block.deviations)] for block in self.blocks]
        return {**super().state_dict(), "inner": self.inner.state_dict(), "blocks": blocks}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the domains' parameters are written anew."""
        own = dict(state_dict)
        inner, blocks = own.pop("inner"), own.pop("blocks")
        super().load_state_dict(own)
        self.inner.load_state_dict(inner)
        for block, values in zip(self.blocks, blocks, strict=True):
            for parameter, value in zip([block.common, *block.deviations], values, strict=True):
                parameter.copy_(value)
            block.write()


@dataclass(frozen=True)
class _Part:
    """Where a domain's parameter lies in the flat common layout."""

    parameter: nn.Parameter
    start: int
    shape: tuple[int, ...]
    """Of the whole, with the entries that this domain lacks."""
    picks: tuple[tuple[int, Tensor], ...]
    """Dimension -> the entries along it that this domain has, where it lacks some."""

    def whole(self, flat: Tensor) -> Tensor:
        """Its place in a flat tensor, as a view of the whole's shape."""
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)

    def take(self, flat: Tensor) -> Tensor:
        """The parameter's entries of a flat tensor."""
        value = self.whole(flat)
        for dim, index in self.picks:
            value = value.index_select(dim, index)
        return value

    def put(self, flat: Tensor, value: Tensor) -> None:
        """Write the parameter's entries into a flat tensor."""
        _put(self.whole(flat), self.picks, value)


def _put(target: Tensor, picks: Sequence[tuple[int, Tensor]], value: Tensor) -> None:
    if not picks:
        target.copy_(value)
        return
    (dim, index), *others = picks
    if others:
        inner = target.index_select(dim, index)
        _put(inner, others, value)
        value = inner
    target.index_copy_(dim, index, value)


class _Block:
    """Some parameters of a tower's domains in one flat layout: the common ones, and each domain's deviations.

    The deviations have the whole layout; entries that a domain lacks get no gradient and stay zero. So all arithmetic
    runs over contiguous memory, and what a domain lacks costs a gather of whole rows.
    """

    def __init__(self, domains: Sequence[Domain]) -> None:
        device = next(c.parameter.device for d in domains for c in d.values())
        self.parts: list[list[_Part]] = [[] for _ in domains]
        size = 0
        for name in dict.fromkeys(name for d in domains for name in d):
            indices = [d[name].indices() if name in d else None for d in domains]
            axes = zip(*(i for i in indices if i is not None), strict=True)
            # entries that no domain has, say of a feature that is key nowhere, have no place
            used = [torch.cat(axis).unique() for axis in axes]
            shape = tuple(len(entries) for entries in used)
            for d, parts, index in zip(domains, self.parts, indices, strict=True):
                if index is not None:
                    places = [torch.searchsorted(entries, i) for entries, i in zip(used, index, strict=True)]
                    picks = [
                        (dim, place.to(device))
                        for dim, place in enumerate(places)
                        if not torch.equal(place, torch.arange(shape[dim]))
                    ]
                    parts.append(_Part(d[name].parameter, size, shape, tuple(picks)))
            size += math.prod(shape)
        self.complete = [
            sum(part.parameter.numel() for part in parts) == size and not any(part.picks for part in parts)
            for parts in self.parts
        ]
        with torch.no_grad():
            common = torch.zeros(size, device=device)
            # the first domain that has an entry decides where all start
            for part in (part for parts in reversed(self.parts) for part in parts):
                part.put(common, part.parameter)
        self.common = nn.Parameter(common)
        self.deviations = [nn.Parameter(torch.zeros(size if parts else 0, device=device)) for parts in self.parts]
        self.gradients = [torch.zeros_like(deviation) for deviation in self.deviations]
        # room for the sum of the gradients, and after the step for a domain's values
        self.room = torch.empty_like(common)

    @torch.no_grad()
    def read_gradients(self) -> None:
        """delta_d's gradient is its domain's, theta_0's the sum of all."""
        self.common.grad = None
        domains = zip(self.parts, self.complete, self.deviations, self.gradients, strict=True)
        for parts, complete, deviation, gradient in domains:
            deviation.grad = None
            if all(part.parameter.grad is None for part in parts):
                continue
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in (part.parameter for part in parts)]
            if complete:
                torch.cat([g.flatten() for g in found], out=gradient)
            else:
                for part, g in zip(parts, found, strict=True):
                    part.put(gradient, g)
            deviation.grad = gradient
            if self.common.grad is None:
                self.common.grad = self.room.copy_(gradient)
            else:
                self.common.grad += gradient

    @torch.no_grad()
    def write(self) -> None:
        """Each domain's parameters become theta_0 + delta_d."""
        for parts, deviation in zip(self.parts, self.deviations, strict=True):
            if parts:
                sums = torch.add(self.common, deviation, out=self.room)
                torch._foreach_copy_([part.parameter for part in parts], [part.take(sums) for part in parts])
