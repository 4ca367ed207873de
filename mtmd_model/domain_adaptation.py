"""Domain adaptation: a tower's raw features to what the domain's experts read (paper section 2.1.2).

Shapes: B rows of one domain; D columns of the domain's own layout, K of its key categorical features, S of
the tower's common layout; F dense features, W embedding columns of the tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from mtmd_model.config import MTMDConfig
from mtmd_model.domain_norm import DomainNorm
from mtmd_model.partial_pooling import Axis, Counterpart
from mtmd_model.schema import Feature
from mtmd_model.squeeze_excitation import SqueezeExcitation


@dataclass(frozen=True)
class Adapted:
    """One domain's rows, ready for the experts."""

    own_BD: Tensor
    """The domain's own features, gated: read by its deep and task-shared experts and its router."""
    key_BK: Tensor
    """Its key categorical features: read by its shallow experts."""
    common_BS: Tensor
    """All of the tower's features, absent ones as learned values: read by the domain-shared expert."""


class DomainAdaptation(nn.Module):
    """Normalise, fill what is missing, weigh the fields by squeeze-and-excitation.

    The key layout is taken before the gates: these depend on every feature, and the shallow expert is to see
    nothing but the key features. A domain without key features gives it a constant one.

    Args:
        domain: name of the surface or product.
        dense: the tower's dense features.
        categorical: the tower's categorical features, in the order of the embedding columns.
        config: switches, and the sizes of `DomainNorm` and `SqueezeExcitation`.

    Raises:
        ValueError: the domain has no feature at all.
    """

    def __init__(
        self,
        domain: str,
        dense: Sequence[Feature],
        categorical: Sequence[Feature],
        config: MTMDConfig,
    ) -> None:
        super().__init__()
        fields = [(f, 1) for f in dense] + [(f, f.width) for f in categorical]
        if not any(domain in f.domains for f, _ in fields):
            raise ValueError(f"domain {domain!r} has no feature")
        has = [domain in f.domains for f, width in fields for _ in range(width)]
        self.own_runs = [run for run, own in _runs(has) if own]
        self.runs = _runs(has)
        is_key = [_is_key(f, domain) for f, width in fields for _ in range(width)]
        self.key_runs = [run for run, key in _runs(is_key) if key]
        self.own_columns = [n for n, own in enumerate(has) if own]
        self.d_own, self.d_common = len(self.own_columns), len(has)
        # one more column than the common layout has: the constant of a domain without key features
        self.key_columns = [n for n, key in enumerate(is_key) if key] or [self.d_common]
        self.d_key = len(self.key_columns)
        self.own_fields = [n for n, (f, _) in enumerate(fields) if domain in f.domains]
        self.norm: nn.Module = nn.Identity()
        if config.domain_norm:
            present = [domain in f.domains for f in dense]
            self.norm = DomainNorm(present, config.norm_clip, config.norm_horizon)
        self.excitation: nn.Module = nn.Identity()
        if config.excitation:
            widths = [w for f, w in fields if domain in f.domains]
            self.excitation = SqueezeExcitation(widths, config.se_reduction)

    def forward(self, dense_BF: Tensor, embedded_BW: Tensor) -> Adapted:
        """(B, F) with NaN where missing (normalised already where domains share a norm) and (B, W) -> the domain's
        layouts."""
        raw_BS = torch.cat([self.norm(dense_BF), embedded_BW], 1)
        own_BD = self.excitation(_take(raw_BS, self.own_runs))
        key_BK = _take(raw_BS, self.key_runs) if self.key_runs else raw_BS.new_ones(len(raw_BS), 1)
        return Adapted(own_BD, key_BK, self._common(own_BD, raw_BS))

    def counterparts(self) -> dict[str, Counterpart]:
        """Its parameters among those of the tower's other domains, by feature."""
        axes: dict[str, tuple[Axis, ...]] = {
            "excitation.squeeze.weight": (None, self.own_fields),
            "excitation.excite.weight": (self.own_fields, None),
            "excitation.excite.bias": (self.own_fields,),
        }
        return {name: Counterpart(p, axes.get(name, (None,) * p.dim())) for name, p in self.named_parameters()}

    def _common(self, own_BD: Tensor, raw_BS: Tensor) -> Tensor:
        """The own columns put back among the absent ones."""
        if self.d_own == self.d_common:
            return own_BD
        parts, used = [], 0
        for (start, stop), own in self.runs:
            parts.append(own_BD[:, used : used + stop - start] if own else raw_BS[:, start:stop])
            used += stop - start if own else 0
        return torch.cat(parts, 1)


def _is_key(feature: Feature, domain: str) -> bool:
    return feature.kind == "categorical" and feature.key and domain in feature.domains


def _runs(flags: Sequence[bool]) -> list[tuple[tuple[int, int], bool]]:
    """Neighbouring equal flags, as ((start, stop), flag): unlike gathers, slices have cheap gradients."""
    runs, start = [], 0
    for flag, group in groupby(flags):
        stop = start + len(list(group))
        runs.append(((start, stop), flag))
        start = stop
    return runs


def _take(x: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """The columns of the runs, one after another."""
    if len(runs) == 1:
        return x[:, runs[0][0] : runs[0][1]]
    return torch.cat([x[:, start:stop] for start, stop in runs], 1)
