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
from typing import Protocol

from mtmd_assets.faults import PlatformError
from mtmd_assets.home import ALWAYS, CHECKOUT, Home, Site


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
    commands.choices["backfill"].add_argument("--job", choices=("data", "models", "daily"), default="data")
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
            return backfill(home, home.site(options.platform), options.job, options.first, options.last)
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


# -- running -----------------------------------------------------------------------------------------------------


def demo(home: Home, name: str, data: str | None) -> int:
    """Build the days of one training window and the next day, train, evaluate, embed, and print the scoreboard.

    A log that goes on is shown from its first day, a log that has ended up to its last one.
    """
    from mtmd_assets.automation import MODEL_TABLES

    known = home.registered(name) or name == ALWAYS
    site = home.site(name) if known and data is None else home.register(name, data)
    platform = site.platform
    evaluated = platform.end or platform.first_window_end + timedelta(1)
    trained = evaluated - timedelta(1)
    first = platform.start if not platform.logs_scores else platform.window(trained)[0]
    print(f"{platform.name}: {len(platform.slices)} slices, {len(platform.tasks)} tasks, home {home.root}", flush=True)
    with _jobs(home, site) as run:
        with _step(f"1/3 build and check the days {first} to {evaluated}"):
            run("data", first, evaluated)
        with _step(f"2/3 train on the window {platform.window(trained)[0]} to {trained}"):
            run("models", trained, only=("models",))
        with _step(f"3/3 evaluate and embed {evaluated}"):
            run("models", evaluated, only=[t for t in MODEL_TABLES if t != "models"])
    print()
    return print_scoreboard(site)


def backfill(home: Home, site: Site, job: str, first: date, last: date) -> int:
    """Run a job for the days first..last, as a backfill from the UI does; data in one run, models a run a day.

    Raises:
        PlatformError: if the days are none of the platform's.
    """
    from mtmd_assets.assets.common import daily_partitions

    keys = daily_partitions(site.platform).get_partition_keys()
    if not (keys and keys[0] <= str(first) <= str(last) <= keys[-1]):
        span = f"{keys[0]} to {keys[-1]}" if keys else "none yet"
        raise PlatformError(f"{site.platform.name}: no days {first} to {last}; its days are {span}")
    with _jobs(home, site) as run, _step(f"{site.platform.name}_{job} of {first} to {last}"):
        if job == "data":
            run(job, first, last)
        else:
            for n in range((last - first).days + 1):
                run(job, first + timedelta(n))
    return 0


class Run(Protocol):
    """Runs jobs of a site."""

    def __call__(self, job: str, first: date, last: date | None = None, only: Sequence[str] = ()) -> None:
        """Run a job for one day, or for a range of days in one run; for some of its tables, or all."""


@contextmanager
def _jobs(home: Home, site: Site) -> Iterator[Run]:
    """Runs jobs in this process, quietly; the runs are kept in the home and seen in the UI.

    The function it gives raises SystemExit if a run fails, with the reasons.
    """
    from mtmd_assets.assets.common import asset_key
    from mtmd_assets.definitions import platform_definitions
    from mtmd_assets.runs import bury_dead, instance_of

    site.warehouse.create()
    folder = home.prepare_dagster()
    definitions = platform_definitions(site)
    with instance_of(folder) as instance:
        bury_dead(instance)

        def run(job: str, first: date, last: date | None = None, only: Sequence[str] = ()) -> None:
            span = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
            result = definitions.resolve_job_def(f"{site.platform.name}_{job}").execute_in_process(
                instance=instance,
                partition_key=None if last else str(first),
                tags=span if last else None,
                asset_selection=[asset_key(site.platform, t) for t in only] or None,
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
                raise SystemExit(f"{site.platform.name}_{job} failed; `make ui` shows run {result.run_id}")

        yield run


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(title, flush=True)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


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
    judged = [c for c in cells if c.gain is not None]
    large = [c for c in judged if c.rows >= 200]
    for those, which in ((judged, ""), (large, " with at least 200 rows"))[: 1 if large == judged else 2]:
        better = sum(c.mtmd < c.constant for c in those if c.constant is not None)
        print(f"\nmtmd is better than the slice's mean in {better} of the {len(those)} cells{which}", end="")
    print("\n\nmake ui                                   the assets, in Dagster")
    print('make sql Q="FROM slice_metrics LIMIT 5"   the tables, in DuckDB')
    return 0


# -- looking at it -----------------------------------------------------------------------------------------------


def prompt(site: Site, query: str | None) -> int:
    """One query, or DuckDB's own shell on the views, read-only so that nobody is locked out."""
    if not site.warehouse.database.exists():
        site.warehouse.create()
    command = [_script("duckdb"), "-readonly", str(site.warehouse.database)]
    return subprocess.run([*command, "-c", query] if query else command, check=False).returncode


def ui(home: Home, port: str) -> int:
    """Dagster's web server and daemon on this home, until interrupted."""
    from mtmd_assets.runs import bury_dead, instance_of

    for site in home.sites():
        site.warehouse.create()
    folder = home.prepare_dagster()
    with instance_of(folder) as instance:
        bury_dead(instance)
    command = [_script("dg"), "dev", "-w", str(CHECKOUT / "workspace.yaml"), "-p", port]
    # Elsewhere than in the checkout, whose dagster.yaml is for those who start Dagster without a home.
    return subprocess.run(command, cwd=folder, check=False).returncode


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


if __name__ == "__main__":
    sys.exit(main())
