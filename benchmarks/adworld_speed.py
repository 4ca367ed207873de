"""How fast adworld makes a day, beside the time polars takes to write the same frames to Parquet.

python benchmarks/adworld_speed.py --rows 1000000
"""

import argparse
import resource
import tempfile
import time
from datetime import date
from pathlib import Path

from mtmd_assets.platform_file import shipped_platform
from mtmd_assets.sources.adworld import Adworld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--ads", type=int, default=4_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    shipped = shipped_platform("adworld")
    size = {"rows_per_day": args.rows, "users": args.users, "ads": args.ads}
    source = Adworld(shipped.model_copy(update={"source": shipped.source.model_copy(update=size)}))
    source.read(date(2026, 1, 1))  # warm: threads, allocator

    print(f"{'':>4} {'make s':>8} {'rows/s':>10} {'write s':>8} {'write/make':>10}")
    for repeat in range(args.repeats):
        began = time.perf_counter()
        day = source.read(date(2026, 1, 2 + repeat))
        made = time.perf_counter() - began
        assert day.scores is not None
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            day.impressions.write_parquet(Path(folder) / "impressions.parquet", compression="zstd")
            day.scores.write_parquet(Path(folder) / "scores.parquet", compression="zstd")
            wrote = time.perf_counter() - began
        print(f"{repeat + 1:>4} {made:>8.2f} {args.rows / made:>10,.0f} {wrote:>8.2f} {wrote / made:>10.2f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
