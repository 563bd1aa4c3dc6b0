"""Tests of dc_ae, convolution, tiling and their interop: against stored outputs of diffusers, no torch."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sprint_jax.core.errors import UserError
from sprint_jax.interop.dc_ae import dc_ae_table
from sprint_jax.interop.diffusers import WEIGHTS, load_autoencoder, save_autoencoder
from sprint_jax.models import convolution
from sprint_jax.models.dc_ae import AutoencoderDC
from sprint_jax.models.tiling import Tiling

STORED = Path(__file__).parents[1] / "parity" / "stored" / "dc_ae"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "vae"))


@pytest.fixture(scope="module")
def loaded():
    return load_autoencoder(STORED)


@pytest.fixture(scope="module")
def arrays():
    return load_file(STORED / "arrays.safetensors")


def assert_close(ours, theirs):
    # Sums of up to 1,000 float32 products in another order: observed 6e-7 of the largest value.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5 * np.abs(theirs).max())


def test_encodes_as_diffusers(loaded, arrays):
    autoencoder, params = loaded
    ours = autoencoder.encode(params, arrays["pixels"])
    assert_close(ours, arrays["encoded"] * autoencoder.scaling_factor)


def test_decodes_as_diffusers(loaded, arrays):
    autoencoder, params = loaded
    ours = autoencoder.decode(params, arrays["latents"] * autoencoder.scaling_factor)
    assert_close(ours, arrays["decoded"])


def test_bfloat16_is_near_float32(loaded, arrays):
    autoencoder, params = loaded
    coarse = AutoencoderDC(**(vars(autoencoder) | {"dtype": jnp.bfloat16}))
    z = arrays["latents"]
    wide, narrow = autoencoder.decode(params, z), coarse.decode(params, z)
    assert narrow.dtype == jnp.float32
    # Eight bits of mantissa through a dozen layers.
    assert 1e-4 < np.abs(narrow - wide).max() / np.abs(wide).max() < 0.05


def test_upsampled_convolution_is_upsampling_then_convolution():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 3, 5, 4)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(3, 3, 4, 6)), jnp.float32)
    upsampled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    expected = convolution.convolve(upsampled, kernel)
    np.testing.assert_allclose(convolution.upsampled_conv3x3(x, kernel), expected, atol=2e-5)


def test_depthwise_convolution_is_a_grouped_one():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 6, 7, 4)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(5, 5, 4)), jnp.float32)
    expected = convolution.convolve(x, kernel[:, :, None], groups=4)
    np.testing.assert_allclose(convolution.depthwise_conv(x, kernel), expected, atol=2e-5)


def test_pixel_shuffle_inverts_pixel_unshuffle():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    packed = convolution.pixel_unshuffle(x)
    assert packed[1, 1, 2, 4 * 2 + 2 * 1 + 0] == x[1, 3, 4, 2]
    np.testing.assert_array_equal(convolution.pixel_shuffle(packed), x)


def test_tiles_of_a_local_function_give_the_whole():
    x = np.random.default_rng(0).normal(size=(1, 80, 56, 3)).astype(np.float32)
    cut = []

    def identity(tile):
        cut.append(tile.shape[1:3])
        return tile

    np.testing.assert_allclose(Tiling(32, 24).encode(identity, x, 1), x, atol=1e-6)
    # Rows start at 0, 24, 48, 72, columns at 0, 24, 48; the last ones are short.
    assert len(cut) == 12 and cut[-1] == (8, 8)


def test_overlap_fades_from_one_tile_to_the_next():
    constants = iter([0.0, 1.0])
    x = np.zeros((1, 4, 12, 1), np.float32)
    out = Tiling(8, 4).decode(lambda tile: jnp.full_like(tile, next(constants, 1.0)), x, 1)
    np.testing.assert_allclose(out[0, 0, :8, 0], [0, 0, 0, 0, 0, 0.25, 0.5, 0.75], atol=1e-6)


def test_pictures_within_a_tile_are_not_cut(loaded, arrays):
    autoencoder, params = loaded
    whole = autoencoder.encode(params, arrays["pixels"])
    tiled = autoencoder.encode(params, arrays["pixels"], Tiling(32, 24))
    np.testing.assert_array_equal(tiled, whole)


def test_published_size():
    table = dc_ae_table(AutoencoderDC())
    sizes = {name: int(np.prod(entry.shape)) for name, entry in table.items()}
    assert len(sizes) == 179 + 196
    assert sum(size for name, size in sizes.items() if name.startswith("encoder")) == 153_027_104
    assert sum(size for name, size in sizes.items() if name.startswith("decoder")) == 159_223_171


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folder_loads_bit_equal(tmp_path, loaded, dtype):
    autoencoder, params = loaded
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    save_autoencoder(tmp_path / "vae", autoencoder, params, dtype)
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {"config.json", WEIGHTS}
    again, loaded_params = load_autoencoder(tmp_path / "vae", dtype)
    assert again == autoencoder
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), params, loaded_params
    )
    assert all(jax.tree.leaves(same))


def test_sharded_index(folder, loaded):
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    _, params = load_autoencoder(folder)
    jax.tree.map(np.testing.assert_array_equal, params, loaded[1])
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        load_autoencoder(folder)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


NAME = "decoder.conv_in.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda f: change_config(f, _class_name="AutoencoderKL"), "is of class 'AutoencoderKL'"),
        (lambda f: change_config(f, gain=2), "key 'gain' is unknown"),
        (lambda f: change_config(f, decoder_block_types="Conv"), "decoder_block_types 'Conv'"),
        (lambda f: change_config(f, decoder_norm_types="batch_norm"), "'batch_norm' is not one of"),
        (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "no whole"),
        (lambda f: change_tensors(f, lambda t: t.pop(NAME)), f"{NAME} is missing"),
        (lambda f: change_tensors(f, lambda t: t.update(x=t[NAME])), "tensor x has no place"),
        (lambda f: change_tensors(f, lambda t: t.update({NAME: t[NAME][:1]})), f"{NAME} has shape"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_autoencoder(folder)


def test_size_that_does_not_divide(loaded):
    autoencoder, params = loaded
    with pytest.raises(UserError, match="30x32: sides must be multiples of 4"):
        autoencoder.encode(params, np.zeros((1, 30, 32, 3), np.float32))
