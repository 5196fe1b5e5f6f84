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
    """Return the covariance S with S = A S A^T + B B^T; A must be stable."""
    transition = torch.tensor(a, dtype=torch.float64)
    source = torch.tensor(b, dtype=torch.float64)
    if torch.linalg.eigvals(transition).abs().max() >= 1:
        raise ValueError("the recursion is unstable")
    n = len(a)
    system = torch.eye(n * n, dtype=torch.float64) - torch.kron(transition, transition)
    covariance: Tensor = torch.linalg.solve(system, (source @ source.T).reshape(-1))
    return covariance.reshape(n, n)


def sgld(lr: float, kappa: float, heat: float = 0.0, left: float = 1.0) -> float:
    """Return the variance of SGLD, x = w.

    Args:
        lr: step size.
        kappa: curvature of U.
        heat: variance that minibatches add in each step.
        left: factor on the variance of the noise: what a correction of the heat leaves.
    """
    s = stationary([[1 - lr * kappa / 2]], [[math.sqrt(lr * left), math.sqrt(heat)]])
    return float(s[0, 0])


def lmsgld(lr: float, kappa: float, heat: float = 0.0, left: float = 1.0) -> float:
    """Return the variance of LMSGLD, x = (w, R); arguments as for :func:`sgld`."""
    half = math.sqrt(lr * left) / 2
    a = [[1 - lr * kappa / 2, half], [0.0, 0.0]]
    return float(stationary(a, [[half, math.sqrt(heat)], [1.0, 0.0]])[0, 0])


def adam_sgld(lr: float, nbeta: float, h: float, gamma: float, beta1: float) -> float:
    """Return the variance of Adam-SGLD, x = (w, m), at P = 1; lr times P stands for another P."""
    half, new = lr / 2, 1 - beta1
    a = [
        [1 - half * (nbeta * new * h + gamma), -half * nbeta * beta1],
        [new * h, beta1],
    ]
    return float(stationary(a, [[math.sqrt(lr)], [0.0]])[0, 0])


def sghmc(lr: float, kappa: float, friction: float) -> float:
    """Return the variance of SGHMC, x = (w, v)."""
    return float(_underdamped(lr, kappa, 1 - friction, 2 * lr * friction)[0, 0])


def sgnht(
    lr: float, kappas: Sequence[float], a: float, *, damped_after: bool = False
) -> tuple[list[float], float]:
    """Return the variance of SGNHT at each curvature, and the thermostat, in Ding's form.

    The thermostat of infinitely many coordinates does not fluctuate; it settles where the mean of
    u^2 is lr.

    Args:
        lr: step size.
        kappas: curvatures of U, as many coordinates of each.
        a: diffusion factor A.
        damped_after: whether friction acts on the gradient too, u <- (1 - xi)(u - lr grad U) + n.
    """

    def law(xi: float) -> tuple[list[float], float]:
        keep = 1 - xi
        scale = keep if damped_after else 1.0
        laws = [_underdamped(lr, scale * kappa, keep, 2 * lr * a) for kappa in kappas]
        return [float(s[0, 0]) for s in laws], sum(float(s[1, 1]) for s in laws) / len(laws)

    return _settled(law, lr, a)


def badodab(lr: float, kappas: Sequence[float], a: float) -> tuple[list[float], float]:
    """Return what :func:`sgnht` does, of the symmetric splitting: u^2 around the noise."""

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
    """Return the covariance of (w, u) for u <- keep u - lr kappa w + n, w <- w + u."""
    root = math.sqrt(source)
    return stationary([[1 - lr * kappa, keep], [-lr * kappa, keep]], [[root], [root]])


def _settled(
    law: Callable[[float], tuple[list[float], float]], lr: float, a: float
) -> tuple[list[float], float]:
    """Bisect for the friction at which the mean of u^2 is lr: more friction, less energy."""
    low, high = a / 4, 4 * a
    for _ in range(60):
        xi = (low + high) / 2
        low, high = (xi, high) if law(xi)[1] > lr else (low, xi)
    return law(xi)[0], xi
