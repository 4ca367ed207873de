"""The platform file: surfaces, products, tasks, features and where the logs come from.

`load_platform` reads one YAML file into frozen types. Everything else (SQL columns, contract rules, tower inputs,
slices, evaluation rows) is derived from it, so that a new platform needs a new file and no code. The keys of the file
are the fields of `Platform` and, below them, of the types in `mtmd_assets.platform_parts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from mtmd_assets import platform_checks
from mtmd_assets.faults import PlatformError
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

SHIPPED = Path(__file__).parent / "platforms"


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

    @model_validator(mode="after")
    def _consistent(self) -> "Platform":
        platform_checks.check(self)
        return self

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


# -- reading ---------------------------------------------------------------------------------------------------


class _Twice(yaml.YAMLError):
    """A key that is given twice."""

    def __init__(self, key: str, lines: tuple[int, int], received: str):
        super().__init__(f"{key}: given twice, in line {lines[0]} and in line {lines[1]} (received {received})")


class _Loader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key given twice is refused, and a date that is none stays text."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Where keys and values have been read and nothing was yet thrown away."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                received = repr(value.value) if isinstance(value, yaml.ScalarNode) else f"a {value.id}"
                raise _Twice(key.value, (lines[key.value], line), received)
            lines[key.value] = line
        return node

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> object:
        """The 31st of February is refused later, by its key."""
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError:
            return node.value


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_timestamp)


def read_text(path: Path) -> str:
    """A platform file's text.

    Raises:
        PlatformError: if it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise PlatformError(f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise PlatformError(f"{path}: no text in UTF-8 (received {e.object[e.start]:#04x} at byte {e.start})") from e


def parse_yaml(text: str, file: str) -> dict[str, Any]:
    """The keys and values in `text`; `file` is named in errors.

    Raises:
        PlatformError: if it is not YAML, no mapping, or a key is given twice.
    """
    try:
        content = yaml.load(text, _Loader)
    except _Twice as e:
        raise PlatformError(f"{file}: {e}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise PlatformError(f"{file}: not YAML: {e}") from e
    if not isinstance(content, dict):
        raise PlatformError(f"{file}: expected keys and values (received {_shown(content)})")
    return content


def parse_platform(text: str, file: str) -> Platform:
    """The platform in `text`; `file` is named in errors.

    Raises:
        PlatformError: naming the file, the key and the value received.
    """
    content = parse_yaml(text, file)
    try:
        return Platform.model_validate(content)
    except ValidationError as e:
        problems = []
        errors = e.errors()
        for error in errors:
            # Pydantic counts only the items that are right.
            within = (other["loc"][: len(error["loc"])] == error["loc"] for other in errors if other is not error)
            if error["type"] == "too_short" and any(within):
                continue
            fault = error.get("ctx", {}).get("error")
            if not isinstance(fault, Fault):
                fault = platform_checks.in_words(error)
            key = ".".join(k for k in (_key(error["loc"]), fault.key) if k)
            problems.append(f"{file}: {key}: {fault} (received {_shown(fault.received)}{_of(content, error['loc'])})")
        raise PlatformError("\n".join(problems)) from e


def _key(loc: Sequence[int | str]) -> str:
    """Where in the file; pydantic names the kind of a source as if it were a key."""
    if len(loc) > 1 and loc[0] == "source":
        loc = ("source", *loc[2:])
    return ".".join(str(part) for part in loc if part != "[key]")


def _of(content: Mapping[str, Any], loc: Sequence[int | str]) -> str:
    """Which feature or task it is, for who does not count them."""
    match loc:
        case ("features" | "tasks" as kind, int(position), _, *_):
            name = content[kind][position].get("name")
            return f"; {kind.removesuffix('s')} {name}" if isinstance(name, str) else ""
    return ""


def _shown(value: object) -> str:
    """A value as a person wrote it, shortened."""
    if isinstance(value, date):
        return str(value)
    text = repr(list(value) if isinstance(value, tuple | set | frozenset) else value)
    return text if len(text) <= 200 else text[:199] + "…"


def load_platform(path: Path) -> Platform:
    """Read one platform file.

    Raises:
        PlatformError: if it cannot be read or does not hold together.
    """
    return parse_platform(read_text(path), str(path))


def shipped_platform(name: str) -> Platform:
    """A platform that comes with the project: `adworld` or `kuairand`."""
    return load_platform(shipped_file(name))


def shipped_file(name: str) -> Path:
    """Where the file of a platform of that name lies, or would lie, in this project."""
    return SHIPPED / f"{name}.yaml"
