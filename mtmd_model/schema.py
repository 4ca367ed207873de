"""What a model needs to know of a platform: its domains, tasks and features.

Plain frozen dataclasses, built by `mtmd_assets.platform` from the platform file and stored whole in a
model's manifest, so that a checkpoint can be read without the platform file.

A *slice* is surface x product, the paper's "ad domain" (paper section 2.1.1). The query tower has one domain
a surface, the item tower one a product (section 2.2).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Side = Literal["query", "item"]
Kind = Literal["dense", "categorical"]


@dataclass(frozen=True)
class Feature:
    """What one tower reads of a column.

    A categorical feature has exactly one of `vocabulary`, `buckets`, `min_count` and `bins`.
    """

    name: str
    side: Side
    kind: Kind
    domains: tuple[str, ...]
    """The tower's domains (surfaces for a query feature, products for an item feature) that have it."""
    log1p: bool = False
    """Of numbers only: sign(x) * log(1 + |x|) before all else, for counts and other heavy tails."""
    width: int = 8
    """Categorical only: columns of its embedding table."""
    vocabulary: tuple[str, ...] | None = None
    """Categorical only: the values that get a row of their own, as strings."""
    buckets: int | None = None
    """Categorical only: hash the value into this many rows."""
    min_count: int | None = None
    """Categorical only: learn the vocabulary from the training window, values seen at least this often."""
    key: bool = False
    """Categorical only: read by the shallow expert (paper section 2.1.3)."""
    bins: int | None = None
    """Categorical only: a number is read, and known by its bin among so many of the training window's quantiles
    (`mtmd_model.bins`)."""
    of: str | None = None
    """The column that is read, where it is not the feature's name: a dense feature's and that of its bins are one."""

    @property
    def column(self) -> str:
        """The column that is read."""
        return self.of or self.name

    @property
    def open_ended(self) -> bool:
        """Whether tomorrow brings values of it that nobody has listed: ids that are learned from the window or hashed."""
        return self.kind == "categorical" and self.vocabulary is None and self.bins is None


@dataclass(frozen=True)
class Task:
    """One prediction task: scores are P(task | impression), the model learns P(task | given)."""

    name: str
    given: str | None
    """The parent task: P(task) = P(task | given) * P(given) (paper section 2.3). None for a root."""
    weight: float
    """Weight of its loss."""
    width: int
    """Columns of its deep embedding."""
    slices: tuple[tuple[str, str], ...]
    """The (surface, product) pairs in which the task exists."""


@dataclass(frozen=True)
class Schema:
    """Domains, tasks (parents before children) and features of one platform.

    Raises:
        ValueError: a task in a slice, or a feature in a domain, that the platform does not have.
    """

    platform: str
    surfaces: tuple[str, ...]
    products: tuple[str, ...]
    tasks: tuple[Task, ...]
    features: tuple[Feature, ...]

    def __post_init__(self) -> None:
        for task in self.tasks:
            unknown = [s for s in task.slices if s[0] not in self.surfaces or s[1] not in self.products]
            if unknown:
                raise ValueError(f"task {task.name!r} has the unknown slices {unknown}")
        for feature in self.features:
            domains = self.domains(feature.side)
            if not set(feature.domains) <= set(domains):
                raise ValueError(f"feature {feature.name!r} must have domains among {domains}, got {feature.domains}")

    def domains(self, side: Side) -> tuple[str, ...]:
        """The domains of one tower."""
        return self.surfaces if side == "query" else self.products

    def side(self, side: Side) -> tuple[Feature, ...]:
        """The features of one tower, in the order of the platform file."""
        return tuple(f for f in self.features if f.side == side)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "Schema":
        """Inverse of `to_dict`, also after a trip through JSON."""
        return cls(
            platform=d["platform"],
            surfaces=tuple(d["surfaces"]),
            products=tuple(d["products"]),
            tasks=tuple(Task(**{**t, "slices": tuple((s, p) for s, p in t["slices"])}) for t in d["tasks"]),
            features=tuple(
                Feature(
                    **{
                        **f,
                        "domains": tuple(f["domains"]),
                        "vocabulary": None if f["vocabulary"] is None else tuple(f["vocabulary"]),
                    }
                )
                for f in d["features"]
            ),
        )
