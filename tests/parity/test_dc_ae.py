"""AutoencoderDC against diffusers' own, on random weights, float32.

Errors are max|a - b| / max|b|. Observed: at most 6e-7.
"""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from helpers.reference import channels_first, channels_last, same_weights, tiny_dc_ae

from sprint_jax.encoders.autoencoder import Autoencoder
from sprint_jax.interop.dc_ae import dc_ae_table
from sprint_jax.interop.diffusers import load_autoencoder, save_autoencoder
from sprint_jax.models.dc_ae import AutoencoderDC
from sprint_jax.models.tiling import Tiling

RANDOM = np.random.default_rng(0)
PLAIN = dict(decoder_act_fns=("relu", "silu", "silu"), decoder_conv_act_fn="silu")
CASES = {
    "sana": {},
    "shuffle": dict(upsample_block_type="pixel_shuffle", downsample_block_type="pixel_unshuffle"),
    "no shortcuts": PLAIN | dict(encoder_out_shortcut=False, decoder_in_shortcut=False),
    "no first stage": dict(encoder_layers_per_block=(0, 2, 1), decoder_layers_per_block=(0, 1, 2)),
    # As DC-AE-Lite: the encoder of another, and fewer and narrower blocks to decode.
    "smaller decoder": dict(
        decoder_layers_per_block=(1, 1, 1),
        decoder_block_out_channels=(4, 8, 16),
        decoder_block_types="ResBlock",
        decoder_qkv_multiscales=((), (), ()),
    ),
    "scales": dict(encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), (3, 5))),
}


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
    cut = dict(tile=tile, whole=0) if tile else {}
    ours = Autoencoder(autoencoder, params, **cut)
    return (
        relative_error(ours.encode(pixels), encoded * scale),
        relative_error(ours.decode(latents * scale), decoded),
    )


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [(32, 48), (8, 8)])
def test_encode_and_decode(tmp_path, changes, size):
    # 8x8 pixels are 2x2 latents, for which diffusers takes its quadratic attention.
    assert max(errors(tiny_dc_ae(**changes), tmp_path, *size)) < 5e-5


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        pytest.param((64, 88), Tiling(32, 24), marks=pytest.mark.slow),
        ((40, 24), Tiling(32, 16)),
    ],
)
def test_tiles(tmp_path, tile, size):
    assert max(errors(tiny_dc_ae(), tmp_path, *size, tile)) < 5e-5


def published() -> dict:
    fields = dataclasses.asdict(AutoencoderDC())
    del fields["dtype"]
    return fields


def test_true_names_and_shapes():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**published()).state_dict()
    ours = {name: entry.shape for name, entry in dc_ae_table(AutoencoderDC()).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    model = tiny_dc_ae().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    save_autoencoder(tmp_path / "ours", *load_autoencoder(tmp_path / "theirs", dtype), dtype=dtype)
    how = dict(torch_dtype=getattr(torch, dtype))
    again = diffusers.AutoencoderDC.from_pretrained(tmp_path / "ours", **how)
    assert again.config.scaling_factor == model.config.scaling_factor
    same_weights(model, again)
