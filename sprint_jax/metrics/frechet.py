"""The Frechet distance between two sets of features, with its standard error and its limit for many pictures.

Everything is float64: the eigenvalues of 2048 features span more than ten decades.
"""

from typing import NamedTuple

import numpy as np

# Eigenvalues below this share of the largest are those of a singular matrix, by rounding alone.
SINGULAR = 1e-10


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] (N - 1 in the denominator) of features; pytorch-fid's ``mu, sigma``."""

    mu: np.ndarray
    sigma: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Computes the moments of features [N, D]; the covariance of a single one is zero."""
    x = np.asarray(features, np.float64)
    mu = x.mean(0)
    gap = x - mu
    return Moments(mu, gap.T @ gap / max(len(x) - 1, 1))


def distance(a: Moments, b: Moments) -> float:
    """Computes |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), at least 0.

    Source: Heusel et al., arXiv 1706.08500. The symmetric form has no imaginary parts and needs no added
    diagonal where a covariance is singular, as it is with fewer pictures than features.
    """
    return _distance(a, b, _root(b.sigma))


def _distance(a: Moments, b: Moments, root_b: np.ndarray) -> float:
    cross = np.sqrt(np.linalg.eigvalsh(root_b @ a.sigma @ root_b).clip(0)).sum()
    return _assemble(a.mu - b.mu, np.trace(a.sigma), np.trace(b.sigma), cross)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the distance of features [N, D] and [M, D], by the form that is cheaper for their sizes."""
    if len(a) + len(b) < a.shape[1]:
        return low_rank(a, b)
    return distance(moments(a), moments(b))


def low_rank(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the same distance from features [N, D] and [M, D] in time N M D, for few pictures.

    With centred rows A / sqrt(N - 1) and B / sqrt(M - 1) the last trace is the nuclear norm of A B^T.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    first, second = ((x - x.mean(0)) / max(len(x) - 1, 1) ** 0.5 for x in (a, b))
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    gap = a.mean(0) - b.mean(0)
    return _assemble(gap, np.square(first).sum(), np.square(second).sum(), cross)


def _assemble(gap: np.ndarray, trace_a: float, trace_b: float, cross: float) -> float:
    # Of equal sets rounding leaves a little on either side of zero.
    return max(float(gap @ gap + trace_a + trace_b - 2 * cross), 0.0)


def _root(sigma: np.ndarray) -> np.ndarray:
    """Returns the square root of a covariance."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def distance_with_error(
    a: np.ndarray, moments_b: Moments, b: np.ndarray | None = None
) -> tuple[float, float]:
    """Computes the distance of features [N, D] to moments, and its standard error by the delta method.

    A picture x changes the distance by |x - mu_a|^2-like terms: 2 (mu_a - mu_b) d + d^T (1 - T) d with
    d = x - mu_a and T = B^1/2 (B^1/2 A B^1/2)^-1/2 B^1/2. Their standard deviation over sqrt(N) is the
    error that sampling pictures makes; one eigendecomposition instead of the hundreds of a bootstrap. The
    error of the reference is added if its features are given.

    Args:
      a: of the pictures in question.
      moments_b: of the reference.
      b: features [M, D] that these are of, or None for a reference that is taken as it is.
    """
    moments_a = moments(a)
    traces = np.trace(moments_a.sigma), np.trace(moments_b.sigma)
    error, cross = _influence(np.asarray(a, np.float64), moments_a, moments_b)
    value = _assemble(moments_a.mu - moments_b.mu, *traces, cross)
    if b is not None:
        other, _ = _influence(np.asarray(b, np.float64), moments_b, moments_a)
        error = np.hypot(error, other)
    return value, float(error)


def _influence(x: np.ndarray, own: Moments, other: Moments) -> tuple[float, float]:
    """Returns the standard deviation over sqrt(N) of what each row of x changes, and the last trace."""
    root = _root(other.sigma)
    values, vectors = np.linalg.eigh(root @ own.sigma @ root)
    kept = values > SINGULAR * max(values[-1], 0)
    side = root @ vectors[:, kept] / values[kept] ** 0.25
    gap = x - own.mu
    changes = 2 * gap @ (own.mu - other.mu) + np.square(gap).sum(1) - np.square(gap @ side).sum(1)
    error = changes.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
    return float(error), np.sqrt(values.clip(0)).sum()


def infinity(
    a: np.ndarray, moments_b: Moments, points: int = 15, least: int | None = None, seed: int = 0
) -> tuple[float, float, dict[str, list[float]]]:
    """Extrapolates the distance to infinitely many pictures, since that of N has a bias near c / N.

    Random subsets of ``points`` sizes from ``least`` to N are measured, and a line is drawn through the
    distances over 1 / size. Source: Chong and Forsyth, arXiv 1911.07023; ``least`` as in dgm-eval.

    Returns:
      The line at 1 / size = 0; its standard error as that of a regression (the subsets share pictures, so it
      is too small); and the points, ``sizes`` and ``distances``.
    """
    count = len(a)
    least = min(5000, max(count // 10, 2)) if least is None else least
    sizes = np.linspace(least, count, points).astype(int)
    generator = np.random.default_rng(seed)
    chosen = (a[generator.choice(count, size, replace=False)] for size in sizes)
    root = _root(moments_b.sigma)
    values = np.array([_distance(moments(rows), moments_b, root) for rows in chosen])
    design = np.stack([np.ones(points), 1 / sizes], 1)
    line, rest, _, _ = np.linalg.lstsq(design, values)
    variance = rest[0] / (points - 2) if len(rest) and points > 2 else np.nan
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    curve = {"sizes": sizes.tolist(), "distances": values.tolist()}
    return float(line[0]), float(error), curve
