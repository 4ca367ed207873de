"""The parts of a platform file, each a frozen type that refuses what does not hold together by itself.

What must hold between them is in `mtmd_assets.platform_checks`; the whole is `mtmd_assets.platform.Platform`.
"""

import re
from collections.abc import Sequence
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mtmd_assets.platform_names import column_name, task_name

Preset = Literal["small", "half", "paper"]
"""Sizes of `mtmd_model.config`, smallest first."""

_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
_INTEGER = re.compile(r"0|-?[1-9]\d*")


class Fault(ValueError):
    """Something in the platform file that is refused: where, what is wrong, and the value received."""

    def __init__(self, key: str, problem: str, received: object):
        """`key` is relative to the part whose validator raises it."""
        super().__init__(problem)
        self.key, self.received = key, received


class Frozen(BaseModel):
    """A part of the platform file: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _number(value: object) -> object:
    """YAML 1.1 reads 2e-3, without a point, as text."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _day(value: object) -> object:
    """Dates only: pydantic would take a number for seconds since 1970."""
    if type(value) is date:
        return value
    try:
        return date.fromisoformat(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError("no date: expected year-month-day") from None


Integer = Annotated[int, Field(strict=True)]
"""Nothing is taken for a number but a number: neither a truth value nor text."""
Count = Annotated[Integer, Field(gt=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Dropped = Annotated[Number, Field(ge=0, lt=1)]
"""A share that leaves something."""
Flag = Annotated[bool, Field(strict=True)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Days = Annotated[int, Field(strict=True, gt=0, le=400)]
Day = Annotated[date, BeforeValidator(_day), Field(ge=date(1970, 1, 1), le=date(2200, 12, 31))]


def refuse_duplicates(values: Sequence[Any], key: str = "{}") -> None:
    """Refuse the first value that is there twice; `key` names it by its position.

    Raises:
        Fault: if there is one.
    """
    for i, value in enumerate(values):
        if value in values[:i]:
            raise Fault(key.format(i), "named twice", value)


class Task(Frozen):
    """A prediction task. Its score and outcome columns are `score_<name>` and `outcome_<name>`."""

    name: str
    given: str | None = None
    """The task it presupposes: P(task) = P(task | given) P(given) (paper section 2.3)."""
    surfaces: tuple[str, ...] | None = None
    """Where it exists; all surfaces when left out."""
    products: tuple[str, ...] | None = None
    """For which products it exists; all when left out."""
    weight: Positive = 1.0
    """Weight of its loss in training."""
    width: Count = 32
    """Columns of its deep embedding at the `paper` preset."""

    _name = field_validator("name")(task_name)


class History(Frozen):
    """A feature computed from published `impressions` of exactly the `days` days before the example's day."""

    by: tuple[str, ...] = Field(min_length=1)
    """The columns that name the entity, for example `[item_id]`: an item feature's are of item_id, product and item
    features, a query feature's of user_id, surface and query features."""
    of: str
    """`impressions` for a count of rows, or a task: the count of its outcomes."""
    days: Days
    per: str | None = None
    """Divide by this count: `impressions` or a task. Left out, the feature is the count itself."""
    prior: Positive = 20.0
    """A rate is (of + prior * mean) / (per + prior), `mean` the platform's own rate over the same days."""

    @model_validator(mode="after")
    def _consistent(self) -> "History":
        refuse_duplicates(self.by, "by.{}")
        if self.per is None and "prior" in self.model_fields_set:
            raise Fault("prior", "only a rate has a prior: name what it is `per`, or leave it out", self.prior)
        return self


_KIND = {
    **dict.fromkeys(("log1p", "bins", "history"), "dense"),
    **dict.fromkeys(("type", "vocabulary", "buckets", "min_count"), "categorical"),
    **dict.fromkeys(("width", "key"), "embedded"),
}
"""The kind of feature that a key is for, where it is not for all."""
_REFUSED = {
    "dense": "for dense features only",
    "categorical": "for categorical features only",
    "embedded": "for categorical features, and dense ones with bins",
}


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
    max_missing: Share = 0.02
    """Contract: the share of rows that may lack it where it should be present."""
    log1p: Flag = False
    """Dense only: sign(x) * log(1 + |x|), for counts and other heavy tails."""
    bins: Integer | None = Field(None, gt=1)
    """Dense only: read also as one of so many bins with equal shares of the training window's rows, each with a row of an
    embedding table: for numbers along which the scores jump, as those of trees do."""
    width: Count = 8
    """Categorical, or dense with `bins`: columns of its embedding table."""
    vocabulary: tuple[str, ...] | None = None
    """Categorical only: the values that get a row of their own. Exactly one of this, `buckets` and `min_count`."""
    buckets: Count | None = None
    """Categorical only: hash the value into this many rows."""
    min_count: Count | None = None
    """Categorical only: learn the vocabulary from the training window, values seen at least this often."""
    key: Flag = False
    """Categorical, or dense with `bins`: read by the shallow expert."""
    history: History | None = None
    """Computed from earlier days rather than read from the log."""

    @field_validator("name")
    @classmethod
    def _free_name(cls, name: str) -> str:
        if name.startswith("outcome_"):
            raise ValueError("that name is taken by a column every log has")
        return column_name(name)

    @model_validator(mode="before")
    @classmethod
    def _vocabulary_as_text(cls, feature: Any) -> Any:
        """Whole numbers may stand in the vocabulary of an integer feature only: YAML reads 18_24 as 1824."""
        if not isinstance(feature, dict) or not isinstance(feature.get("vocabulary"), list):
            return feature
        for i, value in enumerate(feature["vocabulary"]):
            if feature.get("type") == "integer":
                if type(value) is not int and not (isinstance(value, str) and _INTEGER.fullmatch(value)):
                    raise Fault(f"vocabulary.{i}", "the feature's type is integer, so its values are", value)
            elif not isinstance(value, str):
                raise Fault(f"vocabulary.{i}", "no text; quote it in the YAML", value)
            elif not value:
                raise Fault(f"vocabulary.{i}", "an empty text is no value", value)
        return {**feature, "vocabulary": [str(v) for v in feature["vocabulary"]]}

    @model_validator(mode="after")
    def _consistent(self) -> "Feature":
        if self.side == "query" and self.products is not None:
            raise Fault("products", "a query feature is had by surfaces, not by products", self.products)
        if self.side == "item" and self.surfaces is not None:
            raise Fault("surfaces", "an item feature is had by products, not by surfaces", self.surfaces)
        is_a = {self.kind, "embedded"} if self.kind == "categorical" or self.bins else {self.kind}
        for name, value in self:
            given = name in self.model_fields_set and value not in (None, False)
            if given and _KIND.get(name, self.kind) not in is_a:
                raise Fault(name, _REFUSED[_KIND[name]], value)
        encodings = {n: v for n in ("vocabulary", "buckets", "min_count") if (v := getattr(self, n)) is not None}
        if self.kind == "categorical" and len(encodings) != 1:
            raise Fault("", "a categorical feature needs exactly one of vocabulary, buckets, min_count", encodings)
        if self.vocabulary is not None:
            if not self.vocabulary:
                raise Fault("vocabulary", "it holds no value", [])
            refuse_duplicates(self.vocabulary, "vocabulary.{}")
        return self


class AdworldSource(Frozen):
    """The embedded simulator; see docs/adworld.md."""

    kind: Literal["adworld"]
    seed: Seed = 0
    rows_per_day: Count = 50_000
    users: Count = 20_000
    ads: Count = 4_000


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
    impressions: str = Field(min_length=1)
    heavyweight_scores: str | None = Field(None, min_length=1)
    """Left out: the built-in ranker scores (`ranker`)."""
    columns: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """Our column name -> theirs, where they differ. A feature may be a copy of an id; otherwise no column of theirs is
    two of ours."""
    storage_options: dict[str, Any] = {}
    """Passed to fsspec."""


Source = Annotated[AdworldSource | KuairandSource | ParquetSource, Field(discriminator="kind")]


class Ranker(Frozen):
    """The built-in heavyweight ranker, for logs that have no scores of one."""

    train_days: Days = 3
    """Outcomes of this many days train it; it scores only later days."""
    refresh_days: Days | None = None
    """Retrain after this many days; never when left out."""
    cross: tuple[tuple[str, str], ...] = ()
    """Pairs of columns whose joint counters of earlier days it reads besides every feature."""
    history_days: Days = 7
    """Its own counters (of every open-ended categorical feature and every pair in `cross`) look back this far."""
    trees: Count = 600
    """At most this many a task; how many is decided on the training window's last day."""
    learning_rate: Positive = 0.03
    leaves: Integer = Field(15, gt=1)
    min_leaf: Count = 50
    """Fewest training rows in a leaf."""
    seed: Seed = 0


class Join(Frozen):
    """How impressions meet their scores."""

    lateness_hours: Number = Field(24.0, gt=0, le=366 * 24)
    """A score counts if it was made at most this long after its impression."""
    sample_rate: Number = Field(1.0, ge=1e-6, le=1)
    """Keep this share of a day's impressions for training, weighted by its inverse. Evaluation is never sampled."""
    max_rejected: Share = 0.05
    """Refuse the day if a larger share of its rows is faulty; rows out of scope or sampled out do not count."""


class Contract(Frozen):
    """How strictly each slice is held to the features it should have."""

    judged_from: Count = 50
    """A slice with fewer rows in a day is not judged by the missing rates of what it should have."""
    empty_slices: Literal["refuse", "allow"] = "refuse"
    """Whether a slice without a row breaks the contract."""


class Drift(Frozen):
    """When a missing rate counts as drifted from its trailing week. Drift warns and never gates."""

    days: Days = 7
    tolerance: Positive = 0.05
    """Absolute change of the missing rate."""


class Training(Frozen):
    """How the daily model is trained."""

    window_days: Integer = Field(7, ge=2, le=400)
    """Days of a training window; the last one decides when to stop, the others are trained on."""
    preset: Preset = "small"
    max_epochs: Count = 12
    patience: Count = 3
    batch_size: Count = 4096
    learning_rate: Positive = 2e-3
    warmup_share: Share = 0.05
    """Share of all steps in which the learning rate rises from zero."""
    gradient_clip: NotNegative = 1.0
    """Largest norm of the gradient, 0 for none: a smaller one limits how far the loss can jump."""
    embedding_rate: Positive = 1.0
    """Learning rate of the embedding tables, as a multiple of the others': an id has few rows to learn from."""
    weight_decay: NotNegative = 0.01
    dropout: Dropped = 0.0
    deviation: NotNegative | None = 0.1
    """How fast a domain's expert leaves the one common to all, as a share of the learning rate; null: unrelated."""
    slice_balance: Share = 0.0
    """How far small slices are weighed up in the loss: 0 not at all, 1 until all slices count alike."""
    id_dropout: Dropped = 0.0
    """How often training takes an id of an open-ended feature for an unknown one, against learning users and items by
    heart."""
    averaged_passes: NotNegative = 0.0
    """Memory, in passes, of averaged weights, which are validated and kept: for trainings whose validation loss goes up and
    down to the end. 0 keeps those of a pass's last step."""
    main_effects: Flag = False
    """Vectors with a coordinate of their own for what a query or an item is worth by itself, and the others centred."""
    calibrate: Flag = True
    """After training, add constants to the biases, by the sums of predictions and scores of the window's last day."""
    seed: Seed = 0
    block_rows: Count | None = None
    """Rows held in memory at a time, twice, of a window that is too large for it; null holds them all."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    resident: Flag = False
    """Hold the window on the GPU."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: Flag = False
    """Train with `torch.compile`."""

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.block_rows is not None and self.block_rows < self.batch_size:
            raise Fault("block_rows", f"fewer rows than a batch, {self.batch_size}", self.block_rows)
        if self.block_rows is not None and self.resident:
            raise Fault("resident", "the window is left in its files by block_rows: choose one", self.resident)
        return self


class OwnSettings(Frozen):
    """What differs from `training` for a model in experiments."""

    preset: Preset | None = None
    max_epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None
    warmup_share: Share | None = None
    gradient_clip: NotNegative | None = None
    embedding_rate: Positive | None = None
    weight_decay: NotNegative | None = None
    dropout: Dropped | None = None
    slice_balance: Share | None = None
    id_dropout: Dropped | None = None
    averaged_passes: NotNegative | None = None
    main_effects: Flag | None = None

    def given(self) -> dict[str, Any]:
        """What the file says, in its words. Null is as if nothing were said, but for a deviation: that is unrelated experts."""
        return {k: v for k, v in self.model_dump(exclude_unset=True).items() if v is not None or k == "deviation"}


class PooledSettings(OwnSettings):
    """Those of a model whose domains or slices are partially pooled."""

    deviation: NotNegative | None = None


class MMOESettings(OwnSettings):
    """Those of MMOE-DCN."""

    experts: Count | None = None
    """Of a tower."""
    low_rank_layers: Integer | None = Field(None, ge=0)
    """Low-rank cross layers of an expert."""


class Contenders(Frozen):
    """Each contender's own settings."""

    slice_towers: OwnSettings = Field(default_factory=OwnSettings)
    pooled_towers: OwnSettings = Field(default_factory=OwnSettings)
    mmoe_dcn: MMOESettings = Field(default_factory=MMOESettings)
    soft_slice_towers: PooledSettings = Field(default_factory=PooledSettings)


class Experiments(Frozen):
    """How MTMD is compared with the models that it replaces."""

    days: Integer = Field(3, ge=1, le=100)
    """Evaluation days that are pooled: the last one and those before it."""
    last_day: Day | None = None
    """The last of them; if left out, the last of a log that has ended, else the first that leaves so many to score."""
    seeds: Integer = Field(3, ge=1, le=100)
    """Models of each kind and day, numbered from 0; no two windows' trainings start alike."""
    max_epochs: Count | None = None
    """Passes of every model here that names none itself, if not `training.max_epochs`: the daily model may be trained for
    a shorter time."""
    ablation_days: Integer | None = Field(None, ge=1, le=100)
    """Ablations are trained for the last so many evaluation days only, and compared on these; all if left out."""
    tuning_days: tuple[Day, ...] = ()
    """Days on which settings are judged, all before the evaluation days."""
    tuned_epochs: tuple[Count, ...] = ()
    """Passes that the search tries, beside those that a model has."""
    mtmd: PooledSettings = Field(default_factory=PooledSettings)
    """MTMD's own settings here, and its ablations': the daily model may be a smaller one."""
    contenders: Contenders = Field(default_factory=Contenders)

    @model_validator(mode="after")
    def _consistent(self) -> "Experiments":
        if self.ablation_days is not None and self.ablation_days > self.days:
            raise Fault("ablation_days", f"more than the evaluation days, {self.days}", self.ablation_days)
        refuse_duplicates(self.tuning_days, "tuning_days.{}")
        return self


class OutOfScope(Frozen):
    """Values that the log is known to hold and this platform does not model."""

    surfaces: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
