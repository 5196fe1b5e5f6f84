"""What is known before the first draw: the run's facts, and what was measured at w*.

They are arrays of the group ``constant_data``, written once. The list of them, which is written
last, says that the anchor pass is whole.
"""

import warnings
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning

from distsampler.draws import AtAnchor
from distsampler.errors import StoreError
from distsampler.facts import Facts
from distsampler.store.files import damaged
from distsampler.store.integrity import SEAL
from distsampler.store.zarr_files import array_of, codecs, missing_in

GROUP, RECORDED = "constant_data", "recorded"  # the attribute that lists them
DIMS: dict[str, tuple[str, ...]] = {
    "probe_losses": ("probe",),
    "init_losses": ("example",),
    "gradient_variance": ("parameter",),
    "shard_gradients": ("shard", "parameter"),
}
HOP_BIASES = ("hop_bias", "hop_bias_on_all_data")  # relative, of the LLC
MEASURED = {  # at w*: array -> field of AtAnchor; the probe's losses come last
    "init_loss": "init_loss",
    "probe_init_loss": "probe_init_loss",
    "init_losses": "losses",
    "gradient_variance": "gradient_variance",
    "shard_gradients": "shard_gradients",
    "probe_losses": "probe_losses",
}


class Constants:
    """The constants of a run, in its zarr group; one that is damaged is a StoreError when read."""

    def __init__(self, root: zarr.Group) -> None:
        self._root = root
        self._numbers: dict[str, float] = {}  # as they were read

    def record(self, facts: Facts, at_anchor: AtAnchor) -> None:
        """Write all constants, once."""
        values: dict[str, Any] = {
            **facts.numbers(),
            **dict(zip(HOP_BIASES, at_anchor.hop_bias or (None, None), strict=True)),
            **{name: getattr(at_anchor, field) for name, field in MEASURED.items()},
        }
        group = self._root.require_group(GROUP)
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            data = np.asarray(value)
            group.create_array(
                name,
                data=data if data.dtype.kind == "f" else data.astype(np.float64),
                fill_value=np.nan,
                dimension_names=DIMS.get(name, ()),
                overwrite=True,
                **codecs(),
            )
        group.attrs[RECORDED] = list(values)
        self._numbers = {}

    def clear(self) -> None:
        """Remove all constants."""
        if GROUP in self._root:
            del self._root[GROUP]
        self._root.create_group(GROUP)
        self._numbers = {}

    def numbers(self) -> dict[str, float]:
        """Return the recorded numbers by name: nbeta, n, init_loss, localization ..."""
        if not self._numbers:
            arrays = {name: array for name, array in self._arrays().items() if array.ndim == 0}
            self._numbers = {name: float(self._values(array)) for name, array in arrays.items()}
        return dict(self._numbers)

    def array(self, name: str) -> NDArray[Any] | None:
        """Return one array of the anchor pass; None where there is none."""
        arrays = self._arrays()
        return self._values(arrays[name]) if name in arrays else None

    def at_anchor(self) -> AtAnchor | None:
        """Return what the anchor pass measured; None before it has ended."""
        arrays = self._arrays()
        if "probe_losses" not in arrays:
            return None
        lacking = {"init_loss", "probe_init_loss", "nbeta", "n"}.difference(arrays)
        if lacking:
            raise damaged(f"{self._root.store}/{GROUP}", f"it lacks {sorted(lacking)}")
        stored: dict[str, Any] = {name: self._values(array) for name, array in arrays.items()}
        stored |= {name: float(value) for name, value in stored.items() if value.ndim == 0}
        biases = tuple(stored[name] for name in HOP_BIASES if name in stored)
        fields: dict[str, Any] = {field: stored.get(name) for name, field in MEASURED.items()}
        return AtAnchor(**fields, hop_bias=biases if len(biases) == 2 else None)

    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        """The arrays by name; none before all are written."""
        try:
            group = self._root[GROUP]
            assert isinstance(group, zarr.Group)
            if SEAL not in self._root.attrs:
                return _unlisted(group)
            names: Any = group.attrs.get(RECORDED, [])
            return {str(name): array_of(self._root, f"{GROUP}/{name}") for name in names}
        except StoreError:
            raise
        except Exception as error:  # zarr raises what it likes
            raise damaged(f"{self._root.store}/{GROUP}", error) from error

    def _values(self, array: zarr.Array[Any]) -> NDArray[Any]:
        where = f"{array.store}/{array.path}"
        try:
            values = np.asarray(array[...])
        except Exception as error:  # zarr and its codecs raise what they like
            raise damaged(where, error) from error
        if missing_in(values).any():
            raise damaged(where, "it lacks a value")
        if not values.ndim and not np.isfinite(values):
            raise damaged(where, f"it must be finite, got {values}")
        return values


def _unlisted(group: zarr.Group) -> dict[str, zarr.Array[Any]]:
    """The arrays of a run that did not list them; zarr only warns of one that lacks zarr.json."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZarrUserWarning)
        return dict(group.arrays())
