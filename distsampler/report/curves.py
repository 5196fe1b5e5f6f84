"""What a figure shows of long series: fewer points, bounds for the eye, how they decorrelate."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 6_000  # of all lines of a picture; what lies between is drawn as its extremes
LEAST_POINTS = 200  # of a line


def thinned(line: NDArray[Any], lines: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return positions and values: all, or of each bin its least and largest, in their order."""
    size = max(LEAST_POINTS, MOST_POINTS // max(lines, 1) // 2 * 2)
    if len(line) <= size:
        return np.arange(len(line)), np.asarray(line, np.float64)
    edges = np.linspace(0, len(line), size // 2 + 1).astype(int)
    picked = [
        start + extreme
        for start, stop in pairwise(edges)
        for extreme in sorted({int(np.argmin(line[start:stop])), int(np.argmax(line[start:stop]))})
    ]
    at = np.unique([0, *picked, len(line) - 1])
    return at, np.asarray(line, np.float64)[at]


def settled(running: NDArray[np.float64], se: float) -> tuple[float, float]:
    """Return bounds for the eye, without the wild first tenth."""
    late = running[:, running.shape[1] // 10 :]
    mean = float(running[:, -1].mean())
    reach = 3 * se if np.isfinite(se) else 0.0
    low, high = min(late.min(), mean - reach), max(late.max(), mean + reach)
    margin = 0.1 * max(float(high - low), 1e-12)
    return float(low - margin), float(high + margin)


def autocorrelation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the autocorrelation of each chain, (chain, lag), by FFT; 0 where nothing varies."""
    draws = values.shape[1]
    if not values.size:
        return np.zeros_like(values)
    moved = values - values.mean(axis=1, keepdims=True)
    power = np.abs(np.fft.rfft(moved, n=2 * draws, axis=1)) ** 2
    covariance = np.fft.irfft(power, axis=1)[:, :draws]
    first = covariance[:, :1]
    return np.asarray(covariance / np.where(first > 0, first, 1.0))


def decayed(lags: NDArray[np.float64]) -> int:
    """Return the lags to show: 20, or three times as many as the slowest chain takes to a tenth."""
    draws = lags.shape[1]
    low = lags < 0.1
    slowest = max((int(np.argmax(row)) if row.any() else draws for row in low), default=draws)
    return int(min(draws, max(20, 3 * slowest)))
