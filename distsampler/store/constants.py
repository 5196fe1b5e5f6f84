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

from distsampler.draws import AtAnchor, ProbeAtAnchor
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
PROBE_DIMS: dict[str, tuple[str, ...]] = {  # field of ProbeAtAnchor, which is an array a probe
    "rows": ("example",),
    "losses": ("example", "token"),
    "tokens": ("token",),
    "token_ids": ("example", "token"),
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


OF = "_of_"  # between a field and the name of the probe that it is of


def probe_array(probe: str, field: str) -> str:
    """Return the name of the array of a named probe."""
    return f"{field}{OF}{probe}"


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
            **{
                probe_array(name, field): getattr(probe, field)
                for name, probe in at_anchor.named.items()
                for field in PROBE_DIMS
            },
        }
        group = self._root.require_group(GROUP)
        values = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            data = np.asarray(value)
            kept = data.dtype.kind == "f" or (data.ndim and data.dtype.kind == "i")
            data = data if kept else data.astype(np.float64)
            group.create_array(
                name,
                data=data,
                fill_value=np.nan if data.dtype.kind == "f" else -1,
                dimension_names=_dims(name)[: data.ndim],
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

    def __contains__(self, name: str) -> bool:
        """Return whether there is such an array."""
        return name in self._arrays()

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
        fields["hop_bias"] = biases if len(biases) == 2 else None
        names = [name.partition(OF)[2] for name in arrays if name.startswith(f"losses{OF}")]
        fields["named"] = {name: _probe(name, stored) for name in names}
        return AtAnchor(**fields)

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


def _probe(name: str, stored: dict[str, Any]) -> ProbeAtAnchor:
    fields: dict[str, Any] = {each: stored.get(probe_array(name, each)) for each in PROBE_DIMS}
    return ProbeAtAnchor(**fields)


def _dims(name: str) -> tuple[str, ...]:
    """The dimensions of an array; those of a probe are its own."""
    field, _, probe = name.partition(OF)
    if probe and field in PROBE_DIMS:
        return tuple(probe_array(probe, dim) for dim in PROBE_DIMS[field])
    return DIMS.get(name, ())


def _unlisted(group: zarr.Group) -> dict[str, zarr.Array[Any]]:
    """The arrays of a run that did not list them; zarr only warns of one that lacks zarr.json."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZarrUserWarning)
        return dict(group.arrays())
