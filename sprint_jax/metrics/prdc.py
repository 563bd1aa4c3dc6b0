"""Precision, recall, density and coverage: how far two sets of features lie in each other's neighbourhoods."""

import numpy as np

ROWS = 1024  # of a table of distances that are held at once


def prdc(real: np.ndarray, fake: np.ndarray, neighbours: int = 3) -> dict[str, dict[str, float]]:
    """Computes the four numbers of features [N, D] and [M, D].

    The ball of a picture reaches to its k-th nearest neighbour in its own set, inclusive. Precision: the
    share of fakes in the ball of any real one. Recall: the share of real ones in the ball of any fake.
    Density: by how many balls of real ones a fake is covered, over k. Coverage: the share of real ones with
    a fake in their ball.

    Sources: Kynkaanniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797. torch-fidelity takes k =
    3, the package prdc is asked for 5.

    Returns:
      For each name its ``value`` and ``standard_error``, of the pictures counted with the balls as they are.
    """
    real, fake = (np.asarray(x, np.float64) for x in (real, fake))
    radius_real, radius_fake = (_radii(x, neighbours) for x in (real, fake))
    covered = np.zeros(len(real), bool)
    recalled = np.zeros(len(real), bool)
    balls = np.zeros(len(fake))
    for start in range(0, len(real), ROWS):
        rows = slice(start, start + ROWS)
        squares = _squares(real[rows], fake)
        inside = squares <= radius_real[rows, None]
        balls += inside.sum(0)
        covered[rows] = inside.any(1)
        recalled[rows] = (squares <= radius_fake[None]).any(1)
    parts = dict(precision=balls > 0, recall=recalled, density=balls / neighbours, coverage=covered)
    return {
        name: dict(value=float(np.mean(x)), standard_error=float(np.std(x) / len(x) ** 0.5))
        for name, x in parts.items()
    }


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the squared distances of rows: [N, M]."""
    table = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
    return table.clip(0)


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
    """Returns the squared distance of each row to its k-th nearest other one."""
    found = []
    for start in range(0, len(x), ROWS):
        squares = _squares(x[start : start + ROWS], x)
        found.append(np.partition(squares, neighbours, axis=1)[:, neighbours])
    return np.concatenate(found)
