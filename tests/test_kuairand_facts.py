"""The shares of docs/kuairand.md, in a log of a few rows."""

import polars as pl

from benchmarks.kuairand_facts import facts


def test_each_share_is_of_its_own_rows():
    midnight = 1_651_334_400_000  # 2022-04-30 16:00 UTC, 2022-05-01 in Beijing
    log = pl.DataFrame(
        {
            "user_id": [1, 1, 2, 3],
            "video_id": [5, 5, 5, 5],
            "tab": [0, 0, 1, 3],
            "time_ms": [midnight - 1, midnight - 1, midnight, midnight],
            "date": [20220430, 20220501, 20220501, 20220501],
            "is_click": [1, 1, 0, 0],
            "long_view": [1, 1, 1, 0],
            "is_profile_enter": [0, 0, 0, 1],
        }
    )
    assert facts(log) == {
        "rows": "4",
        "in other tabs": "25.00%",
        "dated a day after their time_ms, as local time": "25.00%",
        "long views outside a click": "33.33%",
        "profile enters outside a click": "100.00%",
        "rows that repeat an impression": "25.00%",
        "impressions under two dates": "1",
    }
