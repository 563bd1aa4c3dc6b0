"""Shared by the tests of teachers: quick compilation, and batches of random latents and text."""

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module", autouse=True)
def always_quick(quick):
    """All tests of this folder compile quickly."""


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    return [
        {"latents": draw(4, 4, 4, 12), "text": draw(4, 5, 64), "mask": jnp.ones((4, 5), jnp.int32)}
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def inputs(batches):
    """Arguments of a network after its parameters: x, t, text, mask."""
    batch = batches[0]
    return batch["latents"], jnp.linspace(0, 1, 4), batch["text"], batch["mask"]
