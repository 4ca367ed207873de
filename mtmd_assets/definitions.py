"""The only place that wires assets, checks, jobs and schedules together.

Dagster loads `defs`. One factory builds the definitions of every platform registered in the home, each under its own
asset-key prefix.
"""

import warnings

import dagster as dg

from mtmd_assets.assets.data import data_assets
from mtmd_assets.assets.embeddings import embedding_assets
from mtmd_assets.assets.evaluation import evaluation_assets
from mtmd_assets.assets.experiments import experiment_assets
from mtmd_assets.assets.improvements import improvement_asset
from mtmd_assets.assets.training import training_assets
from mtmd_assets.automation import jobs, schedule
from mtmd_assets.home import Home, Site

# The daily job runs one day at a time, so that its parts backfill differently does not matter.
warnings.filterwarnings("ignore", message="Asset job .*_daily materializes assets with varying BackfillPolicies")


def platform_definitions(site: Site) -> dg.Definitions:
    """Everything of one platform."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`backfill_policy`", category=dg.BetaWarning)
        return _platform_definitions(site)


def _platform_definitions(site: Site) -> dg.Definitions:
    of_site = jobs(site)
    return dg.Definitions(
        assets=[
            data_assets(site),
            training_assets(site),
            evaluation_assets(site),
            embedding_assets(site),
            experiment_assets(site),
            improvement_asset(site),
        ],
        jobs=list(of_site.values()),
        schedules=[schedule(site, of_site["daily"])],
    )


def build_definitions(home: Home) -> dg.Definitions:
    """Everything of every platform registered in a home."""
    return dg.Definitions.merge(*(platform_definitions(site) for site in home.sites()))


defs = build_definitions(Home())
