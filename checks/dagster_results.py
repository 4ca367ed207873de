"""Verdicts as Dagster's asset check results."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from checks.missingness import MissingnessResult, markdown

if TYPE_CHECKING:
    import dagster as dg

    from checks.routing import Signature
    from checks.training import HighPass

CONTRACT, ACCOUNTING, DRIFT = "feature_contract", "row_accounting", "feature_drift"
TRAINING, ROUTING = "training_loss", "routing"
"""Names of the checks: contract and accounting gate a day, the others only warn."""


class RowCounts(Protocol):
    """What became of one source's rows."""

    @property
    def source(self) -> str:
        """Whose rows."""
        ...

    @property
    def received(self) -> int:
        """All of them."""
        ...

    @property
    def accepted(self) -> int:
        """Those in the next table."""
        ...

    @property
    def rejected(self) -> int:
        """Those in `rejected_rows`."""
        ...


def contract_result(result: MissingnessResult, asset_key: "dg.AssetKey | None" = None) -> "dg.AssetCheckResult":
    """The contract's verdict: a day that breaks it is not published."""
    import dagster as dg

    return _result(CONTRACT, dg.AssetCheckSeverity.ERROR, result, asset_key)


def drift_result(result: MissingnessResult, asset_key: "dg.AssetKey | None" = None) -> "dg.AssetCheckResult":
    """The drift's verdict: a warning at most."""
    import dagster as dg

    return _result(DRIFT, dg.AssetCheckSeverity.WARN, result, asset_key)


def _result(
    name: str, severity: "dg.AssetCheckSeverity", result: MissingnessResult, asset_key: "dg.AssetKey | None"
) -> "dg.AssetCheckResult":
    import dagster as dg

    worst = [f"{f.surface} × {f.product}: {f.feature}" for f in result.failures[:3]]
    failing = "; ".join(worst) + (" …" if len(result.failures) > 3 else "")
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=asset_key,
        passed=result.passed,
        severity=severity,
        description=failing or f"{result.rules:,} rules hold",
        metadata={
            "failures": dg.MarkdownMetadataValue(markdown(result)),
            "rules": result.rules,
            "failed_rules": len(result.failures),
            **{f"great_expectations_{k}": v for k, v in result.statistics.items()},
        },
    )


def accounting_result(
    counts: "Sequence[RowCounts]", fault: str = "", asset_key: "dg.AssetKey | None" = None
) -> "dg.AssetCheckResult":
    """Whether every row received of every source is accounted for; `fault` says what is not, as the join found it."""
    import dagster as dg

    lines = ["| source | received | accepted | rejected |", "|---|--:|--:|--:|"]
    lines += [f"| {c.source} | {c.received:,} | {c.accepted:,} | {c.rejected:,} |" for c in counts]
    return dg.AssetCheckResult(
        check_name=ACCOUNTING,
        asset_key=asset_key,
        passed=not fault,
        severity=dg.AssetCheckSeverity.ERROR,
        description=fault or f"{sum(c.received for c in counts):,} rows, none lost",
        metadata={"counts": dg.MarkdownMetadataValue("\n".join(lines))},
    )


def check_specs(asset_key: "dg.AssetKey") -> "list[dg.AssetCheckSpec]":
    """The checks of the joined examples; the first two gate a day."""
    import dagster as dg

    described = {
        CONTRACT: "Each feature is present in the slices that should have it and absent in the others.",
        ACCOUNTING: "Every row received is in a table or in rejected_rows.",
        DRIFT: "Missing rates are near those of the trailing days. Warns only.",
    }
    return [dg.AssetCheckSpec(name, asset=asset_key, description=d) for name, d in described.items()]


def routing_result(found: "Sequence[Signature]", asset_key: "dg.AssetKey | None" = None) -> "dg.AssetCheckResult":
    """Whether a router shows a failure signature: a warning at most."""
    import dagster as dg

    lines = ["| tower | domain | task | fault | |", "|---|---|---|---|---|"]
    lines += [f"| {s.tower} | {s.domain} | {s.task} | {s.fault} | {s.says} |" for s in found]
    worst = "; ".join(f"{s.tower} {s.domain} {s.task}: {s.says}" for s in found[:3])
    return dg.AssetCheckResult(
        check_name=ROUTING,
        asset_key=asset_key,
        passed=not found,
        severity=dg.AssetCheckSeverity.WARN,
        description=worst + (" …" if len(found) > 3 else "") or "every router uses its experts",
        metadata={"faults": len(found), **({"routers": dg.MarkdownMetadataValue("\n".join(lines))} if found else {})},
    )


def training_result(found: "Sequence[HighPass]", asset_key: "dg.AssetKey | None" = None) -> "dg.AssetCheckResult":
    """Whether the training loss jumped: a warning at most."""
    import dagster as dg

    first = "; ".join(high.says for high in found[:3]) + (" …" if len(found) > 3 else "")
    return dg.AssetCheckResult(
        check_name=TRAINING,
        asset_key=asset_key,
        passed=not found,
        severity=dg.AssetCheckSeverity.WARN,
        description=first or "the training loss did not jump",
        metadata={"high passes": len(found)},
    )
