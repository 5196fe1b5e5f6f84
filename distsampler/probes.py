"""Named probes: sets of a user's examples whose losses a run measures, and which decide nothing."""

import re
from collections.abc import Mapping
from typing import Literal

from distsampler.errors import ConfigError
from distsampler.frozen import Config, Count, NamedField

MOST_ROWS = 10_000  # examples that are measured at every draw without having been asked for


class ProbeConfig(Config):
    """How a named probe is measured: one of ``RunConfig.probes``, by its name.

    Args:
        batch_size: most examples that go through the model at once; None: of a DataLoader its own,
            else the run's microbatch or batch size.
        every: the losses are measured at every k-th draw, counted from the chain's start.
        dtype: how they are stored. "float16" takes half of the space, and keeps three digits; a
            loss beyond 65504 is stored as 65504. The mean that ``Run.llc(probe=...)`` reads is
            taken before, in float64.
        loss: ``loss(model, batch)``: one value per example, shape (batch,), or per token, shape
            (batch, tokens), with NaN where a token does not count; in YAML "module:callable" or
            "path/to/file.py:callable". None: the run's.
        rows: so many examples of the data, chosen at random, the same in every run; None: all.

    Example:
        >>> ProbeConfig(every=10, rows=256).dtype
        'float32'
    """

    batch_size: Count | None = None
    every: Count = 1
    dtype: Literal["float32", "float16"] = "float32"
    loss: NamedField | None = None
    rows: Count | None = None

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return a sentence for an option that a probe does not have."""
        if name in ("data", "data_kwargs"):
            return f"{name} belongs to sample(..., probes={{name: data}}), or to a YAML file"
        return super().unknown(name)


def check_names(probes: object) -> object:
    """Check that the names of probes can name arrays and fields, and return what was given."""
    for name in probes if isinstance(probes, Mapping) else ():
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w-]*", name)):
            raise ConfigError(
                f"the name of a probe must be letters, digits, _ and -, got {name!r}: it names an "
                "array in the store"
            )
    return probes


def by_name(probes: object) -> Mapping[str, object]:
    """Return the data of named probes, by name; None: there are none.

    Raises:
        ConfigError: if they are no mapping.
    """
    if probes is None:
        return {}
    if isinstance(probes, Mapping):
        return probes
    raise ConfigError(
        f"probes must be data by name, got {type(probes).__name__}: give {{'code': data}}"
    )
