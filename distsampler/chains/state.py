"""Chain state <-> bytes: plain tensors and ints, torch.save, read with weights_only."""

from __future__ import annotations

import io
from typing import Any

import torch

from distsampler.errors import StoreError


def dump(state: dict[str, Any]) -> bytes:
    """The bytes of a state: tensors, ints, floats, strings, and dicts and lists of these."""
    buffer = io.BytesIO()
    torch.save(_alone(state), buffer)
    return buffer.getvalue()


def _alone(value: Any) -> Any:  # noqa: ANN401 (as in dump)
    """A state whose tensors are no parts of larger ones: torch.save would write all of those."""
    match value:
        case torch.Tensor():
            return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        case dict():
            return {key: _alone(each) for key, each in value.items()}
        case list():
            return [_alone(each) for each in value]
        case _:
            return value


def parse(data: bytes) -> dict[str, Any]:
    """The state in some bytes, on the CPU.

    Raises:
        StoreError: if the bytes are torn or hold anything but plain values.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise StoreError(
            f"a chain's state must be readable, got {len(data)} bytes: {error}"
        ) from error
    if not isinstance(state, dict):
        raise StoreError(f"a chain's state must be a dict, got {type(state).__name__}")
    return state
