"""DC-AE: the deep-compression autoencoder of SANA; pixels [B,H,W,3] to latents [B,H/32,W/32,32] and back.

Stages at high resolution are convolutional, those at low resolution have linear attention, and
shortcuts only move pixels into channels and back (arXiv 2410.10733). Config fields and weight names are
those of diffusers' AutoencoderDC (`interop.dc_ae`), with which the forward pass is compared.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from ..core.errors import UserError
from ..core.ranges import POSITIVE, WIDTH
from ..core.schema import FLAG, Kind, check, either, one_of, several, whole
from .convolution import Conv3x3, depthwise_conv, group_mean, pixel_shuffle, pixel_unshuffle
from .layers import GLUMBConv, Linear, RMSNorm, linear_attention, wide
from .precision import einsum
from .tiling import Tiling

Array = jax.Array

ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu}

_BLOCKS = ("ResBlock", "EfficientViTBlock")
_STAGES = 10  # at most; each but the first halves the sides


def _by_stage(*words: str) -> Kind:
    return either(one_of(*words), several(one_of(*words), 1, _STAGES))


# Values that fields of AutoencoderDC may have.
KINDS = dict(
    in_channels=whole(1, 64),
    latent_channels=whole(1, WIDTH),
    attention_head_dim=whole(1, WIDTH),
    upsample_block_type=one_of("interpolate", "pixel_shuffle"),
    downsample_block_type=one_of("Conv", "pixel_unshuffle"),
    decoder_norm_types=_by_stage("rms_norm"),
    decoder_act_fns=_by_stage(*ACTIVATIONS),
    decoder_conv_act_fn=one_of(*ACTIVATIONS),
    encoder_out_shortcut=FLAG,
    decoder_in_shortcut=FLAG,
    scaling_factor=POSITIVE,
)
for _half in ("encoder", "decoder"):
    KINDS[f"{_half}_block_types"] = _by_stage(*_BLOCKS)
    KINDS[f"{_half}_block_out_channels"] = several(whole(1, WIDTH), 1, _STAGES)
    KINDS[f"{_half}_layers_per_block"] = several(whole(0, 100), 1, _STAGES)
    KINDS[f"{_half}_qkv_multiscales"] = several(several(whole(1, 99)), 1, _STAGES)


class ResBlock(nn.Module):
    """``x + norm(conv2(act(conv1(x))))``."""

    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        y = ACTIVATIONS[self.activation](Conv3x3(d, self.dtype, name="conv1")(x))
        y = Conv3x3(d, self.dtype, use_bias=False, name="conv2")(y)
        return x + RMSNorm(self.dtype, use_bias=True, name="norm")(y)


class MultiscaleLinearAttention(nn.Module):
    """``x + norm(attention(x))``: ReLU linear attention over q, k, v and over blurred copies of them.

    ``to_q, to_k, to_v`` are thirds of one projection to 3C channels, of which each ``3 head_dim``
    consecutive ones are the q, k and v of a head. (For few tokens, diffusers computes the same function in
    quadratic form.)
    """

    head_dim: int
    scales: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:

        def project(name):
            return Linear(x.shape[-1], use_bias=False, dtype=self.dtype, name=name)

        qkv = jnp.concatenate([project(name)(x) for name in ("to_q", "to_k", "to_v")], axis=-1)
        blurred = (
            MultiscaleProjection(size, self.head_dim, self.dtype, name=f"to_qkv_multiscale_{i}")(
                qkv
            )
            for i, size in enumerate(self.scales)
        )
        qkv = jnp.concatenate([qkv, *blurred], axis=-1)
        heads = rearrange(qkv, "b h w (n s c) -> s b (h w) n c", s=3, c=self.head_dim)
        out = linear_attention(*heads).astype(self.dtype)
        out = project("to_out")(out.reshape(*x.shape[:-1], -1))
        return x + RMSNorm(self.dtype, use_bias=True, name="norm_out")(out)


class MultiscaleProjection(nn.Module):
    """Depthwise convolution of q, k and v, then a linear map within each head's q, k or v."""

    size: int
    head_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, qkv: Array) -> Array:
        d, c = qkv.shape[-1], self.head_dim
        init = nn.initializers.lecun_normal()
        blur = self.param("proj_in", init, (self.size, self.size, d))
        kernel = self.param("proj_out", init, (d // c, c, c))
        x = rearrange(depthwise_conv(qkv, blur), "b h w (g i) -> b h w g i", i=c)
        x = einsum("bhwgi,gio->bhwgo", x, kernel.astype(self.dtype))
        return x.reshape(qkv.shape)


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolutional MLP, each normed and added."""

    head_dim: int
    scales: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        x = MultiscaleLinearAttention(self.head_dim, self.scales, self.dtype, name="attn")(x)
        conv_out = GLUMBConv(d, 4 * d, self.dtype, name="conv_out")
        return x + RMSNorm(self.dtype, use_bias=True, name="conv_out_norm")(conv_out(x))


class DownBlock(nn.Module):
    """Half the size, by a strided convolution or pixel unshuffling, plus a shortcut of channel means."""

    features: int
    unshuffle: bool
    shortcut: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.unshuffle:
            y = pixel_unshuffle(Conv3x3(self.features // 4, self.dtype, name="conv")(x))
        else:
            y = Conv3x3(self.features, self.dtype, stride=2, name="conv")(x)
        return y + group_mean(pixel_unshuffle(x), self.features) if self.shortcut else y


class UpBlock(nn.Module):
    """Twice the size, by nearest neighbours or pixel shuffling, plus a shortcut of repeated channels."""

    features: int
    interpolate: bool
    shortcut: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.interpolate:
            y = Conv3x3(self.features, self.dtype, upsample=True, name="conv")(x)
        else:
            y = pixel_shuffle(Conv3x3(4 * self.features, self.dtype, name="conv")(x))
        if not self.shortcut:
            return y
        return y + pixel_shuffle(jnp.repeat(x, 4 * self.features // x.shape[-1], axis=-1))


class Encoder(nn.Module):
    """Pixels [B, H, W, 3] to latents [B, H/f, W/f, latent_channels], not scaled."""

    config: "AutoencoderDC"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        widths, layers = c.encoder_block_out_channels, c.encoder_layers_per_block

        def down(features, shortcut, name):
            unshuffle = c.downsample_block_type == "pixel_unshuffle"
            return DownBlock(features, unshuffle, shortcut, self.dtype, name=name)

        x = x.astype(self.dtype)
        if layers[0]:
            x = Conv3x3(widths[0], self.dtype, name="conv_in")(x)
        else:
            x = down(widths[1], False, "conv_in")(x)
        for i, count in enumerate(layers):
            for j in range(count):
                x = c.block("encoder", i, self.dtype, f"down_blocks_{i}_{j}")(x)
            if i + 1 < len(widths) and count:
                x = down(widths[i + 1], True, f"down_blocks_{i}_{count}")(x)
        out = Conv3x3(c.latent_channels, self.dtype, name="conv_out")(x)
        return wide(out + group_mean(x, c.latent_channels) if c.encoder_out_shortcut else out)


class Decoder(nn.Module):
    """Latents [B, h, w, latent_channels], not scaled, to pixels [B, f h, f w, 3], not clamped."""

    config: "AutoencoderDC"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array) -> Array:
        c = self.config
        widths, layers = c.decoder_block_out_channels, c.decoder_layers_per_block

        def up(features, shortcut, name):
            interpolate = c.upsample_block_type == "interpolate"
            return UpBlock(features, interpolate, shortcut, self.dtype, name=name)

        z = z.astype(self.dtype)
        x = Conv3x3(widths[-1], self.dtype, name="conv_in")(z)
        if c.decoder_in_shortcut:
            x = x + jnp.repeat(z, widths[-1] // c.latent_channels, axis=-1)
        for i, count in reversed(list(enumerate(layers))):
            first = int(i + 1 < len(widths) and count > 0)
            if first:
                x = up(widths[i], True, f"up_blocks_{i}_0")(x)
            for j in range(first, first + count):
                x = c.block("decoder", i, self.dtype, f"up_blocks_{i}_{j}")(x)
        x = RMSNorm(self.dtype, use_bias=True, name="norm_out")(x)
        x = ACTIVATIONS[c.decoder_conv_act_fn](x)
        if layers[0]:
            return wide(Conv3x3(c.in_channels, self.dtype, name="conv_out")(x))
        return wide(up(c.in_channels, False, "conv_out")(x))


@dataclasses.dataclass(frozen=True)
class AutoencoderDC:
    """A DC-AE by its config; fields are those of diffusers' AutoencoderDC, defaults those of
    dc-ae-f32c32-sana-1.0 and -1.1, which differ in weights only.

    Parameters are ``{'encoder': ..., 'decoder': ...}``; either half works without the other.

    Raises:
      UserError: a block type, norm or activation that no published SANA autoencoder has, a value that cannot
        be, or lists of different lengths.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    decoder_block_types: str | tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "interpolate"
    downsample_block_type: str = "Conv"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 0.41407
    dtype: Any = jnp.float32

    def __post_init__(self):
        check(vars(self), KINDS, "autoencoder config: ")
        stages = len(self.encoder_block_out_channels)
        for field in KINDS:
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != stages:
                raise UserError(
                    f"autoencoder config: {field} has {len(value)} stages, "
                    f"encoder_block_out_channels has {stages}"
                )

    def block(self, half: str, i: int, dtype: Any, name: str) -> nn.Module:
        """Returns a block of stage ``i`` of the encoder or the decoder."""
        kind, act = getattr(self, f"{half}_block_types"), "silu"
        if half == "decoder":
            act = self.decoder_act_fns
        kind, act = (value if isinstance(value, str) else value[i] for value in (kind, act))
        if kind == "ResBlock":
            return ResBlock(act, dtype, name=name)
        scales = tuple(getattr(self, f"{half}_qkv_multiscales")[i])
        return EfficientViTBlock(self.attention_head_dim, scales, dtype, name=name)

    @property
    def factor(self) -> int:
        """Side of the square of pixels behind one latent."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    def init(self, key: Array) -> dict:
        """Fresh parameters, float32; under `jax.eval_shape`, the shapes of all of them."""
        keys = jax.random.split(key)
        pixels = jnp.zeros((1, self.factor, self.factor, self.in_channels))
        latents = jnp.zeros((1, 1, 1, self.latent_channels))
        return {
            "encoder": Encoder(self).init(keys[0], pixels)["params"],
            "decoder": Decoder(self).init(keys[1], latents)["params"],
        }

    def encode(self, params, pixels: Array, tile: Tiling | None = None) -> Array:
        """Pixels [B, H, W, 3] in [-1, 1] to scaled latents [B, H/f, W/f, latent_channels], float32.

        Raises:
          UserError: height or width is not a multiple of the factor.
        """
        f = self.factor
        chex.assert_shape(pixels, (None, None, None, self.in_channels))
        if pixels.shape[1] % f or pixels.shape[2] % f:
            raise UserError(
                f"pixels are {pixels.shape[1]}x{pixels.shape[2]}: sides must be multiples of {f}"
            )
        encoder = Encoder(self, self.dtype)

        def apply(x):
            return encoder.apply({"params": params["encoder"]}, x)

        return (tile.encode(apply, pixels, f) if tile else apply(pixels)) * self.scaling_factor

    def decode(self, params, latents: Array, tile: Tiling | None = None) -> Array:
        """Scaled latents [B, h, w, latent_channels] to pixels [B, f h, f w, 3], not clamped, float32."""
        chex.assert_shape(latents, (None, None, None, self.latent_channels))
        decoder = Decoder(self, self.dtype)

        def apply(z):
            return decoder.apply({"params": params["decoder"]}, z)

        z = latents / self.scaling_factor
        return tile.decode(apply, z, self.factor) if tile else apply(z)
