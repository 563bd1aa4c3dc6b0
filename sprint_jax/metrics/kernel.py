"""Kernel distances between two sets of features: KID, unbiased for few pictures, and CMMD."""

from typing import NamedTuple

import numpy as np

ROWS = 1024  # of a kernel matrix that are held at once


class Kid(NamedTuple):
    """``value`` of all pictures with ``standard_error``; ``mean`` and ``std`` of random subsets."""

    value: float
    standard_error: float
    mean: float
    std: float


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's kernel (x y / D + 1)^3 of [N, D] and [M, D]: [N, M] float64."""
    base = x @ y.T / x.shape[1] + 1
    return base * base * base


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy with KID's kernel."""
    within = ((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (cubic(x, x), cubic(y, y)))
    return float(sum(within) - 2 * cubic(x, y).mean())


def kid(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Kid:
    """Computes the kernel Inception distance of features [N, D] and [M, D].

    ``mean`` and ``std`` are those of torch-fidelity: random subsets of ``size`` (or all, if there are fewer),
    drawn by NumPy's RandomState from the seed. ``value`` is of all pictures; its error comes from the mean
    kernel of each picture with the others (the first-order term of a U-statistic). It can be below 0.

    Source: Binkowski et al., arXiv 1801.01401.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    size = min(size, len(a), len(b))
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        rows = [random.choice(len(x), size, replace=False) for x in (a, b)]
        values.append(unbiased_mmd(a[rows[0]], b[rows[1]]))
    within_a, within_b = _within(a), _within(b)
    across_a, across_b = _across(a, b)
    value = within_a.mean() + within_b.mean() - 2 * across_a.mean()
    parts = 2 * (within_a - across_a), 2 * (within_b - across_b)
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    return Kid(float(value), float(error), float(np.mean(values)), float(np.std(values)))


def _across(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean kernel of each row of x with those of y, and of each row of y with those of x."""
    rows, columns = [], np.zeros(len(y))
    for start in range(0, len(x), ROWS):
        block = cubic(x[start : start + ROWS], y)
        rows.append(block.mean(1))
        columns += block.sum(0)
    return np.concatenate(rows), columns / len(x)


def _within(x: np.ndarray) -> np.ndarray:
    """Returns the mean kernel of each row with the others."""
    own = (np.square(x).sum(1) / x.shape[1] + 1) ** 3
    return (_across(x, x)[0] * len(x) - own) / (len(x) - 1)


def cmmd(
    a: np.ndarray, b: np.ndarray, sigma: float = 10.0, scale: float = 1000.0
) -> tuple[float, float]:
    """Computes the CLIP maximum mean discrepancy of features [N, D] and [M, D], and its standard error.

    Features are normalized here. A Gaussian kernel, the biased estimate, times 1000. With this sigma the
    kernel is all but linear on vectors of length 1, so that little more than the means is compared; it
    needs float64.

    Source: Jayasumana et al., arXiv 2401.09603 (google-research/cmmd).
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def shortfall(x, y):
        """Returns the mean of 1 - k(x, y) over y: [len(x)]."""
        squares = (2 - 2 * (x[start : start + ROWS] @ y.T) for start in range(0, len(x), ROWS))
        return np.concatenate(
            [-np.expm1(-part.clip(0) / (2 * sigma**2)).mean(1) for part in squares]
        )

    within_a, within_b, across_a, across_b = (
        shortfall(*pair) for pair in ((a, a), (b, b), (a, b), (b, a))
    )
    value = 2 * across_a.mean() - within_a.mean() - within_b.mean()
    parts = (
        2 * (across - within) for within, across in ((within_a, across_a), (within_b, across_b))
    )
    error = np.sqrt(sum(part.var() / len(part) for part in parts))
    return float(scale * value), float(scale * error)
