"""The file: its sections and the marks around them."""

import re
from collections.abc import Mapping
from pathlib import Path

from mtmd_assets.faults import UsageError

TITLE = "# Results"
HEAD = f"""{TITLE}

Sections of a platform: contenders and ablations, by `make results PLATFORM=…`, and the search of each model, by `make tune`.
Every number was in the tables of the home that it was run in or in its trainings' records; a section that a run has nothing
new for is left as an earlier one wrote it.
"""


def require_results(path: Path) -> None:
    """Refuse to write results where something else is.

    Raises:
        UsageError: the document is a folder, or holds what `write_sections` has not written.
    """
    if not path.exists():
        return
    try:
        first, *rest = path.read_text().strip().split("\n") if path.is_file() else ["a folder"]
    except UnicodeDecodeError:
        first, rest = "no text", []
    if first and (first != TITLE or (rest and not _sections("\n".join(rest)))):
        raise UsageError(f"--document {path}: something else is there, which would be lost: {first[:60]!r}")


def write_sections(path: Path, found: Mapping[str, str]) -> None:
    """Put sections, by their names, in their places in the document."""
    kept = _sections(path.read_text() if path.exists() else HEAD)
    for name, text in found.items():
        kept[name] = f"<!-- {name} -->\n{text}\n<!-- end of {name} -->\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([HEAD, *(kept[n] for n in sorted(kept))]))


def _sections(text: str) -> dict[str, str]:
    """Name -> a document's section, with the marks around it."""
    marked = re.finditer(r"<!-- ([\w ]+) -->\n.*?<!-- end of \1 -->\n?", text, re.DOTALL)
    return {m[1]: m[0] for m in marked}
