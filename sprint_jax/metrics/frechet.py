"""The Frechet distance between two sets of features."""

import numpy as np


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Computes |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of features [N,D] and [M,D], float64.

    A and B are the covariances (N - 1 in the denominator). Source: Heusel et al., arXiv 1706.08500.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
