"""The feature contract and drift: what is measured, what passes, and whether a person can read why not."""

from datetime import date, timedelta

import polars as pl
import pytest

from checks.dagster_results import contract_result, drift_result
from checks.missingness import ContractRule, Failure, MissingnessResult, check_contract, check_drift, markdown
from mtmd_assets.contract import contract_rules, measure_contract
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.tables import tables, views
from mtmd_assets.warehouse import Warehouse

START = date(2026, 1, 1)
TOY = parse_platform(
    """
name: toy
start: 2026-01-01
source: {kind: adworld}
surfaces: [home, search]
products: [standard, shopping]
contract: {judged_from: 1}
drift: {days: 3, tolerance: 0.1}
tasks: [{name: ctr}]
features:
  - {name: age, side: query, kind: dense, max_missing: 0.1}
  - {name: query_text, side: query, kind: categorical, buckets: 10, surfaces: [search]}
  - {name: price, side: item, kind: dense, products: [shopping], max_missing: 0.5}
  - {name: seen, side: item, kind: dense, history: {by: [item_id], of: impressions, days: 2}}
""",
    "toy.yaml",
)


def examples(slices=TOY.slices, rows=10, **missing):
    """`rows` rows a slice that keep the contract; `missing` blanks the feature in so many rows of every slice."""
    parts = []
    for surface, product in slices:
        columns = {
            "age": 30.0,
            "query_text": "q" if surface == "search" else None,
            "price": 1.0 if product == "shopping" else None,
            "seen": 0.0,
        }
        line = pl.int_range(rows)
        parts.append(
            pl.select(line.alias("line")).select(
                pl.format("{}", "line").alias("impression_id"),
                pl.lit(surface).alias("surface"),
                pl.lit(product).alias("product"),
                *(
                    pl.when(pl.col("line") >= missing.get(name, 0)).then(pl.lit(value)).cast(dtype).alias(name)
                    for (name, value), dtype in zip(
                        columns.items(), (pl.Float32, pl.String, pl.Float32, pl.Float32), strict=True
                    )
                ),
            )
        )
    return pl.concat(parts)


@pytest.fixture
def measure(tmp_path):
    """Measure a frame of examples as a day's file."""
    warehouse = Warehouse(tmp_path / "toy", tables(TOY), views(TOY))

    def of(frame, day=START + timedelta(5), **contract):
        path = tmp_path / "examples.parquet"
        frame.write_parquet(path)
        platform = TOY.model_copy(update={"contract": TOY.contract.model_copy(update=contract)})
        with warehouse.connect() as con:
            return measure_contract(con, platform, day, path)

    return of


# -- the contract ------------------------------------------------------------------------------------------------


def test_rules_follow_from_the_platform_file():
    rules = contract_rules(TOY, START + timedelta(2))
    assert len(rules) == 4 * 4
    assert ContractRule("home", "standard", "age", "present", 0.0, 0.1) in rules
    assert ContractRule("home", "shopping", "query_text", "absent", 1.0, 1.0) in rules
    assert ContractRule("search", "standard", "query_text", "present", 0.0, 0.02) in rules
    assert ContractRule("search", "standard", "price", "absent", 1.0, 1.0) in rules


def test_features_from_history_have_rules_once_their_look_back_is_in_the_log():
    assert not any(r.feature == "seen" for r in contract_rules(TOY, START + timedelta(1)))
    assert sum(r.feature == "seen" for r in contract_rules(TOY, START + timedelta(2))) == 4


def test_a_slice_of_few_rows_is_not_judged_by_what_it_lacks_but_by_what_it_must_not_have(measure):
    few = measure(examples(age=5), judged_from=11)
    assert check_contract(few).passed
    assert not check_contract(measure(examples(age=5), judged_from=10)).passed
    alien = examples().with_columns(query_text=pl.lit("q"))
    assert not check_contract(measure(alien, judged_from=11)).passed


def test_a_slice_may_be_empty_where_the_platform_says_so(measure):
    without = examples(TOY.slices[1:])
    assert not check_contract(measure(without)).passed
    allowed = measure(without, empty_slices="allow")
    assert check_contract(allowed).passed
    assert len(allowed) == 12, "an empty slice has no rates to report"


def test_a_day_that_keeps_the_contract_passes(measure):
    result = check_contract(measure(examples(age=1)))  # 1 of 10 is exactly the limit
    assert (result.passed, result.rules, result.failures) == (True, 16, ())
    assert result.statistics["successful_expectations"] == 2
    assert markdown(result) == "All 16 rules hold."


def test_missing_rates_are_counted_per_slice(measure):
    frame = pl.concat([examples([("home", "standard")], rows=8, age=2), examples(TOY.slices[1:], rows=10)])
    rows = measure(frame).filter(pl.col("feature").is_in(["age", "price"])).sort("feature", "surface", "product")
    assert rows.filter(surface="home").rows() == [
        ("home", "shopping", "age", "present", 10, 0, 0.0, 0.0, 0.1, True),
        ("home", "standard", "age", "present", 8, 2, 0.25, 0.0, 0.1, False),
        ("home", "shopping", "price", "present", 10, 0, 0.0, 0.0, 0.5, True),
        ("home", "standard", "price", "absent", 8, 8, 1.0, 1.0, 1.0, True),
    ]


def test_a_feature_missing_where_it_should_be_present_fails(measure):
    result = check_contract(measure(examples(age=3)))
    assert not result.passed
    assert set(result.failures) == {Failure(s, p, "age", "present", 0.0, 0.1, 0.3, 10) for s, p in TOY.slices}
    assert result.statistics["success_percent"] == 50.0


def test_a_feature_present_where_it_should_be_absent_fails(measure):
    frame = examples().with_columns(query_text=pl.lit("leak"))
    result = check_contract(measure(frame))
    assert {(f.surface, f.product, f.feature, f.rule, f.missing_rate) for f in result.failures} == {
        ("home", p, "query_text", "absent", 0.0) for p in TOY.products
    }
    assert "| home × shopping | query_text | absent | 100 % | 0 % | 10 |" in markdown(result)


def test_a_slice_that_vanished_fails_all_its_rules(measure):
    result = check_contract(measure(examples(TOY.slices[1:], age=4)))
    vanished, others = result.failures[:4], result.failures[4:]  # worst first
    assert {(f.surface, f.product, f.missing_rate, f.rows) for f in vanished} == {("home", "standard", None, 0)}
    assert {f.feature for f in vanished} == {"age", "query_text", "price", "seen"}
    assert {f.feature for f in others} == {"age"}


def test_great_expectations_must_agree_with_sql(measure):
    wrong = measure(examples(age=3)).with_columns(passed=True)
    with pytest.raises(RuntimeError, match="disagree on"):
        check_contract(wrong)


def test_failures_read_as_a_table(measure):
    lines = markdown(check_contract(measure(examples(TOY.slices[1:], age=3)))).splitlines()
    assert lines[0] == "7 of 16 rules fail."
    assert lines[2] == "| slice | feature | rule | expected missing | seen | rows |"
    assert lines[4] == "| home × standard | age | present | at most 10 % | no rows | 0 |"
    assert "empty_slices: allow" in lines[-1]
    assert lines[8] == "| home × shopping | age | present | at most 10 % | 30 % | 10 |"


def test_a_long_table_is_cut():
    failures = tuple(Failure("s", "p", f"f{k}", "present", 0.0, 0.1, 0.5, 1234) for k in range(60))
    lines = markdown(MissingnessResult(False, 1000, failures)).splitlines()
    assert lines[0] == "60 of 1,000 rules fail."
    assert lines[-1] == "and 10 more"
    assert sum(line.startswith("| s × p |") for line in lines) == 50


# -- drift -------------------------------------------------------------------------------------------------------


def publish(warehouse, day, missing, rows=10):
    """One feature's contract row of a day."""
    values = (
        f"'home', 'standard', 'age', 'present', {rows}, {missing}, {missing / rows if rows else 'NULL'}, 0, 1, true"
    )
    with warehouse.connect() as con, warehouse.stage() as stage:
        names = "surface, product, feature, rule, rows, missing, missing_rate, min_rate, max_rate, passed"
        stage.write(con, "feature_contract", day, f"FROM (VALUES ({values})) AS v({names})")
        stage.publish()


def missingness(warehouse):
    with warehouse.connect() as con:
        query = (
            "SELECT ds, round(missing_rate, 6), round(min_rate, 6), round(max_rate, 6), passed FROM feature_missingness"
        )
        return con.execute(f"{query} WHERE rule = 'drift' ORDER BY ds").fetchall()


@pytest.fixture
def warehouse(tmp_path):
    return Warehouse(tmp_path / "lake", tables(TOY), views(TOY))


def test_drift_is_against_the_mean_of_the_trailing_days(warehouse):
    for k, missing in enumerate((1, 2, 3, 4, 0)):
        publish(warehouse, START + timedelta(k), missing)
    day = [START + timedelta(k) for k in range(5)]
    assert missingness(warehouse) == [
        (day[1], 0.2, 0.0, 0.2, True),  # mean of 0.1
        (day[2], 0.3, 0.05, 0.25, False),  # mean of 0.1, 0.2
        (day[3], 0.4, 0.1, 0.3, False),  # mean of 0.1, 0.2, 0.3
        (day[4], 0.0, 0.2, 0.4, False),  # mean of 0.2, 0.3, 0.4: three days, not four
    ]


def test_days_without_rows_or_not_published_are_passed_over(warehouse):
    publish(warehouse, START, 1)
    publish(warehouse, START + timedelta(1), 0, rows=0)
    publish(warehouse, START + timedelta(3), 1)
    publish(warehouse, START + timedelta(20), 9)
    assert missingness(warehouse) == [(START + timedelta(3), 0.1, 0.0, 0.2, True)]


def test_drift_does_not_depend_on_the_order_of_a_backfill(tmp_path):
    seen = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        folder = tmp_path / "".join(map(str, order))
        lake = Warehouse(folder, tables(TOY), views(TOY))
        for k in order:
            publish(lake, START + timedelta(k), k)
        seen.append(missingness(lake))
    assert len(seen[0]) == 3
    assert seen[0] == seen[1] == seen[2]


def test_another_program_sees_contract_and_drift(warehouse):
    import duckdb

    for k in range(2):
        publish(warehouse, START + timedelta(k), 5 * k)
    with duckdb.connect(str(warehouse.database), read_only=True) as con:
        query = "SELECT ds, rule, passed FROM feature_missingness ORDER BY ALL"
        rows = con.execute(query).fetchall()
    second = START + timedelta(1)
    assert rows == [(START, "present", True), (second, "drift", False), (second, "present", True)]


def test_the_platform_file_decides_what_counts_as_drift(tmp_path):
    platform = TOY.model_copy(update={"drift": TOY.drift.model_copy(update={"days": 1, "tolerance": 0.5})})
    tolerant = Warehouse(tmp_path, tables(platform), views(platform))
    for k, missing in enumerate((0, 0, 5)):
        publish(tolerant, START + timedelta(k), missing)
    assert missingness(tolerant)[-1] == (START + timedelta(2), 0.5, -0.5, 0.5, True)


# -- Dagster -----------------------------------------------------------------------------------------------------


def test_the_contract_blocks_and_drift_warns(measure, warehouse):
    from dagster import AssetCheckSeverity, AssetKey

    refused = contract_result(check_contract(measure(examples(age=3))), AssetKey("examples"))
    assert (refused.check_name, refused.passed, refused.severity) == (
        "feature_contract",
        False,
        AssetCheckSeverity.ERROR,
    )
    assert refused.metadata["failed_rules"].value == 4
    assert "| home × standard | age |" in refused.metadata["failures"].value
    assert refused.description == "home × shopping: age; home × standard: age; search × shopping: age …"

    for k in range(2):
        publish(warehouse, START + timedelta(k), 5 * k)
    with warehouse.connect() as con:
        drift = con.sql("SELECT * EXCLUDE (ds) FROM feature_drift WHERE ds = DATE '2026-01-02'").pl()
    drifted = drift_result(check_drift(drift), AssetKey("examples"))
    assert (drifted.check_name, drifted.passed, drifted.severity) == ("feature_drift", False, AssetCheckSeverity.WARN)
    assert "| home × standard | age | drift | at most 10 % | 50 % | 10 |" in drifted.metadata["failures"].value


def test_a_day_with_nothing_before_it_has_no_drift(warehouse):
    publish(warehouse, START, 1)
    with warehouse.connect() as con:
        result = check_drift(con.sql("FROM feature_drift").pl())
    assert (result.passed, result.rules) == (True, 0)
