"""Reads a platform file: YAML into a checked `Platform`, or an error that names the file, the key and the value received."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from mtmd_assets.faults import PlatformError
from mtmd_assets.platform import Platform
from mtmd_assets.platform_checks import check
from mtmd_assets.platform_parts import Fault

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SHIPPED = Path(__file__).parent / "platforms"


class _Twice(yaml.YAMLError):
    """A key that is given twice."""

    def __init__(self, key: str, lines: tuple[int, int], received: str):
        super().__init__(f"{key}: given twice, in line {lines[0]} and in line {lines[1]} (received {received})")


class _Loader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key given twice is refused, and a date that is none stays text."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Where keys and values have been read and nothing was yet thrown away."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                received = repr(value.value) if isinstance(value, yaml.ScalarNode) else f"a {value.id}"
                raise _Twice(key.value, (lines[key.value], line), received)
            lines[key.value] = line
        return node

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> object:
        """The 31st of February is refused later, by its key."""
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError:
            return node.value


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_timestamp)


def read_text(path: Path) -> str:
    """A platform file's text.

    Raises:
        PlatformError: if it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise PlatformError(f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise PlatformError(f"{path}: no text in UTF-8 (received {e.object[e.start]:#04x} at byte {e.start})") from e


def parse_yaml(text: str, file: str) -> dict[str, Any]:
    """The keys and values in `text`; `file` is named in errors.

    Raises:
        PlatformError: if it is not YAML, no mapping, or a key is given twice.
    """
    try:
        content = yaml.load(text, _Loader)
    except _Twice as e:
        raise PlatformError(f"{file}: {e}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise PlatformError(f"{file}: not YAML: {e}") from e
    if not isinstance(content, dict):
        raise PlatformError(f"{file}: expected keys and values (received {_shown(content)})")
    return content


def parse_platform(text: str, file: str) -> Platform:
    """The platform in `text`; `file` is named in errors.

    Raises:
        PlatformError: naming the file, the key and the value received.
    """
    content = parse_yaml(text, file)
    try:
        platform = Platform.model_validate(content)
        check(platform)
    except Fault as e:
        raise PlatformError(f"{file}: {_refused(content, (), e)}") from e
    except ValidationError as e:
        problems = []
        errors = e.errors()
        for error in errors:
            # Pydantic counts only the items that are right.
            within = (other["loc"][: len(error["loc"])] == error["loc"] for other in errors if other is not error)
            if error["type"] == "too_short" and any(within):
                continue
            fault = error.get("ctx", {}).get("error")
            if not isinstance(fault, Fault):
                fault = in_words(error)
            problems.append(f"{file}: {_refused(content, error['loc'], fault)}")
        raise PlatformError("\n".join(problems)) from e
    return platform


_IN_WORDS = {
    "extra_forbidden": "no such key",
    "missing": "needed",
    "union_tag_not_found": "needed",
    "union_tag_invalid": "expected one of {expected_tags}",
    "literal_error": "expected {expected}",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "too_short": "expected at least {min_length} of them",
    "too_long": "expected at most {max_length} of them",
    "string_too_short": "expected text that is not empty",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a number",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
    "model_attributes_type": "expected keys and values",
}
"""Pydantic's types of error."""


def in_words(error: "ErrorDetails") -> Fault:
    """One of pydantic's errors as a person would say it; the fault's key is relative to the error's place."""
    kind, context = error["type"], error.get("ctx", {})
    known = _IN_WORDS.get(kind)
    said = known.format(**context) if known else error["msg"].removeprefix("Value error, ")
    said = re.sub(r"datetime\.date\((\d+), (\d+), (\d+)\)", lambda m: str(date(*map(int, m.groups()))), said)
    key = "kind" if kind.startswith("union_tag") else ""
    received = context["tag"] if kind == "union_tag_invalid" else None if said == "needed" else error["input"]
    return Fault(key, said, received)


def _key(loc: Sequence[int | str]) -> str:
    """Where in the file; pydantic names the kind of a source as if it were a key."""
    if len(loc) > 1 and loc[0] == "source":
        loc = ("source", *loc[2:])
    return ".".join(str(part) for part in loc if part != "[key]")


def _refused(content: Mapping[str, Any], loc: tuple[int | str, ...], fault: Fault) -> str:
    """A fault below `loc` in words; which feature or task it is of is said by name too, for who does not count them."""
    of = ""
    # A key of the file may have dots itself, so that only the fault's own is taken apart.
    match [part for part in (*loc, *fault.key.split(".")) if part != ""]:
        case ["features" | "tasks" as kind, position, _, *_]:
            name = content[kind][int(position)].get("name")
            of = f"; {kind.removesuffix('s')} {name}" if isinstance(name, str) else ""
    key = ".".join(k for k in (_key(loc), fault.key) if k)
    return f"{key}: {fault} (received {_shown(fault.received)}{of})"


def _shown(value: object) -> str:
    """A value as a person wrote it, shortened."""
    if isinstance(value, date):
        return str(value)
    text = repr(list(value) if isinstance(value, tuple | set | frozenset) else value)
    return text if len(text) <= 200 else text[:199] + "…"


def load_platform(path: Path) -> Platform:
    """Read one platform file.

    Raises:
        PlatformError: if it cannot be read or does not hold together.
    """
    return parse_platform(read_text(path), str(path))


def shipped_platform(name: str) -> Platform:
    """A platform that comes with the project: `adworld` or `kuairand`."""
    return load_platform(shipped_file(name))


def shipped_file(name: str) -> Path:
    """Where the file of a platform of that name lies, or would lie, in this project."""
    return SHIPPED / f"{name}.yaml"
