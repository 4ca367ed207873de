"""Logs without heavyweight scores, from the folder to the evaluated model: real ones, and a few made up."""

import random
from datetime import date, datetime

import yaml

from mtmd_assets.home import Home
from mtmd_assets.platform_file import SHIPPED
from tests.sources.kuairand_folder import EXCERPT, log_row, needs_excerpt, write_folder
from tests.worlds import SCORED, Runner, cli_output, query, show_failure


@needs_excerpt
def test_kuairand_end_to_end(tmp_path):
    """Three days of real logs train the ranker, it scores the next four, and MTMD learns from them."""
    content = yaml.safe_load((SHIPPED / "kuairand.yaml").read_text())
    content["training"] = {"window_days": 2, "max_epochs": 1, "accelerator": "cpu"}
    content["end"] = "2022-04-30"
    file = tmp_path / "kuairand.yaml"
    file.write_text(yaml.safe_dump(content))
    runner = Runner(Home(tmp_path / "home").register(str(file), str(EXCERPT)))
    start = runner.site.platform.start
    result = runner.run("data", start, date(2022, 4, 30))
    assert result.success, show_failure(result)
    assert runner.materialized("heavyweight_ranker") == {"2022-04-27"}
    assert runner.materialized("joined_examples") == {f"2022-04-{d}" for d in (28, 29, 30)}
    trained = runner.run("models", date(2022, 4, 29), only=("models",))
    assert trained.success, show_failure(trained)
    evaluated = runner.run(
        "models",
        date(2022, 4, 30),
        only=SCORED,
    )
    assert evaluated.success, show_failure(evaluated)
    [(cells, slices)] = query(
        runner,
        "SELECT count(*), count(DISTINCT surface || product) FROM slice_metrics WHERE model = 'mtmd' AND bucket IS NULL",
    )
    assert slices == 20
    assert cells == 60
    scores = runner.instance.fetch_materializations(runner.key("heavyweight_scores"), limit=5).records
    assert {r.partition_key for r in scores} == {f"2022-04-{d}" for d in (28, 29, 30)}
    assert all(0.6 < r.asset_materialization.metadata["AUC click"].value < 0.9 for r in scores)


def made_up_kuairand(folder):
    """A small folder of KuaiRand's layout, 25 to 28 April, and a platform file for it."""
    rng = random.Random(0)
    log = [
        log_row(
            user,
            rng.randrange(12),
            f"202204{d}",
            at=datetime(2022, 4, d, 1 + n, user),
            click=int(rng.random() < 0.2 + 0.5 * (user % 2)),
            long_view=rng.randrange(2),
            profile=rng.randrange(2),
            tab=n % 3,
        )
        for d in range(25, 29)
        for user in range(20)
        for n in range(12)
    ]
    content = yaml.safe_load((SHIPPED / "kuairand.yaml").read_text())
    content["ranker"] = {"train_days": 1, "trees": 20, "min_leaf": 10, "cross": [["user_id", "surface"]]}
    content["training"] = {"window_days": 2, "max_epochs": 1, "batch_size": 256, "accelerator": "cpu"}
    content["end"] = "2022-04-28"
    for feature in content["features"]:  # its users are all alike, and know little
        feature["max_missing"] = 1.0
    file = folder / "kuairand.yaml"
    file.write_text(yaml.safe_dump(content))
    return file, write_folder(folder / "KuaiRand-Pure", log)


def test_logs_without_scores_end_to_end(tmp_path):
    """The first day trains the ranker, it scores the next three, and MTMD learns from two and is evaluated on one."""
    file, logs = made_up_kuairand(tmp_path)
    runner = Runner(Home(tmp_path / "home").register(str(file), str(logs)))
    built = runner.run("data", date(2022, 4, 25), date(2022, 4, 28))
    assert built.success, show_failure(built)
    assert runner.materialized("heavyweight_ranker") == {"2022-04-25"}
    scored = {f"2022-04-{d}" for d in (26, 27, 28)}
    assert runner.materialized("heavyweight_scores") == runner.materialized("joined_examples") == scored
    trained = runner.run("models", date(2022, 4, 27), only=("models",))
    assert trained.success, show_failure(trained)
    evaluated = runner.run("models", date(2022, 4, 28), only=SCORED)
    assert evaluated.success, show_failure(evaluated)
    cells = "SELECT DISTINCT task FROM slice_metrics WHERE model = 'mtmd' AND logmae IS NOT NULL ORDER BY task"
    assert query(runner, cells) == [("click",), ("long_view",), ("profile_enter",)]
    [(versions,)] = query(runner, "SELECT list(DISTINCT ranker_version) FROM heavyweight_scores")
    assert query(runner, "SELECT ranker_versions FROM models") == [(versions,)]
    assert "AUC of the heavyweight ranker" in cli_output(runner, "scoreboard", "--platform", "kuairand")
