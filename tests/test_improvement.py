from datetime import date

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, t

from mtmd_assets.improvement import improvement, improvement_table, mean_over, verdict
from mtmd_assets.intervals import resample_counts, seed_shares

DAYS = [date(2026, 1, 1), date(2026, 1, 2)]
SCORE = 0.5


def rows(n: int, cells: int = 1, users: int | None = None) -> pl.DataFrame:
    """n rows a cell, over two days; cell i is surface s<i>, product p and task t<i % 2>."""
    i = np.arange(n * cells)
    cell = i // n
    return pl.DataFrame(
        {
            "day": [DAYS[k % 2] for k in i],
            "impression_id": i,
            "user_id": i % (users or n),
            "surface": [f"s{c}" for c in cell],
            "product": "p",
            "task": [f"t{c % 2}" for c in cell],
            "score": SCORE,
            "bucket": i % n % 10,
        }
    )


def predictions(table: pl.DataFrame, *errors_of_seeds) -> pl.DataFrame:
    """A seed for each array of |ln p - ln t|."""
    seeds = enumerate(errors_of_seeds)
    return pl.concat(
        [
            table.with_columns(
                pl.lit(s).alias("seed"), pl.Series("probability", SCORE * np.exp(-np.broadcast_to(e, len(table))))
            )
            for s, e in seeds
        ]
    )


def whole(table: pl.DataFrame, **cell: str | None) -> dict:
    """The one line of all rows with these names."""
    of_cell = [pl.col(name).eq_missing(pl.lit(value, pl.String)) for name, value in cell.items()]
    return table.filter(pl.col("bucket").is_null(), *of_cell).row(0, named=True)


def test_hand_computed() -> None:
    table = rows(4).with_columns(user_id=pl.Series(["a", "a", "b", "c"]))
    mtmd = predictions(table, [0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, 0.6])
    contender = predictions(table, [0.5] * 4, [0.4, 0.7, 0.4, 0.8])
    out = improvement_table(mtmd, contender, min_rows=1, min_users=3, replicates=50)
    cell = whole(out, surface="s0")
    # mtmd (0.25 + 0.45) / 2, contender (0.5 + 0.575) / 2.
    assert cell["mtmd"] == pytest.approx(0.35)
    assert cell["contender_logmae"] == pytest.approx(0.5375)
    assert cell["improvement"] == pytest.approx((0.5375 - 0.35) / 0.5375)
    assert (cell["rows"], cell["users"], cell["seeds"]) == (4, 3, 2)
    assert cell["joint_low"] <= cell["improvement"] <= cell["joint_high"]
    few = improvement_table(mtmd, contender, min_rows=1, min_users=4, replicates=50)
    assert whole(few, surface="s0") == {**cell, "joint_low": None, "joint_high": None}

    first = out.filter(pl.col("surface") == "s0", pl.col("bucket") == 0).row(0, named=True)
    # The one row of bucket 0: mtmd (0.1 + 0.3) / 2, contender (0.5 + 0.4) / 2.
    assert first["improvement"] == pytest.approx(1 - 0.2 / 0.45)
    assert (first["rows"], first["users"], first["joint_low"]) == (1, 1, None)
    empty = out.filter(pl.col("surface") == "s0", pl.col("bucket") == 4).row(0, named=True)
    assert (empty["rows"], empty["improvement"], empty["low"]) == (0, None, None)
    assert out["bucket"].to_list() == [None, 0, 1, 2, 3, 4] * 3
    assert whole(out, surface=None, task=None)["improvement"] == cell["improvement"]
    assert whole(out, surface=None, task="t0")["low"] == cell["low"]


def test_probabilities_are_floored() -> None:
    mtmd = predictions(rows(1), [0.0]).with_columns(probability=0.0)
    contender = predictions(rows(1), [1.0])
    cell = whole(improvement_table(mtmd, contender, replicates=5), surface="s0")
    assert cell["mtmd"] == pytest.approx(np.log(SCORE / 1e-6))


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_models(seeds: int) -> None:
    table = rows(300, cells=5, users=90)
    errors = np.random.default_rng(0).exponential(size=(seeds, len(table)))
    frame = predictions(table, *errors)
    out = improvement_table(frame, frame, replicates=200)
    assert (out["improvement"] == 0).all()
    assert (out["low"] <= 0).all()
    assert (out["high"] >= 0).all()
    if seeds == 1:  # nothing but the users differ, and those are the same for both
        assert (out["low"] == 0).all()
        assert (out["high"] == 0).all()
    assert {verdict(row) for row in out.iter_rows(named=True)} == {"no clear difference"}


def test_does_not_depend_on_the_order_of_rows() -> None:
    table = rows(50, cells=3, users=20)
    rng = np.random.default_rng(0)
    mtmd, contender = (predictions(table, *rng.exponential(size=(2, len(table)))) for _ in range(2))
    out = improvement_table(mtmd, contender, min_rows=10, replicates=20)
    shuffled = improvement_table(mtmd.sample(fraction=1, shuffle=True, seed=1), contender, min_rows=10, replicates=20)
    assert shuffled.equals(out)
    assert not improvement_table(mtmd, contender, min_rows=10, replicates=20, seed=1).equals(out)


def test_bootstrap_is_the_formula_on_resampled_rows() -> None:
    """Rows repeated as often as their user is drawn, and each day's seeds by their shares, give the replicate; with the
    spread of the trainings its degrees of freedom."""
    table = rows(30, cells=2, users=7)
    rng = np.random.default_rng(3)
    errors = rng.exponential(size=(2, 3, len(table)))
    out = improvement_table(*(predictions(table, *e) for e in errors), min_rows=1, replicates=40, seed=5)

    same = np.random.default_rng(5)
    users_BU = resample_counts(same, 7, 40)
    mtmd_DBS, contender_DBS = ([seed_shares(same, 3, 40) for _ in DAYS] for _ in range(2))
    value_C, replicates_CB, trainings = [], [], []
    for cell in range(2):
        at = slice(30 * cell, 30 * cell + 30)
        day_N = (table["day"][at] == DAYS[1]).to_numpy().astype(int)
        values = []
        for b, users in enumerate(users_BU):
            repeats = users[table["user_id"][at]]
            m, c = (
                sum((np.array([shares_DBS[d][b] for d in day_N]).T * e[:, at] * repeats)[s].sum() for s in range(3))
                / repeats.sum()
                for e, shares_DBS in zip(errors, (mtmd_DBS, contender_DBS), strict=True)
            )
            values.append((c - m) / c)
        m, c = (e[:, at].mean() for e in errors)
        by_day = [[[x[day_N == d].sum() / 30 for x in e[:, at]] for d in range(2)] for e in errors]
        value_C.append((c - m) / c)
        replicates_CB.append(values)
        trainings.append(np.array(by_day) * np.array([-1 / c, m / c**2])[:, None, None])
    # of the mean too: its cells share users and trainings, which makes it stray more than theirs alone would
    for line, cells in (({"surface": "s0"}, [0]), ({"surface": "s1"}, [1]), ({"surface": None, "task": None}, [0, 1])):
        value, values = (np.mean([x[c] for c in cells], axis=0) for x in (value_C, replicates_CB))
        parts = np.var(np.mean([trainings[c] for c in cells], axis=0), axis=2, ddof=1) / 3
        freedom = max(np.var(values, ddof=1), parts.sum()) ** 2 / (parts**2 / 2).sum()
        stretch = t.ppf(0.975, freedom) / norm.ppf(0.975)
        expected = value + stretch * (np.quantile(values, [0.025, 0.975]) - value)
        row = whole(out, **line)
        assert row["improvement"] == pytest.approx(value)
        assert [row["low"], row["high"]] == pytest.approx(expected, abs=1e-5)


def simulated(rng: np.random.Generator, factor_C: np.ndarray, users: int, seeds: int) -> list[pl.DataFrame]:
    """Four rows a user and cell; users differ threefold in their errors, in part alike for both models."""
    cells = len(factor_C)
    table = rows(4 * users, cells, users)
    user_N = table["user_id"].to_numpy()
    alike_U = 0.4 * rng.normal(size=(cells, users))
    frames = []
    for factor in (factor_C, np.ones(cells)):
        user_CU = np.exp(alike_U + 0.4 * rng.normal(size=(cells, users)))
        mean_N = 0.3 * (factor[:, None] * user_CU)[np.repeat(np.arange(cells), 4 * users), user_N]
        frames.append(predictions(table, *(mean_N * rng.uniform(0.5, 1.5, size=(seeds, len(table))))))
    return frames


def test_coverage() -> None:
    """Intervals of data sets with a known improvement contain it as often as they say."""
    rng = np.random.default_rng(0)
    factor_C = np.linspace(0.7, 1.2, 8)
    truth_C, sets = 1 - factor_C, 100
    pointwise, joint, of_mean = 0.0, 0.0, 0.0
    for seed in range(sets):
        out = improvement_table(*simulated(rng, factor_C, users=120, seeds=2), replicates=300, seed=seed)
        cells = out.filter(pl.col("bucket").is_null(), pl.col("surface").is_not_null())
        low, high, joint_low, joint_high = (cells[c].to_numpy() for c in ("low", "high", "joint_low", "joint_high"))
        pointwise += ((low <= truth_C) & (truth_C <= high)).mean() / sets
        joint += ((joint_low <= truth_C) & (truth_C <= joint_high)).all() / sets
        mean = whole(out, surface=None, task=None)
        of_mean += (mean["low"] <= truth_C.mean() <= mean["high"]) / sets
    assert 0.92 <= pointwise <= 0.98
    assert 0.91 <= joint <= 0.99
    assert 0.90 <= of_mean <= 0.99


def test_rows_of_a_user_are_no_new_evidence() -> None:
    """Every row eight times leaves the intervals as they are; eight times the users narrows them."""
    rng = np.random.default_rng(1)
    frames = simulated(rng, np.array([0.9]), users=100, seeds=1)
    more = simulated(rng, np.array([0.9]), users=800, seeds=1)
    copies = pl.DataFrame({"copy": range(8)})
    repeated = [
        f.join(copies, how="cross").with_columns(impression_id=pl.col("impression_id") * 8 + pl.col("copy"))
        for f in frames
    ]

    def width(pair: list[pl.DataFrame]) -> float:
        row = whole(improvement_table(*pair, replicates=400), surface="s0")
        return row["high"] - row["low"]

    assert width(repeated) == pytest.approx(width(frames), rel=1e-3)
    assert width(more) < width(frames) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop("bucket"), r"contender lacks the columns \['bucket'\]"),
        (lambda f: f.clear(), "contender has no rows"),
        (lambda f: f.slice(1), r"contender, seed 0, lacks 1 rows, the first .*'impression_id': 0"),
        (lambda f: f.filter(pl.col("seed") == 0), r"the seeds differ: .*'contender': \[0\]"),
        (lambda f: pl.concat([f, f.slice(0, 1)]), "contender, seed 0, has 1 rows twice"),
        (lambda f: f.with_columns(impression_id=pl.col("impression_id") + 1), "contender, seed 0, lacks 20 rows"),
        (lambda f: f.with_columns(user_id=pl.col("user_id").cast(pl.String)), "seed 0, has columns of other types"),
        (lambda f: f.with_columns(user_id=pl.col("user_id") + pl.col("seed")), "seed 1, differs in user_id in 20 rows"),
        (lambda f: f.with_columns(product=pl.lit("q")), "differs in product in 20 rows"),
        (lambda f: f.with_columns(score=pl.lit(0.4)), "differs in score in 20 rows"),
        (lambda f: f.with_columns(bucket=9 - pl.col("bucket")), "differs in bucket in 20 rows"),
        (lambda f: f.with_columns(probability=pl.lit(float("nan"))), r"out of range in \['probability'\]"),
        (lambda f: f.with_columns(probability=pl.lit(None, pl.Float64)), r"out of range in \['probability'\]"),
        (lambda f: f.with_columns(bucket=pl.lit(10)), r"out of range in \['bucket'\]"),
        (lambda f: f.with_columns(user_id=pl.lit(None, pl.Int64)), r"out of range in \['user_id'\]"),
    ],
)
def test_refuses_other_rows(change, message: str) -> None:
    frame = predictions(rows(20), 0.1, 0.2)
    with pytest.raises(ValueError, match=message):
        improvement_table(frame, change(frame), replicates=2)


def test_refuses_rows_that_come_twice_in_both() -> None:
    frame = predictions(rows(20), 0.1)
    frame = pl.concat([frame, frame.slice(0, 2)])
    with pytest.raises(ValueError, match="2 rows come twice"):
        improvement_table(frame, frame, replicates=2)


def test_means_take_only_cells_with_min_rows() -> None:
    table = pl.concat([rows(20, cells=3), rows(20, cells=4).slice(60, 19)])  # the last, of task t1, has 19 rows
    error_N = np.repeat([0.8, 0.6, 0.4, 0.01], [20, 20, 20, 19])
    # Two seeds do not make 19 rows 38.
    out = improvement_table(
        predictions(table, error_N, error_N), predictions(table, 1.0, 1.0), min_rows=20, replicates=50
    )
    assert whole(out, surface="s3")["improvement"] == pytest.approx(0.99)
    assert whole(out, surface="s3")["joint_low"] is None
    assert whole(out, surface="s2")["joint_low"] is not None
    mean = whole(out, surface=None, product=None, task=None)
    assert mean["improvement"] == pytest.approx((0.2 + 0.4 + 0.6) / 3)
    assert mean["mtmd"] == pytest.approx(0.6)
    assert (mean["rows"], mean["users"], mean["joint_low"]) == (60, 20, None)
    assert whole(out, surface=None, task="t0")["improvement"] == pytest.approx((0.2 + 0.6) / 2)
    assert whole(out, surface=None, task="t1")["improvement"] == pytest.approx(0.4)
    bucket = out.filter(pl.col("surface").is_null(), pl.col("task").is_null(), pl.col("bucket") == 3)
    assert bucket["improvement"].item() == pytest.approx((0.2 + 0.4 + 0.6) / 3)

    none = improvement_table(predictions(table, error_N), predictions(table, 1.0), min_rows=21, replicates=5)
    assert whole(none, surface=None, task=None)["improvement"] is None
    assert none["joint_low"].null_count() == len(none)


@given(
    error=st.lists(st.floats(0.01, 5), min_size=1, max_size=30),
    factor=st.floats(0.1, 2),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_scaled_errors(error: list[float], factor: float, seed: int) -> None:
    """Errors times `factor` are an improvement of 1 - factor, whoever is resampled, with one seed."""
    table = rows(len(error), users=min(len(error), 4))
    contender, mtmd = (predictions(table, np.array(error) * f) for f in (1, factor))
    out = improvement_table(mtmd, contender, min_rows=1, replicates=20, seed=seed)
    for column in ("improvement", "low", "high"):
        assert out[column].drop_nulls().to_numpy() == pytest.approx(1 - factor, abs=1e-5)


def test_improvement_without_error() -> None:
    assert improvement(np.array([0.0, 1, 3]), np.array([0.0, 0, 2])) == pytest.approx(
        [np.nan, np.nan, -0.5], nan_ok=True
    )


def test_mean_over_leaves_out_cells_without_a_number() -> None:
    x_CG = np.array([[1.0, np.nan], [3.0, np.nan], [8.0, 5.0]])
    members_LC = np.array([[1.0, 1, 0], [1, 1, 1]])
    assert mean_over(members_LC, x_CG) == pytest.approx(np.array([[2, np.nan], [4, 5]]), nan_ok=True)


def test_a_cell_whose_users_are_seldom_drawn() -> None:
    table = rows(40, cells=2, users=40).with_columns(
        user_id=pl.when(pl.col("surface") == "s1").then(0).otherwise(pl.col("user_id"))
    )
    error_N = np.random.default_rng(0).exponential(size=80)
    out = improvement_table(predictions(table, error_N), predictions(table, 1.0), min_rows=1, replicates=100)
    # User 0 alone has rows in s1: he is missing in a third of the replicates, and the others all agree.
    cell = whole(out, surface="s1")
    assert cell["users"] == 1
    assert [cell["low"], cell["high"]] == pytest.approx([cell["improvement"]] * 2, abs=1e-6)
    assert whole(out, surface=None, task=None)["users"] == 40


def test_verdict() -> None:
    assert verdict({"joint_low": 0.01, "joint_high": 0.2}) == "better"
    assert verdict({"joint_low": -0.2, "joint_high": -0.01}) == "worse"
    assert verdict({"joint_low": 0.0, "joint_high": 0.2}) == "no clear difference"
    assert verdict({"joint_low": None, "joint_high": None}) == "no clear difference"
