"""Tables in Markdown: of asset metadata, of documents and of what a command prints."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers are right-aligned and shortened."""
    numeric = [bool(rows) and all(isinstance(r[i], int | float | None) for r in rows) for i in range(len(header))]
    ruler = "|" + "|".join("--:" if n else "---" for n in numeric) + "|"
    top, *lines = ("| " + " | ".join(map(_cell, row)) + " |" for row in (header, *rows))
    return "\n".join([top, ruler, *lines])


def _cell(value: object) -> str:
    match value:
        case bool():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
    return str(value)
