"""The hash of a tree: the same on any mesh, another for any bit that differs."""

import hashlib
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import make_state, mesh
from jax.sharding import NamedSharding, PartitionSpec

from sprint_jax.core.fingerprint import fingerprint, leaf_table


def test_fingerprint_does_not_depend_on_placement_or_container():
    tree, on = make_state(1).params, mesh(4, 2)
    split = NamedSharding(on, PartitionSpec("fsdp", "data"))
    others = [
        jax.device_get(tree),
        jax.device_put(tree, NamedSharding(on, PartitionSpec())),
        tree | {"transformer_blocks": jax.device_put(tree["transformer_blocks"], split)},
        flax.core.freeze(tree),
        dict(reversed(tree.items())),
    ]
    assert {fingerprint(other) for other in others} == {fingerprint(tree)}


def test_fingerprint_formula_never_changes():
    """Written out in numpy: another formula would make all checkpoints on disk look damaged."""

    def mix(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    words, position = array.view(np.uint32).ravel(), np.arange(12, dtype=np.uint32)
    first = mix(words + mix(position + np.uint32(0x9E3779B9))).sum(dtype=np.uint32)
    second = mix(words ^ mix(position ^ np.uint32(0x7F4A7C15))).sum(dtype=np.uint32)
    table = {"a/b": {"shape": [3, 4], "dtype": "float32", "bits": f"{first:08x}{second:08x}"}}
    assert leaf_table({"a": {"b": array}}) == table
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    assert fingerprint({"a": {"b": array}}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float64", "int64"]
)
def test_fingerprint_sees_every_bit(dtype):
    array = np.zeros((3, 5), jnp.dtype(dtype))
    places = range(0, array.nbytes, max(1, array.dtype.itemsize // 2))
    seen = {fingerprint({"x": array})}
    for at in places:
        content = bytearray(array.tobytes())
        content[at] ^= 1
        seen.add(fingerprint({"x": np.frombuffer(content, array.dtype).reshape(3, 5)}))
    assert len(seen) == 1 + len(places)


def test_fingerprint_sees_names_shapes_dtypes_and_order():
    base, nan = jnp.arange(6, dtype=jnp.int32), {"nan": jnp.nan}
    arrays = [base, base.reshape(2, 3), base.reshape(3, 2), base.astype(jnp.uint32), base[::-1]]
    arrays += [-base, jnp.zeros(6, jnp.int32), jnp.zeros(5, jnp.int32)]
    # Sign bits of two words cancel in any sum of words times odd weights.
    arrays += [jnp.float32([1, -1]), jnp.float32([-1, 1]), jnp.float32([1, 1])]
    trees = [{"x": array} for array in arrays]
    trees += [{"y": base}, {"x": {"x": base}}, {"x": base, "y": base}, {}]
    trees += [{"x": jnp.zeros(6)} | nan, {"x": -jnp.zeros(6)} | nan]
    prints = [fingerprint(jax.tree.map(jnp.asarray, tree)) for tree in trees]
    assert len(set(prints)) == len(prints)
