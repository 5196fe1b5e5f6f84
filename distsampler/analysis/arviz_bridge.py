"""What we take from ArviZ, typed, and loaded when it is first called: statistics and container.

This is the only file that imports ArviZ: it takes a second or more to load, and neither a chain's
actor nor ``distsampler --help`` needs it. The version decides the container: ``InferenceData`` in
0.23, ``xarray.DataTree`` in 1.x.
"""

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, cast

import xarray as xr

if TYPE_CHECKING:
    import arviz

InferenceData: TypeAlias = Union["arviz.InferenceData", xr.DataTree]

TAIL = (0.05, 0.95)  # the quantiles whose effective sample size is that of the tails


def load() -> ModuleType:
    """Import ArviZ, without the announcement that 0.23 warns of once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "\nArviZ is undergoing", FutureWarning)
        import arviz
    return cast(ModuleType, arviz)


def mcse(data: xr.Dataset) -> xr.Dataset:
    """Return the Monte-Carlo standard error of each variable's mean."""
    return cast(xr.Dataset, load().mcse(data, method="mean"))


def r_hat(data: xr.Dataset) -> xr.Dataset:
    """Return the rank-normalised split R-hat of each variable (Vehtari et al. 2021)."""
    return cast(xr.Dataset, load().rhat(data, method="rank"))


def split_r_hat(data: xr.Dataset) -> xr.Dataset:
    """Return the split R-hat of each variable: without ranks it takes a thirtieth of the time."""
    return cast(xr.Dataset, load().rhat(data, method="split"))


def ess(data: xr.Dataset, method: Literal["bulk", "tail"]) -> xr.Dataset:
    """Return the effective sample size of each variable: of the bulk, or the smaller tail's."""
    options = {"prob": TAIL} if method == "tail" else {}
    return cast(xr.Dataset, load().ess(data, method=method, **options))


def container(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> InferenceData:
    """Return groups as the installed ArviZ wants them: an InferenceData or a DataTree."""
    if int(load().__version__.partition(".")[0]) < 1:
        warmup = any(name.startswith("warmup_") for name in groups)
        return load().InferenceData(attrs=dict(attrs), save_warmup=warmup, **groups)
    tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    tree.attrs.update(attrs)
    return tree


def group(data: InferenceData, name: str) -> xr.Dataset:
    """Return one group of either container as a Dataset."""
    group: Any = data[name]
    return group.to_dataset() if isinstance(group, xr.DataTree) else group
