"""Gemma-2 against stored outputs of transformers; no torch."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close, relative_error
from safetensors.numpy import load_file

from sprint_jax.interop.gemma2 import gemma2_table, load_text_encoder
from sprint_jax.models.gemma2 import Gemma2

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


def test_published_size():
    shapes = {name: entry.shape for name, entry in gemma2_table(Gemma2()).items()}
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (288, 2_614_341_888)
    assert shapes["layers.25.self_attn.k_proj.weight"] == (1024, 2304)
