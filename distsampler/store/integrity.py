"""What is read may come from anybody, and may be damaged: how it is parsed, checked and shown.

A JSON text is parsed within bounds, and a text is shown without control characters.

A file shows by a seal that it is what was written, of this run and in this place. A JSON document
holds a digest of itself; that of an array also covers the run's identity and the file's name. A
chunk holds both behind its values, in a frame that every zstd decoder passes over: any zarr library
reads the arrays. A seal tells damage and mistakes, not malice: anybody can make one.
"""

import hashlib
import json
import struct
from typing import Any

import google_crc32c  # which zarr's own codec of this checksum uses

from distsampler.redaction import redacted

LARGEST, DEEPEST = 2**26, 64  # bytes and levels of a JSON document
SEAL = "seal"  # key of a document's digest
SKIPPED = 0x184D2A50  # magic number of a frame that a zstd decoder passes over
CHECKSUM = struct.Struct("<I")  # that ends a chunk, as the codec crc32c has it


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
    r"""Return a text as a terminal or page may show it: no secrets, control characters as escapes.

    Example:
        >>> printable("red \x1b[31m")
        'red \\x1b[31m'
    """
    lines = (line if line.isprintable() else _escaped(line) for line in redacted(text).split("\n"))
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


def seal(document: dict[str, Any], *place: str) -> dict[str, Any]:
    """Return a document with its digest, bound to a place: texts that name it."""
    return {**document, SEAL: _digest(document, place)}


def check(document: dict[str, Any], *place: str) -> None:
    """Check that a document is what was sealed.

    Raises:
        ValueError: if not.
    """
    if document.get(SEAL) != _digest(document, place):
        raise ValueError("it is not what was written here: its digest differs")


def seal_metadata(data: bytes, identity: str, name: str) -> bytes:
    """Return a zarr.json with the run's identity and a digest among its attributes."""
    metadata = json.loads(data)
    written = {SEAL: f"{identity} {_of(metadata, identity, name)}"}
    metadata["attributes"] = metadata.get("attributes", {}) | written
    return json.dumps(metadata, indent=2).encode()


def check_metadata(data: bytes, identity: str | None, name: str) -> str:
    """Check that a zarr.json is what was written under this name, and return the run's identity.

    Args:
        data: the file.
        identity: of the run; empty: it has none, nothing is checked; None: as the file says.
        name: the file's name.

    Raises:
        ValueError: if not.
    """
    metadata = parsed(data)
    attributes = metadata.get("attributes", {}) if isinstance(metadata, dict) else None
    if not isinstance(attributes, dict):
        raise ValueError(f"{name} is not what was written here: it has no attributes")
    written = str(attributes.get(SEAL, ""))
    if identity is None:
        identity = written.partition(" ")[0]
    if identity and written != f"{identity} {_of(metadata, identity, name)}":
        raise ValueError(f"{name} is not what was written here: its digest differs")
    return identity


def seal_chunk(data: bytes, identity: str, name: str) -> bytes:
    """Return an encoded chunk, which ends in its checksum, with what says where it belongs."""
    body = data[: -CHECKSUM.size] + _frame(identity, name)
    return body + CHECKSUM.pack(google_crc32c.value(body))


def check_chunk(data: bytes, identity: str, name: str) -> None:
    """Check that a chunk was written under this name; its checksum is the codec's to check.

    Raises:
        ValueError: if not.
    """
    if not data[: -CHECKSUM.size].endswith(_frame(identity, name)):
        raise ValueError(f"{name} is not what was written here: it belongs elsewhere, or is torn")


def _frame(identity: str, name: str) -> bytes:
    label = f"{identity} {name}".encode()
    return struct.pack("<II", SKIPPED, len(label)) + label


def _of(metadata: dict[str, Any], identity: str, name: str) -> str:
    """The digest of a zarr.json, but for what seals it."""
    attributes = {k: v for k, v in metadata.get("attributes", {}).items() if k != SEAL}
    return _digest({**metadata, "attributes": attributes}, (identity, name))


def _digest(document: dict[str, Any], place: tuple[str, ...]) -> str:
    content = {key: value for key, value in document.items() if key != SEAL}
    text = json.dumps([*place, content], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
