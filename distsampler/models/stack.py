"""The loss of several chains at once, and its gradient.

What moves in each chain is a lane of one stack, (lanes, d). ``torch.func`` maps the gradient of the
loss over the lanes; the operations that result are recorded once, on the first batch, and only they
are repeated at every step: neither the model's Python nor the machinery of the map. So the loss
must do the same operations at every step, which ``sampling.packing`` checks before a run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from distsampler.data.trees import map_tensors, tensors_of, with_tensors
from distsampler.models.loss import LossFn, in_precision
from distsampler.models.replica import ChainSpec, Replica

Compute = Callable[..., Sequence[Tensor]]
aten: Any = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.expand.default)


class Lanes:
    """Stacked weights and their gradient; all begin at w*, where the base replica stays."""

    def __init__(self, base: Replica, spec: ChainSpec, count: int) -> None:
        self._base, self._spec = base, spec
        self.weights = [flat.detach().repeat(count, 1) for flat in base.flats]
        self.gradients = [torch.zeros_like(stack) for stack in self.weights]
        self._parameters = base.views(self.weights)
        self._parameter_gradients = base.views(self.gradients)
        self._compute: Compute | None = None

    def take_in(self, replica: Replica, lane: int) -> None:
        """Let a replica live in a lane."""
        replica.live_in([w[lane] for w in self.weights], [g[lane] for g in self.gradients])

    def put_to_rest(self, lane: int) -> None:
        """Put a lane back to w*, where it harms nobody."""
        for stack, flat in zip(self.weights, self._base.flats, strict=True):
            stack[lane].copy_(flat.detach())

    @torch.no_grad()
    def losses_and_gradients(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the losses at the present weights, and leave each lane's gradient of its mean.

        Rows and losses have the shape (lanes, batch); (lanes,) of a loss that returns means.
        """
        whole = self._base.batch(rows.reshape(-1))
        batch = map_tensors(lambda t: t.view(*rows.shape, *t.shape[1:]), whole)
        if self._compute is None:
            self._compute = self._recorded(batch)
        losses, *gradients = self._compute(*self._parameters, *tensors_of(batch))
        torch._foreach_copy_(self._parameter_gradients, gradients)
        return losses

    def _recorded(self, batch: object) -> Compute:
        """The operations from weights and batch to losses and gradients, of all lanes."""
        names = [name for name, p in self._base.model.named_parameters() if p.requires_grad]
        config = self._spec.config
        lossy = _Lossy(
            self._base.model, in_precision(self._spec.loss, config.precision, self._base.device)
        )

        def mean(parameters: dict[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            weights = {f"model.{name}": w for name, w in parameters.items()}
            losses = functional_call(lossy, weights, (with_tensors(batch, tensors),))
            return losses.mean(), losses

        def lane(*tensors: Tensor) -> tuple[Tensor, ...]:
            parameters = dict(zip(names, tensors, strict=False))
            gradients, losses = grad(mean, has_aux=True)(parameters, tensors[len(names) :])
            return losses, *(gradients[name] for name in names)

        graph = make_fx(vmap(lane))(*self._parameters, *tensors_of(batch))
        _simplify(graph)
        if not config.compile:
            return graph.forward
        compiled: Compute = torch.compile(graph.forward, dynamic=False)
        return compiled


class _Lossy(nn.Module):
    """A model and its loss as one module, so that other weights can be put under both."""

    def __init__(self, model: nn.Module, loss: LossFn) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: object) -> Tensor:
        """Return the losses of the batch."""
        return self._loss(self.model, batch)


def _simplify(graph: fx.GraphModule) -> None:
    """Take out what the map puts in and nobody needs: reshapes to one shape, double transposes.

    At a small model's size each costs as much as an operation that does something.
    """
    for node in graph.graph.nodes:
        same = _same_as(node)
        if same is not None:
            node.replace_all_uses_with(same)
    graph.graph.eliminate_dead_code()
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph.recompile()


def _same_as(node: fx.Node) -> fx.Node | None:
    """An earlier node with the same memory in the same layout, if there is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in RESHAPES and _layout(node) == _layout(source) is not None:
        return source
    again = node.target is aten.transpose.int and source.target is node.target
    if again and source.args[1:] == node.args[1:] and isinstance(source.args[0], fx.Node):
        return source.args[0]
    return None


def _layout(node: fx.Node) -> tuple[object, ...] | None:
    """Shape, strides and dtype of a tensor; None of a constant, of which they are not known."""
    meta = node.meta.get("tensor_meta")
    return None if meta is None else (meta.shape, meta.stride, meta.dtype)
