"""Operations of the inference forms; channels-last, sums and norms in float32 or wider.

Each is written so that XLA makes one kernel of it on a GPU. Weights are as the ``prepare`` functions of this
folder arrange them: ``dtype`` for matmuls and convolutions, float32 for norms.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from ..layers import wide
from ..precision import dot_general, precision_of

Array = jax.Array


def arrange(form: Callable, params: Any, by_parts: bool = False) -> tuple[Any, Any]:
    """``form(params)``, computed once on the device, and ``params`` in the host's memory; shapes of shapes.

    With ``by_parts`` the form takes the parameters from there and compiles its parts itself: of a network of
    equal blocks, the device never holds more than one in both forms.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return jax.eval_shape(form, params), params
    host = jax.device_get(params)
    return (jax.device_put(form(host)) if by_parts else jax.jit(form)(params)), host


def linear(x: Array, weights: dict) -> Array:
    """``x kernel + bias`` over the last axis; a bias is optional."""
    kernel = weights["kernel"]
    rows = x.reshape(-1, x.shape[-1])
    y = dot_general(rows, kernel, (((1,), (0,)), ((), ())))
    y = y.reshape(*x.shape[:-1], kernel.shape[-1])
    return biased(y, weights)


def biased(x: Array, weights: dict) -> Array:
    """``x`` plus a bias of its last axis, if there is one."""
    return x + jnp.broadcast_to(weights["bias"], x.shape) if "bias" in weights else x


def rms_norm(x: Array, weights: dict, epsilon: float = 1e-5) -> Array:
    """Root-mean-square norm over the last axis; float32 or wider."""
    x = wide(x)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return biased(x * jnp.broadcast_to(weights["weight"], x.shape), weights)


def taps(kernel: Array) -> list[Array]:
    """A depthwise kernel [k, k, C] as `depthwise` takes it: an array [C] for each tap; slices cost kernels."""
    return list(wide(kernel).reshape(-1, kernel.shape[-1]))


def depthwise(x: Array, kernel: list[Array], channels_first: bool = False) -> Array:
    """Depthwise k x k convolution, zero-padded; float32 or wider.

    Shifted multiply-adds, which a compiler fuses with what is done to the result: a library's grouped
    convolution reads and writes everything once more.

    Args:
      x: [B, H, W, C], or [B, C, H, W]; kernel: of `taps`.
    """
    size, rows, channels = math.isqrt(len(kernel)), *((2, 1) if channels_first else (1, 3))
    pads = [(0, 0)] * 4
    pads[rows] = pads[rows + 1] = (size // 2,) * 2
    padded = jnp.pad(x, pads)

    def term(number, weights):
        i, j = divmod(number, size)
        shifted = jax.lax.slice_in_dim(padded, i, i + x.shape[rows], axis=rows)
        shifted = jax.lax.slice_in_dim(shifted, j, j + x.shape[rows + 1], axis=rows + 1)
        return wide(shifted) * jax.lax.broadcast_in_dim(weights, x.shape, (channels,))

    return sum(term(*each) for each in enumerate(kernel))


def convolution(x: Array, weights: dict, pad: int = 1) -> Array:
    """2-D cross-correlation of [B, H, W, C] with a kernel [O, k, k, C], and a bias if there is one."""
    kernel = weights["kernel"]
    how = dict(dimension_numbers=("NHWC", "OHWI", "NHWC"), precision=precision_of(x, kernel))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((pad, pad),) * 2, **how)
    return biased(y, weights)


def halves(kernel: Array, axis: int) -> Array:
    """The two kernels of 2 that see, on either side, what one of 3 sees of doubled pixels; stacked in front."""
    first, middle, last = jnp.split(kernel, 3, axis)
    pairs = ((first, middle + last), (first + middle, last))
    return jnp.stack([jnp.concatenate(pair, axis) for pair in pairs])


def sub_pixel_kernel(kernel: Array) -> Array:
    """The kernel [(2 2 D), 2, 2, C] of `upsampled_convolution` for one [3, 3, C, D] of doubled pictures."""
    phases = jax.vmap(lambda k: halves(k, 1))(halves(kernel, 0))
    return rearrange(phases, "y x i j c d -> (y x d) i j c")


def upsampled_convolution(x: Array, weights: dict) -> Array:
    """Nearest upsampling by 2 and a 3x3 convolution: one 2x2 convolution whose channels are four phases.

    Phase (y, x) of pixel (i, j) lies at (i + y, j + x) of a result that is one larger than the picture.

    Args:
      x: [B, h, w, C]; weights: kernel of `sub_pixel_kernel`, bias [D].

    Returns:
      [B, 2h, 2w, D].
    """
    height, width = x.shape[1:3]
    y = convolution(x, {"kernel": weights["kernel"]})
    y = rearrange(y, "b h w (y x d) -> b h w y x d", y=2, x=2)
    rows = [
        jnp.stack([y[:, i : i + height, j : j + width, i, j] for j in range(2)], 3)
        for i in range(2)
    ]
    y = rearrange(jnp.stack(rows, 2), "b h y w x d -> b (h y) (w x) d")
    return biased(y, weights)
