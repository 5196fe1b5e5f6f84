"""Users' own observables: ``fn(model, batch)`` on the probe, a tensor of one shape at every draw.

They are tried at w* before a run starts: that gives their shape, and tells most mistakes at once.
A small one is a variable of the posterior; a larger one is written by the chain's owner.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distsampler.draws import Variable, WideVariable
from distsampler.errors import ConfigError, WorkFailedError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.seeding import probe_rows
from distsampler.store.large_arrays import LOSSES, WEIGHTS

SMALL = 64  # numbers of a draw that may travel with it
RESERVED = {"chain", "draw", "example", LOSSES, WEIGHTS}
Function = Callable[[nn.Module, object], object]


def found(
    spec: ChainSpec, taken: Sequence[Variable | WideVariable]
) -> tuple[Variable | WideVariable, ...]:
    """What the observables of a run give at w*.

    Args:
        spec: the recipe, whose model is left as it is.
        taken: what else a draw holds.

    Raises:
        ConfigError: if one raises, gives no finite tensor, changes the model, or has a name that is
            taken.
    """
    if not spec.config.observables:
        return ()
    names = RESERVED.union(*((each.name, *each.dims) for each in taken))
    replica = Replica(spec, next(spec.model.parameters()).device)
    batch = _probe(replica, spec)
    return tuple(_found(name, f, names, replica, batch) for name, f in _functions(spec))


def dims_of(name: str, count: int) -> tuple[str, ...]:
    """Names of a variable's own dimensions, as ArviZ names them."""
    return tuple(f"{name}_dim_{i}" for i in range(count))


class OwnObservables:
    """Measures the user's observables along one chain.

    Args:
        spec: the recipe.
        replica: the chain's model.
        chain: index.
    """

    def __init__(self, spec: ChainSpec, replica: Replica, chain: int) -> None:
        self._replica, self._chain, self._thin = replica, chain, spec.config.thin
        self._functions = tuple(_functions(spec))
        self._shapes = {each.name: each.shape for each in spec.observed}
        self._batch = _probe(replica, spec) if self._functions else None

    def measure(self, step: int) -> dict[str, NDArray[np.floating]]:
        """Their values at the replica's present weights.

        Raises:
            WorkFailedError: if one raises, or gives another shape than at w*.
        """
        return {name: self._value(name, f, step) for name, f in self._functions}

    def _value(self, name: str, function: Function, step: int) -> NDArray[np.floating]:
        where = f"observable {name!r} of chain {self._chain} at draw {step // self._thin}"
        try:
            given = self._replica.evaluate(function, self._batch, self._chain, step)
        except torch.OutOfMemoryError:
            raise  # the place's fault, not the chain's
        except Exception as error:  # the user's code: anything can come
            raise WorkFailedError(
                f"{where} raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from None
        wanted = self._shapes[name]
        if not isinstance(given, Tensor) or given.shape != wanted:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise WorkFailedError(
                f"{where} must have the shape that it has at w*, {wanted}: got {got}"
            )
        return _numbers(given)


def _found(
    name: str, function: Function, names: set[str], replica: Replica, batch: object
) -> Variable | WideVariable:
    """What one observable gives."""
    _check_name(name, names)
    value = _tried(name, function, replica, batch)
    meaning, dims = f"{name}, an observable of the user's", dims_of(name, value.ndim)
    if math.prod(value.shape) <= SMALL:
        return Variable(name, "posterior", meaning, dims, value.shape)
    return WideVariable(name, meaning, dims, value.shape)


def _check_name(name: str, taken: set[str]) -> None:
    if not name.isidentifier():
        raise ConfigError(f"observables: a name must be an identifier, got {name!r}")
    if name in taken:
        raise ConfigError(
            f"observables: {name!r} is taken by what every draw holds: give it another name"
        )


def _tried(name: str, function: Function, replica: Replica, batch: object) -> NDArray[np.floating]:
    """The value at w*, where it is what it must be."""
    what = f"observables.{name}: {getattr(function, '__qualname__', function)}(model, batch)"
    before = [flat.detach().clone() for flat in replica.flats]
    try:
        with torch.no_grad():
            given = replica.evaluate(function, batch, 0, 0)
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"{what} must work on the probe, but it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(given, Tensor) or given.is_complex():
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ConfigError(f"{what} must return a tensor of real numbers, got {got}")
    gradients = (flat.grad for flat in replica.flats)
    if any(g is not None and bool(g.any()) for g in gradients):
        raise ConfigError(f"{what} must leave no gradient: use torch.autograd.grad, not backward")
    if not all(map(torch.equal, before, replica.flats)):
        raise ConfigError(f"{what} must leave the model as it is, but it changed its weights")
    value = _numbers(given)
    if not np.isfinite(value).all():
        raise ConfigError(f"{what} must be finite at w*: {_example(value)}")
    return value


def _example(value: NDArray[np.floating]) -> str:
    """Where a value that is not finite lies."""
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
    return f"got {value[place]} at {place}, of shape {value.shape}"


@np.errstate(over="ignore")  # then it is not finite, and that is told
def _numbers(given: Tensor) -> NDArray[np.floating]:
    """The values as they are stored."""
    kind = np.float64 if given.numel() <= SMALL else np.float32
    return given.detach().double().cpu().numpy().astype(kind)


def _functions(spec: ChainSpec) -> Iterator[tuple[str, Function]]:
    for name, each in spec.config.observables.items():
        if each.function is None:
            raise ConfigError(f"observables.{name}: {each.name!r} was not imported")
        yield name, each.function


def _probe(replica: Replica, spec: ChainSpec) -> object:
    """The probe's examples as one batch, whatever the loss gives."""
    rows = probe_rows(spec.config.seed, len(spec.rows), spec.config.probe)
    return replica.batch(rows)
