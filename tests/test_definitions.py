"""What Dagster is given: everything of every registered platform, loadable, jobs apart."""

import pkgutil
import re
import subprocess
import sys

import dagster as dg

import mtmd_assets
from mtmd_assets.definitions import build_definitions
from mtmd_assets.home import CHECKOUT, Home
from tests.worlds import small_adworld

DATA = {"impressions", "heavyweight_scores", "joined_examples", "rejected_rows", "row_counts", "feature_missingness"}
MODELS = {"models", "predictions", "slice_metrics", "routing_metrics", "item_embeddings", "query_embeddings"}

EXPERIMENTS = {
    "experiment_models",
    "experiment_predictions",
    "experiment_slice_metrics",
    "experiment_routing_metrics",
    "improvements",
}


def test_one_location_serves_every_registered_platform(tmp_path):
    home = Home(tmp_path)
    home.register("kuairand", "folder")
    definitions = build_definitions(home)
    dg.Definitions.validate_loadable(definitions)
    keys = {k.to_user_string() for k in definitions.resolve_all_asset_keys()}
    assert keys == {f"adworld/{t}" for t in DATA | MODELS | EXPERIMENTS} | {
        f"kuairand/{t}" for t in DATA | MODELS | EXPERIMENTS | {"heavyweight_ranker"}
    }
    repository = definitions.get_repository_def()
    assert {s.name for s in repository.schedule_defs} == {"adworld_every_day", "kuairand_every_day"}
    for name, first in (("adworld", "2026-01-01"), ("kuairand", "2022-04-25")):
        job = definitions.resolve_job_def(f"{name}_data")
        assert job.partitions_def is not None
        assert job.partitions_def.get_first_partition_key() == first


def test_data_and_model_jobs_share_no_asset(tmp_path):
    definitions = build_definitions(Home(tmp_path))
    selected = {
        j: {k.path[-1] for k in definitions.resolve_job_def(f"adworld_{j}").asset_layer.selected_asset_keys}
        for j in ("data", "models", "daily", "experiments", "improvements")
    }
    assert selected == {
        "data": DATA,
        "models": MODELS,
        "daily": DATA | MODELS,
        "experiments": EXPERIMENTS - {"improvements"},
        "improvements": {"improvements"},
    }


def test_a_changed_adworld_takes_the_place_of_the_shipped_one(tmp_path):
    home = Home(tmp_path / "home")
    home.register(str(small_adworld(tmp_path)))
    [site] = home.sites()
    assert site.platform.training.window_days == 3


def test_loading_the_location_imports_nothing_heavy(tmp_path):
    """Every run's process loads it: torch, Lightning, Great Expectations and LightGBM wait until they are used."""
    code = "import sys, mtmd_assets.definitions; print(*{'torch', 'lightning', 'great_expectations', 'lightgbm', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env={**__import__("os").environ, "MTMD_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == ""


def test_the_workspace_file_names_the_location():
    import yaml

    [entry] = yaml.safe_load((CHECKOUT / "workspace.yaml").read_text())["load_from"]
    assert entry == {"python_module": {"module_name": "mtmd_assets.definitions", "location_name": "mtmd"}}


def test_the_map_of_the_package_names_every_module():
    modules = {m.name for m in pkgutil.iter_modules(mtmd_assets.__path__)}
    assert modules <= set(re.findall(r"\w+", mtmd_assets.__doc__ or ""))
