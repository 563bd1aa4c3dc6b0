"""Depthwise 3x3 convolution that is fast on every backend, forward and backward.

GPUs and TPUs run XLA's grouped convolution and its own derivatives. XLA's CPU backend is 20 times slower at
it than nine shifted multiply-adds, and the weight gradient that autodiff makes of those is slow in turn: nine
separate reductions, each of which XLA fuses with, and so repeats, whatever produced its inputs. On the CPU
the weight gradient is therefore one reduction with nine outputs, which reads its inputs once.

Two JAX primitives hold this, because nothing lighter does: `jax.custom_vjp` forbids the forward mode that
sCM needs, and `jax.custom_derivatives.linear_call` has no batching rule and no derivative in its residuals.
Both primitives are bilinear and each other's transposes, so derivatives of any order and mode stay among the
two. Programs for other platforms do not contain them.
"""

import operator

import chex
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .convolution import convolve


def depthwise_conv3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Depthwise 3x3 cross-correlation with zero padding 1 and stride 1, as `torch.nn.Conv2d`.

    `y[b, h, w, c] = bias[c] + sum_ij kernel[i, j, c] * x[b, h + i - 1, w + j - 1, c]`, where x is
    zero outside its borders. Sums are accumulated in float32 (float64 for float64).

    Args:
      x: [B, H, W, C], any floating dtype; the result has this dtype.
      kernel: [3, 3, C], cast to the dtype of x. Torch's [C, 1, 3, 3] weight, transposed.
      bias: [C], cast to the dtype of x.

    Returns:
      [B, H, W, C] in the dtype of x.
    """
    channels = x.shape[-1]
    chex.assert_shape([x, kernel, bias], [(None,) * 4, (3, 3, channels), (channels,)])
    bias = bias.astype(x.dtype).reshape(1, 1, 1, channels)
    inputs = (x, kernel.astype(x.dtype))
    return jax.lax.platform_dependent(*inputs, cpu=_convolve_p.bind, default=_grouped) + bias


def _grouped(x, kernel):
    return convolve(x, kernel[:, :, None], groups=x.shape[-1])


def _shifts(x):
    """The nine [B, H, W, C] views of x that meet kernel[0, 0], kernel[0, 1], ..., kernel[2, 2]."""
    height, width = x.shape[1:3]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # Without the barrier XLA turns slices of one padded array into nine padded slices.
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    return [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def _convolve(x, kernel):
    terms = zip(_shifts(x), kernel.reshape(9, 1, 1, 1, -1), strict=True)
    return sum(shift * weight for shift, weight in terms).astype(x.dtype)


def _correlate(x, cotangent):
    """d(loss)/d(kernel) [3, 3, C] from x and d(loss)/d(output), both [B, H, W, C]."""
    shifts = _shifts(x)
    zeros = [jnp.zeros((), shifts[0].dtype)] * 9
    # Image by image, so that its nine shifts are read from the cache, then over the batch.
    image_sums = jax.lax.reduce(
        [shift * cotangent.astype(shift.dtype) for shift in shifts],
        zeros,
        lambda sums, values: list(map(operator.add, sums, values)),
        dimensions=(1, 2),
    )
    return jnp.stack(image_sums).sum(1).reshape(3, 3, -1).astype(x.dtype)


def _flip(kernel):
    return kernel[::-1, ::-1]


def _into_channels(x, axis, size):
    """Merges the mapped axis (None: repeat x) of [..., C] into the channels: [..., size * C]."""
    if axis is None:
        x, axis = jnp.broadcast_to(x, (size, *x.shape)), 0
    x = jnp.moveaxis(x, axis, -2)
    return x.reshape(*x.shape[:-2], -1)


def _batch(primitive, arguments, axes):
    """The channels are independent, so a mapped axis is just more of them."""
    size = next(a.shape[i] for a, i in zip(arguments, axes, strict=True) if i is not None)
    out = primitive.bind(*map(_into_channels, arguments, axes, [size] * 2))
    return out.reshape(*out.shape[:-1], size, -1), out.ndim - 1


def _primitive(name, function, out_shape):
    """Returns a bilinear primitive that lowers to a function."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind))
    primitive.def_abstract_eval(lambda x, y: jax.core.ShapedArray(out_shape(x), x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda *args: _batch(primitive, *args)
    return primitive


_convolve_p = _primitive("depthwise_convolve", _convolve, lambda x: x.shape)
_correlate_p = _primitive("depthwise_correlate", _correlate, lambda x: (3, 3, x.shape[-1]))
ad.defbilinear(
    _convolve_p,
    lambda cotangent, x, kernel: _convolve_p.bind(cotangent, _flip(kernel)),
    lambda cotangent, x, kernel: _correlate_p.bind(x, cotangent),
)
ad.defbilinear(
    _correlate_p,
    lambda cotangent, x, y: _convolve_p.bind(y, _flip(cotangent)),
    lambda cotangent, x, y: _convolve_p.bind(x, cotangent),
)
