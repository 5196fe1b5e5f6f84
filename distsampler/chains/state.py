"""The state of a chain as bytes: tensors and plain values, read without running any code."""

import io
from typing import Any

import torch

from distsampler.errors import StoreError


def dump(state: dict[str, Any]) -> bytes:
    """Return the bytes of a state: tensors, numbers, strings, and dicts and lists of these."""
    buffer = io.BytesIO()
    torch.save(_compact(state), buffer)
    return buffer.getvalue()


def _compact(value: Any) -> Any:  # noqa: ANN401 (as in dump)
    """A state whose tensors share no larger memory, all of which torch.save would write."""
    match value:
        case torch.Tensor():
            return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        case dict():
            return {key: _compact(each) for key, each in value.items()}
        case list():
            return [_compact(each) for each in value]
        case _:
            return value


def parse(data: bytes) -> dict[str, Any]:
    """Return the state in some bytes, on the CPU.

    Raises:
        StoreError: if the bytes are incomplete or contain anything but plain values.
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
