"""DC-AE, its convolutions and tiles, against stored outputs of diffusers; no torch."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from safetensors.numpy import load_file

from sprint_jax.core.errors import UserError
from sprint_jax.interop.dc_ae import dc_ae_table
from sprint_jax.interop.diffusers import load_autoencoder
from sprint_jax.models.dc_ae import AutoencoderDC
from sprint_jax.models.tiling import Tiling

pytestmark = pytest.mark.usefixtures("quick")

STORED = Path(__file__).parents[1] / "parity" / "stored" / "dc_ae"
# Sums of up to 1,000 float32 products in another order: observed 6e-7 of the largest value.
LIMIT = 5e-5


@pytest.fixture(scope="module")
def loaded():
    return load_autoencoder(STORED)


ARRAYS = load_file(STORED / "arrays.safetensors")


def test_encodes_and_decodes_as_diffusers(loaded):
    (autoencoder, params), scale = loaded, loaded[0].scaling_factor
    encoded = autoencoder.encode(params, ARRAYS["pixels"])
    assert_close(encoded, ARRAYS["encoded"] * scale, LIMIT)
    assert_close(autoencoder.decode(params, ARRAYS["latents"] * scale), ARRAYS["decoded"], LIMIT)
    # A picture within a tile is not cut.
    tiled = autoencoder.encode(params, ARRAYS["pixels"], Tiling(32, 24))
    np.testing.assert_array_equal(tiled, encoded)


def test_bfloat16_is_near_float32(loaded):
    autoencoder, params = loaded
    coarse = dataclasses.replace(autoencoder, dtype=jnp.bfloat16)
    wide, narrow = (each.decode(params, ARRAYS["latents"]) for each in (autoencoder, coarse))
    assert narrow.dtype == jnp.float32
    # Eight bits of mantissa through a dozen layers.
    assert 1e-4 < np.abs(narrow - wide).max() / np.abs(wide).max() < 0.05


def test_tiles_of_a_local_function_give_the_whole():
    x = np.random.default_rng(0).normal(size=(1, 80, 56, 3)).astype(np.float32)
    cut = []

    def identity(tile):
        cut.append(tile.shape[1:3])
        return tile

    np.testing.assert_allclose(Tiling(32, 24).encode(identity, x, 1), x, atol=1e-6)
    # Rows start at 0, 24, 48, 72, columns at 0, 24, 48; the last ones are short.
    assert len(cut) == 12 and cut[-1] == (8, 8)


def test_published_size():
    table = dc_ae_table(AutoencoderDC())
    sizes = {half: [] for half in ("encoder", "decoder")}
    for name, entry in table.items():
        sizes[name.partition(".")[0]].append(int(np.prod(entry.shape)))
    counts = {half: (len(each), sum(each)) for half, each in sizes.items()}
    assert counts == {"encoder": (179, 153_027_104), "decoder": (196, 159_223_171)}


def test_wrong_sizes_are_refused(loaded):
    autoencoder, params = loaded
    with pytest.raises(UserError, match=r"30x32.* 4"):
        autoencoder.encode(params, np.zeros((1, 30, 32, 3), np.float32))
    with pytest.raises(AssertionError, match=r"\(32, 32, 3\)"):
        autoencoder.encode(params, np.zeros((32, 32, 3), np.float32))
    with pytest.raises(AssertionError, match=r"\(1, 8, 8, 5\) .*, 4\)"):
        autoencoder.decode(params, np.zeros((1, 8, 8, 5), np.float32))
