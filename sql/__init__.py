"""One file a derived table, view or macro, each readable on its own."""

from pathlib import Path

FOLDER = Path(__file__).parent


def text(name: str) -> str:
    """The statement in `sql/<name>.sql`."""
    return (FOLDER / f"{name}.sql").read_text()


def quoted(value: object) -> str:
    """An SQL text literal, for places that take no parameter (a view's file, the target of COPY)."""
    return "'" + str(value).replace("'", "''") + "'"
