"""Adworld with other seeds of its simulator, for studies of what holds beyond one world."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mtmd_assets.home import Home, Site


def world(home: Home, seed: int, base: Path, change: Callable[[dict[str, Any]], None]) -> Site:
    """Register the platform `world<seed>`.

    Args:
        home: where it and its tables lie; a world that is there already keeps its tables.
        seed: of the simulator.
        base: the platform file whose seed is changed.
        change: what else is, of the file's content.
    """
    content = yaml.safe_load(base.read_text())
    content["name"] = f"world{seed}"
    content["source"]["seed"] = seed
    change(content)
    home.root.mkdir(parents=True, exist_ok=True)
    file = home.root / f"world{seed}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return home.register(str(file))


def options(description: str | None, worlds: int, folder: str) -> argparse.Namespace:
    """How many `worlds` and in which `folder`, from the command line.

    Args:
        description: of the study.
        worlds: unless given.
        folder: unless given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=worlds)
    parser.add_argument("--folder", type=Path, default=Path(folder), help="a home of its own")
    return parser.parse_args()
