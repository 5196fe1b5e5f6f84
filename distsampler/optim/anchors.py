"""What a sampler remembers of its parameters: the anchor w*, and fp32 masters of half precision."""

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from distsampler.optim.layout import is_half, working_dtype


def of(param: Tensor, anchor: Tensor | None = None) -> dict[str, Tensor]:
    """Return a parameter's anchor, taken now unless given, and its master if it needs one."""
    dtype, present = working_dtype(param), param.detach()
    if anchor is None or anchor.data_ptr() == param.data_ptr():
        anchor = present.to(dtype, copy=True)
    state = {"anchor": anchor.detach().to(param.device, dtype)}
    if is_half(param):
        state["master"] = present.to(dtype, copy=True)
    return state


def restore(optimizer: Optimizer, saved: StateDict, anchors: dict[Tensor, Tensor]) -> None:
    """Undo what torch's loading does to state that is more precise than its parameter.

    Args:
        optimizer: Has just loaded ``saved``.
        saved: The state dict as it was loaded.
        anchors: Of each parameter before the loading; kept where the saved one is equal or
            missing, so that chains that share them continue to.
    """
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(keys, params, strict=True):
        state = optimizer.state[p]
        for name, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                state[name] = value.to(p.device, copy=True)
        present = anchors[p]
        if "anchor" not in state or torch.equal(state["anchor"], present):
            state["anchor"] = present
        for name, value in of(p, present).items():
            state.setdefault(name, value)
