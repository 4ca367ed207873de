"""The two-tower rankers that can be trained, by name: a contender is one more entry."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mtmd_model.contenders.mmoe_dcn import MMOEDCN, MMOEConfig
from mtmd_model.contenders.plain import PlainConfig, PooledTowers, SliceTowers, SoftSliceTowers
from mtmd_model.contenders.product_mtmd import ProductMTMD
from mtmd_model.encoder import Encoder
from mtmd_model.mtmd import MTMD, MTMDConfig
from mtmd_model.schema import Schema
from mtmd_model.two_tower import TwoTower


@dataclass(frozen=True)
class Architecture:
    """How a model is made from its configuration."""

    config: type[Any]
    """Of its configurations: a dataclass with `preset` (a size by name) and `from_dict` (from JSON)."""
    build: Callable[[Schema, Mapping[str, int], Any], TwoTower]
    """A model from the schema, the vocabularies' rows and a configuration."""


ARCHITECTURES: dict[str, Architecture] = {
    "mtmd": Architecture(MTMDConfig, MTMD),
    "product_mtmd": Architecture(MTMDConfig, ProductMTMD),
    "slice_towers": Architecture(PlainConfig, SliceTowers),
    "soft_slice_towers": Architecture(PlainConfig, SoftSliceTowers),
    "pooled_towers": Architecture(PlainConfig, PooledTowers),
    "mmoe_dcn": Architecture(MMOEConfig, MMOEDCN),
}


def build(name: str, encoder: Encoder, config: Any) -> TwoTower:
    """A new model.

    Raises:
        ValueError: no such architecture.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {sorted(ARCHITECTURES)}, got {name!r}")
    return ARCHITECTURES[name].build(encoder.schema, encoder.rows, config)


def config_to_dict(config: Any) -> dict[str, Any]:
    """JSON-ready form of an architecture's configuration."""
    return asdict(config)
