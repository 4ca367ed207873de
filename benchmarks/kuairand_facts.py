"""The shares in docs/kuairand.md, counted in the log as it was downloaded.

.venv/bin/python -m benchmarks.kuairand_facts path/to/KuaiRand-Pure
"""

import sys
from pathlib import Path

import polars as pl

from mtmd_assets.markdown import markdown_table
from mtmd_assets.platform_file import shipped_platform

IMPRESSION = ("user_id", "video_id", "tab", "time_ms")


def facts(rows: pl.DataFrame) -> dict[str, str]:
    """What to say of the rows of `log_standard_*.csv`, by what it is."""
    platform = shipped_platform("kuairand")
    in_scope = pl.format("tab_{}", "tab").is_in(platform.surfaces)
    noted, happened = pl.col("date").cast(pl.String).str.to_date("%Y%m%d"), pl.from_epoch("time_ms", time_unit="ms")
    late = noted == happened.dt.offset_by("8h").dt.date() + pl.duration(days=1)
    dates = rows.group_by(IMPRESSION).agg(pl.len().alias("rows"), pl.col("date").n_unique().alias("dates"))
    counted = rows.select(
        rows=pl.len(),
        other_tabs=(~in_scope).mean(),
        late=late.mean(),
        long_view=(pl.col("is_click") == 0).filter(pl.col("long_view") == 1).mean(),
        profile_enter=(pl.col("is_click") == 0).filter(pl.col("is_profile_enter") == 1).mean(),
    ).row(0, named=True)
    return {
        "rows": f"{counted['rows']:,}",
        "in other tabs": f"{counted['other_tabs']:.2%}",
        "dated a day after their time_ms, as local time": f"{counted['late']:.2%}",
        "long views outside a click": f"{counted['long_view']:.2%}",
        "profile enters outside a click": f"{counted['profile_enter']:.2%}",
        "rows that repeat an impression": f"{(dates['rows'] - 1).sum() / rows.height:.2%}",
        "impressions under two dates": f"{(dates['dates'] > 1).sum():,}",
    }


def main() -> None:
    platform = shipped_platform("kuairand")
    assert platform.end is not None
    first, last = (int(day.strftime("%Y%m%d")) for day in (platform.start, platform.end))
    logs = sorted((Path(sys.argv[1]) / "data").glob("log_standard_*.csv"))
    rows = pl.concat(pl.read_csv(file) for file in logs).filter(pl.col("date").is_between(first, last))
    print(f"{platform.start} to {platform.end}\n")
    print(markdown_table(["what", "share"], [[what, share] for what, share in facts(rows).items()]))


if __name__ == "__main__":
    main()
