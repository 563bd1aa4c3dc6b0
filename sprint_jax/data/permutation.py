"""A permutation of any number of things, computed place by place: no table, and no memory of its own.

A Feistel network on the cells of a grid that has hardly more cells than there are things; what falls on a cell
too many goes through it again (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

import functools
import hashlib
import math

import numpy as np

ROUNDS = 16  # with half of them the 720 orders of six things are not equally frequent


def permute(places: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Finds what stands at some places of a shuffled ``range(count)``.

    Args:
      places: [n], each in ``range(count)``.
      key: names one of the orders. The same numbers on every machine, with every version of every library.

    Returns:
      [n] int64 in ``range(count)``, different for different places.
    """
    if count == 1:
        return np.zeros(len(places), np.int64)
    height = math.isqrt(count - 1) + 1
    grid = np.uint64(height), np.uint64(-(-count // height))
    values = _encipher(np.asarray(places, np.int64).astype(np.uint64), grid, _round_keys(key))
    while len(outside := np.flatnonzero(values >= count)):
        values[outside] = _encipher(values[outside], grid, _round_keys(key))
    return values.astype(np.int64)


@functools.lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    words = " ".join(str(int(number)) for number in key)
    return np.frombuffer(hashlib.shake_256(words.encode()).digest(8 * ROUNDS), "<u8")


def _encipher(
    values: np.ndarray, grid: tuple[np.uint64, np.uint64], keys: np.ndarray
) -> np.ndarray:
    """One to one on the cells of a grid: each half is moved by a hash of the other, in turn."""
    height, width = grid
    row, column = np.divmod(values, width)
    for round_, key in enumerate(keys):
        if round_ % 2:
            column = (column + _hash(row ^ key) % width) % width
        else:
            row = (row + _hash(column ^ key) % height) % height
    return row * width + column


def _hash(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: every bit of uint64 affects every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
