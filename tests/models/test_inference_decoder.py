"""The inference form of DC-AE's decoder: the plain form's pictures, nothing constant, few kernels on a GPU."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gpu_programs as gpu
from helpers.jaxprs import constant_work

from sprint_jax.core.pixels import to_bytes
from sprint_jax.encoders.autoencoder import Autoencoder
from sprint_jax.interop.diffusers import load_autoencoder
from sprint_jax.models.dc_ae import AutoencoderDC
from sprint_jax.models.inference import decoder

STORED = Path(__file__).parents[1] / "parity" / "stored" / "dc_ae"


@pytest.fixture(scope="module")
def loaded():
    return load_autoencoder(STORED)


def latents_of(config: AutoencoderDC, height: int = 4, width: int = 3) -> jax.Array:
    shape = (2, height, width, config.latent_channels)
    return jax.random.normal(jax.random.key(0), shape)


def test_pictures_are_those_of_the_plain_form(loaded, quick):
    config, params = loaded
    latents = latents_of(config)
    plain = Autoencoder(config, params)
    arranged = Autoencoder(config, params, arranged=True)
    expected, found = (np.asarray(each.decode(latents)) for each in (plain, arranged))
    # Sums in another order: observed 2e-6 of the largest value.
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    bytes_of = [np.asarray(to_bytes(each)).astype(int) for each in (expected, found)]
    difference = np.abs(bytes_of[0] - bytes_of[1])
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    # What export and identities read stays the plain form.
    assert jax.tree.structure(arranged.params) == jax.tree.structure(params)


def test_bfloat16_is_as_near_float32_as_the_plain_form(loaded, quick):
    config, params = loaded
    coarse, latents = dataclasses.replace(config, dtype=jnp.bfloat16), latents_of(config)
    exact, plain = (jax.jit(each.decode)(params, latents) for each in (config, coarse))
    found = Autoencoder(coarse, params, arranged=True).decode(latents)
    error, usual = (np.sqrt(np.mean((each - exact) ** 2)) for each in (found, plain))
    assert found.dtype == jnp.float32 and error < 1.3 * usual


def test_nothing_is_computed_from_weights_alone(loaded):
    config, params = loaded
    ready = jax.eval_shape(lambda p: decoder.prepare(config, p), params["decoder"])
    latents = jax.eval_shape(lambda: latents_of(config))
    found = constant_work(lambda p, z: decoder.decode(config, p, z), ready, latents)
    assert found == []
    # The plain form sums the kernels of its sub-pixel convolutions, and the reader sees it.
    plain = constant_work(config.decode, params, latents)
    assert "concatenate" in plain and "add" in plain


BLOCKS = {
    # kind: (a function of (config, weights, x), its weights' name, shape of x, most kernels)
    "residual": (lambda c, w, x: decoder._res_block(c, 0, w, x), "up_blocks_0_1", (1024, 128), 4),
    "up": (lambda c, w, x: decoder._up(c, w, x, 128, True), "up_blocks_0_0", (512, 256), 2),
    "attention": (lambda c, w, x: decoder._vit_block(c, w, x), "up_blocks_3_1", (128, 512), 19),
}


@pytest.mark.skipif(not gpu.HAS_PLUGIN, reason="JAX's CUDA plugin is not installed")
@pytest.mark.parametrize("kind", BLOCKS)
def test_kernels_of_a_block_on_an_h200(kind):
    function, name, (side, width), most = BLOCKS[kind]
    config = AutoencoderDC(dtype=jnp.bfloat16)
    params = jax.eval_shape(config.init, jax.random.key(0))["decoder"]
    ready = jax.eval_shape(lambda p: decoder.prepare(config, p), params)[name]
    x = jax.ShapeDtypeStruct((1, side, side, width), jnp.bfloat16)
    program = gpu.compile_for_h200(lambda params, x: function(config, params, x), ready, x)
    found = gpu.kernels(program.as_text())
    assert gpu.count(found) <= most
    assert [each for each in found if each.constant] == []
