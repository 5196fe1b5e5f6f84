"""What is known before the first draw: the run's facts, and what was measured at w*.

They are arrays of the group ``constant_data``, written once. Where the probe's losses are, which
are written last, the anchor pass is whole.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning

from distsampler.draws import AtAnchor
from distsampler.facts import Facts, Posterior
from distsampler.store.files import damaged
from distsampler.store.manifest import Manifest
from distsampler.store.zarr_files import codecs, missing_in

GROUP = "constant_data"
DIMS: dict[str, tuple[str, ...]] = {
    "probe_losses": ("probe",),
    "init_losses": ("example",),
    "gradient_variance": ("parameter",),
    "shard_gradients": ("shard", "parameter"),
}
HOP_BIASES = ("hop_bias", "hop_bias_on_all_data")  # relative, of the LLC


class Constants:
    """The constants of a run.

    Args:
        root: the zarr group of the run.
    """

    def __init__(self, root: zarr.Group) -> None:
        self._root = root

    def record(self, facts: Facts, at_anchor: AtAnchor) -> None:
        """Write all constants, once."""
        values = {
            **facts.numbers(),
            "init_loss": at_anchor.init_loss,
            "probe_init_loss": at_anchor.probe_init_loss,
            "init_losses": at_anchor.losses,
            "gradient_variance": at_anchor.gradient_variance,
            "shard_gradients": at_anchor.shard_gradients,
            **dict(zip(HOP_BIASES, at_anchor.hop_bias or (None, None), strict=True)),
            "probe_losses": at_anchor.probe_losses,
        }
        group = self._root.require_group(GROUP)
        for name, value in values.items():
            if value is None:
                continue
            data = np.asarray(value)
            group.create_array(
                name,
                data=data if data.dtype.kind == "f" else data.astype(np.float64),
                fill_value=np.nan,
                dimension_names=DIMS.get(name, ()),
                overwrite=True,
                **codecs(),
            )

    def clear(self) -> None:
        """Remove all constants."""
        if GROUP in self._root:
            del self._root[GROUP]
        self._root.create_group(GROUP)

    def numbers(self) -> dict[str, float]:
        """Return the recorded numbers by name: nbeta, n, init_loss, localization ...

        Raises:
            StoreError: if one is damaged.
        """
        return {n: float(self._values(a)) for n, a in self._arrays().items() if a.ndim == 0}

    def array(self, name: str) -> NDArray[Any] | None:
        """Return one array of the anchor pass; None where there is none.

        Raises:
            StoreError: if it is damaged.
        """
        arrays = self._arrays()
        return self._values(arrays[name]) if name in arrays else None

    def facts(self, manifest: Manifest) -> Facts | None:
        """Return what was known before the first draw; None while it is not recorded.

        Args:
            manifest: manifest of the run, which has the sampler's law and options.

        Raises:
            StoreError: if it is damaged.
        """
        numbers, options = self.numbers(), manifest.config.sampler.options
        if not {"nbeta", "n"} <= set(numbers):
            return None
        decay = float(options.get("weight_decay", 0.0))
        return Facts(
            int(numbers["n"]),
            Posterior(numbers["nbeta"], numbers.get("localization", 0.0), decay),
            numbers.get("lr"),
            manifest.law,
        )

    def at_anchor(self) -> AtAnchor | None:
        """Return what the anchor pass measured; None before it has ended.

        Raises:
            StoreError: if it is damaged.
        """
        probe = self.array("probe_losses")
        if probe is None:
            return None
        numbers = self.numbers()
        lacking = {"init_loss", "probe_init_loss", "nbeta", "n"}.difference(numbers)
        if lacking:
            raise damaged(f"{self._root.store}/{GROUP}", f"it lacks {sorted(lacking)}")
        own, law = HOP_BIASES
        return AtAnchor(
            losses=self.array("init_losses"),
            init_loss=numbers["init_loss"],
            probe_init_loss=numbers["probe_init_loss"],
            probe_losses=probe,
            gradient_variance=self.array("gradient_variance"),
            shard_gradients=self.array("shard_gradients"),
            hop_bias=(numbers[own], numbers[law]) if {own, law} <= set(numbers) else None,
        )

    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        """The arrays by name; zarr only warns of one whose description is lost."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ZarrUserWarning)
                return dict(self._root.require_group(GROUP).arrays())
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
        return values
