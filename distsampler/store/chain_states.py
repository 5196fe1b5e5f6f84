"""State files of chains: the newest of each are kept, and the name of each holds its digest."""

import hashlib
import re

from distsampler.draws import StateFile
from distsampler.errors import StoreError
from distsampler.store.files import Files

FOLDER, KEPT, LARGEST = "checkpoints", 2, 2**44  # bytes of a state
_NAME = re.compile(r"draw-(\d{8})-([0-9a-f]{32})\.pt")


def write(files: Files, chain: int, draw: int, state: bytes) -> StateFile:
    """Write the state of a chain at a draw."""
    name = f"{_folder(chain)}/draw-{draw:08d}-{_digest(state)}.pt"
    files.write(name, state)
    return StateFile(name, len(state))


def read(files: Files, name: str) -> bytes:
    """Return the state in a file.

    Raises:
        StoreError: if it is gone, torn or changed.
    """
    match = _NAME.search(name)
    try:
        state = files.read(name, LARGEST)
    except OSError as error:
        raise StoreError(f"the state {files.path(name)} cannot be read: {error}") from error
    if match is None or _digest(state) != match[2]:
        raise StoreError(f"the state {files.path(name)} is not what was written: digests differ")
    return state


def newest(files: Files, chain: int, upto: int) -> tuple[int, StateFile | None]:
    """Return the last whole state of a chain, up to a draw, and its draw; None at the start."""
    for draw, name in reversed(_listed(files, chain)):
        if draw <= upto:
            try:
                return draw, StateFile(name, len(read(files, name)))
            except StoreError:
                continue
    return 0, None


def forget(files: Files, chain: int, count: int, boundary: int) -> None:
    """Remove the states that no resume will need.

    Of those up to ``count`` draws, which are committed, the newest two stay; and the last up to
    ``boundary``, where the run may be cut.
    """
    old = [(draw, name) for draw, name in _listed(files, chain) if draw <= count]
    keep = {name for _, name in old[-KEPT:]}
    keep.update([name for draw, name in old if draw <= boundary][-1:])
    for _, name in old:
        if name not in keep:
            files.remove(name)


def remove_old(files: Files, counts: tuple[int, ...]) -> None:
    """Remove the states of draws that were never committed."""
    for chain, count in enumerate(counts):
        for draw, name in _listed(files, chain):
            if draw > count:
                files.remove(name)


def _listed(files: Files, chain: int) -> list[tuple[int, str]]:
    """Draw and name of every state file of a chain, oldest first."""
    matches = ((_NAME.search(name), name) for name in files.names(_folder(chain)))
    return sorted((int(match[1]), name) for match, name in matches if match)


def _folder(chain: int) -> str:
    return f"{FOLDER}/chain-{chain:04d}"


def _digest(state: bytes) -> str:
    return hashlib.blake2b(state, digest_size=16).hexdigest()
