"""Fingerprint: what the bits of a trace depend on, so that a run is continued only as it began."""

import functools
import hashlib
import inspect
from importlib.metadata import version

import torch
from torch import nn

from distsampler.config import RunConfig
from distsampler.data.trees import as_bytes
from distsampler.errors import StoreError
from distsampler.models.loss import ByToken
from distsampler.models.replica import ChainSpec
from distsampler.models.restriction import digest_of_components
from distsampler.models.sampler import freeze_after
from distsampler.redaction import redacted
from distsampler.schedule import Schedule
from distsampler.store.files import Files
from distsampler.store.manifest import Manifest
from distsampler.store.trace import Trace

# Fields of RunConfig that change no bit of a draw; a run may also be asked for more draws.
FREE = ("placement", "commit_seconds", "max_seconds", "min_chains", "gate", "fsync", "max_state_mb")


ATTENTION = "attention"  # which a store may lack that was written before it was noted


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers rest on."""
    names = ("distsampler", "torch", "numpy", "zarr", "xarray", "arviz", "ray")
    return {name: version(name) for name in names}


def fingerprint(spec: ChainSpec) -> dict[str, str]:
    """Return what the draws depend on beside the config; a place that is up adds its device."""
    settings = {"settings of torch": str(spec.settings)} if str(spec.settings) else {}
    components = digest_of_components(spec.model, spec.config)
    kinds = _attention(spec.model)
    return {
        **settings,
        **({ATTENTION: kinds} if kinds else {}),
        **({"components": components} if components else {}),
        "distsampler": versions()["distsampler"],
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "dtype": ", ".join(sorted({str(p.dtype) for p in spec.model.parameters()})),
        "data": f"{len(spec.rows)} examples, {spec.rows.digest()}",
        **({"tokens": f"{spec.loss.tokens}"} if isinstance(spec.loss, ByToken) else {}),
        "model": _model_digest(spec.model),
        "loss": _function_digest(spec.loss),
        **{
            f"observables.{name}": _function_digest(each.function)
            for name, each in spec.config.observables.items()
        },
        **{
            f"probes.{each.name}.{part}": digest
            for each in spec.probes
            for part, digest in {
                "data": f"{len(each.rows)} examples, {each.rows.digest()}",
                "loss": _function_digest(each.loss),
            }.items()
        },
    }


def check_same(files: Files, manifest: Manifest) -> Trace:
    """Check that the run in a store is the one that is asked for, and return it."""
    trace = Trace(files)
    stored = trace.manifest
    then, now = redacted(stored.fingerprint), redacted(manifest.fingerprint)
    keys = [key for key in now if key != ATTENTION or key in then]
    keys += {"settings of torch"} & (then.keys() - now)  # a place adds others
    pairs = {key: (then.get(key), now.get(key)) for key in keys}
    old, new = (redacted(each.config.model_dump()) for each in (stored, manifest))
    if _long_enough(manifest.config, stored):
        old |= {name: new[name] for name in ("draws", "max_draws")}
    if manifest.config.burn_in == stored.config.burn_in == "auto":  # it follows the gate rounds
        steps = [str(freeze_after(config)) for config in (stored.config, manifest.config)]
        pairs["sampler.freeze_after"] = (steps[0], steps[1])
    pairs |= {f"config.{key}": (old[key], new[key]) for key in new if key not in FREE}
    lines = [f"  {key}: stored {a!r}, now {b!r}" for key, (a, b) in pairs.items() if a != b]
    if lines:
        raise StoreError(
            f"the run in {files} can only be continued as it was started; different are\n"
            + "\n".join(lines)
        )
    return trace


def _long_enough(config: RunConfig, stored: Manifest) -> bool:
    """Return whether a config's budget holds every draw that a run has, or was to have."""
    made = Schedule.of(stored.config).budget
    if stored.config.draws == "auto" and stored.kept is not None:
        made = (stored.burn_in or 0) + stored.kept  # it has ended before its budget
    return Schedule.of(config).budget >= made


def _attention(model: nn.Module) -> str:
    """Return how a model of transformers computes attention; empty: it does not say."""
    configs = (getattr(module, "config", None) for module in model.modules())
    kinds = {getattr(config, "_attn_implementation", None) for config in configs}
    return ", ".join(sorted(kind for kind in kinds if isinstance(kind, str)))


def _model_digest(model: nn.Module) -> str:
    """Return a digest of the structure, and of names, shapes and bits of parameters and buffers."""
    state = hashlib.blake2b(repr(model).encode(), digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(as_bytes(tensor.cpu()).numpy().data)
    return state.hexdigest()


def _function_digest(function: object) -> str:
    """Return the name of a loss or observable and a digest of its source, not of what it calls."""
    function = function.per_token if isinstance(function, ByToken) else function
    function = function.func if isinstance(function, functools.partial) else function
    if not inspect.isfunction(function):
        function = type(function)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    digest = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    return f"{getattr(function, '__qualname__', function)}, {digest}"
