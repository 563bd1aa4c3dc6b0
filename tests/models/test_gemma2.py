"""Gemma-2 against stored outputs of transformers; no torch."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from safetensors.numpy import load_file

from sprint_jax.interop.gemma2 import gemma2_table, load_text_encoder
from sprint_jax.models.gemma2 import Gemma2

STORED = Path(__file__).parents[1] / "parity" / "stored" / "gemma2"
# Float32 sums in another order, through three layers: observed 2e-6 of the largest value.
LIMIT = 2e-5


@pytest.fixture(scope="module")
def loaded():
    return load_text_encoder(STORED / "text_encoder")


@pytest.fixture(scope="module")
def arrays():
    return load_file(STORED / "arrays.safetensors")


def test_hidden_states_of_transformers(loaded, arrays):
    gemma, params = loaded
    # Rows of 1, 13 and 20 tokens, and a window of 9: states of padding are equal, too.
    assert_close(gemma.encode(params, arrays["ids"], arrays["mask"]), arrays["hidden"], LIMIT)
    with pytest.raises(AssertionError, match=r"\(3, 20\), \(3, 19\)"):
        gemma.encode(params, arrays["ids"], arrays["mask"][:, 1:])


def test_padding_and_later_tokens_are_not_seen(loaded, arrays):
    gemma, params = loaded
    ids, mask = arrays["ids"].copy(), arrays["mask"]
    before = gemma.encode(params, ids, mask)
    ids[1:, 13:] = 7
    after = gemma.encode(params, ids, mask)
    np.testing.assert_array_equal(after[1:, :13], before[1:, :13])
    assert (after[2, 13:] != before[2, 13:]).any(-1).all()


@pytest.mark.parametrize("past", [1, 10])
def test_constant_prefix(loaded, arrays, past):
    gemma, params = loaded
    ids = jnp.asarray(arrays["ids"]).at[:, :past].set(arrays["ids"][:1, :past])
    mask = jnp.asarray(arrays["mask"]).at[:, :past].set(1)
    whole = gemma.encode(params, ids, mask)
    prefix = gemma.prefix_cache(params, ids[0, :past])
    assert prefix.keys.shape == (3, past, 2, 8)
    assert_close(
        gemma.encode(params, ids[:, past:], mask[:, past:], prefix), whole[:, past:], LIMIT
    )
    assert_close(prefix.hidden, whole[0, :past], LIMIT)


def test_bfloat16_is_near_float32(loaded, arrays):
    gemma, params = load_text_encoder(STORED / "text_encoder", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    # Parameters may be wider than the matmuls.
    mixed = dataclasses.replace(loaded[0], dtype=jnp.bfloat16), loaded[1]
    for network, weights in (gemma, params), mixed:
        narrow = network.encode(weights, arrays["ids"], arrays["mask"])
        assert narrow.dtype == jnp.float32
        # Eight bits of mantissa and three layers.
        error = np.abs(narrow - arrays["hidden"]).max() / np.abs(arrays["hidden"]).max()
        assert 1e-4 < error < 0.1


def test_published_size():
    shapes = {name: entry.shape for name, entry in gemma2_table(Gemma2()).items()}
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (288, 2_614_341_888)
    assert shapes["layers.25.self_attn.k_proj.weight"] == (1024, 2304)
