"""The real excerpt, where it is there, and a small made-up folder of the same layout."""

import csv
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mtmd_assets.home import CHECKOUT
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import shipped_platform

EXCERPT = CHECKOUT.parent / "shared" / "data" / "KuaiRand-Pure"

needs_excerpt = pytest.mark.skipif(not EXCERPT.is_dir(), reason=f"the KuaiRand-Pure excerpt is not at {EXCERPT}")

LOG = [
    "user_id",
    "video_id",
    "date",
    "hourmin",
    "time_ms",
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "duration_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_profile_enter",
    "is_rand",
    "tab",
]
USER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{n}" for n in range(18))
).split(",")
VIDEO = [
    "video_id",
    "author_id",
    "video_type",
    "upload_dt",
    "upload_type",
    "visible_status",
    "video_duration",
    "server_width",
    "server_height",
    "music_id",
    "music_type",
    "tag",
]


def platform_of(folder: Path) -> Platform:
    """The shipped platform, reading `folder`."""
    shipped = shipped_platform("kuairand")
    return shipped.model_copy(update={"source": shipped.source.model_copy(update={"data": str(folder)})})


def log_row(
    user: int, video: int, day: str, *, at: datetime, click: int = 0, long_view: int = 0, profile: int = 0, tab: int = 1
) -> list[object]:
    """A row of the log in the order of its columns; `day` like 20220425, `at` in UTC."""
    ms = int(at.replace(tzinfo=UTC).timestamp() * 1000)
    return [user, video, day, 0, ms, click, 0, 0, 0, 0, 0, long_view, 5000, 9000, 0, 0, profile, 0, tab]


def write_folder(folder: Path, log: list[list[object]] | None = None, users: int = 20, videos: int = 12) -> Path:
    """Write the three files; returns `folder`. Video n has upload type n modulo 5: the four in scope and PictureSet."""
    rng = random.Random(0)
    kinds = ["LongImport", "Web", "ShortImport", "Kmovie", "PictureSet"]
    if log is None:
        log = [
            log_row(
                u, (u + n) % videos, f"202204{d}", at=datetime(2022, 4, d, 3 + n, u), click=rng.random() < 0.5, tab=n
            )
            for d in (25, 26)
            for u in range(users)
            for n in range(3)
        ]
        log = [[int(v) if isinstance(v, bool) else v for v in row] for row in log]
    onehot = [0, 1, 2, 3, "", *range(7), *[""] * 6]
    user_rows = [
        [u, "full_active", 0, -124, 1, 5, "(0,10]", 0, "0", 3, "[1,5)", 100, "91-180", *onehot] for u in range(users)
    ]
    video_rows = [
        [v, 100 + v % 3, "NORMAL", "2022-04-10", kinds[v % 5], 0.0, "" if v == 0 else 9000.0, 720.0, 1280.0, 0, "", tag]
        for v, tag in zip(range(videos), ["39", "39,68", ""] * videos, strict=False)
    ]
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, header, rows in (
        ("log_standard_4_22_to_5_08_pure.csv", LOG, log),
        ("user_features_pure.csv", USER, user_rows),
        ("video_features_basic_pure.csv", VIDEO, video_rows),
    ):
        with (data / name).open("w", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([header, *rows])
    return folder
