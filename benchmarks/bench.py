"""Every benchmark in one table, each figure beside a limit or a peer measured in the same run.

make bench                     # sizes for a laptop, a few minutes
make bench ONLY=feed,step      # some of them
make bench LARGE=1             # the sizes that the goals speak of, an hour

Prints the machine, then a table; writes it to `bench.json` in the home folder, subject by subject: the figures of
subjects that were not measured this time stay. What each figure is: docs/benchmarks.md.
"""

import argparse
import importlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import Figure, table
from mtmd_assets.home import Home

SUBJECTS: dict[str, dict[str, Any]] = {
    "lake": {"growth": 10, "days": 30, "backfill_rows": 1_000_000},
    "feed": {"rows": 2_000_000},
    "memory": {"rows_a_day": 200_000, "block_rows": 262_144},
    "step": {"steps": 20, "repetitions": 5},
    "peers": {"rows": 102_400},
    "serving": {},
}
"""The modules, and what `--large` calls their `figures` with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"subjects with commas between, of {','.join(SUBJECTS)}")
    parser.add_argument("--large", action="store_true", help="the sizes that the goals speak of")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal does not hold")
    options = parser.parse_args()
    subjects = options.only.split(",") if options.only else list(SUBJECTS)
    unknown = set(subjects) - set(SUBJECTS)
    if unknown:
        parser.error(f"--only takes {','.join(SUBJECTS)}, got {','.join(sorted(unknown))}")

    on = machine()
    print(on)
    found: list[Figure] = []
    for subject in subjects:
        start = time.perf_counter()
        figures = importlib.import_module(f"benchmarks.{subject}").figures(**SUBJECTS[subject] if options.large else {})
        print(f"\n{subject} ({time.perf_counter() - start:.0f} s)\n{table(figures)}", flush=True)
        found += figures
        path = write(subject, figures, on, Home().root / "bench.json")
    missed = sum(f.holds is False for f in found)
    print(f"\n{sum(f.holds is True for f in found)} goals hold, {missed} do not\n{path}")
    if options.strict and missed:
        raise SystemExit(1)


def machine() -> str:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines()] if info.exists() else []
    about = {name.strip(): value.strip() for name, _, value in lines}
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in about.get("flags", "").split()]
    processor = about.get("model name") or platform.processor()
    kind = f"family {about.get('cpu family', '?')} model {about.get('model', '?')}: {' '.join(units)}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "pyarrow", "polars", "duckdb"))
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return "\n".join(
        [
            f"{processor} ({kind}), {os.cpu_count()} cores, {memory:.0f} GiB, {gpu}",
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}",
            f"{torch.get_num_threads()} torch threads, {load} when it began",
        ]
    )


def write(subject: str, figures: Sequence[Figure], on: str, path: Path) -> Path:
    """Put a subject's figures into a file, a list of objects, in place of what it had; others' stay.

    Each has the fields of `Figure`, its subject, the machine, and the second it was written; a value that was not
    measured is null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    about = {"subject": subject, "machine": on, "at": f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"}
    new = [{**asdict(f), "value": None if math.isnan(f.value) else f.value, **about} for f in figures]
    entries = [entry for entry in earlier if entry["subject"] != subject] + new
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
