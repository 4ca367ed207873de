"""The two-towers without domain modules that MTMD is measured against: pooled towers and slice towers.

Each tower is a multilayer feed-forward network after feature pre-processing (paper section 3.2). What is not
MTMD's architecture they share with it: features, loss, task chain, slice biases, layers of the same kind, and in one
preset the widths of the vectors.

Shapes: B rows, D width of a task's stored vector.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtmd_model.batch import Batch, DomainGroups, TowerInput
from mtmd_model.config import TwoTowerConfig, divided, preset_divisor
from mtmd_model.domain_norm import DomainNorm
from mtmd_model.embeddings import FeatureEmbeddings
from mtmd_model.ffn import FFN, short_projection
from mtmd_model.main_effects import tower_end
from mtmd_model.partial_pooling import Counterpart
from mtmd_model.schema import Schema, Side
from mtmd_model.towers import module_key
from mtmd_model.two_tower import TwoTower

EVERY = "every domain"


@dataclass(frozen=True)
class PlainConfig(TwoTowerConfig):
    """Sizes of a plain two-tower; the defaults are the paper's widths of a deep expert. A stored vector is as wide as MTMD's,
    emb_deep ∥ emb_shallow.

    Raises:
        ValueError: a value that no model can have.
    """

    widths: tuple[int, ...] = (512, 256, 128, 128)
    """Of the tower's layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must hold at least one width of 1 or more, got {self.widths!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A size of `config.DIVISORS`, with changes.

        Raises:
            ValueError: no such preset.
        """
        divisor = preset_divisor(name)
        return replace(cls(widths=divided(cls().widths, divisor), width_divisor=divisor), **changes)

    def vector_widths(self, schema: Schema) -> dict[str, int]:
        """Task -> columns of its vector at the tower's last layer."""
        return {t.name: max(1, (t.width + SHALLOW) // self.width_divisor) for t in schema.tasks}


SHALLOW = 64
"""Columns of MTMD's emb_shallow in the paper (section 2.1.3)."""


class PlainInput(nn.Module):
    """Dense features standardised, missing ones learned values, ids embedded; the domain one-hot if asked for.

    Args:
        side: of the tower.
        schema: for its features.
        rows: rows of each categorical feature's vocabulary.
        config: clip, horizon, initial embeddings.
        domain: the only domain whose rows come in; None for rows of every domain, whose number is then one more
            feature.
    """

    def __init__(
        self, side: Side, schema: Schema, rows: Mapping[str, int], config: PlainConfig, domain: str | None = None
    ) -> None:
        super().__init__()
        features = schema.side(side)
        here = [replace(f, domains=(EVERY,) if domain is None or domain in f.domains else ()) for f in features]
        dense = [f for f in here if f.kind == "dense"]
        categorical = [f for f in here if f.kind == "categorical"]
        self.norm = DomainNorm([bool(f.domains) for f in dense], config.norm_clip, config.norm_horizon)
        self.embeddings = FeatureEmbeddings(categorical, rows, (EVERY,), config.embedding_std)
        self.domains = len(schema.domains(side)) if domain is None else 0
        self.width = len(dense) + sum(f.width for f in categorical) + self.domains

    def forward(self, x: TowerInput) -> Tensor:
        """Rows -> (B, width)."""
        parts = [self.norm(x.dense), self.embeddings(x.ids, torch.zeros_like(x.domain))]
        if self.domains:
            parts.append(F.one_hot(x.domain, self.domains).to(parts[0].dtype))
        return torch.cat(parts, 1)


class Projections(nn.Module):
    """The end of a tower without domain modules: a linear map a task, and main effects (`main_effects`)."""

    def __init__(self, side: Side, schema: Schema, config: PlainConfig) -> None:
        super().__init__()
        widths = config.vector_widths(schema)
        self.tasks = tuple(widths)
        self.project = nn.ModuleList(short_projection(config.widths[-1], w) for w in widths.values())
        self.effects = tower_end(side, schema, widths, config.main_effects)
        self.stored_widths = self.effects.widths
        """Task -> columns of its vector, without the bias coordinates."""

    def forward(self, hidden: Iterable[Tensor], domain_B: Tensor) -> dict[str, Tensor]:
        """A (B, H) for each task, and (B,) domains -> task -> (B, D), without the bias coordinates."""
        tasks = zip(self.tasks, self.project, hidden, strict=True)
        return self.effects({task: project(hidden_BH) for task, project, hidden_BH in tasks}, domain_B)


class PlainTower(nn.Module):
    """An FFN after the features, and a linear map a task."""

    def __init__(
        self, side: Side, schema: Schema, rows: Mapping[str, int], config: PlainConfig, domain: str | None = None
    ) -> None:
        super().__init__()
        self.input = PlainInput(side, schema, rows, config, domain)
        self.ffn = FFN(self.input.width, config.widths, config.dropout)
        self.end = Projections(side, schema, config)

    def forward(self, x: TowerInput) -> dict[str, Tensor]:
        """Rows -> task -> (B, D), without the bias coordinates."""
        hidden_BH = self.ffn(self.input(x))
        return self.end([hidden_BH] * len(self.end.tasks), x.domain)


class PooledTowers(TwoTower):
    """One two-tower for all slices, with surface and product as features; plain, unless a subclass has other towers."""

    tower: type[nn.Module] = PlainTower
    """Made as a `PlainTower` is."""

    def __init__(self, schema: Schema, rows: Mapping[str, int], config: PlainConfig) -> None:
        super().__init__(schema, config.constrained)
        self.query_tower = self.tower("query", schema, rows, config)
        self.item_tower = self.tower("item", schema, rows, config)

    def embed_query(self, query: TowerInput) -> dict[str, Tensor]:
        """Task -> (B, D), the vectors to store."""
        return self.bias.append_to_query(self.query_tower(query), query.domain)

    def embed_item(self, item: TowerInput) -> dict[str, Tensor]:
        """Task -> (B, D), the vectors to store."""
        return self.bias.append_to_item(self.item_tower(item), item.domain)


class SliceTowers(TwoTower):
    """One plain two-tower a slice, with tables, statistics and weights of its own: the models that MTMD replaced.

    They are trained side by side in one run, no parameter of one sees a row of another, and each keeps the weights
    of its own best epoch. Each knows the ids that its own rows have often enough. A vector belongs to a slice, so that both sides must be known; that of a slice without a
    task is zero but for the coordinates of the bias.
    """

    def __init__(self, schema: Schema, rows: Mapping[str, int], config: PlainConfig) -> None:
        super().__init__(schema, config.constrained)
        exists_SP = self.bias.exists_TSP.any(0)
        self.slices = [
            (s, p) for s in range(len(schema.surfaces)) for p in range(len(schema.products)) if exists_SP[s, p]
        ]
        self.towers = nn.ModuleDict()
        for s, p in self.slices:
            surface, product = schema.surfaces[s], schema.products[p]
            query = PlainTower("query", schema, rows, config, surface)
            item = PlainTower("item", schema, rows, config, product)
            self.towers[self._key(s, p)] = nn.ModuleDict({"query": query, "item": item})
            self.widths = query.end.stored_widths

    def embed(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both sides' vectors of the same rows, each by its slice's own towers."""
        products = len(self.schema.products)
        slices = len(self.schema.surfaces) * products
        groups = DomainGroups.of(batch.query.domain * products + batch.item.domain, slices)
        ordered = batch.select(groups.order_B)
        found: dict[Side, list[dict[str, Tensor]]] = {"query": [], "item": []}
        start = 0
        for number, count in enumerate(groups.counts):
            if count:
                block = ordered.slice(start, start + count)
                start += count
                key = self._key(number // products, number % products)
                if key not in self.towers:
                    nothing = {t: block.query.dense.new_zeros(count, w) for t, w in self.widths.items()}
                    found["query"].append(nothing)
                    found["item"].append(nothing)
                    continue
                towers = self.towers[key]
                assert isinstance(towers, nn.ModuleDict)
                found["query"].append(towers["query"](block.query))
                found["item"].append(towers["item"](block.item))
        sides = {
            side: {t: torch.cat([part[t] for part in parts]).index_select(0, groups.inverse_B) for t in parts[0]}
            for side, parts in found.items()
        }
        query = self.bias.append_to_query(sides["query"], batch.query.domain)
        return query, self.bias.append_to_item(sides["item"], batch.item.domain)

    def separate_parts(self) -> dict[str, Sequence[tuple[int, int]]]:
        """Each slice's towers stop on their own slice."""
        return {f"towers.{self._key(s, p)}.": [(s, p)] for s, p in self.slices}

    def _key(self, s: int, p: int) -> str:
        return module_key(f"{self.schema.surfaces[s]} x {self.schema.products[p]}")


class SoftSliceTowers(SliceTowers):
    """Slice towers that are trained as MTMD's domain experts are, by partial pooling: each a tower common to all slices
    plus a deviation of its own (soft parameter sharing). What of MTMD's margin over slice towers is its architecture's
    shows here.

    A common part learns from every slice, so that all stop together and know the same ids.
    """

    def domains(self) -> list[list[dict[str, Counterpart]]]:
        """The slices' towers of each side; every one has places for all features and tasks."""
        return [
            [
                {name: Counterpart(p, (None,) * p.dim()) for name, p in towers.get_submodule(side).named_parameters()}
                for towers in self.towers.values()
            ]
            for side in ("query", "item")
        ]

    def separate_parts(self) -> dict[str, Sequence[tuple[int, int]]]:
        """None."""
        return {}
