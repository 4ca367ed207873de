"""The platform file: surfaces, products, tasks, features and where the logs come from.

`load_platform` reads one YAML file into frozen types. Everything else (SQL columns, contract rules, tower inputs,
slices, evaluation rows) is derived from it, so that a new platform needs a new file and no code.
"""

import hashlib
import json
import re
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mtmd_assets.faults import PlatformError
from mtmd_model.schema import Feature as ModelFeature
from mtmd_model.schema import Schema
from mtmd_model.schema import Task as ModelTask

SHIPPED = Path(__file__).parent / "platforms"

# Columns every table of logs has; a feature may not take their names.
KEY_COLUMNS = (
    "impression_id",
    "request_id",
    "user_id",
    "item_id",
    "ts",
    "surface",
    "product",
    "ds",
    "weight",
    "ranker_version",
)
_SQL_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_VALUE = re.compile(r"[A-Za-z0-9_]+")
# DuckDB's reserved words (`duckdb_keywords()`), so that a column can be written without quotes everywhere.
_RESERVED = frozenset(
    [
        "all",
        "analyse",
        "analyze",
        "and",
        "any",
        "array",
        "as",
        "asc",
        "asymmetric",
        "both",
        "case",
        "cast",
        "check",
        "collate",
        "column",
        "constraint",
        "create",
        "default",
        "deferrable",
        "desc",
        "describe",
        "distinct",
        "do",
        "else",
        "end",
        "except",
        "false",
        "fetch",
        "for",
        "foreign",
        "from",
        "group",
        "having",
        "in",
        "initially",
        "intersect",
        "into",
        "lambda",
        "lateral",
        "leading",
        "limit",
        "not",
        "null",
        "offset",
        "on",
        "only",
        "or",
        "order",
        "pivot",
        "pivot_longer",
        "pivot_wider",
        "placing",
        "primary",
        "qualify",
        "references",
        "returning",
        "select",
        "show",
        "some",
        "summarize",
        "symmetric",
        "table",
        "then",
        "to",
        "trailing",
        "true",
        "union",
        "unique",
        "unpivot",
        "using",
        "variadic",
        "when",
        "where",
        "window",
        "with",
    ]
)


def _sql_name(name: str) -> str:
    if not _SQL_NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError("not usable as an SQL column: lower-case letters, digits and _, no reserved word")
    return name


class Frozen(BaseModel):
    """A part of the platform file: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(Frozen):
    """A prediction task. Its score and outcome columns are `score_<name>` and `outcome_<name>`."""

    name: str
    given: str | None = None
    """The task it presupposes: P(task) = P(task | given) P(given) (paper section 2.3)."""
    surfaces: tuple[str, ...] | None = None
    """Where it exists; all surfaces when left out."""
    products: tuple[str, ...] | None = None
    """For which products it exists; all when left out."""
    weight: float = Field(1.0, gt=0)
    """Weight of its loss in training."""
    width: int = Field(32, gt=0)
    """Columns of its deep embedding at the `paper` preset."""

    _name = field_validator("name")(_sql_name)


class History(Frozen):
    """A feature computed from published `impressions` of exactly the `days` days before the example's day."""

    by: tuple[str, ...] = Field(min_length=1)
    """The columns that name the entity, for example `[item_id]`."""
    of: str
    """`impressions` for a count of rows, or a task: the count of its outcomes."""
    days: int = Field(gt=0)
    per: str | None = None
    """Divide by this count: `impressions` or a task. Left out, the feature is the count itself."""
    prior: float = Field(20.0, gt=0)
    """A rate is (of + prior * mean) / (per + prior), `mean` the platform's own rate over the same days."""


class Feature(Frozen):
    """One feature column: which tower reads it, and which surfaces or products have it."""

    name: str
    side: Literal["query", "item"]
    kind: Literal["dense", "categorical"]
    type: Literal["text", "integer"] = "text"
    """Categorical only: the column's type in the lake."""
    surfaces: tuple[str, ...] | None = None
    """Query features only: the surfaces that have it; all when left out."""
    products: tuple[str, ...] | None = None
    """Item features only: the products that have it; all when left out."""
    max_missing: float = Field(0.02, ge=0, le=1)
    """Contract: the share of rows that may lack it where it should be present."""
    log1p: bool = False
    width: int = Field(8, gt=0)
    vocabulary: tuple[str, ...] | None = None
    buckets: int | None = Field(None, gt=0)
    min_count: int | None = Field(None, gt=0)
    key: bool = False
    """Categorical only: read by the shallow expert."""
    history: History | None = None

    _name = field_validator("name")(_sql_name)

    @model_validator(mode="before")
    @classmethod
    def _vocabulary_as_text(cls, feature: Any) -> Any:
        """Whole numbers may stand in the vocabulary of an integer feature only: YAML reads 18_24 as 1824."""
        if isinstance(feature, dict) and isinstance(feature.get("vocabulary"), list):
            odd = [v for v in feature["vocabulary"] if not isinstance(v, str)]
            if odd and (feature.get("type") != "integer" or not all(type(v) is int for v in odd)):
                raise ValueError(f"vocabulary: {odd[0]!r} is no text; quote it in the YAML")
            return {**feature, "vocabulary": [str(v) for v in feature["vocabulary"]]}
        return feature

    @model_validator(mode="after")
    def _consistent(self) -> "Feature":
        if self.name in KEY_COLUMNS or self.name.startswith(("score_", "outcome_")):
            raise ValueError("that name is taken by a column every log has")
        if self.side == "query" and self.products is not None:
            raise ValueError("a query feature is had by surfaces, not by products")
        if self.side == "item" and self.surfaces is not None:
            raise ValueError("an item feature is had by products, not by surfaces")
        encodings = [n for n in ("vocabulary", "buckets", "min_count") if getattr(self, n) is not None]
        if self.kind == "categorical" and len(encodings) != 1:
            raise ValueError(
                f"a categorical feature needs exactly one of vocabulary, buckets, min_count; it has {encodings}"
            )
        if self.kind == "dense" and (encodings or self.key):
            raise ValueError(f"a dense feature has no {', '.join(encodings) or 'key'}")
        if self.kind == "categorical" and self.log1p:
            raise ValueError("log1p is for dense features")
        if self.history and self.kind != "dense":
            raise ValueError("a feature from history is dense")
        return self


class AdworldSource(Frozen):
    """The embedded simulator; see docs/adworld.md."""

    kind: Literal["adworld"]
    seed: int = 0
    rows_per_day: int = Field(50_000, gt=0)
    users: int = Field(20_000, gt=0)
    ads: int = Field(4_000, gt=0)


class KuairandSource(Frozen):
    """The KuaiRand-Pure folder as downloaded."""

    kind: Literal["kuairand"]
    data: str | None = None
    """The folder. Given at registration: `make demo PLATFORM=kuairand DATA=folder`."""


class ParquetSource(Frozen):
    """A team's own logs: a folder of Parquet files for each of the two tables, local or any fsspec URL.

    The files of day D are `<folder>/ds=D/*.parquet` or `<folder>/D.parquet`.
    """

    kind: Literal["parquet"]
    impressions: str
    heavyweight_scores: str | None = None
    """Left out: the built-in ranker scores (`ranker`)."""
    columns: dict[str, str] = {}
    """Our column name -> theirs, where they differ."""
    storage_options: dict[str, Any] = {}
    """Passed to fsspec."""


Source = Annotated[AdworldSource | KuairandSource | ParquetSource, Field(discriminator="kind")]


class Ranker(Frozen):
    """The built-in heavyweight ranker, for logs that have no scores of one."""

    train_days: int = Field(3, gt=0)
    """Outcomes of this many days train it; it scores only later days."""
    refresh_days: int | None = Field(None, gt=0)
    """Retrain after this many days; never when left out."""
    cross: tuple[tuple[str, str], ...] = ()
    """Pairs of columns whose joint counters of earlier days it reads besides every feature."""
    history_days: int = Field(7, gt=0)
    """Its own counters (of every open-ended categorical feature and every pair in `cross`) look back this far."""
    trees: int = Field(600, gt=0)
    """At most this many a task; how many is decided on the training window's last day."""
    learning_rate: float = Field(0.03, gt=0)
    leaves: int = Field(15, gt=1)
    min_leaf: int = Field(50, gt=0)
    """Fewest training rows in a leaf."""
    seed: int = 0


class Join(Frozen):
    """How impressions meet their scores."""

    lateness_hours: float = Field(24, gt=0)
    """A score counts if it was made at most this long after its impression."""
    sample_rate: float = Field(1.0, gt=0, le=1)
    """Keep this share of a day's impressions for training, weighted by its inverse. Evaluation is never sampled."""
    max_rejected: float = Field(0.05, ge=0, le=1)
    """Refuse the day if a larger share of its rows is faulty; rows out of scope or sampled out do not count."""


class Contract(Frozen):
    """How strictly each slice is held to the features it should have."""

    judged_from: int = Field(50, ge=1)
    """A slice with fewer rows in a day is not judged by the missing rates of what it should have."""
    empty_slices: Literal["refuse", "allow"] = "refuse"
    """Whether a slice without a row breaks the contract."""


class Drift(Frozen):
    """When a missing rate counts as drifted from its trailing week. Drift warns and never gates."""

    days: int = Field(7, gt=0)
    tolerance: float = Field(0.05, gt=0)
    """Absolute change of the missing rate."""


class Training(Frozen):
    """How the daily model is trained."""

    window_days: int = Field(7, ge=2)
    """Days of a training window; the last one decides when to stop, the others are trained on."""
    preset: Literal["small", "paper"] = "small"
    max_epochs: int = Field(12, gt=0)
    patience: int = Field(3, gt=0)
    batch_size: int = Field(4096, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    seed: int = 0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


class OutOfScope(Frozen):
    """Values that the log is known to hold and this platform does not model."""

    surfaces: tuple[str, ...] = ()
    products: tuple[str, ...] = ()


class Platform(Frozen):
    """One platform: see the shipped files in `mtmd_assets/platforms/` for examples."""

    name: str
    time_zone: str = "UTC"
    start: date
    """The first day of the log."""
    end: date | None = None
    """The last day, for a log that has ended."""
    id_type: Literal["integer", "text"] = "text"
    """Type of impression, request, user and item ids."""
    source: Source
    ranker: Ranker | None = None
    surfaces: tuple[str, ...] = Field(min_length=1)
    products: tuple[str, ...] = Field(min_length=1)
    out_of_scope: OutOfScope = OutOfScope()
    tasks: tuple[Task, ...] = Field(min_length=1)
    features: tuple[Feature, ...] = Field(min_length=1)
    extras: dict[str, Literal["double", "integer", "text"]] = {}
    """Further columns of the impression log, kept in `impressions` and never shown to a model (bids, hides, truth)."""
    join: Join = Join()
    contract: Contract = Contract()
    drift: Drift = Drift()
    training: Training = Training()
    schedule_hour: int = Field(6, ge=0, le=23)
    """The hour of the day, in `time_zone`, at which yesterday is built and trained on."""

    _name = field_validator("name")(_sql_name)

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
        for v in values:
            if not _VALUE.fullmatch(v):
                raise ValueError(f"{v!r}: letters, digits and _ only")
        _no_duplicates(values)
        return values

    @field_validator("tasks", "features")
    @classmethod
    def _one_name_each(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        _no_duplicates([v.name for v in values])
        return values

    @field_validator("extras")
    @classmethod
    def _extra_names(cls, extras: dict[str, str]) -> dict[str, str]:
        for name in extras:
            _sql_name(name)
            if name in KEY_COLUMNS or name.startswith("score_"):
                raise ValueError(f"{name!r} is taken by a column every log has")
        return extras

    @model_validator(mode="after")
    def _consistent(self) -> "Platform":
        _no_duplicates([f.name for f in self.features] + list(self.extras) + [f"outcome_{t.name}" for t in self.tasks])
        names = {t.name for t in self.tasks}
        parts: tuple[tuple[str, tuple[Task | Feature, ...]], ...] = (("tasks", self.tasks), ("features", self.features))
        for kind, part in parts:
            for i, spec in enumerate(part):
                for axis in ("surfaces", "products"):
                    chosen = getattr(spec, axis)
                    if chosen is None:
                        continue
                    unknown = [v for v in chosen if v not in getattr(self, axis)]
                    if unknown or not chosen:
                        raise ValueError(
                            f"{kind}.{i}.{axis}: {spec.name} names {unknown}, not among {list(getattr(self, axis))}"
                        )
        seen: set[str] = set()
        by_name = {t.name: t for t in self.tasks}
        for i, t in enumerate(self.tasks):
            if t.given is not None:
                if t.given not in names:
                    raise ValueError(f"tasks.{i}.given: {t.name} is given {t.given!r}, which is no task")
                if t.given not in seen:
                    raise ValueError(f"tasks.{i}.given: {t.given!r} must be listed before {t.name}")
                outside = set(self._slices_of(t)) - set(self._slices_of(by_name[t.given]))
                if outside:
                    raise ValueError(f"tasks.{i}: {t.name} exists where {t.given} does not: {sorted(outside)}")
            seen.add(t.name)
        for i, f in enumerate(self.features):
            if f.history:
                for key, value in (("of", f.history.of), ("per", f.history.per)):
                    if value not in {None, "impressions"} | names:
                        raise ValueError(f"features.{i}.history.{key}: {value!r} is neither impressions nor a task")
                known = {"user_id", "item_id", "surface", "product"} | {g.name for g in self.features if not g.history}
                for column in f.history.by:
                    if column not in known:
                        raise ValueError(f"features.{i}.history.by: {column!r} is no column of the log")
        for side in ("query", "item"):
            if not any(f.side == side for f in self.features):
                raise ValueError(f"features: the {side} tower has none")
        overlap = set(self.surfaces) & set(self.out_of_scope.surfaces) | set(self.products) & set(
            self.out_of_scope.products
        )
        if overlap:
            raise ValueError(f"out_of_scope: {sorted(overlap)} are in scope")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"end: {self.end} is before start {self.start}")
        if not self.logs_scores and self.ranker is None:
            raise ValueError("ranker: the source has no heavyweight scores, so a ranker is needed")
        return self

    # -- derived -----------------------------------------------------------------------------------------------

    def _slices_of(self, task: Task) -> list[tuple[str, str]]:
        return [
            (s, p)
            for s in self.surfaces
            for p in self.products
            if s in (task.surfaces or self.surfaces) and p in (task.products or self.products)
        ]

    @cached_property
    def slices(self) -> tuple[tuple[str, str], ...]:
        """Every (surface, product): the paper's ad domains (section 2.1.1)."""
        return tuple((s, p) for s in self.surfaces for p in self.products)

    @cached_property
    def task_slices(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """The slices in which each task exists."""
        return {t.name: tuple(self._slices_of(t)) for t in self.tasks}

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

    def has(self, feature: Feature, surface: str, product: str) -> bool:
        """Whether the contract expects the feature in a slice."""
        return surface in (feature.surfaces or self.surfaces) and product in (feature.products or self.products)

    @cached_property
    def model_schema(self) -> Schema:
        """What the model needs to know."""
        return Schema(
            platform=self.name,
            surfaces=self.surfaces,
            products=self.products,
            tasks=tuple(ModelTask(t.name, t.given, t.weight, t.width, self.task_slices[t.name]) for t in self.tasks),
            features=tuple(
                ModelFeature(
                    name=f.name,
                    side=f.side,
                    kind=f.kind,
                    domains=(f.surfaces or self.surfaces) if f.side == "query" else (f.products or self.products),
                    log1p=f.log1p,
                    width=f.width,
                    vocabulary=f.vocabulary,
                    buckets=f.buckets,
                    min_count=f.min_count,
                    key=f.key,
                )
                for f in self.features
            ),
        )

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of everything the file decides."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _no_duplicates(values: "list[str] | tuple[str, ...]") -> None:
    twice = sorted({v for v in values if values.count(v) > 1})
    if twice:
        raise ValueError(f"named twice: {twice}")


def parse_platform(text: str, file: str) -> Platform:
    """The platform in `text`; `file` is named in errors.

    Raises:
        PlatformError: naming the file, the key and the value received.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise PlatformError(f"{file}: not YAML: {e}") from e
    if not isinstance(content, dict):
        raise PlatformError(f"{file}: expected keys and values, received {type(content).__name__}")
    try:
        return Platform.model_validate(content)
    except ValidationError as e:
        problems = []
        for error in e.errors():
            key = ".".join(str(part) for part in error["loc"]) or "platform"
            received = (
                ""
                if isinstance(error["input"], dict) and len(error["input"]) > 3
                else f" (received {error['input']!r:.200})"
            )
            problems.append(f"{file}: {key}: {error['msg'].removeprefix('Value error, ')}{received}")
        raise PlatformError("\n".join(problems)) from e


def load_platform(path: Path) -> Platform:
    """Read one platform file.

    Raises:
        PlatformError: if it cannot be read or does not hold together.
    """
    try:
        return parse_platform(path.read_text(), str(path))
    except OSError as e:
        raise PlatformError(f"{path}: {e.strerror}") from e


def shipped_platform(name: str) -> Platform:
    """A platform that comes with the project: `adworld` or `kuairand`."""
    return load_platform(SHIPPED / f"{name}.yaml")
