"""Fingerprints of trees of arrays: to recognise a frozen network and to find damaged checkpoints.

A leaf's bits are hashed on the devices where they lie, as two sums over words modulo 2**32. Sums of integers
do not depend on their order, so the fingerprint does not depend on sharding, mesh or backend.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer: a bijection of uint32 in which every bit affects every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _word_sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes two uint32 hashes of the bits and positions of an array.

    In a weighted sum of words the top bits of two words cancel under any odd weights, so that an array of
    negated numbers could pass. Each (word, position) is mixed before the sum; mixing is one to one, so that a
    change of a single word is always found.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size) + index
    first = _mix(words + _mix(position + jnp.uint32(0x9E3779B9)))
    second = _mix(words ^ _mix(position ^ jnp.uint32(0x7F4A7C15)))
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def leaf_name(key_path: tuple) -> str:
    """Returns the path of a leaf with slashes, such as ``params/transformer_blocks/attn/kernel``."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def describe(tree: Tree) -> dict[str, dict[str, Any]]:
    """Returns shape and dtype of every leaf (array or ShapeDtypeStruct) by its name; JSON-able.

    Raises:
      ValueError: when two leaves have the same name (keys that contain slashes).
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    table = {
        leaf_name(path): {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name}
        for path, leaf in flat
    }
    if len(table) != len(flat):
        raise ValueError("two leaves of the tree have the same name")
    return table


def leaf_table(tree: Tree) -> dict[str, dict[str, Any]]:
    """Returns `describe` with the hash of each leaf's bits (16 hex digits) as ``bits``.

    On several hosts every process must call it, and gets the same table.
    """
    table = describe(tree)

    def as_words(leaf):
        # Without x64, jit would round 64-bit numpy arrays to 32 bits before they are hashed.
        wide = isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.itemsize == 8
        return np.frombuffer(leaf.tobytes(), np.uint32) if wide else leaf

    # One at a time: many small programs with collectives in flight can starve one another of the
    # CPU backend's threads when there are more devices than cores.
    sums = [jax.device_get(_word_sums(as_words(leaf))) for leaf in jax.tree.leaves(tree)]
    for entry, (first, second) in zip(table.values(), sums, strict=True):
        entry["bits"] = f"{int(first):08x}{int(second):08x}"
    return table


@jax.jit
def _all_finite(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def nonfinite_leaves(tree: Tree) -> list[str]:
    """Returns the names of the leaves that hold NaN or infinity; every process of a run must call it."""
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_all_finite(tree)))
    return [leaf_name(path) for path, finite in flat if not finite]


def digest(value: Any) -> str:
    """Returns the sha256 of a JSON-able value, 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(tree: Tree) -> str:
    """Returns the hash of all leaves of a tree: names, shapes, dtypes and bits; 64 hex digits.

    Independent of sharding, of the order of leaves and of the kind of container (dict or struct). It finds
    accidents, and does not withstand an adversary.
    """
    return digest(leaf_table(tree))
