"""The models that MTMD is measured against, and MTMD with one thing taken away: how each is trained.

A contender is trained on the same window and features and by the same stopping rule as MTMD. What the platform file says of
it under `experiments.contenders` was chosen on days before those that are evaluated (docs/tuning.md), and of MTMD
under `experiments.mtmd`, where the daily model is a cheaper one. An ablation is MTMD's training here with one change. All
make `experiments.max_epochs` passes, where the platform file has it and nothing of their own.

Nothing here imports Dagster or torch: a training process pays for what it needs only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mtmd_assets.platform import Platform
from mtmd_assets.platform_parts import OwnSettings

if TYPE_CHECKING:
    from mtmd_model.schema import Schema
    from mtmd_model.train import TrainConfig

CONTENDERS = ("slice_towers", "pooled_towers", "mmoe_dcn", "soft_slice_towers")


@dataclass(frozen=True)
class Change:
    """What sets one training apart from the platform's own."""

    architecture: str = "mtmd"
    """A name in `mtmd_model.architectures`."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the architecture's configuration."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the platform file's `training`."""
    sample_rate: float = 1.0
    """Share of the training rows."""
    bins: bool = True
    """Whether numbers that have bins (`mtmd_model.bins`) are read in them too."""

    def on(self, settings: Mapping[str, Any]) -> "Change":
        """This change on top of `settings`, which are in the platform file's words; the change wins."""
        of_model = {k: v for k, v in settings.items() if k in OF_MODEL}
        others = {k: v for k, v in settings.items() if k not in OF_MODEL}
        return replace(self, model={**of_model, **self.model}, training={**others, **self.training})


OF_MODEL = ("experts", "low_rank_layers")
"""Settings that are fields of the architecture's configuration."""

ALL_EXPERTS = ("deep", "task_shared", "domain_shared", "shallow")

ABLATIONS: Mapping[str, Change] = {
    "no_domain_adaptation": Change(model={"domain_norm": False, "excitation": False}),
    "no_domain_norm": Change(model={"domain_norm": False}),
    "no_excitation": Change(model={"excitation": False}),
    "no_cross": Change(model={"cross_layers": 0}),
    "post_norm": Change(model={"norm": "post"}),
    "no_norm": Change(model={"norm": "none"}),
    "no_routing": Change(model={"routing": False}),
    **{f"no_{kind}": Change(model={"experts": tuple(k for k in ALL_EXPERTS if k != kind)}) for kind in ALL_EXPERTS},
    "unconstrained": Change(model={"constrained": False}),
    "width_64": Change(model={"deep_width": 64}),
    "width_48": Change(model={"deep_width": 48}),
    "width_32": Change(model={"deep_width": 32}),
    "half_the_rows": Change(sample_rate=0.5),
    "one_model_a_product": Change(architecture="product_mtmd"),
    "unpooled": Change(training={"deviation": None}),
    "no_main_effects": Change(training={"main_effects": False}),
    "no_bins": Change(bins=False),
    "last_step": Change(training={"averaged_passes": 0.0}),
}
"""By the name in the column `model`. `no_cross` is without DCN (table 6); `unconstrained` has independent tasks of equal
width (table 5); `width_*` give every task's emb_deep one width (section 3.4, before the preset's divisor); `unpooled`
trains the domain experts without `mtmd_model.partial_pooling`, `no_bins` reads numbers as numbers only, `last_step` keeps
the weights of a pass's last step (`mtmd_model.averaging`)."""

MODELS = ("mtmd", *CONTENDERS, *ABLATIONS)


def change_of(platform: Platform, model: str) -> Change:
    """How a model's training in an experiment differs from the platform's own.

    Raises:
        ValueError: no such model.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    passes = platform.experiments.max_epochs
    settings = own_settings(platform, model).given()
    change = Change(model) if model in CONTENDERS else ABLATIONS.get(model, Change())
    return change.on({**({} if passes is None else {"max_epochs": passes}), **settings})


def own_settings(platform: Platform, model: str) -> OwnSettings:
    """What the platform file says of a model in experiments; of an ablation what it says of MTMD."""
    experiments = platform.experiments
    of: OwnSettings = getattr(experiments.contenders, model) if model in CONTENDERS else experiments.mtmd
    return of


NOTHING_TAKEN: Mapping[str, Callable[[Platform], bool]] = {
    "unconstrained": lambda platform: all(task.given is None for task in platform.tasks),
    "no_domain_norm": lambda platform: len(platform.surfaces) == len(platform.products) == 1,
    "no_task_shared": lambda platform: len(platform.tasks) == 1,
    "one_model_a_product": lambda platform: len(platform.products) == 1,
    **{
        f"width_{width}": partial(lambda width, platform: all(t.width == width for t in platform.tasks), width)
        for width in (64, 48, 32)
    },
}
"""Ablations of what some platforms do not have: there `unconstrained` changes widths at most, which `width_*` do."""


def takes_nothing(platform: Platform, model: str) -> bool:
    """Whether an ablation takes nothing away: the platform, or its training, has not what it is without."""
    if model in NOTHING_TAKEN and NOTHING_TAKEN[model](platform):
        return True
    own, whole = (change_of(platform, name) for name in (model, "mtmd"))
    same_features = model_schema(platform, own) == model_schema(platform, whole)
    return same_features and train_config(platform, own, 0) == train_config(platform, whole, 0)


def model_schema(platform: Platform, change: Change) -> "Schema":
    """The platform's domains, tasks and features, with a change."""
    schema = platform.model_schema
    return schema if change.bins else replace(schema, features=tuple(f for f in schema.features if f.bins is None))


def train_config(platform: Platform, change: Change | None = None, seed: int | None = None) -> "TrainConfig":
    """The platform file's training section, with a change, as the model package wants it."""
    from mtmd_model.architectures import ARCHITECTURES
    from mtmd_model.lightning_module import OptimiserConfig
    from mtmd_model.train import TrainConfig

    change = change or Change()
    t = platform.training.model_copy(update=dict(change.training))
    config = ARCHITECTURES[change.architecture].config
    return TrainConfig(
        architecture=change.architecture,
        model=config.preset(t.preset, **{"dropout": t.dropout, "main_effects": t.main_effects, **change.model}),
        optimiser=OptimiserConfig(
            learning_rate=t.learning_rate,
            warmup_share=t.warmup_share,
            weight_decay=t.weight_decay,
            embedding_weight_decay=t.weight_decay,
            embedding_rate=t.embedding_rate,
            deviation=t.deviation,
        ),
        sample_rate=change.sample_rate,
        slice_balance=t.slice_balance,
        id_dropout=t.id_dropout,
        averaged_passes=t.averaged_passes,
        calibrate=t.calibrate,
        batch_size=t.batch_size,
        block_rows=t.block_rows,
        resident=t.resident,
        gradient_clip=t.gradient_clip,
        max_epochs=t.max_epochs,
        patience=t.patience,
        seed=t.seed if seed is None else seed,
        accelerator=t.accelerator,
        precision=t.precision,
        compile=t.compile,
    )
