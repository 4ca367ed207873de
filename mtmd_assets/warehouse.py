"""The lake: publish one day of some tables atomically; open a connection that sees all of them.

One zstd Parquet file a table and day, `lake/<table>/ds=YYYY-MM-DD/data.parquet`. `mtmd.duckdb` beside it holds only
views and macros, and no step of the pipeline holds it open, so any number of runs write different days while any
number of people query.
"""

import glob
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sql
from mtmd_assets.processes import alive
from mtmd_assets.tables import Columns

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SCHEMA_DAY = date(1, 1, 1)
"""The day of the zero-row file that every table starts with, so that every view answers."""

DERIVED_VIEWS = {"feature_drift": "feature_contract", "feature_missingness": "feature_contract"}
"""Views over the tables' own views, `sql/<name>.sql`, in order, each with the table it needs."""

_COPY = "(FORMAT parquet, COMPRESSION zstd)"


class Warehouse:
    """The lake and the views of one platform.

    Args:
        folder: the platform's folder in the home, for example `.mtmd/adworld`.
        tables: table -> column -> DuckDB type.
        settings: numbers of the platform file that views read, each a macro without arguments (`tables.settings`);
            without them the views of `DERIVED_VIEWS` are left out.

    Raises:
        PermissionError: if the folder cannot be written, naming it and `MTMD_HOME`.
    """

    def __init__(self, folder: Path, tables: dict[str, Columns], settings: dict[str, float] | None = None):
        self.folder, self.tables, self.settings = folder.absolute(), tables, settings or {}
        self.lake = self.folder / "lake"
        self.staging = self.lake / ".staging"
        self.database = self.folder / "mtmd.duckdb"

    # -- reading -----------------------------------------------------------------------------------------------

    def path(self, table: str, day: date) -> Path:
        """Where a day of a table is, or would be, published."""
        assert table in self.tables, table
        return self.lake / table / f"ds={day.isoformat()}" / "data.parquet"

    def published(self, table: str, day: date) -> bool:
        """Whether the day is published."""
        return self.path(table, day).is_file()

    def days(self, table: str) -> list[date]:
        """The published days of a table, in order."""
        found = (date.fromisoformat(p.parent.name[3:]) for p in (self.lake / table).glob("ds=*/data.parquet"))
        return sorted(d for d in found if d != SCHEMA_DAY)

    def columns(self, table: str, day: date) -> list[tuple[str, str]]:
        """Name and DuckDB type of each column of a published day, in order."""
        with _connect() as con:
            described = con.execute(
                "DESCRIBE FROM read_parquet($file, hive_partitioning = false)", {"file": str(self.path(table, day))}
            )
            return [(name, kind) for name, kind, *_ in described.fetchall()]

    def missing(self, table: str, first: date, last: date) -> list[date]:
        """The days first..last that are not published."""
        days = (first + timedelta(n) for n in range((last - first).days + 1))
        return [d for d in days if not self.published(table, d)]

    def connect(self) -> "DuckDBPyConnection":
        """An in-memory connection with a view a table; spills to a folder of the home."""
        self.create()
        spill = self.folder / "tmp"
        con = _connect(temp_directory=str(spill))
        con.execute(self._views())
        return con

    # -- creating ----------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folders, each table's zero-row file and the views, where they are missing or have changed."""
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            probe = self._draft()
            probe.mkdir()
            probe.rmdir()
        except OSError as e:
            raise PermissionError(
                f"{self.folder} cannot be written ({e.strerror}): set MTMD_HOME to a folder that can"
            ) from e
        self._sweep()
        changed = [t for t in self.tables if self._create_table(t)]
        for table in changed:
            self._mark_mixed(table, changed=True)
        stamp = self.folder / "views.sql"
        if changed or not self.database.exists() or not stamp.exists() or stamp.read_text() != self._views():
            self._create_views(stamp)

    def _create_table(self, table: str) -> bool:
        """Write the zero-row file if the table has none of exactly these columns; say whether it did."""
        columns = ", ".join(f"NULL::{t} AS {c}" for c, t in self.tables[table].items())
        wanted = f"SELECT {columns} WHERE false"
        path, stamp = self.path(table, SCHEMA_DAY), self.lake / table / "columns.sql"
        if path.exists() and stamp.exists() and stamp.read_text() == wanted:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._draft()
        with _connect() as con:
            con.execute(f"COPY ({wanted}) TO {sql.quoted(draft)} {_COPY}")
        os.replace(draft, path)
        draft.write_text(wanted)
        os.replace(draft, stamp)
        return True

    def _mark_mixed(self, table: str, changed: bool) -> None:
        """Keep a mark beside a table some of whose days have other columns: built before the platform file changed."""
        mark, wanted = self.lake / table / "mixed", list(self.tables[table].items())
        if changed or mark.exists():
            if any(self.columns(table, d) != wanted for d in self.days(table)):
                mark.touch()
            else:
                mark.unlink(missing_ok=True)

    def _views(self) -> str:
        """Statements that define a view a table, and the macros."""
        statements = [self._view(table, columns) for table, columns in self.tables.items()]
        settings = [f"CREATE OR REPLACE MACRO {name}() AS {value};" for name, value in self.settings.items()]
        derived = [sql.text(view) for view, table in DERIVED_VIEWS.items() if table in self.tables and self.settings]
        return "\n".join([*statements, sql.text("macros"), *settings, *derived])

    def _view(self, table: str, columns: Columns) -> str:
        """The view of a table; in days built before a column was added it is null. That makes reading slower."""
        mixed = (self.lake / table / "mixed").exists()
        selected = (f"TRY_CAST({c} AS {t}) AS {c}" for c, t in columns.items()) if mixed else columns
        files = sql.quoted(self.lake / table / "ds=*" / "data.parquet")
        by_name = ", union_by_name = true" if mixed else ""
        return f"""CREATE OR REPLACE VIEW {table} AS SELECT {", ".join(selected)}, ds
            FROM read_parquet({files}, hive_partitioning = true, hive_types = {{'ds': DATE}}{by_name});"""

    def _create_views(self, stamp: Path) -> None:
        """Build `mtmd.duckdb` beside the old one and swap it whole, so that readers keep their snapshot."""
        draft = self._draft()
        with _connect() as con:
            # An old storage version, so that older DuckDB shells read it.
            con.execute(f"ATTACH {sql.quoted(draft)} AS views (STORAGE_VERSION 'v1.2.0'); USE views;")
            con.execute(self._views())
            con.execute("USE memory; DETACH views;")
        os.replace(draft, self.database)
        draft.write_text(self._views())
        os.replace(draft, stamp)

    # -- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, run_id: str = "") -> Iterator["Stage"]:
        """A place to write one day of some tables; nothing is seen until `Stage.publish`, and what is left is removed."""
        self.create()
        folder = self._draft(run_id)
        folder.mkdir()
        try:
            yield Stage(self, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _draft(self, run_id: str = "") -> Path:
        """A name in the staging folder that tells whose it is, so that leftovers of dead runs can be swept."""
        return self.staging / f"{socket.gethostname()}~{os.getpid()}~{run_id}~{uuid.uuid4().hex[:8]}"

    def _sweep(self) -> None:
        """Finish what a killed run had begun to publish; remove what dead runs of this machine left behind."""
        for draft in self.staging.glob(f"{glob.escape(socket.gethostname())}~*~*~*"):
            if alive(int(draft.name.split("~")[1])):
                continue
            if draft.is_dir():
                Stage(self, draft).finish()
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)


class Stage(Warehouse):
    """A warehouse in which files that are not yet visible to others take the place of published ones.

    Write a day's tables, read and check them as if they were published, then publish them together, or not at all.
    """

    def __init__(self, warehouse: Warehouse, draft: Path):
        super().__init__(warehouse.folder, warehouse.tables, warehouse.settings)
        self.draft = draft

    def path(self, table: str, day: date) -> Path:
        """The staged file of a table and day, or else the published one."""
        staged = self._staged(table, day)
        return staged if staged.exists() else super().path(table, day)

    def connect(self) -> "DuckDBPyConnection":
        """As of a warehouse; staged days show in the views."""
        con = super().connect()
        for path in self.draft.glob("*.parquet"):
            con.execute(self._with_staged(*_table_and_day(path.name)))
        return con

    def write(self, con: "DuckDBPyConnection", table: str, day: date, query: str, parameters: object = None) -> Path:
        """Stage a query's rows as one day of a table; columns are picked by name and cast to the table's types.

        Raises:
            duckdb.Error: if the query lacks a column or a value does not fit its type.
        """
        columns = ", ".join(f"{c}::{t} AS {c}" for c, t in self.tables[table].items())
        path = self._staged(table, day)
        con.execute(f"COPY (SELECT {columns} FROM ({query})) TO {sql.quoted(path)} {_COPY}", parameters)
        con.execute(self._with_staged(table, day))
        return path

    def write_rows(self, con: "DuckDBPyConnection", table: str, day: date, rows: list[dict[str, Any]]) -> Path:
        """Stage Python rows as one day of a table (see `write`)."""
        import pyarrow as pa

        con.register("rows_to_write", pa.Table.from_pylist(rows))
        path = self.write(con, table, day, "FROM rows_to_write")
        con.unregister("rows_to_write")
        return path

    def keep_only(self, table: str) -> None:
        """Drop the staged files of every other table."""
        for path in self.draft.glob("*.parquet"):
            if _table_and_day(path.name)[0] != table:
                path.unlink()

    def publish(self) -> None:
        """Rename every staged file into place. If the process dies half-way, the next run finishes it (`_sweep`).

        Connections made before still look for the staged files: read what you need first.
        """
        plan = [p.name for p in sorted(self.draft.glob("*.parquet"))]
        draft = self.draft / "publish.tmp"
        draft.write_text(json.dumps(plan))
        os.replace(draft, self.draft / "publish.json")
        self.finish()

    def finish(self) -> None:
        """Carry out the written plan, if there is one; renames already done are passed over."""
        plan = self.draft / "publish.json"
        if not plan.exists():
            return
        for name in json.loads(plan.read_text()):
            table, day = _table_and_day(name)
            target = super().path(table, day)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(self.draft / name, target)
            except FileNotFoundError:
                continue
            self._mark_mixed(table, changed=False)

    def _staged(self, table: str, day: date) -> Path:
        return self.draft / f"{table}@{day.isoformat()}.parquet"

    def _with_staged(self, table: str, day: date) -> str:
        """The view of a table with the staged day in place of the published one."""
        columns = ", ".join(self.tables[table])
        published = self._view(table, self.tables[table]).removesuffix(";")
        staged = f"SELECT {columns}, DATE '{day}' FROM read_parquet({sql.quoted(self._staged(table, day))})"
        return f"{published} WHERE ds <> DATE '{day}' UNION ALL {staged}"


def _table_and_day(name: str) -> tuple[str, date]:
    """What a staged file is of."""
    table, day = name.removesuffix(".parquet").split("@")
    return table, date.fromisoformat(day)


def _connect(**config: str) -> "DuckDBPyConnection":
    """An in-memory connection. DuckDB is imported here: a code location that holds the module in its assets' globals
    makes it complain of leaks whenever a process ends that also used torch.
    """
    import duckdb

    return duckdb.connect(config=dict(config))
