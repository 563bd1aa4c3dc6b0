"""Comparisons of our numbers with a reference's: max|a - b| / max|b|, or bit by bit."""

import chex
import jax
import numpy as np

from sprint_jax.core.fingerprint import leaf_table


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_close(ours, theirs, limit: float) -> None:
    """Two trees have the same shapes, and no leaf a larger relative error than ``limit``."""
    chex.assert_trees_all_equal_shapes(ours, theirs)

    def check(one, other):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max() <= limit * np.abs(other).max()

    jax.tree.map(check, ours, theirs)


def assert_same(one, other) -> None:
    """Two trees have the same shapes, dtypes and values."""
    chex.assert_trees_all_equal_dtypes(one, other)
    chex.assert_trees_all_equal(one, other)


def assert_same_bits(mine, other) -> None:
    """Two trees have the same leaves by name, bit for bit, NaN included."""
    table, others = leaf_table(mine), leaf_table(other)
    assert table.keys() == others.keys()
    assert not [name for name in table if table[name] != others[name]]
