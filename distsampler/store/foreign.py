"""What is read may come from anybody: it is parsed within bounds, and shown as plain text."""

import json
from typing import Any

LARGEST, DEEPEST = 2**26, 64  # bytes and levels of a JSON document


def parsed(data: bytes | str) -> Any:  # noqa: ANN401 (what JSON holds)
    """Return what a JSON text holds.

    Raises:
        ValueError: if it is no JSON, or larger or deeper than anything that is written here.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data)} bytes, more than {LARGEST}")
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def printable(text: str) -> str:
    r"""Return a text as a terminal or page may show it: control characters as escapes.

    Example:
        >>> printable("red \x1b[31m")
        'red \\x1b[31m'
    """
    lines = (line if line.isprintable() else _escaped(line) for line in text.split("\n"))
    return "\n".join(lines)


def _children(value: object) -> list[Any]:
    match value:
        case dict():
            return list(value.values())
        case list():
            return value
    return []


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else _escape(c) for c in line)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
