"""The lake: publish one day of some tables atomically; open a connection that sees all of them.

One Parquet file a table and day, `lake/<table>/ds=YYYY-MM-DD/data.parquet`. `mtmd.duckdb` beside it holds only
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
from mtmd_assets.faults import not_writable
from mtmd_assets.processes import alive, this_process
from mtmd_assets.tables import Columns

if TYPE_CHECKING:
    import polars as pl
    from duckdb import DuckDBPyConnection

SCHEMA_DAY = date(1, 1, 1)
"""The day of the zero-row file that every table starts with, so that every view answers."""

_COPY = "(FORMAT parquet, COMPRESSION zstd)"
_ROW_GROUP = 122_880
"""Rows of a row group, DuckDB's own number."""

_BESIDE = "beside/"
"""The part of a stage's folder that holds what is no table's, each file at its place in the platform's folder."""


class Warehouse:
    """The lake and the views of one platform.

    Args:
        folder: the platform's folder in the home, for example `.mtmd/adworld`.
        tables: table -> column -> DuckDB type.
        views: statements that define macros, and views over the tables' own (`tables.views`).

    Raises:
        PermissionError: if the folder cannot be written, naming it and `MTMD_HOME`.
    """

    def __init__(self, folder: Path, tables: dict[str, Columns], views: str = ""):
        self.folder, self.tables, self.views = folder.absolute(), tables, views
        self.lake = self.folder / "lake"
        self.staging = self.lake / ".staging"
        self.database = self.folder / "mtmd.duckdb"
        self.spill = self.folder / "tmp"
        """Where DuckDB puts what does not fit into memory; left alone it takes the current directory."""

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
        with self._connect() as con:
            return _columns(con, self.path(table, day))

    def missing(self, table: str, first: date, last: date) -> list[date]:
        """The days first..last that are not published."""
        days = (first + timedelta(n) for n in range((last - first).days + 1))
        return [d for d in days if not self.published(table, d)]

    def connect(self) -> "DuckDBPyConnection":
        """An in-memory connection with a view a table; spills to a folder of the home."""
        self.create()
        con = self._connect()
        con.execute(self._views())
        return con

    def _connect(self) -> "DuckDBPyConnection":
        """An in-memory connection. DuckDB is imported here: a code location that holds the module in its assets'
        globals makes it complain of leaks whenever a process ends that also used torch.
        """
        import duckdb

        return duckdb.connect(config={"temp_directory": str(self.spill)})

    # -- creating ----------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folders, each table's zero-row file and the views, where they are missing or have changed."""
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            probe = self._draft()
            probe.mkdir()
            probe.rmdir()
        except OSError as e:
            raise not_writable(self.folder, e) from e
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
        with self._connect() as con:
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
        """Statements that define a view a table, and those over them."""
        return "\n".join([*(self._view(table, columns) for table, columns in self.tables.items()), self.views])

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
        with self._connect() as con:
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
        """A place to write one day of some tables; nothing is seen until `Stage.publish`, and what is left is removed.

        A publish that an exception cuts short is finished all the same, at the latest by a later run (`_sweep`).
        """
        self.create()
        stage = Stage(self, self._draft(run_id))
        stage.draft.mkdir()
        try:
            yield stage
        finally:
            stage.finish()
            shutil.rmtree(stage.draft, ignore_errors=True)

    def _draft(self, run_id: str = "") -> Path:
        """A name in the staging folder that tells whose it is, so that leftovers of dead runs can be swept."""
        return self.staging / f"{socket.gethostname()}~{this_process()}~{run_id}~{uuid.uuid4().hex[:8]}"

    def _sweep(self) -> None:
        """Finish what a killed run had begun to publish; remove what dead runs of this machine left behind."""
        for draft in self.staging.glob(f"{glob.escape(socket.gethostname())}~*~*~*"):
            if alive(draft.name.split("~")[1]):
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
        super().__init__(warehouse.folder, warehouse.tables, warehouse.views)
        self.draft = draft

    def path(self, table: str, day: date) -> Path:
        """The staged file of a table and day, or else the published one."""
        return self._staged(table, day) if self.holds(table, day) else super().path(table, day)

    def holds(self, table: str, day: date) -> bool:
        """Whether the day of a table is staged here."""
        return self._staged(table, day).exists()

    def table_of(self, file: Path) -> str | None:
        """The table that a file staged here is of; None if it is not."""
        return _table_and_day(file.name)[0] if file.parent == self.draft and "@" in file.name else None

    def connect(self) -> "DuckDBPyConnection":
        """As of a warehouse; staged days show in the views."""
        con = self._connect()  # `create` has been called: this stage lies in its folders
        con.execute(self._views())
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

    def write_frame(self, con: "DuckDBPyConnection", table: str, day: date, frame: "pl.DataFrame") -> Path:
        """Stage a frame as one day of a table, its columns picked by name.

        For vectors, which Polars writes faster than DuckDB does, by lz4: zstd takes twice the time to save a tenth of
        what hardly compresses. Other columns read faster from `write`.

        Raises:
            TypeError: if a column has not the table's type; nothing is staged then.
        """
        path, wanted = self._staged(table, day), self.tables[table]
        frame.select(list(wanted)).write_parquet(path, compression="lz4", row_group_size=_ROW_GROUP)
        odd = [
            (*have, want) for have, want in zip(_columns(con, path), wanted.values(), strict=True) if have[1] != want
        ]
        if odd:
            path.unlink()
            raise TypeError(f"{table} of {day}: (column, type, expected type) {odd}")
        con.execute(self._with_staged(table, day))
        return path

    def write_rows(self, con: "DuckDBPyConnection", table: str, day: date, rows: list[dict[str, Any]]) -> Path:
        """Stage Python rows as one day of a table (see `write`)."""
        import pyarrow as pa

        con.register("rows_to_write", pa.Table.from_pylist(rows))
        path = self.write(con, table, day, "FROM rows_to_write")
        con.unregister("rows_to_write")
        return path

    def add(self, source: Path, target: Path) -> None:
        """Stage a file or folder that is no table's and lies in the stage; `publish` moves it to `target`.

        Args:
            source: what to move, on the stage's disk.
            target: in the platform's folder. In a folder that is there already, files of the same name are replaced.
        """
        staged = self.draft / _BESIDE / target.relative_to(self.folder)
        staged.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, staged)

    def drop(self, table: str, day: date) -> None:
        """Drop a staged day; connections made before still look for it."""
        self._staged(table, day).unlink()

    def keep_only(self, table: str) -> None:
        """Drop what else is staged: the files of every other table, and those of none."""
        shutil.rmtree(self.draft / _BESIDE, ignore_errors=True)
        for path in self.draft.glob("*.parquet"):
            if _table_and_day(path.name)[0] != table:
                path.unlink()

    def publish(self) -> None:
        """Rename every staged file into place. If the process dies half-way, the next run finishes it (`_sweep`).

        Connections made before still look for the staged files: read what you need first.

        Raises:
            OSError: if the disk refuses. Before the plan is written nothing is published, after it the rest will be.
        """
        # Tables last: their rows name the other files.
        beside = sorted(p for p in (self.draft / _BESIDE).rglob("*") if p.is_file())
        plan = [str(p.relative_to(self.draft)) for p in (*beside, *sorted(self.draft.glob("*.parquet")))]
        for name in plan:  # now, as a full disk may refuse a folder, but hardly a rename
            self._target(name).parent.mkdir(parents=True, exist_ok=True)
        draft = self.draft / "publish.tmp"
        draft.write_text(json.dumps(plan))
        os.replace(draft, self.draft / "publish.json")
        self.finish()

    def finish(self) -> None:
        """Carry out the written plan, if there is one; renames already done are passed over."""
        try:
            plan = json.loads((self.draft / "publish.json").read_text())
        except FileNotFoundError:
            return
        for name in plan:
            target = self._target(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(self.draft / name, target)
            except FileNotFoundError:
                continue
            if not name.startswith(_BESIDE):
                self._mark_mixed(_table_and_day(name)[0], changed=False)

    def _target(self, name: str) -> Path:
        """Where a staged file, named as in the plan, is published."""
        if name.startswith(_BESIDE):
            return self.folder / name.removeprefix(_BESIDE)
        return super().path(*_table_and_day(name))

    def _staged(self, table: str, day: date) -> Path:
        return self.draft / f"{table}@{day.isoformat()}.parquet"

    def _with_staged(self, table: str, day: date) -> str:
        """The view of a table with the staged day in place of the published one."""
        columns = ", ".join(self.tables[table])
        published = self._view(table, self.tables[table]).removesuffix(";")
        staged = f"SELECT {columns}, DATE '{day}' FROM read_parquet({sql.quoted(self._staged(table, day))})"
        return f"{published} WHERE ds <> DATE '{day}' UNION ALL {staged}"


def _columns(con: "DuckDBPyConnection", file: Path) -> list[tuple[str, str]]:
    """Name and DuckDB type of each column of a Parquet file, in order."""
    described = con.execute("DESCRIBE FROM read_parquet($file, hive_partitioning = false)", {"file": str(file)})
    return [(name, kind) for name, kind, *_ in described.fetchall()]


def _table_and_day(name: str) -> tuple[str, date]:
    """What a staged file is of."""
    table, day = name.removesuffix(".parquet").split("@")
    return table, date.fromisoformat(day)
