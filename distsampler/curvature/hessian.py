"""The Hessian of the mean loss and the noise of its gradient, by Lanczos quadrature.

From k steps of Lanczos on Hessian-vector products, started from a vector z of random signs, come
Ritz values theta_j and vectors y_j, and of any function f

    z^T f(H) z   = sum_j f(theta_j) (z . y_j)^2              which is tr f(H) in expectation
    z^T f(H) C z = sum_j f(theta_j) (z . y_j) (y_j . C z)    which is tr f(H) C

(Ubaru, Chen & Saad 2017; Hutchinson 1990), C being the covariance of the gradient between examples,
of which ``C z`` takes one product of the Jacobian of the losses each way. The second has the start
of the first, so one walk serves both, and where a diagonal D is subtracted from C (what the heat
correction removes) their common part cancels before it is noise. The start as the deviation of a
minibatch's gradient would need a walk of its own, and has no such cancellation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.models.replica import ChainSpec, Replica, view_like

STEPS = 12
PARTS = 16  # of the rows, where the loss gives means


class Ritz(NamedTuple):
    """What one walk of Lanczos measured: sums over it stand for traces over all directions.

    ``sum(weights f(values))`` is tr f(H), ``sum(noise f(values))`` is tr f(H) C, and
    ``sum(removed f(values))`` is tr f(H) D, in expectation over walks.
    """

    values: NDArray[np.float64]
    """Curvatures of the mean loss, rising."""
    weights: NDArray[np.float64]
    noise: NDArray[np.float64]
    """With the covariance C of the gradient between examples."""
    removed: NDArray[np.float64]
    """With the diagonal D that a heat correction takes away."""

    @property
    def largest(self) -> float:
        """The largest curvature, from below."""
        return float(self.values[-1])


class Curvature:
    """The Hessian of the mean loss over some rows, at the present weights of a replica.

    Vectors are flat, float64, over the entries of the replica's flat tensors; those that a mask
    holds still are zero. The graph of the losses lives as long as this does.

    Args:
        replica: a model and where it stands; it is not moved, and its gradients stay.
        spec: the recipe.
        rows: of the data.
        seat: chain and step whose randomness the forward pass uses, where it draws any.

    Raises:
        RuntimeError: from autograd, if an operation of the loss has no double backward.
    """

    def __init__(
        self,
        replica: Replica,
        spec: ChainSpec,
        rows: NDArray[np.int64],
        seat: tuple[int, int] = (0, 0),
    ) -> None:
        self._flats, self._parameters = replica.flats, replica.moving
        self._before = {flat.dtype: int(flat.storage_offset()) for flat in replica.flats}
        self._moves = None if replica.masks is None else torch.cat(list(replica.masks))
        self._size, self._n = 1, len(spec.rows)
        parts = [rows]
        if not spec.per_example or spec.config.mode == "train":
            parts = _parts(rows, spec)
            self._size = len(parts[0])
        with _double_backward():
            found = [
                replica.losses(replica.batch(part), *seat, exact=True).reshape(-1) for part in parts
            ]
        self._losses = found[0] if len(parts) == 1 else torch.stack([each.mean() for each in found])
        self._share = torch.full_like(self._losses, 1 / len(self._losses), requires_grad=True)
        # Weighted with variables, the losses give the Jacobian's products from the same graph.
        self._gradients = torch.autograd.grad(
            _dot([self._losses], [self._share]),
            self._parameters,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    @property
    def kind(self) -> torch.dtype:
        """Of vectors that are kept: that of the weights, at least single."""
        double = any(flat.dtype == torch.float64 for flat in self._flats)
        return torch.float64 if double else torch.float32

    @property
    def moving(self) -> int:
        """How many entries may move."""
        everything = sum(flat.numel() for flat in self._flats)
        return everything if self._moves is None else int(self._moves.sum())

    def gradient(self) -> Tensor:
        """Of the mean loss."""
        return self._flat(self._gradients)

    def times(self, v: Tensor) -> Tensor:
        """H v."""
        return self._flat(self._back(self._parameters, v))

    def noise_times(self, v: Tensor) -> Tensor:
        """C v, C the covariance of the gradient between examples that are drawn from all data.

        It is unbiased: (rows / (rows - 1)) (n - 1) / n times the covariance among the rows.
        """
        (along,) = self._back([self._share], v)
        count = len(along)
        scale = self._size / max(count - 1, 1) * (self._n - 1) / self._n
        found = torch.autograd.grad(
            _dot([self._losses], [(along - along.mean()) * scale]),
            self._parameters,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self._flat(found)

    def check(self) -> None:
        """Goes back through the whole graph of the gradient, into the ``grad`` of the parameters.

        A product with H asks for the ways to the parameters only, and passes by a function whose
        backward pass cuts them: it would be taken for one without curvature.

        Raises:
            RuntimeError: from autograd, if an operation of the loss has no double backward.
        """
        found = [g for g in self._gradients if g.requires_grad]
        if found:
            torch.autograd.backward(_dot(found, map(torch.ones_like, found)), retain_graph=True)

    def signs(self, generator: torch.Generator) -> Tensor:
        """A vector of random signs on what moves."""
        size, device = sum(flat.numel() for flat in self._flats), self._flats[0].device
        bits = torch.randint(0, 2, (size,), generator=generator, device=generator.device)
        return self._held(bits.to(device, torch.float64).mul_(2).sub_(1))

    def _back(self, inputs: Sequence[Tensor], v: Tensor) -> tuple[Tensor, ...]:
        """The gradient of (gradient . v) with respect to some inputs."""
        pairs = [
            (g, w) for g, w in zip(self._gradients, self._shaped(v), strict=True) if g.requires_grad
        ]
        if not pairs:
            return tuple(map(torch.zeros_like, inputs))
        outputs, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(
            _dot(outputs, weights),
            inputs,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def _shaped(self, v: Tensor) -> list[Tensor]:
        """A flat vector as tensors like the parameters."""
        pairs = zip(self._flats, self._split(v), strict=True)
        homes = {flat.dtype: part.to(flat.dtype) for flat, part in pairs}
        return [self._place(homes[p.dtype], p) for p in self._parameters]

    def _flat(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Tensors like the parameters as one flat vector, in their places."""
        whole = torch.zeros(
            sum(f.numel() for f in self._flats), dtype=torch.float64, device=self._flats[0].device
        )
        homes = dict(zip((f.dtype for f in self._flats), self._split(whole), strict=True))
        for p, tensor in zip(self._parameters, tensors, strict=True):
            self._place(homes[p.dtype], p).copy_(tensor.detach())
        return self._held(whole)

    def _place(self, home: Tensor, parameter: Tensor) -> Tensor:
        """The part of a flat vector that belongs to a parameter, in its shape."""
        start = int(parameter.storage_offset()) - self._before[parameter.dtype]
        return view_like(parameter, home, start)

    def _split(self, v: Tensor) -> tuple[Tensor, ...]:
        return torch.split(v, [flat.numel() for flat in self._flats])

    def _held(self, v: Tensor) -> Tensor:
        return v if self._moves is None else v.mul_(self._moves)


def measure(
    curvature: Curvature,
    generator: torch.Generator,
    steps: int = STEPS,
    removed: Tensor | None = None,
) -> Ritz:
    """One walk of Lanczos from a vector of random signs.

    Args:
        curvature: at some weights.
        generator: of the signs.
        steps: k, at most; each takes a Hessian-vector product.
        removed: the diagonal D, flat: the gradient variance that a heat correction takes away; None
            for none.

    Returns:
        Ritz values in rising order; not finite where the loss is not.
    """
    z = curvature.signs(generator)
    basis, values, vectors = _walk(curvature, z, steps)
    if not len(values):
        nothing = np.full(1, np.nan)
        return Ritz(nothing, nothing, nothing, nothing)
    start = float(z.norm()) * vectors[0]
    noise = start * (_along(basis, curvature.noise_times(z)) @ vectors)
    less = np.zeros_like(start)
    if removed is not None:
        less = start * (_along(basis, removed * z) @ vectors)
    return Ritz(values, start**2, noise, less)


def directions(
    curvature: Curvature, generator: torch.Generator, steps: int = STEPS
) -> tuple[NDArray[np.float64], list[Tensor]]:
    """Ritz vectors of one walk of Lanczos.

    Returns:
        The share of each in a trace, ``tr f(H) = sum_j share_j f(theta_j)`` in expectation, and the
        vectors, flat, of unit length; nothing where the loss is not finite.
    """
    z = curvature.signs(generator)
    basis, values, vectors = _walk(curvature, z, steps)
    found = []
    for column in vectors.T[: len(values)]:
        y = torch.zeros_like(z)
        for q, share in zip(basis, column.tolist(), strict=True):
            y.add_(q, alpha=share)
        found.append(y)
    return (float(z.norm()) * vectors[0]) ** 2 if found else np.empty(0), found


def _walk(
    curvature: Curvature, z: Tensor, steps: int
) -> tuple[list[Tensor], NDArray[np.float64], NDArray[np.float64]]:
    """Basis of Lanczos, Ritz values in rising order, their vectors in the basis as columns.

    No values where the loss is not finite.
    """
    basis, diagonal, beside = _lanczos(curvature, z, steps)
    tridiagonal = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    if not np.isfinite(tridiagonal).all():
        return basis, np.empty(0), np.empty((0, 0))
    values, vectors = np.linalg.eigh(tridiagonal)
    return basis, values, vectors


def _lanczos(
    curvature: Curvature, z: Tensor, steps: int
) -> tuple[list[Tensor], list[float], list[float]]:
    """Basis, diagonal and off-diagonal; sums in float64, every vector kept orthogonal to all.

    It ends early where nothing new is found: H leaves the space invariant.
    """
    kind = curvature.kind
    q = z / z.norm()
    basis, diagonal, beside = [q.to(kind)], list[float](), list[float]()
    while True:
        new = curvature.times(q)
        diagonal.append(float(new @ q))
        for _ in range(2):  # once more takes away what rounding left
            for old in basis:
                new -= (old.double() @ new) * old
        size = float(new.norm())
        largest = max(map(abs, [*diagonal, *beside]))
        if len(diagonal) == min(steps, curvature.moving) or not size > 1e-6 * largest:
            return basis, diagonal, beside
        beside.append(size)
        q = new / size
        basis.append(q.to(kind))


def _along(basis: list[Tensor], v: Tensor) -> NDArray[np.float64]:
    """V's coordinates in the basis."""
    return np.array([float(q.double() @ v) for q in basis])


def _parts(rows: NDArray[np.int64], spec: ChainSpec) -> list[NDArray[np.int64]]:
    """Parts of one size: 16, or, in mode "train", where a batch is one thing, of the run's size."""
    size = len(rows) // PARTS if spec.config.mode == "eval" else spec.config.batch_size
    size = max(1, min(size, len(rows) // 2))
    count = len(rows) // size
    return list(rows[: count * size].reshape(count, size))


def _dot(outputs: Iterable[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """Their inner product, to go back from.

    Weights given to autograd as grad_outputs lead to the same gradients, to the bit, but bring in
    sympy, which takes half a second.
    """
    pairs = zip(outputs, weights, strict=True)
    return torch.as_tensor(sum((output * weight).sum() for output, weight in pairs))


@contextlib.contextmanager
def _double_backward() -> Iterator[None]:
    """Attention in plain products: its fused kernels have no double backward."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
