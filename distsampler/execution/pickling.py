"""Whether a recipe can be sent to other processes: model, data and functions must be picklable."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType

from distsampler.errors import ConfigError
from distsampler.models.replica import ChainSpec

Dumps = Callable[[object], object]


def send_by_value(spec: ChainSpec, register: Callable[[ModuleType], None]) -> None:
    """Send user code that no actor can import, such as a config's file.py, with the recipe."""
    parts = [spec.loss, *_others(spec).values(), spec.rows, *spec.model.modules()]
    send_values([*parts, spec.sampler], register)


def send_values(parts: Iterable[object], register: Callable[[ModuleType], None]) -> None:
    """Do the same for functions, classes and objects, and for what objects of ours hold."""
    inner = [each for part in parts for each in _contents(part)]
    names = {getattr(part, "__module__", None) or type(part).__module__ for part in inner}
    modules = list(sys.modules.items())  # to ask one may import others, as may another thread
    loaded = {name for name, module in modules if _from_a_file(module)}
    for name in {name.partition(".")[0] for name in names | loaded} - {"__main__", "builtins"}:
        if name in sys.modules and not _importable(sys.modules[name]):
            register(sys.modules[name])


def _from_a_file(module: ModuleType) -> bool:
    """Whether a module is one file of Python, and no part of a package."""
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    return isinstance(loader, SourceFileLoader) and "." not in module.__name__


def _importable(module: ModuleType) -> bool:
    """Whether importing the module's name gives this module, here and where the folders are."""
    finders = (each for each in sys.meta_path if hasattr(each, "find_spec"))
    specs = (finder.find_spec(module.__name__, None) for finder in finders)
    spec = next((spec for spec in specs if spec is not None), None)
    file = getattr(module, "__file__", None)
    return spec is not None and (file is None or not spec.has_location or spec.origin == file)


def _contents(part: object) -> Iterator[object]:
    """An object, and what it holds if it is one of ours, such as data around a user's data set."""
    if isinstance(part, functools.partial):
        part = part.func
    yield part
    if type(part).__module__.startswith("distsampler."):
        for each in vars(part).values():
            for inner in each if isinstance(each, tuple) else [each]:
                yield from _contents(inner)


def check_picklable(spec: ChainSpec, dumps: Dumps) -> None:
    """Check that model, data and loss can be sent.

    Args:
        spec: the recipe.
        dumps: pickles an object.

    Raises:
        ConfigError: names the attribute that cannot be pickled.
    """
    parts = {"model": spec.model, "loss": spec.loss, "data": spec.rows, **_others(spec)}
    for name, value in parts.items():
        error = _pickle_error(value, dumps)
        if error is not None:
            raise ConfigError(
                f"the {name} must be picklable, to be sent to the actors: "
                f"{_culprit(value, name, dumps)} is not ({error}); remove it, or use "
                "pool=SerialPool()"
            )


def _others(spec: ChainSpec) -> dict[str, object]:
    """The user's observables and probes, by what they are called in errors."""
    observables = spec.config.observables.items()
    return {
        **{f"observable {name}": each.function for name, each in observables},
        **{f"data of the probe {each.name}": each.rows for each in spec.probes},
        **{f"loss of the probe {each.name}": each.loss for each in spec.probes},
    }


def _culprit(value: object, path: str, dumps: Dumps) -> str:
    """The deepest attribute that cannot be pickled."""
    inner = dict(getattr(value, "__dict__", {}))
    for name, child in {**inner, **inner.pop("_modules", {})}.items():
        if name != "_modules" and _pickle_error(child, dumps) is not None:
            return _culprit(child, f"{path}.{name}", dumps)
    return f"{path} ({type(value).__name__})"


def _pickle_error(value: object, dumps: Dumps) -> str | None:
    try:
        dumps(value)
    except Exception as error:  # pickling runs the user's __reduce__: anything can come
        return f"{type(error).__name__}: {error}"
    return None
