"""What torch computes with: captured where a run is asked for, the same wherever its chains run.

A process has settings that a number depends on and no function takes as an argument: the default
dtype, how exact a float32 product is, which kernels may be used. Those of the process that called
``sample`` travel with the recipe. What holds around a call only (``no_grad``, ``inference_mode``,
``autocast``) does not: chains need gradients, and ``precision`` says where autocast is used.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:  # it imports this file
    from distsampler.models.replica import ChainSpec

P = ParamSpec("P")
T = TypeVar("T")
# Flags of torch.backends that change bits, as torch sets them; not every version has each.
BACKENDS: dict[str, str | bool] = {
    "fp32_precision": "none",
    "cuda.matmul.fp32_precision": "none",
    "cudnn.fp32_precision": "none",
    "cudnn.conv.fp32_precision": "tf32",
    "cudnn.rnn.fp32_precision": "tf32",
    "mkldnn.fp32_precision": "none",
    "mkldnn.matmul.fp32_precision": "none",
    "mkldnn.conv.fp32_precision": "none",
    "mkldnn.rnn.fp32_precision": "none",
    "cuda.matmul.allow_fp16_reduced_precision_reduction": True,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": True,
    "cudnn.enabled": True,
    "cudnn.benchmark": False,
    "cudnn.deterministic": False,
}
ATTENTION = ("flash", "mem_efficient", "math", "cudnn")  # kernels, each of which may be off
AUTOCAST = ("cpu", "cuda")  # types of devices


@dataclass(frozen=True)
class ProcessSettings:
    """The settings of torch in a process; the defaults are torch's own."""

    dtype: torch.dtype = torch.float32  # the default dtype
    device: str = "cpu"  # type of the default device
    matmul: str = "highest"  # the precision of float32 products
    backends: tuple[tuple[str, str | bool], ...] = ()  # flags that are not as in BACKENDS
    no_attention: tuple[str, ...] = ()  # kernels of ATTENTION that are switched off

    @classmethod
    def here(cls) -> ProcessSettings:
        """Return the settings of this process, and of this thread."""
        values = {name: _backend(name) for name in BACKENDS}
        return cls(
            torch.get_default_dtype(),
            torch.get_default_device().type,
            torch.get_float32_matmul_precision(),
            tuple((n, v) for n, v in values.items() if v not in (None, BACKENDS[n])),
            tuple(k for k in ATTENTION if not getattr(torch.backends.cuda, f"{k}_sdp_enabled")()),
        )

    def __str__(self) -> str:
        """Return what is not as torch sets it; empty: all is."""
        torchs = ProcessSettings()
        named = {
            "default dtype": (self.dtype, torchs.dtype),
            "default device": (self.device, torchs.device),
            "float32 matmul precision": (self.matmul, torchs.matmul),
            **{name: (value, BACKENDS[name]) for name, value in self.backends},
            **{f"{kernel} attention": ("off", "on") for kernel in self.no_attention},
        }
        return ", ".join(f"{name} {here}" for name, (here, usual) in named.items() if here != usual)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with these settings, and restore this process's own afterwards.

        Modes that hold around a call only are switched off: gradients are recorded. The default
        device is not set: it is the user's code alone that reads it, see ``on_device``.
        """
        before = ProcessSettings.here()
        with contextlib.ExitStack() as stack:
            stack.enter_context(plain_modes())
            self._set(before)
            try:
                yield
            finally:
                before._set(self)

    def _set(self, now: ProcessSettings) -> None:
        """Set what is different now."""
        if self.dtype != now.dtype:
            torch.set_default_dtype(self.dtype)
        if self.matmul != now.matmul:  # it sets flags of the backends too
            torch.set_float32_matmul_precision(self.matmul)
        if self.backends != now.backends or self.matmul != now.matmul:
            for name, value in {**BACKENDS, **dict(self.backends)}.items():
                if _backend(name) not in (None, value):
                    setattr(*_owner(name), value)
        for kernel in ATTENTION if self.no_attention != now.no_attention else ():
            enable = getattr(torch.backends.cuda, f"enable_{kernel}_sdp")
            enable(kernel not in self.no_attention)


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """Record gradients, without autocast and default device, whatever holds around the call."""
    on = [kind for kind in AUTOCAST if torch.is_autocast_enabled(kind)]
    usual = torch.get_default_device().type == "cpu"
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        contextlib.nullcontext() if usual else torch.device("cpu"),
    ):
        for kind in on:
            torch.set_autocast_enabled(kind, False)
        try:
            yield
        finally:
            for kind in on:
                torch.set_autocast_enabled(kind, True)


def on_device(function: Callable[P, T], device: str) -> Callable[P, T]:
    """Return a function of the user's, called with its process's default device."""
    if device == ProcessSettings.device:
        return function

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.device(device):
            return function(*args, **kwargs)

    return called


@contextlib.contextmanager
def numerics(spec: ChainSpec) -> Iterator[None]:
    """Set all of torch that a chain's bits depend on, and restore it afterwards.

    These are the settings of the process that the recipe is from, and the config's threads and
    determinism.
    """
    threads = torch.get_num_threads()
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_num_threads(spec.config.threads)
    # use_deterministic_algorithms would say the same, and import the whole compiler: two seconds
    torch.set_deterministic_debug_mode("error" if spec.config.deterministic else "default")
    memory.fill_uninitialized_memory = False  # it costs time and finds no bug here
    try:
        with spec.settings.applied():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill


def _owner(name: str) -> tuple[Any, str]:
    """The object of torch.backends that has a flag, and the flag's own name."""
    path, _, flag = name.rpartition(".")
    return (operator.attrgetter(path)(torch.backends) if path else torch.backends), flag


def _backend(name: str) -> str | bool | None:
    """The value of a flag; None: this version of torch does not have it."""
    value: str | bool | None = getattr(*_owner(name), None)
    return value
