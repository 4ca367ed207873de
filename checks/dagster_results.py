"""The checks as Dagster knows them: what each holds an asset to, and its verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from checks.accounting import RowCount
from checks.missingness import MissingnessResult, markdown
from checks.routing import Signature
from checks.training import HighPass

CONTRACT, ACCOUNTING, DRIFT = "feature_contract", "row_accounting", "feature_drift"
TRAINING, ROUTING = "training_loss", "routing"

_DESCRIBED = {
    CONTRACT: "Each feature is present in the slices that should have it and absent in the others.",
    ACCOUNTING: "Every row received is in a table or in rejected_rows.",
    DRIFT: "Missing rates are near those of the trailing days. Warns only.",
    TRAINING: "The training loss does not jump from one pass to the next (within the first it would not show). Where it "
    "does, lower training.learning_rate or training.gradient_clip, or lengthen training.warmup_share. Warns only.",
    ROUTING: "No router weighs its experts alike for every row, gives all to one, or leaves one unused. Warns only.",
}
_GATES = (CONTRACT, ACCOUNTING)
"""A day that fails one of these is not published; the others warn."""


def check_specs(asset_key: dg.AssetKey, *names: str) -> list[dg.AssetCheckSpec]:
    """These checks of an asset."""
    return [dg.AssetCheckSpec(name, asset=asset_key, description=_DESCRIBED[name]) for name in names]


def contract_result(result: MissingnessResult, asset_key: dg.AssetKey) -> dg.AssetCheckResult:
    """Whether a day's missing rates are what the contract says."""
    return _missingness(CONTRACT, result, asset_key)


def drift_result(result: MissingnessResult, asset_key: dg.AssetKey) -> dg.AssetCheckResult:
    """Whether a day's missing rates are near those of the days before."""
    return _missingness(DRIFT, result, asset_key)


def _missingness(name: str, result: MissingnessResult, asset_key: dg.AssetKey) -> dg.AssetCheckResult:
    metadata = {
        "failures": dg.MarkdownMetadataValue(markdown(result)),
        "rules": result.rules,
        "failed_rules": len(result.failures),
        **{f"great_expectations_{k}": v for k, v in result.statistics.items()},
    }
    failing = [f"{f.surface} × {f.product}: {f.feature}" for f in result.failures]
    return _verdict(name, asset_key, failing, f"{result.rules:,} rules hold", metadata)


def accounting_result(counts: Sequence[RowCount], asset_key: dg.AssetKey, fault: str = "") -> dg.AssetCheckResult:
    """Whether every row received of every source is accounted for; `fault` says what is not, as the join found it."""
    lines = ["| source | received | accepted | rejected |", "|---|--:|--:|--:|"]
    lines += [f"| {c.source} | {c.received:,} | {c.accepted:,} | {c.rejected:,} |" for c in counts]
    fine = f"{sum(c.received for c in counts):,} rows, none lost"
    table = {"counts": dg.MarkdownMetadataValue("\n".join(lines))}
    return _verdict(ACCOUNTING, asset_key, [fault] if fault else [], fine, table)


def routing_result(found: Sequence[Signature], asset_key: dg.AssetKey) -> dg.AssetCheckResult:
    """Whether a router shows a failure signature."""
    lines = ["| tower | domain | task | fault | |", "|---|---|---|---|---|"]
    lines += [f"| {s.tower} | {s.domain} | {s.task} | {s.fault} | {s.says} |" for s in found]
    table = {"routers": dg.MarkdownMetadataValue("\n".join(lines))} if found else {}
    faults = [f"{s.tower} {s.domain} {s.task}: {s.says}" for s in found]
    return _verdict(ROUTING, asset_key, faults, "every router uses its experts", {"faults": len(found), **table})


def training_result(found: Sequence[HighPass], asset_key: dg.AssetKey) -> dg.AssetCheckResult:
    """Whether the training loss jumped."""
    jumps = [high.says for high in found]
    return _verdict(TRAINING, asset_key, jumps, "the training loss did not jump", {"high passes": len(found)})


def _verdict(
    name: str, asset_key: dg.AssetKey, faults: Sequence[str], fine: str, metadata: Mapping[str, Any]
) -> dg.AssetCheckResult:
    """Passed without `faults`, of which the first three are said; else `fine` is."""
    severity = dg.AssetCheckSeverity.ERROR if name in _GATES else dg.AssetCheckSeverity.WARN
    said = "; ".join(faults[:3]) + (" …" if len(faults) > 3 else "")
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=asset_key,
        passed=not faults,
        severity=severity,
        description=said or fine,
        metadata=metadata,
    )
