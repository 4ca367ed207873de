"""DuckDB's shell on a platform's tables."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import sql
from mtmd_assets.home import SCRIPTS, Site

SPILL_LIMIT = "10GB"
"""What one shell may spill; `SET max_temp_directory_size` in the shell allows more."""


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
    return str(shell) if shell.is_file() else str(SCRIPTS / "duckdb")


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
