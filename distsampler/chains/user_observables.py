"""Users' own observables: ``fn(model, batch)`` on the probe, a tensor of one shape at every draw.

One with a third argument is handed the probe's losses there, which every draw has anyway.

They are tried at w* before a run starts: that gives their shape, and shows most mistakes at once.
A small one is a variable of the posterior; a larger one is written to the store where the chain is.
"""

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distsampler.chains.probe import Probe
from distsampler.draws import Variable, WideVariable
from distsampler.errors import ConfigError, WorkFailedError
from distsampler.models.replica import ChainSpec, Replica
from distsampler.seeding import probe_rows
from distsampler.store.large_arrays import LOSSES, MEAN_EXCESS, PROBES, WEIGHTS

SMALL = 64  # numbers of a draw that may travel with it
RESERVED = {"chain", "draw", "example", "token", LOSSES, WEIGHTS, PROBES, MEAN_EXCESS}
Function = Callable[[nn.Module, object, Tensor], object]


def try_observables(
    spec: ChainSpec, taken: Sequence[Variable | WideVariable], device: torch.device
) -> tuple[Variable | WideVariable, ...]:
    """Call the observables of a run at w*, and return what they are.

    Args:
        spec: the recipe, whose model is left as it is.
        taken: what else a draw holds.
        device: where they are called.

    Raises:
        ConfigError: if one raises, returns no finite tensor, changes the model, or has a name that
            is taken.
    """
    if not spec.config.observables:
        return ()
    names = RESERVED.union(*((each.name, *each.dims) for each in taken))
    replica = Replica(spec, device)
    probe = _probe_batch(replica, spec), Probe(replica, spec).tensor()
    return tuple(_variable(name, f, names, replica, probe) for name, f in _functions(spec))


def dims_of(name: str, count: int) -> tuple[str, ...]:
    """Return the names of a variable's own dimensions, as ArviZ names them."""
    return tuple(f"{name}_dim_{i}" for i in range(count))


class UserObservables:
    """Measures the user's observables along one chain."""

    def __init__(self, spec: ChainSpec, replica: Replica, chain: int) -> None:
        self._replica, self._chain, self._thin = replica, chain, spec.config.thin
        self._functions = tuple(_functions(spec))
        self._shapes = {each.name: each.shape for each in spec.observed}
        self._batch = _probe_batch(replica, spec) if self._functions else None

    def measure(self, step: int, losses: Tensor) -> dict[str, NDArray[np.floating]]:
        """Return their values at the replica's present weights, where the probe has these losses.

        Raises:
            WorkFailedError: if one raises, or returns another shape than at w*.
        """
        return {name: self._value(name, f, step, losses) for name, f in self._functions}

    def _value(
        self, name: str, function: Function, step: int, losses: Tensor
    ) -> NDArray[np.floating]:
        where = f"observable {name!r} of chain {self._chain} at draw {step // self._thin}"
        try:
            value = self._replica.evaluate(
                lambda model, batch: function(model, batch, losses.clone()),
                self._batch,
                self._chain,
                step,
            )
        except torch.OutOfMemoryError:
            raise  # the place's fault, not the chain's
        except Exception as error:  # the user's code: anything can come
            raise WorkFailedError(
                f"{where} raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
            ) from None
        shape = self._shapes[name]
        if not isinstance(value, Tensor) or value.shape != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise WorkFailedError(
                f"{where} must have the shape that it has at w*, {shape}: got {got}"
            )
        return _numbers(value)


def _variable(
    name: str,
    function: Function,
    taken: set[str],
    replica: Replica,
    probe: tuple[object, Tensor],
) -> Variable | WideVariable:
    """What one observable is."""
    if not name.isidentifier():
        raise ConfigError(f"observables: a name must be an identifier, got {name!r}")
    if name in taken:
        raise ConfigError(
            f"observables: {name!r} is taken by what every draw holds: give it another name"
        )
    value = _value_at_anchor(name, function, replica, *probe)
    meaning, dims = f"{name}, an observable of the user's", dims_of(name, value.ndim)
    if math.prod(value.shape) <= SMALL:
        return Variable(name, "posterior", meaning, dims, value.shape)
    return WideVariable(name, meaning, dims, value.shape)


def _value_at_anchor(
    name: str, function: Function, replica: Replica, batch: object, losses: Tensor
) -> NDArray[np.floating]:
    """The value at w*, checked."""
    what = f"observables.{name}: {getattr(function, '__qualname__', function)}(model, batch)"
    before = [flat.detach().clone() for flat in replica.flats]
    try:
        with torch.no_grad():
            value = replica.evaluate(
                lambda model, batch: function(model, batch, losses.clone()), batch, 0, 0
            )
    except Exception as error:  # the user's code: anything can come
        raise ConfigError(
            f"{what} must work on the probe, but it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.is_complex():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{what} must return a tensor of real numbers, got {got}")
    if any(flat.grad is not None and bool(flat.grad.any()) for flat in replica.flats):
        raise ConfigError(f"{what} must leave no gradient: use torch.autograd.grad, not backward")
    if not all(map(torch.equal, before, replica.flats)):
        raise ConfigError(f"{what} must leave the model as it is, but it changed its weights")
    numbers = _numbers(value)
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        place = tuple(int(i) for i in bad[0])
        got = f"got {numbers[place]} at {place}, of shape {numbers.shape}"
        raise ConfigError(f"{what} must be finite at w*: {got}")
    return numbers


@np.errstate(over="ignore")  # then it is not finite, which is reported
def _numbers(value: Tensor) -> NDArray[np.floating]:
    """The values as they are stored."""
    dtype = np.float64 if value.numel() <= SMALL else np.float32
    return value.detach().double().cpu().numpy().astype(dtype)


def _functions(spec: ChainSpec) -> Iterator[tuple[str, Function]]:
    for name, each in spec.config.observables.items():
        if each.function is None:
            raise ConfigError(f"observables.{name}: {each.name!r} was not imported")
        yield name, _with_losses(each.function)


def _with_losses(function: Callable[..., object]) -> Function:
    """The function as one of model, batch and losses, whether it takes these or not."""
    if _takes_losses(function):
        return function

    @functools.wraps(function)
    def without(model: nn.Module, batch: object, _: Tensor) -> object:
        return function(model, batch)

    return without


def _takes_losses(function: Callable[..., object]) -> bool:
    """Whether a function has a third argument, without a default unless it is called losses."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C
        return False
    positional = [
        each
        for each in parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    third = positional[2] if len(positional) > 2 else None
    return third is not None and (third.default is third.empty or third.name == "losses")


def _probe_batch(replica: Replica, spec: ChainSpec) -> object:
    """The probe's examples as one batch, whatever the loss returns."""
    return replica.batch(probe_rows(spec.config.seed, len(spec.rows), spec.config.probe))
