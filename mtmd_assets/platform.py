"""What a platform file says: surfaces, products, tasks, features and where the logs come from.

The keys of the file are the fields of `Platform` and, below them, of the types in `mtmd_assets.platform_parts`.
Everything else (SQL columns, contract rules, tower inputs, slices, evaluation rows) is derived from them, so that a new
platform needs a new file and no code. `mtmd_assets.platform_file` reads one.
"""

from dataclasses import replace
from datetime import date, timedelta
from functools import cached_property
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator

from mtmd_assets.platform_names import VALUE, column_name, sql_name
from mtmd_assets.platform_parts import (
    Contract,
    Day,
    Drift,
    Experiments,
    Fault,
    Frozen,
    Integer,
    Join,
    OutOfScope,
    Source,
    Task,
    Training,
    refuse_duplicates,
)
from mtmd_assets.platform_parts import Feature as Feature
from mtmd_assets.platform_parts import History as History
from mtmd_assets.platform_parts import KuairandSource as KuairandSource
from mtmd_assets.platform_parts import ParquetSource as ParquetSource
from mtmd_assets.platform_parts import Ranker as Ranker
from mtmd_model.schema import Feature as ModelFeature
from mtmd_model.schema import Schema
from mtmd_model.schema import Task as ModelTask


class Platform(Frozen):
    """One platform: see the shipped files in `mtmd_assets/platforms/` for examples."""

    name: str
    time_zone: str = "UTC"
    start: Day
    """The first day of the log."""
    end: Day | None = None
    """The last day, for a log that has ended."""
    id_type: Literal["integer", "text"] = "text"
    """Type of impression, request, user and item ids."""
    source: Source
    ranker: Ranker | None = None
    """The built-in ranker, where the source has no heavyweight scores."""
    surfaces: tuple[str, ...] = Field(min_length=1)
    products: tuple[str, ...] = Field(min_length=1)
    out_of_scope: OutOfScope = OutOfScope()
    tasks: tuple[Task, ...] = Field(min_length=1)
    features: tuple[Feature, ...] = Field(min_length=1)
    extras: dict[str, Literal["double", "integer", "text"]] = Field(default_factory=dict)
    """Further columns of the impression log, kept in `impressions` and never shown to a model (bids, hides, truth)."""
    join: Join = Join()
    contract: Contract = Contract()
    drift: Drift = Drift()
    training: Training = Training()
    experiments: Experiments = Experiments()
    schedule_hour: Integer = Field(6, ge=0, le=23)
    """The hour of the day, in `time_zone`, at which yesterday is built and trained on."""

    @field_validator("name")
    @classmethod
    def _free_name(cls, name: str) -> str:
        if name == "dagster":
            raise ValueError("that name is taken: Dagster keeps its own things in the home under it")
        return sql_name(name)

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, zone: str) -> str:
        try:
            ZoneInfo(zone)
        except (KeyError, ValueError, OSError):
            raise ValueError("no such time zone") from None
        return zone

    @field_validator("surfaces", "products")
    @classmethod
    def _plain_values(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for i, v in enumerate(values):
            if not VALUE.fullmatch(v):
                raise Fault(str(i), "letters, digits and _ only", v)
        refuse_duplicates(values)
        return values

    @field_validator("tasks", "features")
    @classmethod
    def _one_name_each(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        refuse_duplicates([v.name for v in values], "{}.name")
        return values

    @field_validator("extras")
    @classmethod
    def _extra_names(cls, extras: dict[str, str]) -> dict[str, str]:
        for name in extras:
            try:
                column_name(name)
            except ValueError as e:
                raise Fault(name, str(e), name) from None
        return extras

    # -- derived -----------------------------------------------------------------------------------------------

    def slices_of(self, task: Task) -> list[tuple[str, str]]:
        """The slices in which a task exists."""
        return [slice_ for slice_ in self.slices if self.has(task, *slice_)]

    @cached_property
    def slices(self) -> tuple[tuple[str, str], ...]:
        """Every (surface, product): the paper's ad domains (section 2.1.1)."""
        return tuple((s, p) for s in self.surfaces for p in self.products)

    @cached_property
    def task_slices(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """The slices in which each task exists."""
        return {t.name: tuple(self.slices_of(t)) for t in self.tasks}

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        """Names, parents first."""
        return tuple(t.name for t in self.tasks)

    @property
    def logs_scores(self) -> bool:
        """Whether the source brings heavyweight scores; otherwise the built-in ranker makes them."""
        return self.source.kind == "adworld" or (
            self.source.kind == "parquet" and self.source.heavyweight_scores is not None
        )

    @property
    def history_days(self) -> int:
        """The longest look-back of any feature from history; 0 when there is none."""
        return max((f.history.days for f in self.features if f.history), default=0)

    @property
    def scored_from(self) -> date:
        """The first day that can have heavyweight scores."""
        return self.start if self.logs_scores or self.ranker is None else self.start + timedelta(self.ranker.train_days)

    def window(self, last: date) -> list[date]:
        """The days of the training window that ends on `last`, in order."""
        return [last - timedelta(n) for n in reversed(range(self.training.window_days))]

    @property
    def first_window_end(self) -> date:
        """The last day of the earliest window that lies within the scored days."""
        return self.scored_from + timedelta(self.training.window_days - 1)

    @property
    def first_evaluated(self) -> date:
        """The first day that a model can score: the day after its window."""
        return self.first_window_end + timedelta(1)

    def built_from(self, day: date) -> date:
        """The first day to build, so that examples of `day` and later can be: what features from history read of the
        days before, or all of them where the built-in ranker has to be trained."""
        return max(self.start, day - timedelta(self.history_days)) if self.logs_scores else self.start

    def has(self, part: Task | Feature, surface: str, product: str) -> bool:
        """Whether a slice has a task, or a feature by the contract: all have it where the file names none."""
        return surface in (part.surfaces or self.surfaces) and product in (part.products or self.products)

    @cached_property
    def model_schema(self) -> Schema:
        """What the model needs to know."""
        return Schema(
            platform=self.name,
            surfaces=self.surfaces,
            products=self.products,
            tasks=tuple(ModelTask(t.name, t.given, t.weight, t.width, self.task_slices[t.name]) for t in self.tasks),
            features=tuple(read for f in self.features for read in self._model_features(f)),
        )

    def _model_features(self, feature: Feature) -> list[ModelFeature]:
        """What the towers read of a feature: a dense one with bins is both a number and the bin that it lies in."""
        on_surfaces, for_products = feature.surfaces or self.surfaces, feature.products or self.products
        as_it_is = ModelFeature(
            name=feature.name,
            side=feature.side,
            kind=feature.kind,
            domains=on_surfaces if feature.side == "query" else for_products,
            log1p=feature.log1p,
            width=feature.width,
            vocabulary=feature.vocabulary,
            buckets=feature.buckets,
            min_count=feature.min_count,
            key=feature.key and feature.kind == "categorical",
        )
        if feature.bins is None:
            return [as_it_is]
        binned = replace(
            as_it_is,
            name=f"{feature.name} in bins",
            kind="categorical",
            key=feature.key,
            bins=feature.bins,
            of=feature.name,
        )
        return [as_it_is, binned]
