"""The Hessian of the mean loss and the noise of its gradient, by Lanczos quadrature.

From k steps of Lanczos on Hessian-vector products, started from a vector z of random signs, follow
Ritz values theta_j and vectors y_j, and for any function f

    z^T f(H) z   = sum_j f(theta_j) (z . y_j)^2              which is tr f(H) in expectation
    z^T f(H) C z = sum_j f(theta_j) (z . y_j) (y_j . C z)    which is tr f(H) C

(Ubaru, Chen & Saad 2017; Hutchinson 1990), C being the covariance of the gradient between examples,
of which ``C z`` takes one product of the Jacobian of the losses each way. The second has the start
of the first, so one walk serves both, and where a diagonal D is subtracted from C (what the heat
correction removes) their common part cancels before it is noise. The start as the deviation of a
minibatch's gradient would need a walk of its own, and has no such cancellation.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsampler.models.replica import ChainSpec, Replica

LANCZOS_STEPS = 12
ROW_PARTS = 16  # of the rows, where the loss returns means


class Ritz(NamedTuple):
    """What one walk of Lanczos measured: sums over it stand for traces over all directions.

    ``sum(weights f(values))`` is tr f(H), ``sum(noise f(values))`` is tr f(H) C, and
    ``sum(removed f(values))`` is tr f(H) D, in expectation over walks.
    """

    values: NDArray[np.float64]  # curvatures of the mean loss, rising
    weights: NDArray[np.float64]
    noise: NDArray[np.float64]  # with the covariance C of the gradient between examples
    removed: NDArray[np.float64]  # with the diagonal D that a heat correction takes away

    @property
    def largest(self) -> float:
        """The largest curvature, from below."""
        return float(self.values[-1])


class Curvature:
    """The Hessian of the mean loss over some rows, at the present weights of a replica.

    Vectors are flat, float64, over the entries of the replica's flat tensors; entries that a mask
    excludes are zero. The graph of the losses lives as long as this does; the replica is not moved,
    and its gradients stay. Autograd raises RuntimeError where the loss has no double backward.
    """

    def __init__(
        self,
        replica: Replica,
        spec: ChainSpec,
        rows: NDArray[np.int64],
        seat: tuple[int, int] = (0, 0),  # chain and step of the random numbers in the forward pass
    ) -> None:
        self._replica = replica
        self._mask = None if replica.masks is None else torch.cat(list(replica.masks))
        self._entries = sum(flat.numel() for flat in replica.flats)
        self._size, self._n = 1, len(spec.rows)
        parts = [rows]
        if not spec.per_example or spec.kind.coupled or spec.config.mode == "train":
            parts = _parts(rows, spec)
            self._size = len(parts[0])
        with _double_backward():
            losses = [
                replica.losses(replica.batch(part), *seat, exact=True).reshape(-1) for part in parts
            ]
        self._losses = losses[0] if len(parts) == 1 else torch.stack([x.mean() for x in losses])
        self._share = torch.full_like(self._losses, 1 / len(self._losses), requires_grad=True)
        # Weighted with variables, the losses give the Jacobian's products from the same graph.
        mean = _dot([self._losses], [self._share])
        self._gradients = _grad(mean, replica.moving, create_graph=True)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of vectors that are kept: that of the weights, at least single."""
        double = any(flat.dtype == torch.float64 for flat in self._replica.flats)
        return torch.float64 if double else torch.float32

    @property
    def dimension(self) -> int:
        """Number of entries that may move."""
        return self._entries if self._mask is None else int(self._mask.sum())

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss."""
        return self._flat(self._gradients)

    def times(self, v: Tensor) -> Tensor:
        """Return H v."""
        return self._flat(self._back(self._replica.moving, v))

    def noise_times(self, v: Tensor) -> Tensor:
        """Return C v, C the covariance of the gradient between examples drawn from all data.

        It is unbiased: (rows / (rows - 1)) (n - 1) / n times the covariance among the rows.
        """
        (along,) = self._back([self._share], v)
        count = len(along)
        scale = self._size / max(count - 1, 1) * (self._n - 1) / self._n
        deviation = _dot([self._losses], [(along - along.mean()) * scale])
        return self._flat(_grad(deviation, self._replica.moving))

    def check(self) -> None:
        """Go back through the whole graph of the gradient, into the ``grad`` of the parameters.

        A product with H asks for the ways to the parameters only, and passes by a function whose
        backward pass cuts them: it would be taken for one without curvature.
        """
        roots = [g for g in self._gradients if g.requires_grad]
        if roots:
            torch.autograd.backward(_dot(roots, map(torch.ones_like, roots)), retain_graph=True)

    def signs(self, generator: torch.Generator) -> Tensor:
        """Return a vector of random signs on what moves."""
        bits = torch.randint(0, 2, (self._entries,), generator=generator, device=generator.device)
        return self._masked(bits.to(self._replica.device, torch.float64).mul_(2).sub_(1))

    def _back(self, inputs: Sequence[Tensor], v: Tensor) -> tuple[Tensor, ...]:
        """The gradient of (gradient . v) with respect to some inputs."""
        flats = zip(self._replica.flats, self._replica.split(v), strict=True)
        views = self._replica.views([part.to(flat.dtype) for flat, part in flats])
        pairs = [(g, w) for g, w in zip(self._gradients, views, strict=True) if g.requires_grad]
        if not pairs:
            return tuple(map(torch.zeros_like, inputs))
        return _grad(_dot(*zip(*pairs, strict=True)), inputs)

    def _flat(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Tensors like the parameters as one flat vector, in their places."""
        whole = torch.zeros(self._entries, dtype=torch.float64, device=self._replica.device)
        views = self._replica.views(self._replica.split(whole))
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor.detach())
        return self._masked(whole)

    def _masked(self, v: Tensor) -> Tensor:
        return v if self._mask is None else v.mul_(self._mask)


def measure(
    curvature: Curvature,
    generator: torch.Generator,
    steps: int = LANCZOS_STEPS,
    removed: Tensor | None = None,
) -> Ritz:
    """Return the spectrum as one walk of Lanczos from a vector of random signs sees it.

    It is not finite where the loss is not. ``removed`` is the diagonal D, flat; None: none.
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
    curvature: Curvature, generator: torch.Generator, steps: int = LANCZOS_STEPS
) -> tuple[NDArray[np.float64], list[Tensor]]:
    """Return shares in a trace, and Ritz vectors, flat, of unit length, of one walk of Lanczos.

    ``tr f(H) = sum_j share_j f(theta_j)`` in expectation; nothing where the loss is not finite.
    """
    z = curvature.signs(generator)
    basis, values, vectors = _walk(curvature, z, steps)
    ritz = list[Tensor]()
    for column in vectors.T[: len(values)]:
        y = torch.zeros_like(z)
        for q, share in zip(basis, column.tolist(), strict=True):
            y.add_(q, alpha=share)
        ritz.append(y)
    return (float(z.norm()) * vectors[0]) ** 2 if ritz else np.empty(0), ritz


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

    It ends early where H leaves the space of the basis invariant.
    """
    q = z / z.norm()
    basis, diagonal, beside = [q.to(curvature.dtype)], list[float](), list[float]()
    while True:
        new = curvature.times(q)
        diagonal.append(float(new @ q))
        for _ in range(2):  # the second pass removes what rounding left
            for old in basis:
                new -= (old.double() @ new) * old
        size = float(new.norm())
        largest = max(map(abs, [*diagonal, *beside]))
        if len(diagonal) == min(steps, curvature.dimension) or not size > 1e-6 * largest:
            return basis, diagonal, beside
        beside.append(size)
        q = new / size
        basis.append(q.to(curvature.dtype))


def _along(basis: list[Tensor], v: Tensor) -> NDArray[np.float64]:
    """The coordinates of v in the basis."""
    return np.array([float(q.double() @ v) for q in basis])


def _parts(rows: NDArray[np.int64], spec: ChainSpec) -> list[NDArray[np.int64]]:
    """Parts of one size: 16, or, in mode "train", where a batch is one thing, of the run's size."""
    size = len(rows) // ROW_PARTS if spec.config.mode == "eval" else spec.config.batch_size
    size = max(1, min(size, len(rows) // 2))
    count = len(rows) // size
    return list(rows[: count * size].reshape(count, size))


def _grad(
    output: Tensor, inputs: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradient with respect to some inputs, zero for those that the output does not use."""
    return torch.autograd.grad(
        output,
        inputs,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _dot(outputs: Iterable[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """Their inner product, to go back from.

    Weights given to autograd as grad_outputs lead to the same gradients, to the bit, but import
    sympy, which takes half a second.
    """
    pairs = zip(outputs, weights, strict=True)
    return torch.as_tensor(sum((output * weight).sum() for output, weight in pairs))


@contextlib.contextmanager
def _double_backward() -> Iterator[None]:
    """Attention in plain products: its fused kernels have no double backward."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
