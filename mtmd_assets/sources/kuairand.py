"""Real logs: the KuaiRand-Pure folder, as downloaded (Gao et al., CIKM 2022; CC BY-SA 4.0). See docs/kuairand.md.

Read: every `log_standard_*.csv` there is, `user_features_pure.csv` and `video_features_basic_pure.csv`. Never read:
`video_features_statistic_pure.csv`, whose averages over the whole month tell the future, and `log_random_*.csv`,
whose videos were shown at random and not by the ranker of the other log.
"""

import csv
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl

from mtmd_assets.faults import BadFile, PlatformError
from mtmd_assets.platform import KuairandSource, Platform
from mtmd_assets.sources import LogDay

USERS, VIDEOS, LOGS = "user_features_pure.csv", "video_features_basic_pure.csv", "log_standard_*.csv"

# Read from the log. Its other columns tell what happened after the impression, or repeat these.
_LOG = ("user_id", "video_id", "date", "time_ms", "is_click", "long_view", "is_profile_enter", "tab")
_ONEHOT = tuple(f"onehot_feat{n}" for n in range(18))
_USER = {
    "user_id": pl.Int64,
    "user_active_degree": pl.String,
    "is_live_streamer": pl.Int64,
    "is_video_author": pl.Int64,
    "follow_user_num": pl.Int64,
    "follow_user_num_range": pl.String,
    "fans_user_num": pl.Int64,
    "fans_user_num_range": pl.String,
    "friend_user_num": pl.Int64,
    "friend_user_num_range": pl.String,
    "register_days": pl.Int64,
    "register_days_range": pl.String,
    **dict.fromkeys(_ONEHOT, pl.Float64),
}
_VIDEO = {
    "video_id": pl.Int64,
    "author_id": pl.Int64,
    "upload_dt": pl.Date,
    "upload_type": pl.String,
    "video_duration": pl.Float64,
    "server_width": pl.Float64,
    "server_height": pl.Float64,
    "music_id": pl.Int64,
    "music_type": pl.Float64,
    "tag": pl.String,
}
NO_VIDEO = "no_video"
"""The product of a row whose video `video_features_basic_pure.csv` does not list: no product of any platform file."""


class Kuairand:
    """Reads KuaiRand-Pure: tabs as surfaces, upload types as products.

    A request is (user, tab, time_ms), as the log has no request id; an impression is a request and its video, so that
    the log's repeated rows (3 %) share an id and are refused as duplicates. A row that is logged under two dates
    belongs to the earlier.

    Args:
        platform: its source names the folder; either `KuaiRand-Pure` or the `data` folder in it.

    Raises:
        PlatformError: if the platform file names no folder.
    """

    def __init__(self, platform: Platform):
        assert isinstance(platform.source, KuairandSource)
        if platform.source.data is None:
            needed = "the KuaiRand-Pure folder is not given: DATA=folder to make, --data folder to mtmd"
            raise PlatformError(f"{platform.name}: source.data: {needed} (received None)")
        folder = Path(platform.source.data).expanduser()
        self.folder = folder / "data" if (folder / "data").is_dir() else folder

    def read(self, day: date) -> LogDay:
        """The rows that the log dates `day`.

        Raises:
            BadFile: if a file is missing, cut short, or lacks a column, or the log holds no row of the day.
        """
        paths = sorted(self.folder.glob(LOGS))
        if not paths:
            raise BadFile("no such file", file=str(self.folder / LOGS), day=day)
        files = ", ".join(str(p) for p in paths)
        log = _log(tuple(_version(p, day) for p in paths), day)
        rows = log.filter(pl.col("ds") == day)
        if rows.is_empty():
            days = log["ds"].unique().sort().to_list()
            raise BadFile(f"no row of this day; it holds {days[0]} to {days[-1]}", file=files, day=day, column="date")
        users = _users(_version(self.folder / USERS, day), day)
        videos = _videos(_version(self.folder / VIDEOS, day), day)
        rows = (
            rows.join(users, on="user_id", how="left", maintain_order="left")
            .join(videos, on="item_id", how="left", maintain_order="left")
            .with_columns(
                pl.col("product").fill_null(NO_VIDEO),
                (pl.col("ds") - pl.col("upload_dt")).dt.total_days().cast(pl.Float32).alias("age_days"),
                pl.col("item_id").alias("video"),
                pl.col("user_id").alias("viewer"),
            )
            .drop("upload_dt")
        )
        return LogDay(rows, None, impressions_file=files)

    def look(self, day: date) -> None:
        """As `read`, whose files hold all days and are kept in memory.

        Raises:
            BadFile: as `read`.
        """
        self.read(day)


_Version = tuple[Path, int, int]
"""A file as it is now: path, size, time of change. Part of a cache's key, so that a replaced file is read again."""


def _version(path: Path, day: date) -> _Version:
    try:
        stat = path.stat()
    except OSError as e:
        raise BadFile("no such file", file=str(path), day=day) from e
    return path, stat.st_size, stat.st_mtime_ns


class _Fault(Exception):
    """A fault of a whole file, not yet of a day: problem, column, value."""


def _log(versions: tuple[_Version, ...], day: date) -> pl.DataFrame:
    for v in versions:
        _checked(_read_log, v, day)
    return _parse_log(versions)


def _users(version: _Version, day: date) -> pl.DataFrame:
    return _checked(_read_users, version, day)


def _videos(version: _Version, day: date) -> pl.DataFrame:
    return _checked(_read_videos, version, day)


def _checked(read: Callable[[_Version], pl.DataFrame], version: _Version, day: date) -> pl.DataFrame:
    try:
        return read(version)
    except _Fault as e:
        problem, column, received = e.args
        raise BadFile(problem, file=str(version[0]), day=day, column=column, received=received) from e


# The day's rows, the users and the videos of one folder, parsed once a process whatever the number of days.
@lru_cache(maxsize=4)
def _parse_log(versions: tuple[_Version, ...]) -> pl.DataFrame:
    raw = pl.concat(_read_log(v) for v in versions)
    key = ["user_id", "video_id", "tab", "time_ms"]
    ts = pl.from_epoch("time_ms", time_unit="ms").cast(pl.Datetime("us"))
    return raw.select(
        _stable_id(raw, key).alias("impression_id"),
        _stable_id(raw, ["user_id", "tab", "time_ms"]).alias("request_id"),
        "user_id",
        pl.col("video_id").alias("item_id"),
        ts.alias("ts"),
        pl.format("tab_{}", "tab").alias("surface"),
        # Local hour, as the log's own `hourmin` disagrees with `time_ms` between copies of one row.
        ts.dt.offset_by("8h").dt.hour().cast(pl.Int64).alias("hour"),
        pl.col("is_click").cast(pl.Int8).alias("outcome_click"),
        # Unconditional: P(long view | impression), so that a child never exceeds its parent.
        (pl.col("is_click") * pl.col("long_view")).cast(pl.Int8).alias("outcome_long_view"),
        (pl.col("is_click") * pl.col("is_profile_enter")).cast(pl.Int8).alias("outcome_profile_enter"),
        pl.col("date").min().over(key).cast(pl.String).str.to_date("%Y%m%d").alias("ds"),
    )


@lru_cache(maxsize=8)
def _read_log(version: _Version) -> pl.DataFrame:
    log = _csv(version[0], dict.fromkeys(_LOG, pl.Int64))
    for column in _LOG:
        if log[column].null_count():
            line = log[column].is_null().arg_max()
            raise _Fault(f"no value in line {(line or 0) + 2}: the row is cut short", column, None)
    for column in ("is_click", "long_view", "is_profile_enter"):
        if not log[column].is_in([0, 1]).all():
            raise _Fault("neither 0 nor 1", column, log[column].filter(~log[column].is_in([0, 1]))[0])
    return log


@lru_cache(maxsize=4)
def _read_users(version: _Version) -> pl.DataFrame:
    _whole_rows(version[0])
    users = _csv(version[0], _USER)
    numbers = [c for c, t in _USER.items() if t != pl.String and c != "user_id"]
    return users.with_columns(
        # -124 and the like stand for "unknown", as does the word.
        *(pl.when(pl.col(c) >= 0).then(c).alias(c) for c in numbers),
        pl.col("user_active_degree").replace("UNKNOWN", None),
    ).select(
        "user_id",
        pl.col("user_active_degree").alias("active_degree"),
        "is_live_streamer",
        "is_video_author",
        pl.col("follow_user_num").cast(pl.Float32).alias("follows"),
        pl.col("follow_user_num_range").alias("follows_range"),
        pl.col("fans_user_num").cast(pl.Float32).alias("fans"),
        pl.col("fans_user_num_range").alias("fans_range"),
        pl.col("friend_user_num").cast(pl.Float32).alias("friends"),
        pl.col("friend_user_num_range").alias("friends_range"),
        pl.col("register_days").cast(pl.Float32),
        pl.col("register_days_range").alias("register_range"),
        *(pl.col(c).cast(pl.Int64) for c in _ONEHOT),
    )


@lru_cache(maxsize=4)
def _read_videos(version: _Version) -> pl.DataFrame:
    _whole_rows(version[0])
    videos = _csv(version[0], _VIDEO)
    tags = pl.col("tag").str.split(",")
    return videos.select(
        pl.col("video_id").alias("item_id"),
        pl.col("upload_type").fill_null("UNKNOWN").alias("product"),
        "upload_dt",
        pl.col("author_id").alias("author"),
        # Milliseconds -> seconds.
        (pl.col("video_duration") / 1000).cast(pl.Float32).alias("duration"),
        pl.col("server_width").cast(pl.Float32),
        pl.col("server_height").cast(pl.Float32),
        (pl.col("server_width") / pl.col("server_height")).cast(pl.Float32).alias("aspect"),
        # 0 stands for "no music", in the same rows that have no type of music.
        pl.when(pl.col("music_id") > 0).then("music_id").alias("music"),
        pl.col("music_type").cast(pl.Int64),
        tags.list.first().alias("tag"),
        pl.col("tag").alias("tags"),
    )


def _csv(path: Path, types: "dict[str, type[pl.DataType]]") -> pl.DataFrame:
    """The named columns of a CSV file."""
    with path.open("rb") as f:
        header = f.readline().decode("utf-8-sig", "replace").strip().split(",")
        if not f.seek(0, 2):
            raise _Fault("holds nothing", None, None)
        f.seek(-1, 2)
        if f.read() != b"\n":
            raise _Fault("does not end with a line break: the file is cut short", None, None)
    for column in types:
        if column not in header:
            raise _Fault("no such column", column, header)
    try:
        frame = pl.read_csv(path, columns=list(types), schema_overrides=types)
    except pl.exceptions.PolarsError as e:
        raise _Fault(f"not readable as CSV: {str(e).splitlines()[0]}", None, None) from e
    if frame.is_empty():
        raise _Fault("holds no rows", None, None)
    return frame


def _whole_rows(path: Path) -> None:
    """Refuse a row with fewer or more values than the header; polars would fill it with missing values."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as f:
        rows = csv.reader(f)
        width = len(next(rows, []))
        for line, row in enumerate(rows, start=2):
            if len(row) != width:
                raise _Fault(f"line {line} has {len(row)} values, not {width}: the row is cut short", None, row[:3])


def _stable_id(frame: pl.DataFrame, columns: list[str]) -> pl.Series:
    """A positive 63-bit id of some integer columns: the same in every process and on every version of the libraries.

    Splitmix64, a column at a time. Two of the whole log's keys would meet with odds of 1e-7, and it is checked.
    """
    state = np.zeros(len(frame), dtype=np.uint64)
    for column in columns:
        state += frame[column].to_numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    ids = pl.Series((state >> np.uint64(1)).astype(np.int64))
    if ids.n_unique() != frame.select(pl.struct(columns).n_unique()).item():
        raise AssertionError(f"two keys of {columns} share an id")
    return ids
