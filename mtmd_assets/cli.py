"""The command `mtmd`: what the Makefile calls, and what a person types.

mtmd demo [--platform NAME] [--data FOLDER]   build days, train, evaluate, print the scoreboard
mtmd backfill FIRST LAST [--platform NAME]    build days without the UI: --job data, models or daily
mtmd results [--platform NAME] [--models M]   MTMD against contenders and ablations, into docs/results.md
mtmd tune [--platform NAME]                   the search behind their settings
mtmd register FILE [--data FOLDER]            add a platform to the home
mtmd scoreboard [--platform NAME]             LogMAE by slice and task, of every evaluated day
mtmd sql [--platform NAME] [QUERY]            one query, or a DuckDB prompt
mtmd ui [--port PORT]                         the Dagster UI with its daemon
"""

import argparse
import atexit
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import NoReturn

from mtmd_assets import scoreboard, shell, web
from mtmd_assets.faults import BadFile, PlatformError, UsageError, Withheld
from mtmd_assets.home import ALWAYS, CHECKOUT, Home, Site, differs_from_shipped
from mtmd_assets.in_process import Run, RunFailed, jobs_in_process, step
from mtmd_assets.platform import Platform
from mtmd_assets.sources import open_source

INTERRUPTED = 130
"""The exit status of who was interrupted."""
UNREAD = 141
"""The exit status of who wrote to a closed pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    home = Home()
    os.environ["MTMD_HOME"] = str(home.root)
    try:
        status: int = options.run(home, options)
        return status
    except (PlatformError, UsageError, BadFile, Withheld, PermissionError) as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    """The commands with their options; each has its function of a home and the options as `run`."""
    parser = argparse.ArgumentParser(
        prog="mtmd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Home, argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name)
        added.set_defaults(run=run)
        return added

    demo_ = command("demo", demo)
    backfill_ = command("backfill", backfill)
    results_ = command("results", results)
    tune_ = command("tune", tune)
    scoreboard_ = command("scoreboard", lambda home, o: scoreboard.show(home.site(o.platform)))
    sql_ = command("sql", lambda home, o: shell.prompt(home.site(o.platform), o.query))
    register_ = command("register", register)
    ui_ = command("ui", lambda home, o: web.serve(home, o.port))

    for of in (demo_, backfill_, results_, tune_, scoreboard_, sql_):
        of.add_argument("--platform", default=ALWAYS, help="a registered platform; %(default)s unless given")
    for of in (demo_, results_, tune_, register_):
        of.add_argument("--data", help="the folder of the platform's logs, where it needs one")
    for of, models in ((results_, "all"), (tune_, "mtmd,contenders")):
        of.add_argument(
            "--models",
            default=models,
            help='comma-separated, as in "slice_towers,no_cross"; contenders stands for many, as ablations and all do of '
            "results; %(default)s unless given",
        )
        of.add_argument(
            "--document",
            type=Path,
            default=CHECKOUT / "docs" / "results.md",
            help="where the platform's sections are written; %(default)s unless given",
        )
    results_.add_argument(
        "--seeds", type=int, help="how many of each model, at least; what the platform file says unless given"
    )
    tune_.add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="CHANGE",
        help='trainings with it on every tuning day and with two seeds, in place of the search: "max_epochs=45 dropout=0.1"; '
        "may be given several times",
    )
    for bound in ("first", "last"):
        backfill_.add_argument(bound, type=_day, help="a day, YYYY-MM-DD")
    backfill_.add_argument(
        "--job",
        choices=("data", "models", "daily"),
        default="data",
        help="data (the default): logs, scores, joined examples; models: train, evaluate, embed; daily: both",
    )
    sql_.add_argument("query", nargs="?")
    register_.add_argument("file", help="a platform file, or the name of a shipped one")
    ui_.add_argument("--port", type=int, default=3000, help="3000 unless given")
    return parser


def run() -> NoReturn:
    """`main` as a process: it ends without taking apart what Dagster and torch have loaded, which takes seconds."""
    try:
        status = main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # a reader has seen enough
        status = UNREAD
    atexit._run_exitfuncs()
    os._exit(status)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a day as YYYY-MM-DD (received {text!r})") from None


def register(home: Home, options: argparse.Namespace) -> int:
    """Add a platform to the home, or replace it; logs whose first day cannot be read may be yet to come, and are named.

    Raises:
        PlatformError: if its log is nowhere given, before anything is registered.
    """
    open_source(home.read(options.file, options.data)[0])
    before = home.names()
    site = home.register(options.file, options.data)
    site.warehouse.create()
    name = site.platform.name
    what = "replaced" if name in before else "registered"
    print(f"{what} {name} in {site.folder}; reload the code location if the UI is running")
    try:
        site.source.look(site.platform.start)
    except BadFile as e:
        print(f"its first day cannot be read as it is: {e}", file=sys.stderr)
    return 0


# -- running -----------------------------------------------------------------------------------------------------


def demo(home: Home, options: argparse.Namespace) -> int:
    """Build the days of one training window and the next day, train, evaluate, embed, and print the scoreboard.

    A log that goes on is shown from its first day, a log that has ended up to its last one.
    """
    from mtmd_assets import study
    from mtmd_assets.automation import MODEL_TABLES

    site = _site(home, options.platform, options.data)
    platform = site.platform
    evaluated = platform.end or platform.first_evaluated
    trained = evaluated - timedelta(1)
    window = platform.window(trained)
    print(f"{platform.name}: {len(platform.slices)} slices, {len(platform.tasks)} tasks, home {home.root}", flush=True)
    with jobs_in_process(home, site) as run:
        with step(f"1/3 build and check the days {platform.built_from(window[0])} to {evaluated}"):
            study.build(site, window[0], evaluated, run)
        with step(f"2/3 train on the window {window[0]} to {trained}"):
            run("models", trained, only=("models",))
        with step(f"3/3 evaluate and embed {evaluated}"):
            run("models", evaluated, only=[t for t in MODEL_TABLES if t != "models"])
    print()
    return scoreboard.show(site)


def _site(home: Home, name: str, data: str | None) -> Site:
    """A platform of the home, registered first if it is not or its data is given.

    Raises:
        PlatformError: if it cannot be registered, or its log is nowhere given.
        BadFile: if the given folder has no log: said once, before anything is registered, not by each day of a run.
    """
    if data is None and (name in home.names() or name == ALWAYS):
        site = home.site(name)
        _require_folder(site.platform)
        if differs_from_shipped(site.platform):
            print(f"{name} as registered, {home.file(name)}, which is not the shipped one (mtmd register)", flush=True)
        return site
    platform, _ = home.read(name, data)
    _require_folder(platform)
    if name in home.names() and _says_something_else(home, name):
        print(
            f"{name}: the shipped platform file takes the place of the registered one, which says something else and is "
            f"kept as {home.replaced(name)}",
            flush=True,
        )
    return home.register(name, data)


def _says_something_else(home: Home, name: str) -> bool:
    """Whether a registered file is not the shipped one, its source apart, or is refused today."""
    try:
        return differs_from_shipped(home.site(name).platform)
    except PlatformError:
        return True


def _require_folder(platform: Platform) -> None:
    if platform.source.kind == "kuairand":
        open_source(platform).look(platform.start)


def results(home: Home, options: argparse.Namespace) -> int:
    """Compare models of a platform, which is registered first if its data is given; see `study.results`."""
    from mtmd_assets import study

    chosen = study.chosen(options.models)
    site = _site(home, options.platform, options.data)
    with jobs_in_process(home, site) as run:
        return study.results(site, chosen, options.document, run, step, options.seeds)


def tune(home: Home, options: argparse.Namespace) -> int:
    """Search the settings of models of a platform, which is registered first if its data is given; see `study.tune`."""
    from mtmd_assets import study

    chosen = study.chosen(options.models)
    site = _site(home, options.platform, options.data)
    with jobs_in_process(home, site) as run:
        return study.tune(site, chosen, options.document, run, step, options.tries)


def backfill(home: Home, options: argparse.Namespace) -> int:
    """Run a job for the days first..last, as a backfill from the UI does; data in one run, models a run a day.

    Raises:
        UsageError: if the days are none of the platform's.
    """
    from mtmd_assets.assets.common import daily_partitions

    site, job, first, last = home.site(options.platform), options.job, options.first, options.last
    if last < first:
        raise UsageError(f"the first day, {first}, is after the last, {last}")
    keys = daily_partitions(site.platform).get_partition_keys()
    if not (keys and keys[0] <= str(first) <= str(last) <= keys[-1]):
        span = f"{keys[0]} to {keys[-1]}" if keys else "none yet"
        raise UsageError(f"{site.platform.name}: no days {first} to {last}; its days are {span}")
    title = f"{site.platform.name}_{job} of {first} to {last}"
    with jobs_in_process(home, site) as run:
        if job == "data":
            with step(title):
                run(job, first, last)
            return 0
        print(title, flush=True)
        return _day_by_day(run, site.platform, job, [first + timedelta(n) for n in range((last - first).days + 1)])


def _day_by_day(run: Run, platform: Platform, job: str, days: Sequence[date]) -> int:
    """Run a job for each day, the days that fail apart; 1 if any did."""
    early = [d for d in days if d < platform.first_window_end]
    if early:
        what = "nothing is trained" if job == "models" else "data only"
        print(
            f"    {early[0]} to {early[-1]}: {what}, the first window ends on {platform.first_window_end}", flush=True
        )
    wanted = days if job == "daily" else days[len(early) :]
    failed = []
    for day in wanted:
        start = time.monotonic()
        try:
            run(job, day)
            print(f"    {day}: done in {time.monotonic() - start:.0f} s", flush=True)
        except RunFailed as e:
            print(f"    {day}: {e}", file=sys.stderr, flush=True)
            failed.append(str(day))
    if failed:
        print(f"{len(failed)} of {len(wanted)} days failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run()
