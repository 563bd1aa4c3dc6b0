"""Autoencoders that cut large pictures, and decoders without text encoders."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.core.pixels import to_bytes
from sprint_jax.encoders import load
from sprint_jax.encoders.autoencoder import Autoencoder
from sprint_jax.encoders.load import load_decoder
from sprint_jax.interop.diffusers import load_autoencoder
from sprint_jax.models.tiling import Tiling

pytestmark = pytest.mark.usefixtures("quick")

STORED = Path(__file__).parents[1] / "parity" / "stored" / "dc_ae"


class Doubling:
    """A decoder of one latent to two by two pixels, in the place of an AutoencoderDC."""

    factor, latent_channels = 2, 3

    def encode(self, params, pixels):
        shapes.append(pixels.shape[1:3])
        return pixels[:, ::2, ::2]

    def decode(self, params, latents):
        shapes.append(latents.shape[1:3])
        return latents.repeat(2, 1).repeat(2, 2)


shapes: list[tuple[int, int]] = []


def test_large_pictures_are_cut_into_tiles():
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 12, 3)), jnp.float32)
    pixels = Doubling().decode({}, latents)
    for whole, expected in ((16 * 24, {(8, 12)}), (16 * 24 - 1, {(4, 4), (4, 2), (2, 4), (2, 2)})):
        autoencoder = Autoencoder(Doubling(), {}, Tiling(8, 4), whole)
        shapes.clear()
        np.testing.assert_allclose(autoencoder.decode(latents), pixels, atol=1e-6)
        assert set(shapes) <= expected and shapes[0] == max(expected)
        np.testing.assert_allclose(autoencoder.encode(pixels), latents, atol=1e-6)


def test_a_decoder_is_loaded_without_text_encoder_and_stays_off_the_devices(tmp_path, monkeypatch):
    shutil.copytree(STORED, tmp_path / "pipeline" / "vae")
    config, params = load_autoencoder(STORED)
    made = load._identify_autoencoder(config) | {"params": "of other bits"}
    loads = []

    def counted(*args, **kwargs):
        loads.append(Autoencoder(config, params))
        return load_autoencoder(*args, **kwargs)

    monkeypatch.setattr(load, "load_autoencoder", counted)
    latents = np.random.default_rng(0).standard_normal((3, 2, 2, 4)).astype(np.float32)
    for process, before in ((0, 1), (1, 0)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        loads.clear()
        live = {id(array) for array in jax.live_arrays()}
        decode = load_decoder(str(tmp_path / "pipeline"), "float32", made, tmp_path / "cache")
        assert len(loads) == before
        assert not [array for array in jax.live_arrays() if id(array) not in live]
        expected = to_bytes(np.asarray(jax.jit(config.decode)(params, latents)))
        found = decode(latents)
        assert np.abs(found.astype(int) - expected).max() <= 1 and len(loads) == 1
    load_decoder("nowhere", "float32", made, tmp_path / "cache")  # this process draws nothing
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(UserError, match="nowhere"):
        load_decoder("nowhere", "float32", made, tmp_path / "cache")
    with pytest.raises(UserError, match=r"pipeline has not the autoencoder that made .*cache"):
        load_decoder(
            str(tmp_path / "pipeline"), "float32", made | {"factor": 8}, tmp_path / "cache"
        )
