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
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import sql
from mtmd_assets.faults import BadFile, PlatformError, Withheld
from mtmd_assets.home import ALWAYS, CHECKOUT, Home, Site
from mtmd_assets.platform import Platform
from mtmd_assets.sources import open_source

if TYPE_CHECKING:
    from dagster._utils.error import SerializableErrorInfo

INTERRUPTED = 130
"""The exit status of who was interrupted."""
UNREAD = 141
"""The exit status of who wrote to a closed pipe."""

SPILL_LIMIT = "10GB"
"""What one shell may spill; `SET max_temp_directory_size` in the shell allows more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="mtmd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("demo", "backfill", "results", "tune", "scoreboard", "sql"):
        commands.add_parser(name).add_argument(
            "--platform", default=ALWAYS, help="a registered platform; %(default)s unless given"
        )
    for name in ("demo", "results", "tune"):
        commands.choices[name].add_argument("--data", help="the folder of the platform's logs, where it needs one")
    for name, models in (("results", "all"), ("tune", "mtmd,contenders")):
        commands.choices[name].add_argument(
            "--models",
            default=models,
            help='comma-separated, as in "slice_towers,no_cross"; contenders stands for many, as ablations and all do of '
            "results; %(default)s unless given",
        )
        commands.choices[name].add_argument(
            "--document",
            type=Path,
            default=CHECKOUT / "docs" / "results.md",
            help="where the platform's sections are written; %(default)s unless given",
        )
    commands.choices["results"].add_argument(
        "--seeds", type=int, help="how many of each model, at least; what the platform file says unless given"
    )
    commands.choices["tune"].add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="CHANGE",
        help='trainings with it on every tuning day and with two seeds, in place of the search: "max_epochs=45 dropout=0.1"; '
        "may be given several times",
    )
    for bound in ("first", "last"):
        commands.choices["backfill"].add_argument(bound, type=_day, help="a day, YYYY-MM-DD")
    commands.choices["backfill"].add_argument(
        "--job",
        choices=("data", "models", "daily"),
        default="data",
        help="data (the default): logs, scores, joined examples; models: train, evaluate, embed; daily: both",
    )
    commands.choices["sql"].add_argument("query", nargs="?")
    commands.add_parser("register").add_argument("file", help="a platform file, or the name of a shipped one")
    commands.choices["register"].add_argument("--data", help="the folder of the platform's logs, where it needs one")
    commands.add_parser("ui").add_argument("--port", type=int, default=3000, help="3000 unless given")
    options = parser.parse_args(arguments)
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    home = Home()
    os.environ["MTMD_HOME"] = str(home.root)
    try:
        if options.command == "demo":
            return demo(home, options.platform, options.data)
        if options.command == "results":
            return results(home, options.platform, options.models, options.document, options.data, options.seeds)
        if options.command == "tune":
            return tune(home, options.platform, options.models, options.document, options.data, options.tries)
        if options.command == "backfill":
            return backfill(home, home.site(options.platform), options.job, options.first, options.last)
        if options.command == "scoreboard":
            return print_scoreboard(home.site(options.platform))
        if options.command == "sql":
            return prompt(home.site(options.platform), options.query)
        if options.command == "register":
            return register(home, options.file, options.data)
        return ui(home, options.port)
    except (PlatformError, BadFile, Withheld, PermissionError) as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


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


def register(home: Home, file: str, data: str | None) -> int:
    """Add a platform to the home, or replace it."""
    before = home.names()
    site = home.register(file, data)
    site.warehouse.create()
    name = site.platform.name
    what = "replaced" if name in before else "registered"
    print(f"{what} {name} in {site.folder}; reload the code location if the UI is running")
    return 0


# -- running -----------------------------------------------------------------------------------------------------


def demo(home: Home, name: str, data: str | None) -> int:
    """Build the days of one training window and the next day, train, evaluate, embed, and print the scoreboard.

    A log that goes on is shown from its first day, a log that has ended up to its last one.
    """
    from mtmd_assets.automation import MODEL_TABLES

    site = _site(home, name, data)
    platform = site.platform
    evaluated = platform.end or platform.first_window_end + timedelta(1)
    trained = evaluated - timedelta(1)
    seen = max(platform.start, platform.window(trained)[0] - timedelta(platform.history_days))
    first = platform.start if not platform.logs_scores else seen
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


def _site(home: Home, name: str, data: str | None) -> Site:
    """A platform of the home, registered first if it is not or its data is given.

    Raises:
        PlatformError: if it cannot be registered, or its log is nowhere given.
        BadFile: if the given folder has no log: said once, before anything is registered, not by each day of a run.
    """
    if data is None and (home.registered(name) or name == ALWAYS):
        site = home.site(name)
        _require_folder(site.platform)
        if home.differs_from_shipped(site.platform):
            file = home.root / name / "platform.yaml"
            print(f"{name} as registered, {file}, which is not the shipped one (mtmd register)", flush=True)
        return site
    platform, _ = home.read(name, data)
    _require_folder(platform)
    if home.registered(name) and _says_something_else(home, name):
        print(
            f"{name}: the shipped platform file takes the place of the registered one, which says something else",
            flush=True,
        )
    return home.register(name, data)


def _says_something_else(home: Home, name: str) -> bool:
    """Whether a registered file is not the shipped one, its source apart, or is refused today."""
    try:
        return home.differs_from_shipped(home.site(name).platform)
    except PlatformError:
        return True


def _require_folder(platform: Platform) -> None:
    if platform.source.kind == "kuairand":
        open_source(platform).read(platform.start)


def results(
    home: Home, platform: str, models: str, document: Path, data: str | None = None, seeds: int | None = None
) -> int:
    """Compare models of a platform, which is registered first if its data is given; see `study.results`."""
    from mtmd_assets import study

    chosen = study.chosen(models)
    site = _site(home, platform, data)
    with _jobs(home, site) as run:
        return study.results(site, chosen, document, run, _step, seeds)


def tune(
    home: Home, platform: str, models: str, document: Path, data: str | None = None, tries: Sequence[str] = ()
) -> int:
    """Search the settings of models of a platform, which is registered first if its data is given; see `study.tune`."""
    from mtmd_assets import study

    chosen = study.chosen(models)
    site = _site(home, platform, data)
    with _jobs(home, site) as run:
        return study.tune(site, chosen, document, run, _step, tries)


def backfill(home: Home, site: Site, job: str, first: date, last: date) -> int:
    """Run a job for the days first..last, as a backfill from the UI does; data in one run, models a run a day.

    Raises:
        PlatformError: if the days are none of the platform's.
    """
    from mtmd_assets.assets.common import daily_partitions

    if last < first:
        raise PlatformError(f"the first day, {first}, is after the last, {last}")
    keys = daily_partitions(site.platform).get_partition_keys()
    if not (keys and keys[0] <= str(first) <= str(last) <= keys[-1]):
        span = f"{keys[0]} to {keys[-1]}" if keys else "none yet"
        raise PlatformError(f"{site.platform.name}: no days {first} to {last}; its days are {span}")
    title = f"{site.platform.name}_{job} of {first} to {last}"
    with _jobs(home, site) as run:
        if job == "data":
            with _step(title):
                run(job, first, last)
            return 0
        print(title, flush=True)
        return _day_by_day(run, site.platform, job, [first + timedelta(n) for n in range((last - first).days + 1)])


def _day_by_day(run: "Run", platform: Platform, job: str, days: Sequence[date]) -> int:
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


class RunFailed(SystemExit):
    """A run failed; its reasons are printed."""


class Run(Protocol):
    """Runs jobs of a site."""

    def __call__(
        self,
        job: str,
        first: date,
        last: date | None = None,
        only: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Run a job for one day, or for a range of days in one run; for some of its tables, or all."""


@contextmanager
def _jobs(home: Home, site: Site) -> Iterator[Run]:
    """Runs jobs in this process, quietly; the runs are kept in the home and seen in the UI.

    The function it gives prints the reasons of a run that fails and raises RunFailed.
    """
    from dagster import DagsterExecutionInterruptedError

    from mtmd_assets.assets.common import asset_key
    from mtmd_assets.definitions import platform_definitions
    from mtmd_assets.runs import bury_dead, instance_of

    site.warehouse.create()
    folder = home.prepare_dagster()
    definitions = platform_definitions(site)
    with instance_of(folder) as instance:
        bury_dead(instance)

        def run(
            job: str,
            first: date,
            last: date | None = None,
            only: Sequence[str] = (),
            config: Mapping[str, Any] | None = None,
        ) -> None:
            span = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
            try:
                result = definitions.resolve_job_def(f"{site.platform.name}_{job}").execute_in_process(
                    instance=instance,
                    partition_key=None if last else str(first),
                    tags=span if last else None,
                    asset_selection=[asset_key(site.platform, t) for t in only] or None,
                    raise_on_error=False,
                    run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}, **(config or {})},
                )
            except DagsterExecutionInterruptedError as e:
                raise KeyboardInterrupt from e
            if not result.success:
                for event in result.all_events:
                    if event.is_step_failure:
                        error = event.step_failure_data.error
                        while error and error.cause:
                            error = error.cause
                        print(f"    {event.step_key}: {_said(error) if error else 'failed'}", file=sys.stderr)
                raise RunFailed(f"{site.platform.name}_{job} failed; `make ui` shows run {result.run_id}")

        yield run


def _said(error: "SerializableErrorInfo") -> str:
    """An error's message; the class of one of ours, or of Dagster's, says nothing more to a user."""
    kind, _, message = error.message.strip().partition(": ")
    return message if kind.startswith(("mtmd_assets.", "dagster.")) else error.message.strip()


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(title, flush=True)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


def print_scoreboard(site: Site) -> int:
    """Print LogMAE by slice and task over every evaluated day, the model beside the constants."""
    from mtmd_assets import scoreboard
    from mtmd_assets.improvement import MIN_ROWS

    days = site.warehouse.days("daily_slice_metrics")
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
    large = [c for c in judged if c.rows >= MIN_ROWS]
    for those, which in ((judged, ""), (large, f" with at least {MIN_ROWS} rows"))[: 1 if large == judged else 2]:
        better = sum(c.mtmd < c.constant for c in those if c.constant is not None)
        print(f"\nmtmd is better than the slice's mean in {better} of the {len(those)} cells{which}", end="")
    print(f"\n\n{_where_to_look(site.platform.name)}")
    return 0


def _where_to_look(name: str) -> str:
    query = f'make sql{"" if name == ALWAYS else f" PLATFORM={name}"} Q="FROM slice_metrics LIMIT 5"'
    return f"{'make ui':<{len(query)}}   the assets, in Dagster\n{query}   the tables, in DuckDB"


# -- looking at it -----------------------------------------------------------------------------------------------


def prompt(site: Site, query: str | None) -> int:
    """One query, or DuckDB's own shell on the views, read-only so that nobody is locked out.

    Joins run in the order in which they are written: DuckDB's own order, guessed without statistics of the files, may
    begin with every item of a day against every request.
    """
    if not site.warehouse.database.exists():
        site.warehouse.create()
    if not any(map(site.warehouse.days, site.warehouse.tables)):
        print(f"no day of {site.platform.name} is built yet: every table is empty", file=sys.stderr)
    _remove_old_spill(site)
    settings = f"""SET temp_directory = {sql.quoted(site.warehouse.spill)};
        SET max_temp_directory_size = '{SPILL_LIMIT}';
        SET disabled_optimizers = 'join_order';"""
    command = [_duckdb(), "-readonly", "-cmd", settings, str(site.warehouse.database)]
    # an interrupt reaches the shell too, which ends a query rather than itself
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run([*command, "-c", query] if query else command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def _duckdb() -> str:
    """DuckDB's shell itself: its Python wrapper would kill it at a Ctrl-C, which only ends a query."""
    shell = Path(str(files("duckdb_cli"))) / "duckdb"
    return str(shell) if shell.is_file() else _script("duckdb")


def _remove_old_spill(site: Site) -> None:
    """Remove what killed processes have left: in the home, and beside the database by shells of one's own."""
    database = site.warehouse.database
    beside = database.with_name(f"{database.name}.tmp")
    for folder in (site.warehouse.spill, beside):
        for file in folder.glob("*"):
            # A file that is in use is kept open, so that even a slow query keeps its own.
            if file.is_file() and file.stat().st_mtime < time.time() - 3600:
                file.unlink(missing_ok=True)
    with suppress(OSError):
        beside.rmdir()


def ui(home: Home, port: int) -> int:
    """Dagster's web server and daemon on this home, until interrupted.

    Raises:
        PlatformError: if the port is not free.
    """
    from mtmd_assets.runs import bury_dead, instance_of

    _require_free(port)
    for site in home.sites():
        site.warehouse.create()
    folder = home.prepare_dagster()
    with instance_of(folder) as instance:
        bury_dead(instance)
    command = [_script("dg"), "dev", "-w", str(CHECKOUT / "workspace.yaml"), "-p", str(port)]
    # Elsewhere than in the checkout, whose dagster.yaml is for those who start Dagster without a home.
    children: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        for child in children:
            child.terminate()

    # a Ctrl-C reaches both, what stops a service this process only
    signal.signal(signal.SIGTERM, end)
    # which a shell has had ignored if it started this in the background; Dagster stops its own processes by it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        children.append(subprocess.Popen(command, cwd=folder))
        return children[0].wait()
    except KeyboardInterrupt:  # the child has it too, and takes a while
        for child in children:
            child.wait()
        return 0


def _require_free(port: int) -> None:
    """Insist that nobody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as e:
            another = "choose another with --port (make ui PORT=3001)"
            raise PlatformError(f"port {port} cannot be had ({e}): {another}") from e


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


if __name__ == "__main__":
    run()
