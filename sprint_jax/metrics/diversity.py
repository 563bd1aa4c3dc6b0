"""Diversity of pictures by their features: distances within a prompt, the Vendi score, the Inception score."""

import itertools
from collections.abc import Hashable, Sequence

import numpy as np

from .clip_score import mean_with_error


def within_prompts(features: np.ndarray, prompts: Sequence[Hashable]) -> tuple[float, float, int]:
    """Measures how much the pictures of one prompt differ: the mean of 1 - cosine over their pairs.

    Args:
      features: [N, D], such as CLIP's.
      prompts: of each picture.

    Returns:
      The mean over prompts with two pictures or more, its standard error, and their number; NaN without any.
    """
    x = np.asarray(features, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    names, number = np.unique([str(prompt) for prompt in prompts], return_inverse=True)
    sums = np.zeros((len(names), x.shape[1]))
    np.add.at(sums, number, x)
    counts = np.bincount(number).astype(float)
    kept = counts >= 2
    if not kept.any():
        return np.nan, np.nan, 0
    # |sum|^2 is the sum of all cosines, with n of a picture with itself.
    pairs = counts * (counts - 1)
    spread = 1 - (np.square(sums).sum(1) - counts)[kept] / pairs[kept]
    return *mean_with_error(spread), int(kept.sum())


def vendi(features: np.ndarray) -> float:
    """Computes the Vendi score of features [N, D] with the cosine kernel: the number of pictures that differ.

    It is exp of the entropy of the eigenvalues of the kernel over N: N for orthogonal ones, 1 for equal ones.
    Source: Friedman and Dieng, arXiv 2210.02410.
    """
    x = np.asarray(features, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    # The products of columns have the same eigenvalues as those of rows, but for zeros.
    kernel = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = np.linalg.eigvalsh(kernel / len(x)).clip(0)
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Computes the Inception score of logits [N, classes], and its standard deviation over splits (ddof 0).

    The order is drawn from the seed as torch-fidelity does. Source: Salimans et al., arXiv 1606.03498.
    """
    x = np.asarray(logits, np.float64)
    x = x[np.random.RandomState(seed).permutation(len(x))]
    x = x - x.max(1, keepdims=True)
    logs = x - np.log(np.exp(x).sum(1, keepdims=True))
    edges = [part * len(x) // splits for part in range(splits + 1)]
    values = []
    for start, stop in itertools.pairwise(edges):
        part = np.exp(logs[start:stop])
        gain = part * (logs[start:stop] - np.log(part.mean(0))[None])
        values.append(np.exp(gain.sum(1).mean()))
    return float(np.mean(values)), float(np.std(values))
