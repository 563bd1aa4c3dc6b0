"""AutoencoderDC against diffusers' own, on random weights, float32.

Errors are max|a - b| / max|b|. Observed: at most 6e-7.
"""

import diffusers
import jax
import numpy as np
import pytest
import torch
from helpers.reference import channels_first, channels_last, randomize, tiny_dc_ae

from sprint_jax.interop.dc_ae import dc_ae_table
from sprint_jax.interop.diffusers import load_autoencoder, save_autoencoder
from sprint_jax.models.dc_ae import AutoencoderDC
from sprint_jax.models.tiling import Tiling

pytestmark = pytest.mark.filterwarnings("ignore")
RANDOM = np.random.default_rng(0)


def relative_error(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def errors(model, folder, height, width, tile=None) -> tuple[float, float]:
    """Of encoding and decoding, through a folder that diffusers wrote."""
    model.save_pretrained(folder)
    autoencoder, params = load_autoencoder(folder)
    f, scale = autoencoder.factor, autoencoder.scaling_factor
    if tile:
        model.enable_tiling(tile.size, tile.size, tile.stride, tile.stride)
    pixels = RANDOM.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    latents = RANDOM.normal(size=(2, height // f, width // f, 4)).astype(np.float32)
    with torch.no_grad():
        encoded = channels_last(model.encode(channels_first(pixels)).latent)
        decoded = channels_last(model.decode(channels_first(latents)).sample)
    return (
        relative_error(autoencoder.encode(params, pixels, tile), encoded * scale),
        relative_error(autoencoder.decode(params, latents * scale, tile), decoded),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"},
        {
            "encoder_out_shortcut": False,
            "decoder_in_shortcut": False,
            "decoder_act_fns": ("relu", "silu", "silu"),
            "decoder_conv_act_fn": "silu",
        },
        {"encoder_layers_per_block": (0, 2, 1), "decoder_layers_per_block": (0, 1, 2)},
        {"decoder_qkv_multiscales": ((), (), (3, 5)), "encoder_qkv_multiscales": ((), (), ())},
    ],
    ids=["sana", "shuffle", "no shortcuts", "no first stage", "scales"],
)
@pytest.mark.parametrize("size", [(32, 48), (8, 8)])
def test_encode_and_decode(tmp_path, changes, size):
    # 8x8 pixels are 2x2 latents, for which diffusers takes its quadratic attention.
    assert max(errors(tiny_dc_ae(**changes), tmp_path, *size)) < 5e-5


@pytest.mark.parametrize(
    "size, tile",
    [
        pytest.param((64, 88), Tiling(32, 24), marks=pytest.mark.slow),
        ((40, 24), Tiling(32, 16)),
    ],
)
def test_tiles(tmp_path, tile, size):
    assert max(errors(tiny_dc_ae(), tmp_path, *size, tile)) < 5e-5


def test_true_names_and_shapes():
    config = AutoencoderDC()
    fields = {key: getattr(config, key) for key in config.__dataclass_fields__ if key != "dtype"}
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**fields).state_dict()
    ours = {name: entry.shape for name, entry in dc_ae_table(config).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.slow
def test_true_size_decodes_256_pixels():
    config = AutoencoderDC()
    fields = {key: getattr(config, key) for key in config.__dataclass_fields__ if key != "dtype"}
    model = randomize(diffusers.AutoencoderDC(**fields), std=0.02).decoder
    tensors = {f"decoder.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    params: dict = {}
    for name, entry in dc_ae_table(config).items():
        if name in tensors:
            node = params
            for key in entry.path[:-1]:
                node = node.setdefault(key, {})
            node[entry.path[-1]] = entry.layout.read(tensors[name])
    latents = RANDOM.normal(size=(1, 8, 8, 32)).astype(np.float32)
    with torch.no_grad():
        theirs = channels_last(model(channels_first(latents)))
    ours = config.decode(params, latents * config.scaling_factor)
    assert relative_error(ours, theirs) < 5e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    model = tiny_dc_ae().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    save_autoencoder(tmp_path / "ours", *load_autoencoder(tmp_path / "theirs", dtype), dtype=dtype)
    again = diffusers.AutoencoderDC.from_pretrained(
        tmp_path / "ours", torch_dtype=getattr(torch, dtype)
    )
    assert again.config.scaling_factor == model.config.scaling_factor
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("shard_size", ["10GB", "4KB"])
def test_variants_by_dtype(tmp_path, shard_size):
    model = tiny_dc_ae()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "half", variant="bf16", max_shard_size=shard_size)
    files = sorted(path.name for path in (tmp_path / "half").iterdir())
    assert all("bf16" in name for name in files if name != "config.json"), files
    whole, half = (load_autoencoder(tmp_path / name)[1] for name in ("whole", "half"))
    jax.tree.map(np.testing.assert_array_equal, whole, half)
