"""A team's own logs: a folder of Parquet files a table, local or any fsspec URL. See docs/your-logs.md."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from mtmd_assets.faults import BadFile
from mtmd_assets.platform import ParquetSource, Platform
from mtmd_assets.sources import LogDay
from mtmd_assets.tables import tables

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from fsspec import AbstractFileSystem


class ParquetLogs:
    """Reads the files of day D, `<folder>/ds=D/*.parquet` or else `<folder>/D.parquet`, and renames their columns.

    Only the columns of the tables are read; `ds` too, where `columns` maps it. Several files of a day are taken in
    the order of their names.

    Args:
        platform: its source names the folders, the columns that differ, and options for fsspec.
    """

    def __init__(self, platform: Platform):
        assert isinstance(platform.source, ParquetSource)
        self.source: ParquetSource = platform.source
        columns = tables(platform)
        self.impressions = list(columns["impressions"]) + (["ds"] if "ds" in self.source.columns else [])
        self.scores = list(columns["heavyweight_scores"])

    def read(self, day: date) -> LogDay:
        """The rows of `day` as received.

        Raises:
            BadFile: if the day has no file, one cannot be read or lacks a column, or its files' types differ.
        """
        impressions, file = self._table(self.source.impressions, self.impressions, day)
        if self.source.heavyweight_scores is None:
            return LogDay(impressions, None, impressions_file=file)
        scores, scores_file = self._table(self.source.heavyweight_scores, self.scores, day)
        return LogDay(impressions, scores, impressions_file=file, scores_file=scores_file)

    def look(self, day: date) -> None:
        """Of each table's first file of the day the columns alone.

        Raises:
            BadFile: if the day has no file, or its first cannot be read or lacks a column.
        """
        for folder, columns in (
            (self.source.impressions, self.impressions),
            (self.source.heavyweight_scores, self.scores),
        ):
            if folder is None:
                continue
            fs, root = self._open(folder, day)
            with self._file(fs, self._files(fs, root, folder, day)[0], columns, day):
                pass

    def _table(self, folder: str, columns: list[str], day: date) -> tuple[pl.DataFrame, str]:
        """One table's rows of the day, in our names, and where they came from."""
        fs, root = self._open(folder, day)
        paths = self._files(fs, root, folder, day)
        frames: list[pl.DataFrame] = []
        for path in paths:
            frame = self._read(fs, path, columns, day)
            if frames and frame.schema != frames[0].schema:
                column = next(c for c in columns if frame.schema[c] != frames[0].schema[c])
                raise BadFile(
                    f"another type than in {paths[0]}, {frames[0].schema[column]}",
                    file=path,
                    day=day,
                    column=self._theirs(column),
                    received=str(frame.schema[column]),
                )
            frames.append(frame)
        return pl.concat(frames), paths[0] if len(paths) == 1 else f"{folder.rstrip('/')}/ds={day}/*.parquet"

    def _open(self, folder: str, day: date) -> "tuple[AbstractFileSystem, str]":
        import fsspec

        if "://" not in folder:
            folder = str(Path(folder).expanduser().absolute())
        try:
            return fsspec.core.url_to_fs(folder, **self.source.storage_options)
        except Exception as e:  # every file system has its own errors
            raise BadFile(f"the folder cannot be opened: {e}", file=folder, day=day) from e

    def _files(self, fs: "AbstractFileSystem", root: str, folder: str, day: date) -> list[str]:
        """The day's files, in the order of their names; what is there beside them is refused, not passed over."""
        root, folder = root.rstrip("/"), folder.rstrip("/")
        among, alone = f"{root}/ds={day}", f"{root}/{day}.parquet"
        try:
            # A listing kept from an earlier day would hide today's files.
            fs.invalidate_cache()
            found = fs.ls(among, detail=True) if fs.isdir(among) else []
            single = [alone] if fs.exists(alone) else []
        except Exception as e:  # every file system has its own errors
            raise BadFile(f"the folder cannot be listed: {e}", file=folder, day=day) from e
        paths = []
        for path, kind in sorted((str(f["name"]).rstrip("/"), f["type"]) for f in found):
            name = path.rpartition("/")[2]
            hidden, parquet = name.startswith(("_", ".")), name.endswith(".parquet")
            # Object stores list the folder itself, and writers leave markers, checksums and `_temporary`.
            if path.strip("/") == among.strip("/") or (hidden and not parquet):
                continue
            if hidden or not parquet or kind == "directory":
                raise BadFile("expected files *.parquet alone", file=f"{folder}/ds={day}", day=day, received=name)
            paths.append(path)
        if paths and single:
            raise BadFile(f"the day is in the folder ds={day} too", file=f"{folder}/{day}.parquet", day=day)
        if not paths and not single:
            raise BadFile("no such file", file=f"{folder}/ds={day}/*.parquet or {folder}/{day}.parquet", day=day)
        return paths or single

    def _read(self, fs: "AbstractFileSystem", path: str, columns: list[str], day: date) -> pl.DataFrame:
        """The columns of one file, in our names."""
        theirs = [self._theirs(c) for c in columns]
        with self._file(fs, path, columns, day) as file:
            table: Any = file.read(columns=list(dict.fromkeys(theirs)))
        frame = pl.DataFrame(pl.from_arrow(table))
        return frame.select(pl.col(name).alias(ours) for ours, name in zip(columns, theirs, strict=True))

    @contextmanager
    def _file(self, fs: "AbstractFileSystem", path: str, columns: list[str], day: date) -> Iterator["pq.ParquetFile"]:
        """An open file that has the columns; what goes wrong while it is read is the file's fault."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with fs.open(path, "rb") as f:
                file = pq.ParquetFile(f)
                present = file.schema_arrow.names
                for ours in columns:
                    name = self._theirs(ours)
                    if name not in present:
                        wanted = "no such column" if ours == name else f"no such column, for our {ours}"
                        raise BadFile(wanted, file=path, day=day, column=name, received=sorted(set(present)))
                    if (times := present.count(name)) > 1:
                        raise BadFile("more than one such column", file=path, day=day, column=name, received=times)
                yield file
        except (OSError, pa.ArrowException, EOFError) as e:
            raise BadFile(f"not readable as Parquet: {str(e).splitlines()[0]}", file=path, day=day) from e

    def _theirs(self, column: str) -> str:
        """What the log calls one of our columns."""
        return self.source.columns.get(column, column)
