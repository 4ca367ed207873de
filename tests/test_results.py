"""docs/results.md says what the tables of the experiments say."""

import math
import re
from datetime import timedelta
from statistics import median

import duckdb
import numpy as np
import polars as pl
import pytest

from checks import routing
from mtmd_assets import model_store
from mtmd_assets.contenders import CONTENDERS
from mtmd_assets.faults import UsageError
from mtmd_assets.results import ablations, calibration, comparison, contenders, trainings
from mtmd_assets.results import routing as routing_results
from mtmd_assets.results.document import HEAD, require_results, write_sections
from mtmd_assets.results.result import cell_in_words, headline, headline_of, interval, result_of, verdicts
from tests.studied import DAYS
from tests.worlds import copy_of, query, show_failure


def test_the_document_says_what_the_tables_say(studied):
    text = studied.document.read_text()
    [(mean,)] = query(
        studied,
        "SELECT improvement FROM improvements WHERE contender = 'pooled_towers' AND surface IS NULL AND task IS NULL AND bucket IS NULL",
    )
    assert f"| pooled_towers | 2 | {mean:+.1%} [" in text
    assert text.count("| search | shopping |") >= 3
    [(impressions,)] = query(studied, "SELECT count(*) FROM joined_examples WHERE ds >= ?", DAYS[0])
    assert f"({impressions:,} impressions)" in text
    [(cells,)] = query(
        studied,
        """SELECT count(*) FROM improvements
        WHERE contender = 'no_routing' AND surface IS NOT NULL AND bucket IS NULL AND rows >= 200""",
    )
    [line] = [line for line in text.splitlines() if line.startswith("| no_routing |")]
    assert line.split(" | ")[-7] == str(cells)
    assert line.endswith(" | 1 | 2 | 0 of 2 |"), "days, seeds and jumps"
    headings = ("Against the contenders", "Every cell", "Parameters", "Calibration", "Who the routers use")
    assert all(f"\n### {heading}\n" in text for heading in headings)
    assert text.count("\n## adworld\n") == text.count("\n## adworld: ablations\n") == 1
    assert "Domain adaptation, by slice:" in text
    assert "Constrained modelling, by task and by slice:" in text
    assert "How unlike the domains are in the 18 dense features" in text
    mtmd, contender = (model_store.code_version(architecture) for architecture in ("mtmd", "mmoe_dcn"))
    assert text.count(f"mtmd `{mtmd}`, of the others `{contender}`.") == text.count(f"mtmd `{mtmd}`.") == 1


def test_an_ablation_has_an_interval_in_each_bucket_and_its_cells_by_slice(studied):
    text = studied.document.read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| no_routing |")]
    of_bucket = query(
        studied,
        """SELECT improvement, low, high FROM improvements WHERE contender = 'no_routing' AND bucket IS NOT NULL
        AND surface IS NULL AND task IS NULL ORDER BY bucket""",
    )
    assert len(of_bucket) == 5
    shown = [f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]" for mean, low, high in of_bucket]
    assert line.split(" | ")[1:6] == shown
    [(mean, low, high, rows)] = query(
        studied,
        """SELECT improvement, joint_low, joint_high, rows FROM improvements WHERE contender = 'unconstrained'
        AND bucket IS NULL AND (surface, product, task) = ('search', 'standard', 'gctr')""",
    )
    by_slice = text[text.index("Constrained modelling, by task and by slice") :]
    line = next(line for line in by_slice.splitlines() if line.startswith("| search | standard |"))
    assert f"| search | standard | {rows:,} |" in line
    assert line.split(" | ")[4].startswith(f"{mean:+.1%} [{low:+.1%}, {high:+.1%}]")


def test_each_cell_has_its_constants_and_the_share_that_the_floor_touched(studied):
    text = studied.document.read_text()
    scores = """SELECT score_gctr FROM joined_examples
        WHERE surface = 'search' AND product = 'standard' AND ds BETWEEN ? AND ?"""
    errors, floored = [], 0.0
    for day in DAYS:
        window = [day - timedelta(n) for n in (3, 1)]
        mean = np.mean(query(studied, scores, *window))
        t = np.array(query(studied, scores, day, day))
        errors.append(np.abs(np.log(np.maximum(t, 1e-6)) - np.log(mean)))
    [line] = [line for line in text.splitlines() if line.startswith("| search | standard | gctr |")][:1]
    assert line.split(" | ")[5] == f"{np.concatenate(errors).mean():.4f}"
    [(floored,)] = query(
        studied, "SELECT max(floored) FROM experiment_slice_metrics WHERE model = 'mtmd' AND bucket IS NULL"
    )
    assert f"LogMAE's floor of 1e-06 touches at most {floored:.2%} of mtmd's rows" in text


def test_a_mean_of_no_cell_says_why():
    nothing = {"improvement": None, "bucket": None}
    assert interval({**nothing, "rows": 199}) == "no cell with 200 rows"
    assert interval({**nothing, "rows": 300}) == "it errs in no cell"


def test_a_seed_that_not_all_days_have_is_left_out(studied, tmp_path):
    runner = copy_of(studied, tmp_path / "home")
    before = comparison(runner.site, DAYS[1])["adworld"]
    config = {"ops": {"adworld_train_and_score": {"config": {"models": ["mtmd"], "seeds": 3, "workers": 1}}}}
    result = runner.run("experiments", DAYS[1], config=config)
    assert result.success, show_failure(result)
    with runner.site.warehouse.connect() as con:
        seeds = con.sql("SELECT DISTINCT seed FROM experiment_predictions WHERE model = 'mtmd' ORDER BY ALL").fetchall()
    assert seeds == [(0,), (1,), (2,)]
    assert comparison(runner.site, DAYS[1])["adworld"] == before


def test_earlier_days_have_a_result_of_their_own(studied, tmp_path):
    experiments = studied.site.platform.experiments.model_copy(update={"days": 1})
    platform = studied.site.platform.model_copy(update={"experiments": experiments})
    runner = copy_of(studied, tmp_path / "home", platform)
    assert runner.run("improvements", DAYS[0]).success
    one = "SELECT mtmd FROM improvement_results WHERE ds = ? AND contender = 'mmoe_dcn' AND task IS NULL AND bucket IS NULL"
    ((earlier,),), ((later,),) = query(runner, one, DAYS[0]), query(runner, one, DAYS[1])
    assert earlier != later
    assert f"Evaluated on {DAYS[0]} to {DAYS[0]} (" in comparison(runner.site, DAYS[0])["adworld"]
    assert f"Evaluated on {DAYS[0]} to {DAYS[1]} (" in comparison(runner.site, DAYS[1])["adworld"]
    assert headline(runner.site, DAYS[0], CONTENDERS) != headline(runner.site, DAYS[1], CONTENDERS)


def test_mtmds_error_is_that_of_all_its_seeds_whatever_a_contender_has(studied):
    [(error,)] = query(
        studied,
        """SELECT sum(rows * logmae) / sum(rows) FROM experiment_slice_metrics
        WHERE model = 'mtmd' AND surface = 'search' AND product = 'standard' AND task = 'ctr' AND bucket IS NULL""",
    )
    with studied.site.warehouse.connect() as con:
        con.execute(
            """CREATE TEMP VIEW result AS SELECT * REPLACE (CASE contender WHEN 'slice_towers' THEN 1 ELSE seeds END AS seeds,
                CASE contender WHEN 'slice_towers' THEN 0 ELSE mtmd END AS mtmd) FROM improvements"""
        )
        text = contenders._cells(con, studied.site, *DAYS, [0, 1])
        shown = headline_of(con, CONTENDERS)
    [line] = [line for line in text.splitlines() if line.startswith("| search | standard | ctr |")]
    assert line.split(" | ")[4] == f"{error:.4f}"
    assert "(one seed)" in line
    [line] = [line for line in shown.splitlines() if line.startswith("| slice_towers |")]
    seeds, _, cells, _, better, worse, few, *_ = line.removeprefix("| slice_towers | ").split(" | ")
    assert (seeds, better, worse, few) == ("1", "", "", ""), "one seed does not say which cells are better"
    assert int(cells) > 0


def test_the_headline_counts_the_cells_with_enough_rows_by_hand():
    """Cells of 199 rows are in no count; the smallest of all that count, and of those with 500 rows."""
    cells = [
        ("a", 199, -0.9, -1.0, -0.8),
        ("b", 200, -0.2, -0.3, -0.1),
        ("c", 499, -0.1, -0.2, 0.1),
        ("d", 500, 0.1, -0.1, 0.3),
        ("e", 900, 0.3, 0.1, 0.5),
        ("f", 900, 0.2, None, None),
    ]
    columns = ["surface", "rows", "improvement", "joint_low", "joint_high"]
    result = pl.DataFrame(cells, schema=columns, orient="row").with_columns(product=pl.lit("p"), task=pl.lit("t"))
    mean = {"improvement": 0.06, "low": 0.01, "high": 0.11, "rows": 2999}
    result = pl.concat([result, pl.DataFrame([mean])], how="diagonal").with_columns(
        pl.lit("mmoe_dcn").alias("contender"), pl.lit(None, pl.Int64).alias("bucket"), pl.lit(3).alias("seeds")
    )
    with duckdb.connect() as con:
        con.register("result", result)
        shown = headline_of(con, CONTENDERS)
    assert shown.splitlines()[2:] == [
        "| mmoe_dcn | 3 | +6.0% [+1.0%, +11.0%] | 5 | 3 | 1 | 1 | 1 | -20.0% (b p t) | +10.0% (d p t) |"
    ]


def test_cells_whose_users_are_too_few_for_a_verdict_are_counted():
    cells: list[dict[str, float | None]] = [
        {"joint_low": 0.1, "joint_high": 0.2},
        {"joint_low": -0.1, "joint_high": 0.2},
        {"joint_low": -0.2, "joint_high": -0.1},
        {"joint_low": None, "joint_high": None},
        {"joint_low": None, "joint_high": None},
    ]
    assert verdicts(cells, seeds=2) == [1, 1, 2]


def test_a_cell_without_an_error_of_the_contender_has_no_improvement(studied):
    with studied.site.warehouse.connect() as con:
        con.execute(
            """CREATE TEMP VIEW result AS SELECT * REPLACE (
                CASE WHEN surface = 'search' AND task = 'ctr' THEN NULL ELSE improvement END AS improvement) FROM improvements"""
        )
        text = contenders._cells(con, studied.site, *DAYS, [0, 1])
        shown = headline_of(con, ["pooled_towers"])
        by_slice = ablations._by_slice(con, studied.site, "unconstrained")
    [line] = [line for line in text.splitlines() if line.startswith("| search | standard | ctr |")]
    assert line.endswith(" |  |  |  |  |"), line
    assert "search standard ctr" not in shown
    assert "| search | standard | " in by_slice


def test_a_cell_has_the_interval_that_its_rows_and_seeds_allow():
    cell = {
        "improvement": 0.1,
        "low": 0.05,
        "high": 0.15,
        "bucket": None,
        "seeds": 3,
        "joint_low": 0.01,
        "joint_high": 0.2,
    }
    assert cell_in_words(cell) == "+10.0% [+1.0%, +20.0%]"
    assert cell_in_words({**cell, "joint_low": -0.01}) == "+10.0% [-1.0%, +20.0%] ~"
    assert (
        cell_in_words({**cell, "joint_low": None, "joint_high": None}) == "+10.0% [+5.0%, +15.0%] (few rows or users)"
    )
    assert cell_in_words({**cell, "joint_low": None, "joint_high": None, "seeds": 1}) == "+10.0% (one seed)"


def test_the_failure_signatures_of_the_routers_are_counted(studied, monkeypatch):
    [(routers,)] = query(
        studied, "SELECT count(DISTINCT (model_version, tower, domain, task)) FROM experiment_routing_metrics"
    )
    assert routers == 4 * ((3 + 2) * 4 - 2), "each task of each domain; cvr and octr have one product each"

    def text():
        with studied.site.warehouse.connect() as con:
            return routing_results.routing_section(con, DAYS[0], DAYS[-1], [0, 1])

    # after one pass from gates that start equal, they still are
    assert f"in {routers} routers of all days and seeds: {routers} uniform." in text()
    monkeypatch.setattr(routing, "UNIFORM", 1.1)
    assert f"in {routers} routers of all days and seeds: none." in text()
    shares = [
        entropy / math.log(experts)
        for entropy, experts in query(
            studied,
            "SELECT any_value(entropy), count(*) FROM experiment_routing_metrics GROUP BY model_version, tower, domain, task",
        )
    ]
    assert f"{median(shares):.1%} of the largest possible in the median router, {min(shares):.1%} in the" in re.sub(
        r"\s+", " ", text()
    )


def test_the_trainings_whose_loss_jumped_are_counted(studied, monkeypatch):
    def of_mtmd():
        with studied.site.warehouse.connect() as con:
            lines = trainings.parameters_section(con, studied.site, DAYS[0], DAYS[-1]).splitlines()
        [line] = [line for line in lines if line.startswith("| mtmd |")]
        return line.split(" | ")[4]

    assert of_mtmd() == "0 of 4"
    seen = []
    monkeypatch.setattr(trainings, "high_passes", lambda history: seen.append(history) or len(seen) == 1)
    assert of_mtmd() == "1 of 4"
    assert all(entry["train_loss"] > 0 for history in seen for entry in history)
    assert trainings.jumped(studied.site, ["a version whose record is gone"]) == ""


def test_parameters_and_weights_are_those_trained_with(studied):
    with studied.site.warehouse.connect() as con:
        text = trainings.parameters_section(con, studied.site, DAYS[0], DAYS[-1])
    assert "Weights of the tasks in everybody's loss: ctr 2, gctr 1, octr 1, cvr 8." in text
    counts = dict(query(studied, "SELECT model, (embedding_params, dense_params) FROM experiment_models"))
    embedding, dense = (a / b for a, b in zip(counts["mtmd"], counts["slice_towers"], strict=True))
    assert f"MTMD has {embedding:.2g} times the embedding parameters" in text
    assert f"and {dense:.2g} times their others" in text
    assert trainings._beside_slice_towers({"mtmd": (1, 1)}) == ""
    assert "MTMD has 0.5 times the parameters of all" in trainings._beside_slice_towers(
        {"mtmd": (0, 1), "slice_towers": (0, 2)}
    ), "without tables"


def test_each_task_has_the_improvement_over_all_its_rows_beside_the_mean_of_its_cells(studied):
    with result_of(studied.site, DAYS[1]) as con:
        words, table = contenders._tasks(con, studied.site)
    assert "By task" in words
    errors = """SELECT avg(abs(ln(greatest(probability, 1e-6)) - ln(greatest(score, 1e-6))))
        FROM experiment_predictions WHERE model = ? AND task = 'gctr'"""
    mtmd, pooled = (query(studied, errors, model)[0][0] for model in ("mtmd", "pooled_towers"))
    [line] = [line for line in table.splitlines() if line.startswith("| gctr |")]
    assert line.split(" | ")[4].startswith(f"{1 - mtmd / pooled:+.1%} [")
    [(mean,)] = query(
        studied,
        "SELECT improvement FROM improvements WHERE contender = 'pooled_towers' AND task = 'gctr' AND surface IS NULL AND bucket IS NULL",
    )
    assert line.split(" | ")[3].startswith(f"{mean:+.1%} [")


def test_calibration_of_every_large_cell_stands_beside_that_of_the_contenders(studied, monkeypatch):
    monkeypatch.setattr(calibration, "CALIBRATED_ROWS", 200)
    with result_of(studied.site, DAYS[1]) as con:
        text = calibration.calibration_section(con, DAYS[0], DAYS[-1])
    cells = query(
        studied,
        """SELECT surface, product, task, count(*) // 2 AS n, sum(probability) / sum(score) AS calibration
        FROM experiment_predictions WHERE model = 'mtmd' GROUP BY ALL HAVING n >= 200 ORDER BY ALL""",
    )
    assert len(cells) > 3
    inside = sum(0.95 <= ratio <= 1.05 for *_, ratio in cells)
    assert f"Of the {len(cells)} cells are within 0.95 to 1.05: {inside} of mtmd, " in text
    assert "| mtmd | slice_towers | pooled_towers | mmoe_dcn | soft_slice_towers |" in text
    intervals = [
        tuple(map(float, re.findall(r"\[([\d.]+), ([\d.]+)\]", line)[0])) for line in text.splitlines() if "[" in line
    ]
    outside = sum(low > 1.05 or high < 0.95 for low, high in intervals)
    assert f"of mtmd's, {outside or 'none'} lie wholly outside" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for (*cell, rows, ratio), line in zip(cells, lines, strict=True):
        assert line.startswith(f"| {' | '.join(cell)} | {rows:,} | {ratio:.3f} [")


def test_where_no_slice_is_large_or_there_is_one_seed_no_interval_is_shown(studied, monkeypatch):
    with result_of(studied.site, DAYS[1]) as con:
        monkeypatch.setattr(calibration, "CALIBRATED_ROWS", 100_000)
        assert calibration.calibration_section(con, DAYS[0], DAYS[-1]).startswith("No slice has the 100,000 rows")
        monkeypatch.setattr(calibration, "CALIBRATED_ROWS", 200)
        monkeypatch.setattr(calibration, "whole_seeds", lambda *_: [0])
        text = calibration.calibration_section(con, DAYS[0], DAYS[-1])
        con.execute(
            "CREATE TEMP TABLE few AS SELECT * REPLACE (1 AS seeds) FROM result WHERE surface IS NULL AND task IS NULL"
        )
        con.execute("CREATE OR REPLACE TEMP VIEW result AS FROM few")
        assert contenders._tasks(con, studied.site) == []
        shown = headline_of(con, ["pooled_towers"])
    assert "Intervals" not in text
    assert "[" not in text
    assert re.search(r"\| pooled_towers \| 1 \| [+-]\d+\.\d% \(one seed\) \| 0 \| 0 \|  \|  \|", shown)


def test_constants_are_shown_whatever_seed_they_were_published_beside(studied):
    with result_of(studied.site, DAYS[1]) as con:
        text = contenders._cells(con, studied.site, *DAYS, [1])
    line = next(line for line in text.splitlines() if line.startswith("| search | standard | ctr |"))
    assert all(re.fullmatch(r"\d\.\d{4}", value) for value in line.split(" | ")[4:7]), line


SECTION = "<!-- a platform -->\nwords\n<!-- end of a platform -->\n"


@pytest.mark.parametrize(
    "content",
    [None, b"", b"# Results\n", f"# Results\n\nwords\n\n{SECTION}".encode(), HEAD.encode() + SECTION.encode()],
)
def test_results_are_written_where_nothing_or_results_are(tmp_path, content):
    document = tmp_path / "document.md"
    if content is not None:
        document.write_bytes(content)
    require_results(document)


@pytest.mark.parametrize(
    "content", [b"# My notes\n", b"# Results of the test\n\nnotes\n", b"# Results\n\nnotes\n", b"\xff\xfe"]
)
def test_results_are_not_written_over_something_else(tmp_path, content):
    document = tmp_path / "document.md"
    document.write_bytes(content)
    for path in (document, tmp_path):
        with pytest.raises(UsageError, match="something else is there"):
            require_results(path)


def test_a_second_writing_replaces_the_sections_and_keeps_others(studied, tmp_path):
    document = tmp_path / "results.md"
    before = studied.document.read_text()
    others = [f"<!-- {name} -->\nuntouched\n<!-- end of {name} -->\n" for name in ("other", "adworld search")]
    document.write_text("\n".join([before, *others]))
    write_sections(document, comparison(studied.site, DAYS[1]))
    text = document.read_text()
    assert text.count("## adworld\n") == text.count("## adworld: ablations\n") == 1
    assert text.count("untouched") == 2, "another platform's, and one that this home has no table for"
