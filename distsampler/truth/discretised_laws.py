"""Exact stationary variances of the discretised chains on a quadratic.

Along a direction of curvature kappa every sampler here is a linear recursion driven by Gaussian
noise, x <- A x + B n, whose stationary covariance S solves S = A S A^T + B B^T. It is solved in
float64, without any small-step expansion. x[0] is the weight.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def stationary(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Tensor:
    """Covariance S with S = A S A^T + B B^T; A must be stable."""
    transition = torch.tensor(a, dtype=torch.float64)
    source = torch.tensor(b, dtype=torch.float64)
    if torch.linalg.eigvals(transition).abs().max() >= 1:
        raise ValueError("the recursion is unstable")
    n = len(a)
    system = torch.eye(n * n, dtype=torch.float64) - torch.kron(transition, transition)
    found: Tensor = torch.linalg.solve(system, (source @ source.T).reshape(-1))
    return found.reshape(n, n)


def sgld(lr: float, kappa: float, heat: float = 0.0, left: float = 1.0) -> float:
    """Of x = w: ``heat`` is the variance minibatches add a step, ``left`` scales the noise's."""
    s = stationary([[1 - lr * kappa / 2]], [[math.sqrt(lr * left), math.sqrt(heat)]])
    return float(s[0, 0])


def lmsgld(lr: float, kappa: float, heat: float = 0.0, left: float = 1.0) -> float:
    """Of x = (w, R)."""
    half = math.sqrt(lr * left) / 2
    a = [[1 - lr * kappa / 2, half], [0.0, 0.0]]
    return float(stationary(a, [[half, math.sqrt(heat)], [1.0, 0.0]])[0, 0])


def adam_sgld(lr: float, nbeta: float, h: float, gamma: float, beta1: float) -> float:
    """Of x = (w, m), P = 1; scale lr by P."""
    half, new = lr / 2, 1 - beta1
    a = [
        [1 - half * (nbeta * new * h + gamma), -half * nbeta * beta1],
        [new * h, beta1],
    ]
    return float(stationary(a, [[math.sqrt(lr)], [0.0]])[0, 0])


def sghmc(lr: float, kappa: float, friction: float) -> float:
    """Of x = (w, v)."""
    return float(_underdamped(lr, kappa, 1 - friction, 2 * lr * friction)[0, 0])


def sgnht(lr: float, kappas: Sequence[float], a: float) -> tuple[list[float], float]:
    """Ding's form with many coordinates: variances of w by curvature, and the thermostat.

    The thermostat of infinitely many coordinates does not fluctuate; it settles where the mean of
    u^2 is lr.
    """

    def law(xi: float) -> tuple[list[float], float]:
        laws = [_underdamped(lr, kappa, 1 - xi, 2 * lr * a) for kappa in kappas]
        return [float(s[0, 0]) for s in laws], sum(float(s[1, 1]) for s in laws) / len(laws)

    return _settled(law, lr, a)


def sgnht_damped_after(lr: float, kappas: Sequence[float], a: float) -> tuple[list[float], float]:
    """As :func:`sgnht` with friction on the gradient too: u <- (1 - xi)(u - lr grad U) + noise."""

    def law(xi: float) -> tuple[list[float], float]:
        laws = [_underdamped(lr, (1 - xi) * kappa, 1 - xi, 2 * lr * a) for kappa in kappas]
        return [float(s[0, 0]) for s in laws], sum(float(s[1, 1]) for s in laws) / len(laws)

    return _settled(law, lr, a)


def badodab(lr: float, kappas: Sequence[float], a: float) -> tuple[list[float], float]:
    """As :func:`sgnht`, for the symmetric splitting: u^2 is read before and after the noise."""

    def law(xi: float) -> tuple[list[float], float]:
        variances, energy = [], 0.0
        for kappa in kappas:
            keep, source = math.exp(-xi), lr * a * -math.expm1(-2 * xi) / xi
            after = [[1 - lr * kappa / 2, 0.5], [-lr * kappa, 1.0]]  # B, A
            last = [[1.0, keep / 2], [0.0, keep]]  # O, A
            whole = torch.tensor(last, dtype=torch.float64) @ torch.tensor(after).double()
            noise = [[math.sqrt(source) / 2], [math.sqrt(source)]]
            s = stationary(whole.tolist(), noise)
            before = torch.tensor(after).double() @ s @ torch.tensor(after).double().T
            variances.append(float(s[0, 0]))
            energy += float(before[1, 1] + s[1, 1]) / 2
        return variances, energy / len(kappas)

    return _settled(law, lr, a)


def _underdamped(lr: float, kappa: float, keep: float, source: float) -> Tensor:
    """Covariance of (w, u) for u <- keep u - lr kappa w + n, w <- w + u."""
    root = math.sqrt(source)
    return stationary([[1 - lr * kappa, keep], [-lr * kappa, keep]], [[root], [root]])


def _settled(
    law: Callable[[float], tuple[list[float], float]], lr: float, a: float
) -> tuple[list[float], float]:
    """Bisect for the friction at which the mean of u^2 is lr; more friction, less energy."""
    low, high = a / 4, 4 * a
    for _ in range(60):
        xi = (low + high) / 2
        low, high = (xi, high) if law(xi)[1] > lr else (low, xi)
    return law(xi)[0], xi
