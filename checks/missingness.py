"""Missing rates against what is expected of them: Great Expectations for the contract, and tables a person can read.

Takes the rows of `feature_contract` or `feature_drift` as a frame with the columns surface, product, feature, rule,
rows, missing, missing_rate, min_rate, max_rate, passed.
"""

import os
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import polars as pl
    from great_expectations import ValidationDefinition

_KEY = ("surface", "product", "feature")


@dataclass(frozen=True)
class ContractRule:
    """The allowed missing rate of one feature in one slice (surface x product), bounds included.

    A slice without rows fails its rules, unless `contract.empty_slices` allows it; one of fewer rows than
    `contract.judged_from` may lack anything.
    """

    surface: str
    product: str
    feature: str
    rule: Literal["present", "absent"]
    min_rate: float
    max_rate: float


@dataclass(frozen=True)
class Failure:
    """One feature of one slice whose missing rate is not as expected."""

    surface: str
    product: str
    feature: str
    rule: str
    min_rate: float
    max_rate: float
    missing_rate: float | None
    """None: the slice has no rows."""
    rows: int

    @property
    def distance(self) -> float:
        """How far outside its bounds; infinite for a slice without rows."""
        if self.missing_rate is None:
            return float("inf")
        return max(self.min_rate - self.missing_rate, self.missing_rate - self.max_rate)


@dataclass(frozen=True)
class MissingnessResult:
    """The verdict on one day."""

    passed: bool
    rules: int
    failures: tuple[Failure, ...]
    """Worst first."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Great Expectations' own: evaluated, successful and unsuccessful expectations, success percent."""


def check_contract(measured: "pl.DataFrame") -> MissingnessResult:
    """Evaluate one day of `feature_contract` with Great Expectations.

    Raises:
        RuntimeError: if Great Expectations cannot evaluate, or disagrees with the column `passed`, which SQL computed.
    """
    refused, statistics = _expectations(measured)
    failures = _failures(measured)
    found = {(f.surface, f.product, f.feature) for f in failures}
    if refused != found:
        raise RuntimeError(f"Great Expectations and SQL disagree on {sorted(refused ^ found)[:5]}")
    return MissingnessResult(not failures, measured.height, failures, statistics)


def check_drift(drift: "pl.DataFrame") -> MissingnessResult:
    """The verdict of one day of the view `feature_drift`."""
    failures = _failures(drift)
    return MissingnessResult(not failures, drift.height, failures)


def markdown(result: MissingnessResult, most: int = 50) -> str:
    """The failures as a Markdown table, worst first, at most `most` of them."""
    if not result.failures:
        return f"All {result.rules:,} rules hold."
    lines = [
        f"{len(result.failures):,} of {result.rules:,} rules fail.",
        "",
        "| slice | feature | rule | expected missing | seen | rows |",
        "|---|---|---|---|---|---|",
    ]
    for f in result.failures[:most]:
        seen = "no rows" if f.missing_rate is None else _percent(f.missing_rate)
        lines.append(f"| {f.surface} × {f.product} | {f.feature} | {f.rule} | {_expected(f)} | {seen} | {f.rows:,} |")
    if len(result.failures) > most:
        lines += ["", f"and {len(result.failures) - most:,} more"]
    if any(f.missing_rate is None for f in result.failures):
        lines += [
            "",
            "Where a slice may be without rows, `contract: {empty_slices: allow}` in the platform file lets it.",
        ]
    return "\n".join(lines)


def _failures(rows: "pl.DataFrame") -> tuple[Failure, ...]:
    columns = ("surface", "product", "feature", "rule", "min_rate", "max_rate", "missing_rate", "rows")
    failed = [Failure(*values) for values in rows.filter(~rows["passed"]).select(columns).iter_rows()]
    return tuple(sorted(failed, key=lambda f: (-f.distance, -f.rows, f.surface, f.product, f.feature)))


def _expectations(measured: "pl.DataFrame") -> tuple[set[tuple[str, str, str]], dict[str, Any]]:
    """Great Expectations' verdict: which (surface, product, feature) it refuses, and its statistics."""
    # A slice without rows has no rate: NaN, which fails both comparisons.
    frame = measured.select(*_KEY, "missing_rate", "min_rate", "max_rate").to_pandas()
    verdict = _validation().run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": list(_KEY)},
    )
    refused: set[tuple[str, str, str]] = set()
    for part in verdict.results:
        if part.exception_info["raised_exception"]:
            raise RuntimeError(f"Great Expectations: {part.exception_info['exception_message']}")
        refused |= {(r["surface"], r["product"], r["feature"]) for r in part.result.get("unexpected_index_list") or ()}
    if verdict.success == bool(refused):
        raise RuntimeError(f"Great Expectations: success is {verdict.success}, yet it lists {len(refused)} failures")
    return refused, dict(verdict.statistics)


@cache
def _validation() -> "ValidationDefinition":
    """The contract as a suite of Great Expectations; made once a process, as making it costs more than a day's check.

    Two expectations over the whole table take 0.05 s where one a rule takes seconds.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # Read at import.
    import great_expectations as gx  # Takes seconds: only runs that check pay for it.
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.expectations import ExpectColumnPairValuesAToBeGreaterThanB as AtLeast

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("lake").add_dataframe_asset("feature_contract")
    pairs = (("missing_rate", "min_rate"), ("max_rate", "missing_rate"))
    suite = gx.ExpectationSuite(
        name="feature_contract",
        expectations=[AtLeast(column_A=a, column_B=b, or_equal=True, ignore_row_if="neither") for a, b in pairs],
    )
    context.suites.add(suite)
    data = asset.add_batch_definition_whole_dataframe("day")
    validation = gx.ValidationDefinition(name="feature_contract", data=data, suite=suite)
    context.validation_definitions.add(validation)
    return validation


def _expected(f: Failure) -> str:
    if f.min_rate <= 0:
        return f"at most {_percent(f.max_rate)}"
    if f.max_rate >= 1:
        return f"at least {_percent(f.min_rate)}" if f.min_rate < 1 else "100 %"
    return f"{_percent(f.min_rate)} to {_percent(f.max_rate)}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.4g} %"
