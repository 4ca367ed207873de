"""The home folder: which platforms are registered in it, and where each keeps its things.

`$MTMD_HOME` (default `.mtmd/` in the checkout) holds a folder a platform, `<platform>/{platform.yaml, lake, models,
mtmd.duckdb}`, and Dagster's own folder `dagster/`.
"""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mtmd_assets.faults import PlatformError, UsageError, not_writable
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import (
    SHIPPED,
    load_platform,
    parse_platform,
    parse_yaml,
    read_text,
    shipped_file,
    shipped_platform,
)
from mtmd_assets.sources import Source, open_source
from mtmd_assets.tables import tables, views
from mtmd_assets.warehouse import Warehouse

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
"""Where the programs of this environment are."""

ALWAYS = "adworld"
"""The platform that every home has without registration."""
LOG_FOLDERS = ("impressions", "heavyweight_scores", "data")
"""Keys of a source that name one."""


@dataclass(frozen=True)
class Site:
    """One registered platform with its folder."""

    platform: Platform
    folder: Path

    @cached_property
    def warehouse(self) -> Warehouse:
        """Its lake and views."""
        return Warehouse(self.folder, tables(self.platform), views(self.platform))

    @cached_property
    def source(self) -> Source:
        """Where its logs come from."""
        return open_source(self.platform)

    @property
    def models(self) -> Path:
        """Where its trained models are kept, a folder a version."""
        return self.folder / "models"

    @property
    def experiments(self) -> Path:
        """Where experiments keep theirs: a folder a training, and beside it what it predicted (`training_record`)."""
        return self.folder / "experiments"


class Home:
    """A home folder.

    Args:
        root: the folder; `$MTMD_HOME`, or `.mtmd` in the checkout, when left out.
    """

    def __init__(self, root: Path | None = None):
        self.root = (root or Path(os.environ.get("MTMD_HOME") or CHECKOUT / ".mtmd")).absolute()

    def sites(self) -> list[Site]:
        """Every registered platform, adworld first.

        Raises:
            PlatformError: if a registered platform file does not hold together.
        """
        return [self.site(n) for n in (ALWAYS, *sorted(self.names() - {ALWAYS}))]

    def names(self) -> set[str]:
        """The platforms that have a folder with their file in this home."""
        return {p.parent.name for p in self.root.glob("*/platform.yaml")}

    def file(self, name: str) -> Path:
        """Where a platform's file is, or would be, in this home."""
        return self.root / name / "platform.yaml"

    def replaced(self, name: str) -> Path:
        """Where the file is kept that a platform had before it was last registered with another."""
        return self.file(name).with_suffix(".yaml.before")

    def site(self, name: str) -> Site:
        """One platform of the home; adworld as shipped until it is registered with changes.

        Raises:
            UsageError: if it is not registered.
            PlatformError: if its file does not hold together.
        """
        file = self.file(name)
        if not file.is_file():
            if name != ALWAYS:
                raise UsageError(f"{self.root}: no platform {name!r} is registered (mtmd register)")
            file = shipped_file(name)
        return Site(load_platform(file), self.root / name)

    def register(self, file_or_name: str, data: str | None = None) -> Site:
        """Copy a platform file (or a shipped platform, by name) into the home; arguments as of `read`.

        Raises:
            UsageError, PlatformError: as `read`; then nothing is registered.
        """
        platform, text = self.read(file_or_name, data)
        file = self.file(platform.name)
        folder = file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / f"{file.name}.{os.getpid()}"
            draft.write_text(text, encoding="utf-8")
            if file.is_file() and file.read_bytes() != draft.read_bytes():
                shutil.copy(file, self.replaced(platform.name))
            os.replace(draft, file)
        except OSError as e:
            raise not_writable(folder, e) from e
        return Site(platform, folder)

    def read(self, file_or_name: str, data: str | None = None) -> tuple[Platform, str]:
        """The platform that `register` would register, and the text of its file.

        Args:
            file_or_name: a YAML file, `adworld` or `kuairand`, or the name of a platform that is registered.
            data: the folder of its logs, for a source that takes one. Local folders that the file itself names are where
                the file lies, if they are not absolute.

        Raises:
            UsageError: if there is no such file or platform.
            PlatformError: if the file is refused.
        """
        places = [shipped_file(file_or_name), Path(file_or_name)]
        if file_or_name in self.names():
            places.append(self.file(file_or_name))
        file = next((f for f in places if f.is_file()), None)
        if file is None:
            known = ", ".join(sorted({p.stem for p in SHIPPED.glob("*.yaml")} | self.names()))
            raise UsageError(f"{file_or_name}: neither a file nor a platform that is shipped or registered ({known})")
        text = read_text(file)
        content = parse_yaml(text, str(file))
        source = content.get("source")
        if data is not None and not isinstance(source, dict):
            raise PlatformError(f"{file}: source: expected keys and values (received {source!r})")
        placed = _placed(source, file, data) if isinstance(source, dict) else source
        if placed != source:
            text = yaml.safe_dump({**content, "source": placed}, sort_keys=False, allow_unicode=True)
        platform = parse_platform(text, str(file))
        _refuse_disguise(platform, file)
        return platform, text

    def prepare_dagster(self) -> Path:
        """Dagster's folder in this home, with the settings of the checkout's `dagster.yaml`; set as `DAGSTER_HOME`.

        Raises:
            PermissionError: if the home cannot be written, naming it and `MTMD_HOME`.
        """
        folder = self.root / "dagster"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe.{os.getpid()}"
            probe.touch()
            probe.unlink()
            if not (folder / "dagster.yaml").exists():
                shutil.copy(CHECKOUT / "dagster.yaml", folder)
        except OSError as e:
            raise not_writable(folder, e) from e
        os.environ["DAGSTER_HOME"] = str(folder)
        return folder


def _placed(source: Mapping[str, Any], file: Path, data: str | None) -> dict[str, Any]:
    """The source with folders that hold wherever it is read from: `data`, and those that the file names from where it lies."""
    named = {k: v for k, v in source.items() if k in LOG_FOLDERS and isinstance(v, str) and v and "://" not in v}
    folders = {k: str(file.absolute().parent / v) for k, v in named.items()}
    return {**source, **folders, **({} if data is None else {"data": str(Path(data).absolute())})}


def differs_from_shipped(platform: Platform) -> bool:
    """Whether there is a shipped platform of that name that says something else, its source apart."""
    shipped = _shipped(platform.name)
    return shipped is not None and shipped.model_dump(exclude={"source"}) != platform.model_dump(exclude={"source"})


def _shipped(name: str) -> Platform | None:
    """The shipped platform of that name, if there is one."""
    return shipped_platform(name) if shipped_file(name).is_file() else None


def _refuse_disguise(platform: Platform, file: Path) -> None:
    """Logs of one's own under a shipped platform's name would take its place, and its days stay under them."""
    shipped = _shipped(platform.name)
    if shipped is not None and shipped.source.kind != platform.source.kind:
        raise PlatformError(
            f"{file}: name: that is a shipped platform, of another kind of source: choose another name "
            f"(received {platform.name!r})"
        )
