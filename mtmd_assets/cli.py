"""The command `mtmd`: what the Makefile calls, and what a person types.

mtmd demo [--platform NAME] [--data FOLDER]   build days, train, evaluate, print the scoreboard
mtmd backfill FIRST LAST [--platform NAME]     build days of data without the UI
mtmd register FILE [--data FOLDER]            add a platform to the home
mtmd scoreboard [--platform NAME]             LogMAE by slice and task, of every evaluated day
mtmd sql [--platform NAME] [QUERY]            one query, or a DuckDB prompt
mtmd ui [--port PORT]                         the Dagster UI with its daemon
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mtmd_assets.faults import PlatformError
from mtmd_assets.home import ALWAYS, CHECKOUT, Home, Site

if TYPE_CHECKING:
    import dagster as dg

_RANGE_START, _RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="mtmd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("demo", "backfill", "scoreboard", "sql"):
        commands.add_parser(name).add_argument("--platform", default=ALWAYS)
    commands.choices["demo"].add_argument("--data", help="the folder of the platform's logs, where it needs one")
    for bound in ("first", "last"):
        commands.choices["backfill"].add_argument(bound, type=date.fromisoformat, help="a day, YYYY-MM-DD")
    commands.choices["sql"].add_argument("query", nargs="?")
    register = commands.add_parser("register")
    register.add_argument("file", help="a platform file, or the name of a shipped one")
    register.add_argument("--data", help="the folder of the platform's logs, where it needs one")
    commands.add_parser("ui").add_argument("--port", default="3000")
    options = parser.parse_args(arguments)
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    home = Home()
    os.environ["MTMD_HOME"] = str(home.root)
    try:
        if options.command == "demo":
            return demo(home, options.platform, options.data)
        if options.command == "backfill":
            return backfill(home.site(options.platform), options.first, options.last, home)
        if options.command == "scoreboard":
            return print_scoreboard(home.site(options.platform))
        if options.command == "sql":
            return prompt(home.site(options.platform), options.query)
        if options.command == "register":
            site = home.register(options.file, options.data)
            site.warehouse.create()
            print(f"registered {site.platform.name} in {site.folder}; reload the code location if the UI is running")
            return 0
        return ui(home, options.port)
    except (PlatformError, PermissionError) as e:
        print(e, file=sys.stderr)
        return 2


# -- demo --------------------------------------------------------------------------------------------------------


def demo(home: Home, name: str, data: str | None) -> int:
    """Build the days of one training window and the next day, train, evaluate, embed, and print the scoreboard.

    A log that goes on is shown from its first day, a log that has ended up to its last one.
    """
    import dagster as dg

    from mtmd_assets.definitions import platform_definitions

    site = home.register(name, data) if data or name != ALWAYS else home.site(name)
    platform = site.platform
    evaluated = platform.end or platform.first_window_end + timedelta(1)
    trained = evaluated - timedelta(1)
    first = platform.start if not platform.logs_scores else platform.window(trained)[0]
    home.prepare_dagster()
    definitions = platform_definitions(site)
    data_job, models_job = (definitions.resolve_job_def(f"{platform.name}_{j}") for j in ("data", "models"))
    print(f"{platform.name}: {len(platform.slices)} slices, {len(platform.tasks)} tasks, home {home.root}", flush=True)
    with dg.DagsterInstance.get() as instance:
        with _step(f"1/3 build and check the days {first} to {evaluated}"):
            _run(data_job, instance, tags={_RANGE_START: str(first), _RANGE_END: str(evaluated)})
        with _step(f"2/3 train on the window {platform.window(trained)[0]} to {trained}"):
            _run(models_job, instance, trained, [site_key(site, "models")])
        with _step(f"3/3 evaluate and embed {evaluated}"):
            _run(models_job, instance, evaluated, [site_key(site, t) for t in _model_tables() if t != "models"])
    print()
    return print_scoreboard(site)


def backfill(site: Site, first: date, last: date, home: Home) -> int:
    """Build the data tables of the days first..last in one run, as a backfill from the UI does."""
    import dagster as dg

    from mtmd_assets.definitions import platform_definitions

    home.prepare_dagster()
    job = platform_definitions(site).resolve_job_def(f"{site.platform.name}_data")
    with (
        dg.DagsterInstance.get() as instance,
        _step(f"build and check the days {first} to {last} of {site.platform.name}"),
    ):
        _run(job, instance, tags={_RANGE_START: str(first), _RANGE_END: str(last)})
    return 0


def site_key(site: Site, table: str) -> "dg.AssetKey":
    """The asset key of a table of a site."""
    from mtmd_assets.assets.common import asset_key

    return asset_key(site.platform, table)


def _model_tables() -> tuple[str, ...]:
    from mtmd_assets.automation import MODEL_TABLES

    return MODEL_TABLES


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(title, flush=True)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


def _run(
    job: "dg.JobDefinition",
    instance: "dg.DagsterInstance",
    day: date | None = None,
    selection: "Sequence[dg.AssetKey] | None" = None,
    tags: dict[str, str] | None = None,
) -> None:
    """Run a job in this process, quietly; the run is kept in the home and seen in the UI.

    Raises:
        SystemExit: if it fails, with the reasons.
    """
    result = job.execute_in_process(
        instance=instance,
        partition_key=None if day is None else day.isoformat(),
        asset_selection=selection,
        tags=tags,
        raise_on_error=False,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    if not result.success:
        for event in result.all_events:
            if event.is_step_failure:
                error = event.step_failure_data.error
                while error and error.cause:
                    error = error.cause
                print(f"    {event.step_key}: {error.message if error else 'failed'}", file=sys.stderr)
        raise SystemExit(f"{job.name} failed; `make ui` shows run {result.run_id}")


def print_scoreboard(site: Site) -> int:
    """Print LogMAE by slice and task over every evaluated day, the model beside the constants."""
    from mtmd_assets import scoreboard

    days = site.warehouse.days("slice_metrics")
    if not days:
        print(f"no day of {site.platform.name} is evaluated yet", file=sys.stderr)
        return 1
    with site.warehouse.connect() as con:
        cells = scoreboard.cells(con, site, days)
        print(f"LogMAE to the heavyweight scores, {site.platform.name}, evaluated on {', '.join(map(str, days))}\n")
        print(scoreboard.scoreboard(con, site, days))
        if not site.platform.logs_scores:
            print(
                "\nAUC of the heavyweight ranker that is imitated, against the outcomes of days it was not trained on\n"
            )
            print(scoreboard.ranker_auc(con, site))
    better = sum(c[4] < c[5] for c in cells)
    print(f"\nmtmd is better than the slice's mean in {better} of {len(cells)} cells", end="")
    large = [c for c in cells if c[3] >= 200]
    if len(large) < len(cells):
        print(f", in {sum(c[4] < c[5] for c in large)} of the {len(large)} with at least 200 rows", end="")
    print(
        '\n\nmake ui                                   the assets, in Dagster\nmake sql Q="FROM slice_metrics LIMIT 5"   the tables, in DuckDB'
    )
    return 0


# -- looking at it -----------------------------------------------------------------------------------------------


def prompt(site: Site, query: str | None) -> int:
    """One query, or DuckDB's own shell on the views, read-only so that nobody is locked out."""
    site.warehouse.create()
    command = [_script("duckdb"), "-readonly", str(site.warehouse.database)]
    return subprocess.run([*command, "-c", query] if query else command, check=False).returncode


def ui(home: Home, port: str) -> int:
    """Dagster's web server and daemon on this home, until interrupted."""
    for site in home.sites():
        site.warehouse.create()
    home.prepare_dagster()
    return subprocess.run(
        [_script("dg"), "dev", "-w", "workspace.yaml", "-p", port], cwd=CHECKOUT, check=False
    ).returncode


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


if __name__ == "__main__":
    sys.exit(main())
