"""The sizes and switches of MTMD, and those of every model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from mtmd_model.schema import Task

DIVISORS = {"paper": 1, "half": 2, "small": 4}
"""What the paper's widths are divided by: `paper` is for a GPU, the others for CPUs and small data."""

EXPERTS = ("deep", "task_shared", "domain_shared")
"""What the routing layer weighs, in the order of its outputs."""
KINDS = (*EXPERTS, "shallow")


@dataclass(frozen=True)
class TwoTowerConfig:
    """What every model has.

    Raises:
        ValueError: a value that no model can have.
    """

    width_divisor: int = 1
    """Every stored vector is as wide as the platform says divided by this."""
    constrained: bool = True
    """P(child) = P(child | parent) P(parent) (section 2.3); if not, every task's logit is its own."""
    norm_clip: float = 5.0
    """Largest standardised dense feature, in standard deviations."""
    norm_horizon: int = 1_000_000
    """Observed values after which a domain's statistics start to forget."""
    embedding_std: float = 0.05
    """Standard deviation of a new embedding table."""
    dropout: float = 0.0
    """Dropped share of the output of an expert's layers, or of a plain tower's, in training; the paper has none."""
    main_effects: bool = False
    """A vector's first column is its main effect, the others are centred (`main_effects`); the paper has none."""

    def __post_init__(self) -> None:
        for name in ("width_divisor", "norm_horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.norm_clip <= 0 or self.embedding_std < 0:
            raise ValueError(
                "norm_clip must be above 0 and embedding_std not below, "
                f"got {self.norm_clip!r} and {self.embedding_std!r}"
            )

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, also after a trip through JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        return cls(**values)


@dataclass(frozen=True)
class MTMDConfig(TwoTowerConfig):
    """Sizes and switches; the defaults are the paper's.

    Raises:
        ValueError: a value that no model can have.
    """

    deep: tuple[int, ...] = (512, 256, 128, 128)
    """Widths of a deep, task-shared or domain-shared expert (sections 2.1.3, 2.1.4)."""
    shallow: tuple[int, ...] = (128, 64)
    """Widths of a shallow expert (section 2.1.3)."""
    router: tuple[int, ...] = (128, 64)
    """Widths of the routing layer before its last, linear one (section 2.1.5)."""
    unconstrained_width: int = 64
    """Width of every task's emb_deep without constrained modelling (section 2.3), before the divisor."""
    norm: Literal["pre", "post", "none"] = "pre"
    """LayerNorm before or after the cross layers (section 2.1.5, table 6)."""
    cross_layers: int = 2
    """Number of DCN-v2 layers; 0 leaves them out."""
    cross_rank: float = 0.25
    """Their rank, as a share of their width."""
    se_reduction: int = 2
    """Hidden units of squeeze-and-excitation: fields divided by this."""
    domain_norm: bool = True
    """Statistics and learned values a domain (section 2.1.2); if not, one BatchNorm for all domains of a tower."""
    excitation: bool = True
    """Squeeze-and-excitation (section 2.1.2); if not, the fields stay as they are."""
    routing: bool = True
    """Experts weighed by the routing layer (section 2.1.5); if not, equally."""
    experts: tuple[str, ...] = KINDS
    """The kinds of expert it has (sections 2.1.3, 2.1.4)."""
    deep_width: int | None = None
    """Width of every task's emb_deep in place of the platform's (table 6), before the divisor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("deep", "shallow", "router"):
            widths = getattr(self, name)
            if not widths or min(widths) < 1:
                raise ValueError(f"{name} must hold at least one width of 1 or more, got {widths!r}")
        if self.norm not in ("pre", "post", "none"):
            raise ValueError(f"norm must be 'pre', 'post' or 'none', got {self.norm!r}")
        for name in ("unconstrained_width", "se_reduction"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if self.cross_layers < 0:
            raise ValueError(f"cross_layers must be 0 or more, got {self.cross_layers!r}")
        if not 0 < self.cross_rank <= 1:
            raise ValueError(f"cross_rank must be in (0, 1], got {self.cross_rank!r}")
        if set(self.experts) - set(KINDS) or not self.mixed:
            raise ValueError(f"experts must be among {KINDS} and hold one besides 'shallow', got {self.experts!r}")
        if self.deep_width is not None and self.deep_width < 1:
            raise ValueError(f"deep_width must be None or 1 or more, got {self.deep_width!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "MTMDConfig":
        """A size of `DIVISORS`, with changes.

        Raises:
            ValueError: no such preset.
        """
        divisor = preset_divisor(name)
        paper = cls()
        widths: dict[str, Any] = {w: divided(getattr(paper, w), divisor) for w in ("deep", "shallow", "router")}
        return replace(paper, **{**widths, "width_divisor": divisor, **changes})

    def embedding_width(self, task: Task) -> int:
        """Width of a task's emb_deep."""
        width = self.deep_width or (task.width if self.constrained else self.unconstrained_width)
        return max(1, width // self.width_divisor)

    @property
    def mixed(self) -> tuple[str, ...]:
        """The kinds of expert that the routing layer weighs, in the order of its outputs."""
        return tuple(e for e in EXPERTS if e in self.experts)


def preset_divisor(name: str) -> int:
    """Of a name in `DIVISORS`.

    Raises:
        ValueError: no such preset.
    """
    if name not in DIVISORS:
        raise ValueError(f"preset must be one of {list(DIVISORS)}, got {name!r}")
    return DIVISORS[name]


def divided(widths: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    """The widths of a preset."""
    return tuple(w // divisor for w in widths)
