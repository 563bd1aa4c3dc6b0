"""Gemma-2 against stored outputs of transformers; no torch."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gpu_programs as gpu
from helpers.compare import assert_close, relative_error
from safetensors.numpy import load_file

from sprint_jax.interop.gemma2 import gemma2_table, load_text_encoder
from sprint_jax.models.gemma2 import Gemma2, Prefix, unstack_layers

STORED = Path(__file__).parents[1] / "parity" / "stored" / "gemma2"
# Float32 sums in another order, through three layers: observed 2e-6 of the largest value.
LIMIT = 2e-5


IDS, MASK, HIDDEN = (load_file(STORED / "arrays.safetensors")[k] for k in ("ids", "mask", "hidden"))


def test_hidden_states_of_transformers():
    gemma, params = load_text_encoder(STORED / "text_encoder")
    # Rows of 1, 13 and 20 tokens, and a window of 9: states of padding are equal, too.
    assert_close(gemma.encode(params, IDS, MASK), HIDDEN, LIMIT)
    with pytest.raises(AssertionError, match=r"\(3, 20\), \(3, 19\)"):
        gemma.encode(params, IDS, MASK[:, 1:])
    mixed = dataclasses.replace(gemma, dtype=jnp.bfloat16)  # with wider parameters
    assert 1e-4 < relative_error(mixed.encode(params, IDS, MASK), HIDDEN) < 0.1


def test_bfloat16_is_near_float32():
    gemma, params = load_text_encoder(STORED / "text_encoder", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    narrow = gemma.encode(params, IDS, MASK)
    assert narrow.dtype == jnp.float32
    # Eight bits of mantissa and three layers.
    assert 1e-4 < relative_error(narrow, HIDDEN) < 0.1


def test_layers_apart_give_the_same_states_and_prefix(quick):
    gemma, params = load_text_encoder(STORED / "text_encoder")
    apart = unstack_layers(params)
    encode, cache = jax.jit(gemma.encode), jax.jit(gemma.prefix_cache)
    prefixes = [cache(each, IDS[0, :4]) for each in (params, apart)]
    jax.tree.map(lambda a, b: assert_close(a, b, LIMIT), *prefixes)
    inputs = IDS[:, 4:], MASK[:, 4:]
    expected = encode(params, *inputs, prefixes[0])
    assert_close(encode(apart, *inputs, prefixes[0]), expected, LIMIT)


@pytest.mark.skipif(not gpu.HAS_PLUGIN, reason="JAX's CUDA plugin is not installed")
def test_kernels_of_a_layer_on_an_h200():
    counts, reads = [], []
    for layers in (1, 2):
        gemma = Gemma2(num_hidden_layers=layers, vocab_size=1000, dtype=jnp.bfloat16)

        def shape(*dims, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(dims, dtype)

        params = jax.eval_shape(gemma.init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: shape(*leaf.shape), params)
        ids, kept = shape(1, 300, dtype=jnp.int32), (layers, 212, 4, 256)
        prefix = Prefix(shape(*kept), shape(*kept), shape(212, 2304, dtype=jnp.float32))
        inputs = jax.eval_shape(unstack_layers, params), ids, ids, prefix
        # The reader looks for the name of the first argument.
        encode = lambda params, *args, gemma=gemma: gemma.encode(params, *args)  # noqa: E731
        program = gpu.compile_for_h200(encode, *inputs)
        found = gpu.kernels(program.as_text())
        assert [each for each in found if each.constant] == []
        counts.append(gpu.count(found))
        reads.append(sum(each.weights for each in found))
    size = 2 * sum(leaf.size for leaf in jax.tree.leaves(params["layers"])) / 2
    assert counts[1] - counts[0] <= 16 and 0.99 * size < reads[1] - reads[0] < 1.01 * size


def test_published_size():
    shapes = {name: entry.shape for name, entry in gemma2_table(Gemma2()).items()}
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (288, 2_614_341_888)
    assert shapes["layers.25.self_attn.k_proj.weight"] == (1024, 2304)
