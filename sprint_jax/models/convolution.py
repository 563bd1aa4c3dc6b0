"""Convolutions of the autoencoder, and rearrangements of pixels into channels; channels-last."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from .precision import precision_of

Array = jax.Array


def pixel_unshuffle(x: Array) -> Array:
    """[B, 2h, 2w, C] -> [B, h, w, 4C]; channel ``4 c + 2 dy + dx``, as torch."""
    return rearrange(x, "b (h y) (w x) c -> b h w (c y x)", y=2, x=2)


def pixel_shuffle(x: Array) -> Array:
    """[B, h, w, 4C] -> [B, 2h, 2w, C], the inverse of `pixel_unshuffle`."""
    return rearrange(x, "b h w (c y x) -> b (h y) (w x) c", y=2, x=2)


def group_mean(x: Array, channels: int) -> Array:
    """Means over consecutive channels, so that ``channels`` of them are left."""
    return rearrange(x, "... (c g) -> ... c g", c=channels).mean(-1)


def upsampled_conv3x3(x: Array, kernel: Array) -> Array:
    """Nearest upsampling by 2, then a 3x3 convolution with zero padding 1, in 4/9 of the multiplications.

    Two of the three rows that a kernel reads from an upsampled picture are the same row of ``x``, so each
    of the four output phases is a 2x2 convolution of ``x`` whose weights are sums of the kernel's.

    Args:
      x: [B, h, w, C]; kernel: [3, 3, C, D].

    Returns:
      [B, 2h, 2w, D].
    """

    def halves(kernel, axis):
        first, middle, last = jnp.split(kernel, 3, axis)
        return enumerate(
            (
                jnp.concatenate([first, middle + last], axis),
                jnp.concatenate([first + middle, last], axis),
            )
        )

    rows = []
    for dy, row in halves(kernel, 0):
        phases = [
            convolve(x, phase.astype(x.dtype), pads=((1 - dy, dy), (1 - dx, dx)))
            for dx, phase in halves(row, 1)
        ]
        rows.append(jnp.stack(phases, 3))
    return rearrange(jnp.stack(rows, 2), "b h y w x d -> b (h y) (w x) d")


def convolve(
    x: Array,
    kernel: Array,
    stride: int = 1,
    groups: int = 1,
    pads: Any = None,
) -> Array:
    """2-D cross-correlation of [B, H, W, C]; ``pads`` of rows and columns are k // 2 by default."""
    pads = pads or ((kernel.shape[0] // 2,) * 2,) * 2
    how = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision_of(x, kernel))
    how |= dict(window_strides=(stride, stride), padding=pads, feature_group_count=groups)
    return jax.lax.conv_general_dilated(x, kernel, **how)


def depthwise_conv(x: Array, kernel: Array) -> Array:
    """Depthwise k x k convolution, zero-padded; kernel [k, k, C]. On CPU only the forward pass is fast."""
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    height, width = x.shape[1:3]

    def shifts(x, kernel):
        padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

        def row(top):
            rows = jax.lax.dynamic_slice_in_dim(padded, top, size, axis=1)
            terms = (
                rows[:, i, j : j + width] * kernel[i, j][None, None]
                for i in range(size)
                for j in range(size)
            )
            return sum(terms)

        # Row by row: all at once, XLA fuses the sum with the transposition that follows it in
        # `MultiscaleProjection`, and then adds in an order that is four times slower.
        return jnp.moveaxis(jax.lax.map(row, jnp.arange(height)), 0, 1)

    def grouped(x, kernel):
        return convolve(x, kernel[:, :, None], groups=x.shape[-1])

    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=shifts, default=grouped)


class Conv3x3(nn.Module):
    """3x3 convolution, zero padding 1; ``upsample`` doubles the picture by nearest neighbours before."""

    features: int
    dtype: Any
    stride: int = 1
    use_bias: bool = True
    upsample: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features))
        x = x.astype(self.dtype)
        if self.upsample:
            x = upsampled_conv3x3(x, kernel)
        else:
            x = convolve(x, kernel.astype(self.dtype), self.stride)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            x = x + bias.astype(self.dtype)[None, None, None]
        return x
